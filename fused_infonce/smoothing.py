"""Label smoothing: what a share ε of the label, spread evenly over the columns, adds to a row's loss.

    −Σ_j y_ij log p_ij,  y_ij = (1 − ε)[j = i] + ε/K     (Szegedy et al., 2016, section 7)
    = loss_i + ε κ (p_i − mean_j s_ij),  p_i in the place of s_ii

Since Σ_j s_ij = q̂_i·Σ_j k̂_j this is O(N·D) beside the sweep, and autograd's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import Reduction
from .distributed import Exchange
from .geometry import cosine_with_margin, unit_rows

Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # anchors, positives, negatives, queue


def smoothing_term(
    inputs: Inputs,
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
    assert positives is not None
    N, T = anchors.shape[0], positives.shape[0] + sum(x.shape[0] for x in others if x is not None)
    if exchange is not None:
        N, T = exchange.total("positives"), exchange.total("columns")
    smoothing = _Smoothing(label_smoothing, angular_margin, symmetric, dtype, N, T)
    if exchange is not None:
        return _SmoothingAmongRanks.apply(*inputs, temperature, smoothing, reduction, exchange)  # type: ignore[no-any-return, no-untyped-call]
    with torch.autocast(anchors.device.type, enabled=False):
        terms = smoothing.terms(inputs, temperature, smoothing.sums(inputs))
    return terms if reduction == "none" else terms.mean() if reduction == "mean" else terms.sum()


@dataclass(frozen=True, slots=True)
class _Smoothing:
    label_smoothing: float
    angular_margin: float
    symmetric: bool
    dtype: torch.dtype
    anchors: int  # on all ranks
    columns: int

    def sums(self, inputs: Inputs) -> Tensor:
        """Sums of the unit columns and of the unit anchors, (2, D)."""
        anchors, *columns = inputs
        total = sum(unit_rows(x, self.dtype).sum(0) for x in columns if x is not None)
        assert isinstance(total, Tensor)
        return torch.stack([total, unit_rows(anchors, self.dtype).sum(0)])

    def terms(self, inputs: Inputs, temperature: float | Tensor, sums: Tensor) -> Tensor:
        """Of each row, (N,); sums: over all ranks' rows."""
        anchors, positives, *_ = inputs
        assert positives is not None
        q, k = unit_rows(anchors, self.dtype), unit_rows(positives, self.dtype)
        s = (q * k).sum(1)
        p = s
        if self.angular_margin:
            zero = ~(q.any(1) & k.any(1))
            p = cosine_with_margin(s, (q - k).square().sum(1) / 2, zero, self.angular_margin)[0]
        terms = _row_terms(q, sums[0], s, p, self.columns)
        if self.symmetric:
            terms = (terms + _row_terms(k, sums[1], s, p, self.anchors)) / 2
        if isinstance(temperature, Tensor):
            tau = temperature.to(q.device, self.dtype).reshape(())
            return terms * (self.label_smoothing * torch.where(tau > 0, 1 / tau, math.nan))
        return terms * (self.label_smoothing / temperature)  # no copy to a device, which would wait for it


def _row_terms(rows: Tensor, columns: Tensor, s: Tensor, p: Tensor, count: int) -> Tensor:
    """p_i less the mean over ``count`` columns, whose sum is ``columns`` (D,); the positive's is p_i there too."""
    return p - (rows @ columns - s + p) / count


class _SmoothingAmongRanks(torch.autograd.Function):
    """One node, so that every rank's backward makes the same exchange, whichever gradients it has to give.

    Every rank's loss depends on every rank's sums: their gradients are summed, too, and then go the way that they
    would have gone from each rank's own rows. Second derivatives are refused by the loss itself.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, anchors, positives, negatives, queue, temperature, smoothing: _Smoothing, reduction: Reduction,
        exchange: Exchange,
    ) -> Tensor:  # fmt: skip
        inputs = (anchors, positives, negatives, queue)
        ctx.smoothing, ctx.reduction, ctx.exchange = smoothing, reduction, exchange
        ctx.temperature, tau = (None, temperature) if isinstance(temperature, Tensor) else (temperature, None)
        with torch.autocast(anchors.device.type, enabled=False):
            sums = exchange.sum(smoothing.sums(inputs))
            terms = smoothing.terms(inputs, temperature, sums)
        ctx.save_for_backward(*inputs, tau, sums)
        if reduction == "none":
            return terms
        total = exchange.sum(terms.sum())
        return total / smoothing.anchors if reduction == "mean" else total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        exchange, smoothing = ctx.exchange, ctx.smoothing
        needs = ctx.needs_input_grad[:5]
        with torch.enable_grad(), torch.autocast(upstream.device.type, enabled=False):
            leaves: list[Any] = [None if x is None else x.detach() for x in ctx.saved_tensors]
            sums = leaves.pop()
            for x, need in zip(leaves, needs, strict=True):
                if x is not None:
                    x.requires_grad_(need)
            sums.requires_grad_()
            *inputs, tau = leaves
            terms = smoothing.terms(inputs, ctx.temperature if tau is None else tau, sums)
            own = smoothing.sums(inputs)
            # Times the number of ranks, as the gradients of the loss itself.
            weights = upstream * (exchange.size / smoothing.anchors if ctx.reduction == "mean" else exchange.size)
            wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
            of_sums: Tensor
            found: Any
            of_sums, *found = torch.autograd.grad(
                terms, [sums, *wanted], weights.expand_as(terms), allow_unused=True
            )
            of_sums = exchange.sum(of_sums)
            if own.requires_grad:
                through = torch.autograd.grad(own, wanted, of_sums, allow_unused=True)
                found = [_sum(a, b) for a, b in zip(found, through, strict=True)]
        grads = iter(found)
        return *(next(grads) if need else None for need in needs), None, None, None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
