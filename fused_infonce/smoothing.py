"""Label smoothing: what a share ε of the label, spread evenly over the columns, adds to a row's loss.

    −Σ_j y_ij log p_ij,  y_ij = (1 − ε)[j = i] + ε/K     (Szegedy et al., 2016, section 7)
    = loss_i + ε κ (p_i − mean_j s_ij),  p_i in the place of s_ii

Since Σ_j s_ij = q̂_i·Σ_j k̂_j this is O(N·D) beside the sweep, and autograd's own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .distributed import Exchange
from .geometry import cosine_with_margin, unit_rows
from .options import Reduction


def smoothing_term(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],  # anchors, positives, negatives, queue
    temperature: float | Tensor,
    *,
    label_smoothing: float,  # ε
    angular_margin: float,
    symmetric: bool,
    reduction: Reduction,
    dtype: torch.dtype,
    exchange: Exchange | None = None,
) -> Tensor:
    """The term of every row (N,), or reduced; differentiable."""
    anchors, positives, *others = inputs
    with torch.autocast(anchors.device.type, enabled=False):
        q, k = unit_rows(anchors, dtype), unit_rows(positives, dtype)
        more = [unit_rows(x, dtype) for x in others if x is not None]
        s = (q * k).sum(1)
        p = s
        if angular_margin:
            zero = ~(q.any(1) & k.any(1))
            p = cosine_with_margin(s, (q - k).square().sum(1) / 2, zero, angular_margin)[0]
        N, T = q.shape[0], k.shape[0] + sum(x.shape[0] for x in more)
        if exchange is not None:
            N, T = exchange.total("positives"), exchange.total("columns")
        columns = k.sum(0) + sum(x.sum(0) for x in more)
        terms = _row_terms(q, _everyones(columns, exchange), s, p, T)
        if symmetric:
            terms = (terms + _row_terms(k, _everyones(q.sum(0), exchange), s, p, N)) / 2
        if isinstance(temperature, Tensor):
            tau = temperature.to(q.device, dtype).reshape(())
            terms = terms * (label_smoothing * torch.where(tau > 0, 1 / tau, math.nan))
        else:  # no copy to a device, which would wait for it
            terms = terms * (label_smoothing / temperature)
        if reduction == "none":
            W = 1 if exchange is None else exchange.size
            return terms + (W - 1) * (terms - terms.detach())  # gradients times W, as of the loss itself
        total = _everyones(terms.sum(), exchange)
        return total / N if reduction == "mean" else total


def _row_terms(rows: Tensor, columns: Tensor, s: Tensor, p: Tensor, count: int) -> Tensor:
    """p_i less the mean over ``count`` columns, whose sum is ``columns`` (D,); the positive's is p_i there too."""
    return p - (rows @ columns - s + p) / count


def _everyones(x: Tensor, exchange: Exchange | None) -> Tensor:
    return x if exchange is None else _SumOverRanks.apply(x, exchange)  # type: ignore[no-untyped-call]


class _SumOverRanks(torch.autograd.Function):
    """Every rank's loss depends on every rank's x: gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.sum(x.clone())

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.sum(upstream.clone()), None
