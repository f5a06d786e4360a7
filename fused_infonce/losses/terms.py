"""What the losses are made of: cosines of pairs, terms of a denominator, and the loss of their sum.

With s_i the cosine of anchor i and its positive, and L_i^(t) the log-sum-exp of the t-th set of columns,

    loss_i = log(c + Σ_t e^(L_i^(t) − s_i/τ)),        c how often the denominator contains the positive, mostly 1.

The positive is in none of the sums, so nothing cancels where the loss is small.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..distributed import resolve_group
from ..geometry import unit_rows


def pair_cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Cosines of row i and its own rows, in fp32 (fp64 for fp64) from unrounded rows; differentiable.

    rows: (N, D); others: (N, D) → (N,), or (N, K, D) → (N, K). A zero row has cosine 0 and gradient 0.
    """
    if others.ndim not in (2, 3) or others.shape[0] != rows.shape[0] or others.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f"own rows must have shape {tuple(rows.shape)} or (N, K, D) with the same N and D, one block for each "
            f"anchor, not {tuple(others.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(rows.dtype, others.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        q, x = unit_rows(rows, dtype), unit_rows(others.flatten(0, -2), dtype).view(others.shape)
        return (q * x).sum(-1) if others.ndim == 2 else (q[:, None] * x).sum(-1)


def own_negatives(
    rows: Tensor,  # (N, D)
    negatives: Tensor,  # (N, K, D), or (H, D) with owners
    temperature: float | Tensor,
    *,
    owners: Tensor | None = None,  # (H,)
    hardness: float = 0.0,
    limit: Tensor | None = None,  # (N,)
) -> Tensor:
    """Log-sum-exp over each row's own hard negatives, (N,): of (1/τ + β) s, β (``hardness``) without gradient;
    those whose cosine exceeds ``limit`` are left out. Cosines are exact; O(N·K·D).

    negatives: K of each row; or, of uneven numbers, all below one another with the index of each one's row.
    """
    flat = owners is not None
    s = pair_cosines(rows[owners] if flat else rows, negatives)  # (N, K), or (H,)
    z = s / scalar(temperature) + hardness * s.detach()
    if limit is not None:
        z = z.masked_fill(s > (limit[owners] if flat else limit[:, None]), -math.inf)
    if owners is None:
        return log_add(*z.unbind(1))
    least = torch.full_like(rows[:, 0], -math.inf, dtype=z.dtype)
    top = least.scatter_reduce(0, owners, z.detach(), "amax").clamp(min=torch.finfo(z.dtype).min)
    sums = torch.zeros_like(top).index_add(0, owners, torch.exp(z - top[owners]))
    empty = sums == 0
    return top + sums.masked_fill(empty, 1).log().masked_fill(empty, -math.inf)


def log_add(*terms: Tensor) -> Tensor:
    """log Σ_t e^(L_i^(t)) of terms (N,); −∞, with gradient 0, where all of them are."""
    stacked = torch.stack(terms)
    empty = (stacked == -math.inf).all(0)
    return stacked.masked_fill(empty, 0).logsumexp(0).masked_fill(empty, -math.inf)


def contrast(positive: Tensor, temperature: float | Tensor, *terms: Tensor, count: int = 1) -> Tensor:
    """log(count + Σ_t e^(L_i^(t) − s_i/τ)), the loss of each anchor in nats, (N,).

    positive: (N,) cosines of the anchors' positives; terms: (N,) each; count: of the positive in the denominator.
    """
    excess = log_add(*terms) - positive / scalar(temperature) - math.log(count)
    return F.softplus(excess, threshold=40) + math.log(count)  # beyond 40, x is softplus(x) in float64, too


def scalar(temperature: float | Tensor) -> float | Tensor:
    """A tensor of one element without dimensions, so that it leaves shapes and dtypes as they are."""
    return temperature.reshape(()) if isinstance(temperature, Tensor) else temperature


def row_numbers(rows: Tensor, options: dict[str, Any]) -> Tensor:
    """An id for each row, (N,), different on every rank of the options' group."""
    group = resolve_group(options.get("group", "local"))
    first = 0 if group is None else dist.get_rank(group) << 40
    return torch.arange(first, first + len(rows), device=rows.device)


def reducible(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Adds ``reduction`` ("mean", "sum" or "none") to a loss that returns one value per anchor, (N,)."""

    @functools.wraps(loss)
    def reduced(*args: Any, reduction: str = "mean", **options: Any) -> Tensor:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be one of 'mean', 'sum', 'none', not {reduction!r}")
        losses = loss(*args, **options)
        return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()

    own = inspect.signature(loss)
    *first, last = own.parameters.values()
    kind = inspect.Parameter.KEYWORD_ONLY
    added = inspect.Parameter("reduction", kind, default="mean", annotation="Reduction")
    reduced.__signature__ = own.replace(parameters=[*first, added, last])  # type: ignore[attr-defined]
    return reduced


def one_process_only(name: str, options: dict[str, Any]) -> None:
    if options.get("group", "local") not in (None, "local"):
        raise ValueError(f"{name} supports a single process only; leave group out")
