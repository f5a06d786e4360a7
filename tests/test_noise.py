"""The closed form of expected noise against scipy and against sampling; blocks of sampled noise."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import rows
from scipy.special import ive

from fused_infonce import alignment, contrastive_stats, gs_infonce, uniformity
from fused_infonce import noise as noise_source
from fused_infonce.noise import NOISE_BLOCK, log_mean_exp_cosine, num_blocks, sample_all, sample_block


@pytest.mark.parametrize("D", [2, 3, 64, 384, 768, 1024])
@pytest.mark.parametrize("kappa", [0.1, 1.0, 20.0, 200.0, 1000.0])
def test_closed_form(D, kappa):
    log_c, rho = log_mean_exp_cosine(kappa, D)
    v = D / 2 - 1
    bessel = ive(v, kappa)
    if bessel > 1e-290:  # where scipy does not underflow
        want = math.lgamma(D / 2) + v * math.log(2 / kappa) + math.log(bessel) + kappa
        assert math.isclose(log_c, want, rel_tol=1e-10, abs_tol=2e-11)
        assert math.isclose(rho, ive(v + 1, kappa) / bessel, rel_tol=1e-9)
    slope = log_mean_exp_cosine(kappa * 1.0001, D)[0] - log_mean_exp_cosine(kappa * 0.9999, D)[0]
    assert math.isclose(rho, slope / (0.0002 * kappa), rel_tol=1e-4)


def test_known_values():
    assert math.isclose(math.exp(log_mean_exp_cosine(20.0, 768)[0]), 1.297, abs_tol=5e-4)
    assert math.isclose(math.exp(log_mean_exp_cosine(20.0, 384)[0]), 1.682, abs_tol=5e-4)
    assert math.isclose(math.exp(log_mean_exp_cosine(3.0, 1)[0]), math.cosh(3), rel_tol=1e-12)


def test_tensor_and_float_agree_and_the_tensor_has_a_gradient():
    kappa = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    log_c, rho = log_mean_exp_cosine(kappa, 20)
    assert math.isclose(log_c.item(), log_mean_exp_cosine(7.0, 20)[0])
    assert torch.allclose(torch.autograd.grad(log_c, kappa)[0], rho)


def test_blocks_are_normal_and_the_same_alone():
    M, D = 2 * NOISE_BLOCK + 100, 8
    args = (M, D, torch.float32, torch.device("cpu"))
    blocks = [sample_block(5, b, *args) for b in range(num_blocks(M))]
    assert [len(b) for b in blocks] == [NOISE_BLOCK, NOISE_BLOCK, 100]
    assert torch.equal(sample_block(5, 1, *args), blocks[1])
    assert not torch.equal(blocks[0], blocks[1])
    assert not torch.equal(sample_block(6, 0, *args), blocks[0])
    everything = torch.cat(blocks)
    assert abs(everything.mean()) < 0.03
    assert abs(everything.std() - 1) < 0.03


def test_every_bit_of_the_seed_counts():
    """A generator on a CPU is seeded with 32 bits; seeds have 62."""
    device = torch.device("cpu")
    for num_noise, D in ((1, 8), (5, 3), (NOISE_BLOCK + 3, 2)):
        drawn = [
            sample_all(torch.tensor([s]), num_noise, D, device) for s in (0, *(1 << bit for bit in range(62)))
        ]
        assert len({x.numpy().tobytes() for x in drawn}) == 63
        assert torch.equal(drawn[0], sample_all(torch.tensor([0]), num_noise, D, device))
    sample = sample_all(torch.tensor([2**61 + 5]), 2000, 50, device)
    assert abs(float(sample.mean())) < 0.02
    assert abs(float(sample.std()) - 1) < 0.02
    halves = sample[:NOISE_BLOCK].view(2, -1)
    assert abs(float(torch.corrcoef(halves)[0, 1])) < 0.03


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("noise", ["sampled", "expected"])
def test_a_default_device_changes_nothing(noise, backend):
    """Nothing of a call is made on the default device, for which "meta" stands here."""
    x, y, h = rows(6, 4), rows(6, 4, seed=1), rows(12, 4, seed=2)
    options = {"noise": noise, "backend": backend, "num_noise": 7, "hard_negative_weight": 0.5}
    more = [
        {"temperature": 0.013}, {"temperature": torch.tensor(0.1), "symmetric": True}, {"reduction": "none"},
        {"ids": torch.arange(6) // 2, "filter_threshold": 0.5}, {"label_smoothing": 0.1, "angular_margin": 0.2},
        {"filter_margin": 0.1, "symmetric": True}, {"generator": torch.Generator()},
    ]  # fmt: skip

    def run():
        out = []
        for extra in more:
            torch.manual_seed(3)
            if "generator" in extra:
                extra["generator"].manual_seed(4)
            leaf = x.clone().requires_grad_()
            loss = gs_infonce(leaf, y, h, **options, **extra)
            out += [loss.detach(), *torch.autograd.grad(loss.sum(), leaf, create_graph=True)]
        return [*out, uniformity(x), alignment(x, y), *contrastive_stats(x, y, h, noise=noise).values()]

    want = run()
    torch.set_default_device("meta")
    try:
        noise_source._series_of_float.cache_clear()
        got = run()
    finally:
        torch.set_default_device(None)
    for a, b in zip(got[:-7], want[:-7], strict=True):
        assert torch.equal(a, b)
    assert all(a.device.type == "cpu" for a in got)
