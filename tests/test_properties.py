"""What has to hold whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import loss_and_grads, relative_error, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_infonce import gs_infonce, info_nce

sizes = {"n": st.integers(1, 40), "d": st.integers(1, 24), "seed": st.integers(0, 2**16)}
relaxed = settings(max_examples=40, deadline=None)


def pair(n, d, seed, dtype=torch.float64):
    return rows(n, d, seed=seed, dtype=dtype), rows(n, d, seed=seed + 1, dtype=dtype)


@relaxed
@given(**sizes, tau=st.floats(1e-3, 10), m=st.integers(0, 9), h=st.integers(0, 9), symmetric=st.booleans())
def test_agrees_with_the_reference(n, d, seed, tau, m, h, symmetric):
    q, k = pair(n, d, seed)
    inputs = [q, k, rows(h, d, seed=seed + 2)] if h else [q, k]
    options = {"temperature": tau, "noise": rows(m, d, seed=seed + 3), "symmetric": symmetric}
    ours = loss_and_grads(inputs, backend="torch", workspace_bytes=4000, **options)
    want = loss_and_grads(inputs, backend="reference", **options)
    for a, b in zip(ours, want, strict=True):
        assert float((a - b).norm()) <= 1e-11 * max(1, 0.05 / tau) * max(float(b.norm()), 1e-1)


@relaxed
@given(**sizes)
def test_order_of_the_batch_does_not_matter(n, d, seed):
    q, k = pair(n, d, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss, dq, dk = loss_and_grads([q, k], num_noise=0)
    loss2, dq2, dk2 = loss_and_grads([q[order], k[order]], num_noise=0)
    for a, b in ((loss2, loss), (dq2, dq[order]), (dk2, dk[order])):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


@relaxed
@given(**sizes, copies=st.integers(2, 3))
def test_masked_duplicates_are_as_if_absent(n, d, seed, copies):
    """A batch repeated, with ids, has the loss of the batch alone."""
    q, k = pair(n, d, seed)
    repeated = info_nce(
        q.repeat(copies, 1), k.repeat(copies, 1), ids=torch.arange(n).repeat(copies), reduction="none"
    )
    once = info_nce(q, k, reduction="none") if n > 1 else torch.zeros(1, dtype=q.dtype)
    # every other sentence appears `copies` times among the negatives
    assert torch.allclose(repeated[:n].expm1(), copies * once.expm1(), rtol=1e-9, atol=1e-13)


@relaxed
@given(**sizes)
def test_little_noise_tends_to_info_nce(n, d, seed):
    """The loss grows by λ times the noise's share: a tenth of λ, a tenth of the growth."""
    q, k = pair(n, d, seed)
    g = rows(5, d, seed=seed + 2)
    plain, less, more = (
        gs_infonce(q, k, noise=g, noise_weight=w, temperature=0.5, reduction="none") for w in (0, 1e-6, 1e-5)
    )
    assert (less > plain).all()
    assert torch.allclose(more - plain, 10 * (less - plain), rtol=1e-2)


@relaxed
@given(n=st.integers(1, 20), d=st.integers(1, 8), tau=st.floats(1e-3, 10))
def test_identical_rows_give_log_n(n, d, tau):
    q = rows(1, d).expand(n, d)
    loss, dq, dk = loss_and_grads([q, q], num_noise=0, temperature=tau)
    assert math.isclose(loss, math.log(n), abs_tol=1e-12 * max(1, 1 / tau))
    assert max(dq.norm(), dk.norm()) < 1e-12 / tau


@relaxed
@given(**sizes, scale=st.floats(1e-3, 1e3))
def test_length_of_the_rows_does_not_matter(n, d, seed, scale):
    q, k = pair(n, d, seed)
    loss, dq, _ = loss_and_grads([q, k], num_noise=0)
    loss2, dq2, _ = loss_and_grads([q * scale, k], num_noise=0)
    assert torch.allclose(loss2, loss, rtol=1e-9)
    assert torch.allclose(dq2 * scale, dq, rtol=1e-6, atol=1e-12)
    assert (dq * q).sum(1).abs().max() < 1e-12 * max(1, dq.norm())


@relaxed
@given(**sizes)
def test_strides_do_not_matter(n, d, seed):
    q, k = pair(n, d, seed, torch.float32)
    want = loss_and_grads([q, k], num_noise=0)
    wide = torch.randn(n, 2 * d)
    wide[:, ::2] = q
    tall = torch.randn(d, n)
    tall.copy_(k.T)
    a, b = wide[:, ::2].requires_grad_(), tall.T.requires_grad_()
    loss = info_nce(a, b)
    for x, y in zip([loss, *torch.autograd.grad(loss, (a, b))], want, strict=True):
        assert relative_error(x.detach(), y) < 1e-5


def test_one_noise_vector_by_hand():
    q, k, g = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, -3.0]])
    loss = gs_infonce(q, k, noise=g, noise_weight=2.0, temperature=0.5)
    assert math.isclose(loss, math.log1p(2 * math.exp((0 - 0.6) / 0.5)), rel_tol=1e-6)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"noise": "sampled", "num_noise": 50}], ids=str)
@pytest.mark.parametrize("n", [64, 700])
def test_two_runs_give_the_same_bits(options, n):
    q, k = pair(n, 48, 1, torch.float32)
    options = {"num_noise": 0, **options, "temperature": torch.tensor(0.05), "workspace_bytes": 300_000}
    runs = []
    for _ in range(3):
        torch.manual_seed(0)
        runs.append(loss_and_grads([q, k], **options))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"temperature": 0.001}], ids=str)
def test_zero_rows(options):
    """Cosine 0 to everything, gradient 0, and the others as if a row orthogonal to all stood there."""
    q, k = (torch.cat([rows(6, 5, seed=s), torch.zeros(6, 3, dtype=torch.float64)], 1) for s in (1, 2))
    orthogonal_q, orthogonal_k = q.clone(), k.clone()
    q[2], k[4] = 0, 0
    orthogonal_q[2], orthogonal_k[4] = torch.eye(8, dtype=torch.float64)[6:]
    loss, dq, dk = loss_and_grads([q, k], num_noise=0, **options)
    want, _, _ = loss_and_grads([orthogonal_q, orthogonal_k], num_noise=0, **options)
    assert torch.allclose(loss, want, rtol=1e-10)
    assert dq[2].abs().max() == 0 == dk[4].abs().max()
    assert dq.isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"reduction": "none"}, {"temperature": 0.001}], ids=str
)
def test_rows_without_a_negative_cost_nothing(options):
    q, k = pair(1, 6, 1)
    upstream = torch.ones(1, dtype=q.dtype) if "reduction" in options else None
    assert all(float(x.abs().max()) == 0 for x in loss_and_grads([q, k], upstream, num_noise=0, **options))
    q, k = pair(4, 6, 1)
    upstream = torch.ones(4, dtype=q.dtype) if "reduction" in options else None
    ids = torch.zeros(4, dtype=torch.int64)
    assert all(
        float(x.abs().max()) == 0 for x in loss_and_grads([q, k], upstream, num_noise=0, ids=ids, **options)
    )
