"""The ground truth is itself right: against cross entropy where that is exact, and against its own derivative."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, rows

from fused_infonce import gs_infonce, info_nce


def cosines(q, k):
    return F.normalize(q, dim=1) @ F.normalize(k, dim=1).T


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_is_cross_entropy_of_cosines(temperature, symmetric):
    q, k = (rows(17, 9, seed=s).requires_grad_() for s in (1, 2))
    got = info_nce(q, k, temperature=temperature, symmetric=symmetric, backend="reference")
    logits = cosines(q, k) / temperature
    want = F.cross_entropy(logits, torch.arange(17))
    if symmetric:
        want = (want + F.cross_entropy(logits.T, torch.arange(17))) / 2
    for a, b in zip(
        [got, *torch.autograd.grad(got, (q, k))], [want, *torch.autograd.grad(want, (q, k))], strict=True
    ):
        assert relative_error(a.detach(), b.detach()) < 1e-12


def test_every_column_and_weight_as_extra_logits():
    N, H, Q, M, tau = 6, 12, 5, 7, 0.2
    q, k, h, queue, g = (rows(n, 8, seed=n) for n in (N, N + 1, H, Q, M))
    k = k[:N]
    ids, negative_ids = torch.tensor([0, 1, 0, 2, 3, 4]), torch.arange(H) % 7
    logits = torch.cat([cosines(q, x) / tau for x in (k, h, queue, g)], 1)
    own = torch.arange(N)[:, None] == torch.arange(H) % N
    logits[:, N : N + H] += 1.5 * own
    masked = torch.cat([(ids[:, None] == ids) & ~torch.eye(N, dtype=torch.bool), ids[:, None] == negative_ids], 1)
    logits[:, : N + H].masked_fill_(masked, -math.inf)
    logits[:, N + H + Q :] += math.log(0.3)
    want = F.cross_entropy(logits, torch.arange(N), reduction="none")
    got = gs_infonce(
        q, k, h, queue=queue, temperature=tau, noise=g, noise_weight=0.3, hard_negative_weight=1.5,
        ids=ids, negative_ids=negative_ids, reduction="none", backend="reference",
    )  # fmt: skip
    assert torch.allclose(got, want, rtol=1e-12, atol=0)


def test_noise_enters_both_directions_and_hard_negatives_one():
    N, tau = 5, 0.3
    q, k, h, g = (rows(n, 7, seed=s) for s, n in enumerate((N, N, 4, 3)))
    forward = F.cross_entropy(torch.cat([cosines(q, x) for x in (k, h, g)], 1) / tau, torch.arange(N))
    backward = F.cross_entropy(torch.cat([cosines(k, x) for x in (q, g)], 1) / tau, torch.arange(N))
    got = gs_infonce(q, k, h, noise=g, temperature=tau, symmetric=True, backend="reference")
    assert torch.allclose(got, (forward + backward) / 2, rtol=1e-12)


def test_trained_rows_where_cross_entropy_is_inexact():
    q = rows(8, 16)
    loss = info_nce(q, q + 1e-3 * rows(8, 16, seed=1), temperature=0.01, reduction="none", backend="reference")
    z = (cosines(q, q) - 1) / 0.01
    assert (loss > 0).all()
    assert (loss < z.fill_diagonal_(-math.inf).exp().sum(1) * 2).all()


@pytest.mark.parametrize("noise", ["given", "expected", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_derivatives_of_the_reference(noise, symmetric):
    q, k, h, queue = (rows(n, 4, seed=n).requires_grad_() for n in (3, 3, 6, 2))
    tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    options = {"given": {"noise": rows(5, 4, seed=9)}, "expected": {"noise": "expected"}, "none": {"num_noise": 0}}

    def loss(q, k, h, queue, tau):
        return gs_infonce(
            q, k, h, queue=queue, temperature=tau, hard_negative_weight=0.7, symmetric=symmetric,
            reduction="none", backend="reference", **options[noise],
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (q, k, h, queue, tau))
    if noise != "expected":
        assert torch.autograd.gradgradcheck(loss, (q, k, h, queue, tau))
