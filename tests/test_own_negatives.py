"""Own hard negatives of the loss: what each anchor's denominator holds, and what it costs in exactness."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, rows

from fused_infonce import GSInfoNCELoss, autograd, contrastive_stats, dense, info_nce, losses

N, D, K, TAU = 12, 10, 3, 0.1
Q, P = rows(N, D, seed=1), rows(N, D, seed=2)
OWN = rows(N, K, D, seed=3)
OWNERS = torch.arange(N).repeat_interleave(K)


def cosines(a, b):
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).mT


def test_the_denominator_holds_each_anchor_s_own():
    logits = torch.cat([cosines(Q, P), cosines(Q[:, None], OWN)[:, 0]], 1) / TAU  # (N, N + K)
    want = torch.nn.functional.cross_entropy(logits, torch.arange(N))
    assert relative_error(info_nce(Q, P, OWN, temperature=TAU), want) < 1e-12


@pytest.mark.parametrize("most", [dense.MAX_LOGITS, 0], ids=["dense", "tiles"])
def test_of_every_anchor_as_many_or_with_owners(most, monkeypatch):
    """In any order; an anchor without own negatives has its denominator over the batch."""
    monkeypatch.setattr(dense, "MAX_LOGITS", most)
    order = torch.randperm(N * K, generator=torch.Generator().manual_seed(1))
    flat = OWN.flatten(0, 1)[order]
    want = info_nce(Q, P, OWN, reduction="none")
    assert relative_error(info_nce(Q, P, flat, negative_owners=OWNERS[order], reduction="none"), want) < 1e-12
    few = info_nce(Q, P, OWN[3], negative_owners=torch.full((K,), 3), reduction="none")
    plain = info_nce(Q, P, reduction="none")
    assert relative_error(few[3], want[3]) < 1e-12
    assert torch.equal(few[:3], plain[:3])
    assert torch.equal(few[4:], plain[4:])


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"temperature": 0.003}, {"symmetric": True}], ids=str)
def test_they_may_be_all_that_needs_a_gradient(options):
    own = OWN.clone().requires_grad_()
    every = [x.clone().requires_grad_() for x in (Q, P, OWN)]
    got = torch.autograd.grad(info_nce(Q, P, own, **options), own)[0]
    assert relative_error(got, torch.autograd.grad(info_nce(*every, **options), every)[2]) < 1e-12


@pytest.mark.parametrize("options", [{}, {"ids": torch.arange(N), "negative_ids": OWNERS.view(N, K)}], ids=len)
def test_nan_in_one_of_them_is_seen_even_where_it_is_masked(options):
    broken = OWN.clone()
    broken[2, 1] = torch.nan
    for backend in ("torch", "reference"):
        each = info_nce(Q, P, broken, reduction="none", backend=backend, **options)
        assert each.isnan().nonzero().flatten().tolist() == [2]


def test_where_all_are_masked_the_loss_is_that_of_the_batch():
    ids = torch.arange(N)
    leaves = [x.clone().requires_grad_() for x in (Q, P, OWN)]
    loss = info_nce(*leaves, ids=ids, negative_ids=OWNERS.view(N, K))
    grads = torch.autograd.grad(loss, leaves)
    want = torch.autograd.grad(info_nce(*leaves[:2], ids=ids), leaves[:2])
    assert loss == info_nce(Q, P)
    assert relative_error(grads[0], want[0]) < 1e-12
    assert not grads[2].any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_their_cosines_come_from_unrounded_rows(half, monkeypatch):
    """At the trained stage, where they alone make the loss: only the inputs and gradients are rounded."""
    monkeypatch.setattr(autograd, "SMALL_PRODUCT", 0)
    q = rows(N, 64, seed=1)
    p, own = q + 0.1 * rows(N, 64, seed=2), q[:, None] + 0.5 * rows(N, K, 64, seed=3)
    given = [x.to(half) for x in (q, p, own)]
    results = []
    for inputs, backend in ((given, "torch"), ([x.double() for x in given], "reference")):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = info_nce(*leaves, temperature=0.05, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert relative_error(results[0][0], results[1][0]) < 1e-5
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        assert relative_error(a, b) < 2 * torch.finfo(half).eps


def test_the_module_and_the_stats_take_them():
    loss = GSInfoNCELoss(0.05, num_noise=0, hardness=3.0, hardness_mode="hard_negatives")
    flat = OWN.flatten(0, 1)
    want = info_nce(Q, P, OWN, hardness=3.0, hardness_mode="hard_negatives")
    assert loss(Q, P, flat, negative_owners=OWNERS) == pytest.approx(want.item(), rel=1e-12)
    stats = contrastive_stats(Q, P, OWN, num_noise=0, hardness=3.0, hardness_mode="hard_negatives")
    assert stats["loss"] == pytest.approx(want.item(), rel=1e-12)
    assert stats["noise_share"] == 0


def test_matryoshka_cuts_them():
    cut = [x[..., :4] for x in (Q, P, OWN)]
    assert losses.matryoshka(info_nce, (4,))(Q, P, OWN) == info_nce(*cut)


def test_a_step_with_a_tensor_of_temperature_out_of_range_is_nan():
    assert info_nce(Q, P, OWN, temperature=torch.tensor(-0.1)).isnan()
