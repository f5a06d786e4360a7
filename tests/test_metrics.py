"""Alignment, uniformity and the statistics, against their formulas; the module and its temperature."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, rows

from fused_infonce import GSInfoNCELoss, alignment, contrastive_stats, gs_infonce, uniformity


def pdist_uniformity(x, t=2.0):
    return torch.pdist(F.normalize(x, dim=1)).pow(2).mul(-t).exp().mean().log()


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_alignment(alpha):
    x, y = rows(30, 8, seed=1), rows(30, 8, seed=2)
    want = (F.normalize(x) - F.normalize(y)).norm(dim=1).pow(alpha).mean()
    assert torch.allclose(alignment(x, y, alpha), want)
    assert alignment(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    assert alignment(x, 3 * x) < 1e-15


@pytest.mark.parametrize("t", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniformity_and_its_gradient(t, dtype):
    x = (rows(300, 24, seed=1) + 0.4).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    want = pdist_uniformity(exact, t)
    got = uniformity(x, t)
    assert abs(got.item() - want.item()) < 1e-6
    error = relative_error(*torch.autograd.grad(got, x), *torch.autograd.grad(want, exact))
    assert error < (1e-10 if dtype == torch.float64 else 1e-5)


def test_uniformity_of_two_rows():
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert math.isclose(uniformity(x), -4, rel_tol=1e-6)


def test_stats_against_the_matrix():
    N, tau = 50, 0.1
    q = rows(N, 12, seed=1)
    k, h, queue, g = (
        q + 1.2 * rows(N, 12, seed=2),
        rows(100, 12, seed=3),
        rows(7, 12, seed=4),
        rows(40, 12, seed=5),
    )
    ids = torch.arange(N) // 2
    stats = contrastive_stats(
        q, k, h, queue=queue, temperature=tau, noise=g, noise_weight=2.0, hard_negative_weight=0.5, ids=ids,
        workspace_bytes=9_000,
    )  # fmt: skip
    qn, kn = F.normalize(q), F.normalize(k)
    s = qn @ kn.T
    off = ids[:, None] != ids
    positive = s.diagonal()
    loss = gs_infonce(
        q, k, h, queue=queue, temperature=tau, noise=g, noise_weight=2.0, hard_negative_weight=0.5, ids=ids,
        reduction="none", backend="reference",
    )  # fmt: skip
    noise = 2 * (((qn @ F.normalize(g).T) - positive[:, None]) / tau).exp().sum(1)
    want = {
        "loss": loss.mean(),
        "noise_share": (noise / loss.exp()).mean(),
        "accuracy": ((s <= positive[:, None]) | ~off).all(1).double().mean(),
        "positive_cosine": positive.mean(),
        "negative_cosine": s[off].mean(),
        "alignment": alignment(q, k),
        "uniformity": (-2 * (2 - 2 * s[off])).exp().mean().log(),
    }
    assert stats.keys() == want.keys()
    for name, value in want.items():
        assert torch.allclose(stats[name], value, rtol=1e-10), name
    assert 0 < stats["accuracy"] < 1


@pytest.mark.parametrize("noise", ["sampled", "expected"])
def test_stats_of_noise(noise):
    q, k = rows(64, 128, seed=1).requires_grad_(), rows(64, 128, seed=2)
    stats = contrastive_stats(q, k, noise=noise, num_noise=10_000, temperature=0.5)
    assert 0.98 < stats["noise_share"] < 1
    assert not stats["loss"].requires_grad
    assert contrastive_stats(q, k, num_noise=0)["noise_share"] == 0


def test_stats_in_bf16_are_near():
    q, k = rows(400, 256, seed=1, dtype=torch.float32), rows(400, 256, seed=2, dtype=torch.float32)
    want = contrastive_stats(q, k, num_noise=0)
    with torch.autocast("cpu", torch.bfloat16):
        got = contrastive_stats(q, k, num_noise=0)
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-2, atol=1e-3), name


def test_module_is_the_function():
    q, k, h = rows(6, 5, seed=1), rows(6, 5, seed=2), rows(12, 5, seed=3)
    options = {
        "num_noise": 10,
        "noise": "expected",
        "hard_negative_weight": 0.5,
        "symmetric": True,
        "reduction": "sum",
    }
    loss = GSInfoNCELoss(0.2, **options)
    assert loss(q, k, h, ids=torch.arange(6)) == gs_infonce(
        q, k, h, temperature=0.2, ids=torch.arange(6), **options
    )
    assert loss(q, k, noise=rows(3, 5)) == gs_infonce(
        q, k, temperature=0.2, symmetric=True, reduction="sum", noise=rows(3, 5)
    )
    assert "temperature=0.2" in repr(loss)
    assert "noise='expected'" in repr(loss)
    assert not list(loss.parameters())


def test_learned_temperature_moves_and_stays_in_its_range():
    loss = GSInfoNCELoss(0.1, learnable_temperature=True, num_noise=0)
    q = rows(32, 8, seed=1, dtype=torch.float32)
    k = q + 0.05 * rows(32, 8, seed=2, dtype=torch.float32)
    optimizer = torch.optim.SGD(loss.parameters(), lr=50.0)
    before = loss.temperature.item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(q, k).backward()
        optimizer.step()
    assert 0.015 * (1 - 1e-5) <= loss.temperature.item() < before
    with torch.no_grad():
        loss.log_temperature.fill_(-100)
    assert math.isclose(loss.temperature.item(), 0.015, rel_tol=1e-5)
    loss(q, k).backward()
    assert loss.log_temperature.grad.isfinite()
    copy = GSInfoNCELoss(0.5, learnable_temperature=True)
    copy.load_state_dict(loss.state_dict())
    assert copy.temperature.item() == loss.temperature.item()
