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

import torch.nn.functional as F
from torch import Tensor

from ..own_negatives import OwnNegatives, log_add, scalar


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
    return OwnNegatives(negatives, owners).log_sum(rows, temperature, hardness=hardness, limit=limit)


def contrast(positive: Tensor, temperature: float | Tensor, *terms: Tensor, count: int = 1) -> Tensor:
    """log(count + Σ_t e^(L_i^(t) − s_i/τ)), the loss of each anchor in nats, (N,).

    positive: (N,) cosines of the anchors' positives; terms: (N,) each; count: of the positive in the denominator.
    """
    excess = log_add(*terms) - positive / scalar(temperature) - math.log(count)
    return F.softplus(excess, threshold=40) + math.log(count)  # beyond 40, x is softplus(x) in float64, too


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
