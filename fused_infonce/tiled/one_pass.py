"""One pass over the tiles: losses and the sums that all gradients are made of. Three products.

A chunk of rows meets all columns at once: E_ij = e^(z_ij − o_i), S_i = Σ_j E_ij, and with
α_i = 1/(e^−o_i + S_i) the ratio's share is α_i E_ij. E is not normalised, so no second pass over it is needed:
α_i multiplies rows of small matrices. The offset o_i keeps E in range. Where the exponents' range is known to be
small enough it is computed in advance (docs/numerics.md, "Range"); a backend whose tiles hold whole rows takes the
row's maximum elsewhere, at any temperature. It needs one upstream gradient for all rows, and one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import variants
from ..options import Options
from .backend import OnePassRows, TileBackend
from .gradients import finish_sides
from .operands import (
    Accumulator,
    Gradients,
    GradScale,
    NeedsGrad,
    NormalizedBatch,
    NormalizedRows,
    RowDenominator,
    RowGradArgs,
    RowStats,
    grad_range,
)  # fmt: skip
from .problem import LOG2_E, TiledProblem
from .ranks import all_columns


@dataclass(slots=True, eq=False)
class OnePassResiduals:
    """What the gradients are made of, beside the inputs and the temperature."""

    inv_norms: list[Tensor]  # (n, 1) of anchors and columns
    center_q: Tensor | None
    center_k: Tensor
    stats: RowStats
    rho: float | Tensor  # of expected noise
    own_fraction: Tensor | None  # (N, 1) of own hard negatives in ``stats.constant_share``
    positive: variants.Positive | None  # where a margin replaces s_ii
    acc_rows: Tensor | None  # (N, D) Σ_j E_ij k̃_j
    acc_columns: Accumulator | None  # of the columns whose gradients are requested

    def batch(self, inputs: list[Tensor]) -> NormalizedBatch:
        """The normalised rows again, from the inputs that are given, anchors first."""
        anchors, *columns = (NormalizedRows(x, r) for x, r in zip(inputs, self.inv_norms, strict=True))
        return NormalizedBatch(anchors, columns, self.center_q, self.center_k)


def one_pass(
    problem: TiledProblem, needs: NeedsGrad, kappa_bound: float | None
) -> tuple[Tensor, OnePassResiduals]:
    """Losses in nats, (N, 1), and what ``gradients`` reads. kappa_bound: a known upper bound of κ."""
    backend, batch = problem.backend, problem.batch
    constants = problem.log_constants()
    denominator = _row_denominator(problem, constants.rows, kappa_bound)
    every = all_columns(problem, needs)
    add, chunks = problem.options.has_noise_columns, problem.row_chunks(len(every.columns))
    single_chunk, grad_columns = len(chunks) == 1, every.grad_range
    acc_rows = backend.row_products(problem.N, problem.D, single_chunk and not add) if needs.rows else None
    acc = None
    if grad_columns.stop:
        single = single_chunk and every.exchange is None
        acc = backend.column_accumulator(grad_columns.stop - grad_columns.start, problem.D, single)
    needs_tiles = acc_rows is not None or acc is not None
    rows_state = backend.one_pass_rows(denominator, batch, grad_columns, acc, needs_tiles)
    if add:
        _add_noise(problem, rows_state, acc_rows)
        backend.release()  # a block of wide noise vectors is as large as a tile
    for rows in chunks:
        tile, rescale = rows_state.exp_tile(problem.operands.queries, every.columns, rows, is_last_block=True)
        part = None if acc_rows is None else acc_rows[rows]
        if add and part is not None and rescale is not None:
            part.mul_(rescale)  # the noise's part; elsewhere the product is written to new memory
        anchors = None if acc is None else rows_state.weighted_anchors(rows)
        backend.grad_products(
            tile, every.columns.grad_rows, part, add, grad_columns, anchors, acc, add_columns=rows.start > 0
        )
        del tile
    if acc is not None and every.exchange is not None:
        acc = every.return_to_owners(acc).part(grad_range(problem.options.counts, needs.columns))
    stats = rows_state.stats()
    losses, hidden = stats.losses, problem.hidden_nan()
    return losses if hidden is None else losses + hidden, OnePassResiduals(
        [rows.inv_norm for rows in (batch.anchors, *batch.columns)], batch.center_q, batch.center_k, stats,
        constants.rho, constants.own_fraction, problem.positive if problem.options.angular_margin else None, acc_rows, acc,
    )  # fmt: skip


def _add_noise(problem: TiledProblem, rows_state: OnePassRows, acc_rows: Tensor | None) -> None:
    for block, columns in enumerate(problem.noise_blocks(problem.batch.center_k)):
        for rows in problem.row_chunks(len(columns)):
            tile, rescale = rows_state.exp_tile(problem.operands.queries, columns, rows, is_last_block=False)
            part = None if acc_rows is None else acc_rows[rows]
            if block and part is not None and rescale is not None:
                part.mul_(rescale)
            problem.backend.grad_products(tile, columns.grad_rows, part, block > 0)
            del tile  # the next one may take other memory


def _row_denominator(
    problem: TiledProblem, log_constant: Tensor | None, kappa_bound: float | None
) -> RowDenominator:
    """What a row's sum is added to. log_constant: (N, 1)"""
    options, decoupled = problem.options, problem.options.decoupled
    on_diagonal = not options.angular_margin
    if kappa_bound is None or not options.fits_known_offset(kappa_bound):
        shift = problem.row_shift_log2
        return RowDenominator(shift, None, True, log_constant, 0.0, options, on_diagonal)
    offset: Tensor | None = None
    positive_term: Tensor | float = 0.0 if decoupled else 1.0
    if decoupled or 2 * kappa_bound + options.hardness + options.offset_margin > 0:
        p = problem.positive.value
        offset = (problem.kappa * (1 - p)).add_(options.hardness + options.offset_margin)
        if not decoupled:
            positive_term = (-offset.clamp_(min=0)).exp_()
    shift = problem.row_shift_log2 if offset is None else problem.row_shift_log2 + offset * LOG2_E
    t = None
    if log_constant is not None:
        t = (log_constant if offset is None else log_constant - offset).exp()
    return RowDenominator(shift, offset, False, t, positive_term, options, on_diagonal)


def gradients(
    backend: TileBackend,
    options: Options,
    kept: OnePassResiduals,
    inputs: list[Tensor],  # those that are given, anchors first
    needs: NeedsGrad,
    kappa: float | Tensor,
    scale: GradScale,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Gradients of scale · Σ_i loss_i, in the inputs' dtypes or in ``dtype``."""
    stats, batch, anchors = kept.stats, kept.batch(inputs), None
    scale = scale.times(1 / stats.unit)
    share, constant_share = stats.share, stats.constant_share
    of_positive = share  # −dloss_i/ds_ii
    if kept.positive is not None and kept.positive.slope is not None and share is not None:
        of_positive = share * kept.positive.slope
    if kept.acc_rows is not None:
        # The centre's weight is Σ_j α_i E_ij, less what the tiles' diagonal has subtracted.
        weight = share
        if constant_share is not None:
            weight = -constant_share if share is None else share - constant_share
        anchors = RowGradArgs(kept.acc_rows, of_positive, weight, batch.center_k, stats.alpha, dtype=dtype)
    out, dots = finish_sides(
        backend, options, batch, needs, kept.acc_columns, of_positive, anchors, scale.times(kappa),
        dtype=dtype,
    )  # fmt: skip
    of_noise = constant_share
    if constant_share is not None and kept.own_fraction is not None:
        of_own = constant_share * kept.own_fraction
        of_noise = constant_share - of_own
        out.log_own = (of_own * scale.value)[:, 0] if needs.log_own else None
    if needs.temperature and dots is not None:
        if of_noise is not None:
            dots = dots + of_noise * kept.rho
        if kept.positive is not None and kept.positive.kappa_correction is not None and share is not None:
            dots = dots + share * kept.positive.kappa_correction
        out.kappa = dots.sum() * scale.value
    return out
