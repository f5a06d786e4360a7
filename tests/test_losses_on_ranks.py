"""Published losses with a process group: two ranks against one process on all rows."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import relative_error, rows
from ranks import Ranks

from fused_infonce import losses

D, COUNTS = 8, (5, 7)
TAU = {"temperature": 0.2}
# name → the loss of anchors, positives and of what each rank knows beside them
CASES = {
    "supcon": lambda q, d, t, **o: losses.supcon(q, t["labels"], **TAU, **o),
    "debiased": lambda q, d, t, **o: losses.debiased(q, d, tau_plus=0.05, **TAU, **o),
    "hcl": lambda q, d, t, **o: losses.hcl(q, d, tau_plus=0.05, beta=0.5, **TAU, **o),
    "soft labels": lambda q, d, t, **o: losses.soft_labels(q, d, *t["teacher"], **TAU, **o),
    "gistembed": lambda q, d, t, **o: losses.gistembed(q, d, guide=t["teacher"], margin=0.1, **TAU, **o),
}
NO_RING = ("gistembed",)


def beside(rank: int) -> dict:
    n = COUNTS[rank]
    teacher = tuple(rows(n, 6, seed=40 + 10 * rank + i) for i in (0, 1))
    return {"labels": torch.arange(n) % 3, "teacher": teacher, "weights": rows(n, seed=60 + rank).abs()}


def pairs(rank: int) -> list[torch.Tensor]:
    base = rows(COUNTS[rank], D, seed=rank)
    return [(base + 0.5 * rows(COUNTS[rank], D, seed=10 * rank + i)).requires_grad_() for i in (2, 3)]


def with_gradients(loss, leaves):
    grads = torch.autograd.grad(loss.mean(), leaves, allow_unused=True)
    return [loss, *[torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]]


def on_a_rank(group, name, strategy):
    rank = dist.get_rank(group)
    leaves = pairs(rank)
    loss = CASES[name](*leaves, beside(rank), group=group, strategy=strategy, reduction="none")
    return with_gradients(loss, leaves)


def clip_on_a_rank(group, strategy):
    rank = dist.get_rank(group)
    leaves = pairs(rank)
    loss = losses.clip(*leaves, weights=beside(rank)["weights"], group=group, strategy=strategy)
    return with_gradients(loss, leaves)


def refused_on_a_rank(group):
    return losses.cross_entropy(*pairs(0), torch.arange(2), group=group)


def without_negatives_on_a_rank(group, name):
    own = [x[: 1 - dist.get_rank(group)] for x in pairs(0)]  # one row, and none
    return CASES[name](*own, {}, group=group)


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def together() -> tuple[list[torch.Tensor], list[torch.Tensor], dict]:
    """All leaves by rank, anchors and positives of both, and what both know."""
    leaves = [*pairs(0), *pairs(1)]
    both = [torch.cat([leaves[0], leaves[2]]), torch.cat([leaves[1], leaves[3]])]
    known = [beside(0), beside(1)]
    every = {name: torch.cat([x[name] for x in known]) for name in ("labels", "weights")}
    every["teacher"] = tuple(torch.cat(x) for x in zip(*(x["teacher"] for x in known), strict=True))
    return leaves, both, every


@pytest.mark.parametrize(
    ("name", "strategy"), [(n, s) for n in CASES for s in ("gather", "ring") if not (s == "ring" and n in NO_RING)]
)
def test_each_rank_has_its_own_mean_and_gradients_are_those_of_their_sum(ranks, name, strategy):
    answers = [[torch.as_tensor(x) for x in answer] for answer in ranks.run(on_a_rank, name, strategy)]
    leaves, both, every = together()
    each = CASES[name](*both, every, reduction="none").split(COUNTS)
    grads = torch.autograd.grad(sum(x.mean() for x in each), leaves, allow_unused=True)
    for rank, (loss, *found) in enumerate(answers):
        assert relative_error(loss, each[rank].detach()) < 1e-11
        for a, b in zip(found, grads[2 * rank : 2 * rank + 2], strict=True):
            assert relative_error(a, torch.zeros_like(a) if b is None else b) < 1e-11


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_weighted_clip_is_that_of_one_process(ranks, strategy):
    answers = [[torch.as_tensor(x) for x in answer] for answer in ranks.run(clip_on_a_rank, strategy)]
    leaves, both, every = together()
    want = losses.clip(*both, weights=every["weights"])
    grads = torch.autograd.grad(want, leaves)
    for rank, (loss, *found) in enumerate(answers):
        assert relative_error(loss, want.detach()) < 1e-11
        for a, b in zip(found, grads[2 * rank : 2 * rank + 2], strict=True):
            assert relative_error(a / 2, b) < 1e-11  # as DistributedDataParallel averages


def test_cross_entropy_is_refused_with_the_remedy(ranks):
    for _, error in ranks.tried(refused_on_a_rank):
        assert "cross_entropy takes no group: give every rank the same classes" in error


@pytest.mark.parametrize("name", ["debiased", "hcl"])
def test_a_single_row_among_all_ranks_has_no_negatives_and_is_an_error_on_each(ranks, name):
    for _, error in ranks.tried(without_negatives_on_a_rank, name):
        assert "anchors must be at least 2 rows, on all ranks together, not 1" in error
