"""``cosine_logsumexp``: every mask and weight against the reference, on every backend, under compile, on ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from helpers import relative_error, rows
from ranks import Ranks
from torch import Tensor

from fused_infonce import autograd, cosine_logsumexp, info_nce

D, G = 12, 7
CASES = {
    "plain": {},
    "diagonal": {"exclude_diagonal": True},
    "ids": {"ids": True},
    "either of two ids": {"ids": 2},
    "threshold": {"filter_threshold": 0.2},
    "limits": {"limits": True},
    "guide": {"limits": True, "guide": True},
    "hardness": {"hardness": 5.0},
    "all": {"hardness": 3.0, "limits": True, "ids": True, "exclude_diagonal": True},
    "cold": {"temperature": 0.003},
    "weights": {"weights": True},
    "weights, all": {"weights": True, "hardness": 3.0, "limits": True, "ids": True, "exclude_diagonal": True},
    "nothing left": {"filter_threshold": -2.0},
}
LIMIT = {torch.float64: 1e-11, torch.float32: 2e-5}


def weights_of(T: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Log-weights over 400 nats, some columns without a weight."""
    return torch.linspace(-300, 100, T, dtype=dtype).masked_fill(torch.arange(T) % 5 == 1, -math.inf)


def call(case: dict, N: int, T: int, dtype: torch.dtype, backend: str, **more) -> list[Tensor]:
    """The values, and the gradients of rows, columns and temperature; the upstream of an empty row is NaN."""
    options = {**case, **more}
    x, y = (rows(n, D, seed=n, dtype=dtype).requires_grad_() for n in (N, T))
    tau = torch.tensor(options.pop("temperature", 0.05), dtype=torch.float64, requires_grad=True)
    kinds = options.pop("ids", 0)
    if kinds:
        ids = {
            "row_ids": (torch.arange(N) // 2, -torch.arange(N)),
            "column_ids": (torch.arange(T) // 3, -torch.arange(T) % 7),
        }
        options |= ids if kinds == 2 else {name: x[0] for name, x in ids.items()}
    if options.pop("limits", False):
        options["filter_threshold"] = torch.linspace(-0.1, 0.3, N)
    if options.pop("weights", False):
        options["log_weights"] = weights_of(T)
    if options.pop("guide", False):
        options["guide"] = rows(N, G, seed=5), rows(T, G, seed=6)
    out = cosine_logsumexp(x, y, temperature=tau, backend=backend, **options)
    weights = torch.where(out.isinf(), math.nan, 1 + rows(N, seed=7).to(out))
    return [out.detach(), *torch.autograd.grad(out, (x, y, tau), weights)]


def assert_equal(ours: list[Tensor], want: list[Tensor], limit: float) -> None:
    empty = want[0].isinf()
    assert torch.equal(ours[0].isinf(), empty)
    for a, b in zip((ours[0][~empty], *ours[1:]), (want[0][~empty], *want[1:]), strict=True):
        if b.numel() and not b.isnan().any():  # autograd makes NaN of the reference's empty rows
            assert relative_error(a, b) < limit
        assert not a.isnan().any()


@pytest.mark.parametrize("sizes", [(20, 33), (33, 20), (1, 5)], ids=str)
@pytest.mark.parametrize("workspace_bytes", [None, 3000], ids=["dense", "tiles"])
@pytest.mark.parametrize("name", CASES)
def test_torch(name, workspace_bytes, sizes):
    ours = call(CASES[name], *sizes, torch.float64, "torch", workspace_bytes=workspace_bytes)
    assert_equal(ours, call(CASES[name], *sizes, torch.float64, "reference"), LIMIT[torch.float64])


@pytest.mark.parametrize("name", CASES)
def test_triton(name):
    pytest.importorskip("triton")
    ours = call(CASES[name], 20, 33, torch.float32, "triton", workspace_bytes=1)
    assert_equal(ours, call(CASES[name], 20, 33, torch.float64, "reference"), LIMIT[torch.float32])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bf16_rounds_the_operands_alone(backend, monkeypatch):
    monkeypatch.setattr(autograd, "SMALL_PRODUCT", 0)
    x, y = rows(40, D, seed=1, dtype=torch.bfloat16), rows(50, D, seed=2, dtype=torch.bfloat16)
    ours = cosine_logsumexp(x, y, temperature=0.2, backend=backend)
    assert relative_error(ours, cosine_logsumexp(x, y, temperature=0.2, backend="reference")) < 4e-3


@pytest.mark.parametrize("name", ["plain", "guide", "all", "weights", "nothing left"])
def test_compiled(name):
    x, y = rows(9, D, seed=1, dtype=torch.float32), rows(11, D, seed=2, dtype=torch.float32)
    options = {k: v for k, v in CASES[name].items() if k not in ("ids", "limits", "guide", "weights")}
    more = {}
    if "limits" in CASES[name]:
        more["filter_threshold"] = torch.linspace(-0.1, 0.3, 9)
    if "weights" in CASES[name]:
        more["log_weights"] = torch.linspace(-3, 1, 11)
    if "guide" in CASES[name]:
        more["guide"] = rows(9, G, seed=5, dtype=torch.float32), rows(11, G, seed=6, dtype=torch.float32)
    if "ids" in CASES[name]:
        more |= {"row_ids": torch.arange(9) // 2, "column_ids": torch.arange(11) // 3}

    def step(x, y, tau):
        return cosine_logsumexp(x, y, temperature=tau, **options, **more).exp().sum()

    leaves = [z.requires_grad_() for z in (x, y, torch.tensor(0.3))]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    for a, b in zip(
        torch.autograd.grad(compiled, leaves), torch.autograd.grad(step(*leaves), leaves), strict=True
    ):
        assert relative_error(a, b) < 1e-6


def on_a_rank(group, strategy):
    rank = dist.get_rank(group)
    x, y = (rows(n + rank, D, seed=10 * n + rank).requires_grad_() for n in (4, 6))
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    more = {"row_ids": torch.arange(len(x)), "column_ids": torch.arange(len(y)) % 3 + rank}
    more["log_weights"] = torch.arange(len(y)) * 0.3 - rank
    loss = cosine_logsumexp(x, y, temperature=tau, group=group, strategy=strategy, **more).mean()
    return [loss, *torch.autograd.grad(loss, (x, y, tau))]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_ranks_give_the_gradients_of_the_sum_of_their_losses(strategy):
    ranks = Ranks(2)
    try:
        answers = [[torch.as_tensor(z) for z in answer] for answer in ranks.run(on_a_rank, strategy)]
    finally:
        ranks.stop()
    parts = [[rows(n + rank, D, seed=10 * n + rank) for n in (4, 6)] for rank in (0, 1)]
    xs, ys = ([part[i].requires_grad_() for part in parts] for i in (0, 1))
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    column_ids = torch.cat([torch.arange(len(y)) % 3 + rank for rank, y in enumerate(ys)])
    weights = torch.cat([torch.arange(len(y)) * 0.3 - rank for rank, y in enumerate(ys)])
    losses = []
    for x in xs:
        ids = {"row_ids": torch.arange(len(x)), "column_ids": column_ids, "log_weights": weights}
        losses.append(cosine_logsumexp(x, torch.cat(ys), temperature=tau, backend="reference", **ids).mean())
    *grads, of_tau = torch.autograd.grad(sum(losses), (*xs, *ys, tau))
    for rank in (0, 1):
        assert relative_error(answers[rank][0], losses[rank].detach()) < 1e-11
        assert relative_error(answers[rank][1], grads[rank]) < 1e-11
        assert relative_error(answers[rank][2], grads[2 + rank]) < 1e-11
    assert relative_error(answers[0][3] + answers[1][3], of_tau) < 1e-11


def test_info_nce_is_made_of_it():
    x, y = rows(30, D, seed=1), rows(30, D, seed=2)
    others = cosine_logsumexp(x, y, exclude_diagonal=True)
    made = torch.nn.functional.softplus(others - torch.cosine_similarity(x, y) / 0.05, threshold=40)
    assert relative_error(made, info_nce(x, y, reduction="none")) < 1e-11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": rows(3, D + 1)}, "columns must have the rows' 12 features, not 13"),
        ({"columns": None}, "columns must be a torch.Tensor"),
        ({"row_ids": torch.arange(5)}, "column_ids is missing"),
        ({"row_ids": torch.arange(4), "column_ids": torch.arange(6)}, r"row_ids must have shape \(5,\)"),
        ({"row_ids": torch.arange(5), "column_ids": [torch.arange(6)] * 2}, "must both be"),
        ({"row_ids": [torch.arange(5)] * 3}, "row_ids must be an integer tensor .* or a pair"),
        ({"filter_threshold": torch.zeros(6)}, r"filter_threshold must have shape \(5,\)"),
        ({"guide": [rows(5, 2), rows(6, 2)]}, "guide needs filter_threshold"),
        ({"log_weights": torch.zeros(5)}, r"log_weights must have shape \(6,\), one per column"),
        ({"log_weights": torch.arange(6)}, "log_weights must be a floating-point tensor"),
        ({"exclude_diagonal": 1}, "exclude_diagonal must be True or False"),
        ({"hardness": -1.0}, "hardness must be >= 0"),
        ({"temperature": 0}, "temperature must be > 0"),
    ],
    ids=str,
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cosine_logsumexp(**{"rows": rows(5, D), "columns": rows(6, D), **arguments})
