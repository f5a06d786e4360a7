"""Two passes over the tiles: the losses first, from running maxima and sums; then the gradients from the losses.

One product and three; or one and two, where the workspace holds all products and the second pass takes them over.
This is right for every temperature, for both directions and for a weight per row:

    G_ij = w_i e^(z_ij − loss_i) of the rows' exponents, plus w_j e^(z_ij − loss_j) of the columns'

and dq̂_i = κ [Σ_j G_ij k̃_j − h_i k̂_i + (Σ_j G_ij) c], h_i the share of all ratios; its mirror image for the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import variants
from .gradients import finish_sides
from .operands import Accumulator, Gradients, GradScale, NeedsGrad, RowGradArgs
from .problem import LOG2_E, TiledProblem
from .ranks import grad_ranges, iter_ranks

Running = tuple[Tensor, Tensor]  # maximum in base 2, and Σ 2^(z − maximum)


def kept_products(problem: TiledProblem) -> Tensor | None:
    """Memory for all q_i·k_j, (N, T), if the second pass may follow the first at once and the workspace has it.

    That pass follows at once where one upstream gradient, by which the gradients are multiplied later, serves all
    rows.
    """
    options, backend = problem.options, problem.backend
    if options.reduction == "none" or problem.exchange is not None:
        return None
    noise = min(options.num_noise, backend.noise_block) if options.has_noise_columns else 0
    return backend.kept_products(problem.N, problem.T, problem.D + noise)


def losses(problem: TiledProblem, products: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """log1p(R_i), or log R_i, of the rows and, where the loss is symmetric, of the columns; (N, 1) each, nats.

    products: (N, T) memory for all q_i·k_j.
    """
    backend, options = problem.backend, problem.options
    symmetric, queries, shift = options.symmetric, problem.operands.queries, problem.row_shift_log2
    least = variants.least_maximum(options)
    constants = problem.log_constants()
    row = start(problem, constants.rows)
    columns: list[Running] = []
    row_bias: Tensor = problem.row_shift_log2
    column_shift: list[Tensor] = []
    if symmetric:
        row_bias, column_shift = problem.column_direction()
        columns = [
            (_zeros(problem, counts.positives, 1) + least, _zeros(problem, counts.positives, 1))
            for counts in problem.counts
        ]
        columns[problem.rank] = start(problem, constants.columns)
    add_noise(problem, row, columns[problem.rank] if symmetric else None)
    for owner, owned, _ in iter_ranks(problem, None, [slice(0, 0)] * len(problem.counts)):
        counts = problem.counts[owner]
        for rows in problem.row_chunks(min(backend.column_block, counts.columns)):
            part = (row[0][rows], row[1][rows])
            for block in problem.column_blocks(counts, split=symmetric):
                other = None
                if symmetric and block.start < counts.positives:
                    maximum, total = columns[owner]
                    other = (row_bias[rows], column_shift[owner][block], maximum[block, 0], total[block, 0])
                backend.add_ratios(
                    queries[rows], owned.block(block), rows.start, block.start, shift[rows], part, other, least,
                    None if products is None else products[rows, block],
                )  # fmt: skip
    hidden = problem.hidden_nan()
    row_loss = log_of(problem, row)
    row_loss = row_loss if hidden is None else row_loss + hidden
    if not symmetric:
        return row_loss, None
    column_loss = log_of(problem, columns[0] if problem.exchange is None else problem.exchange.merged(columns))
    return row_loss, column_loss if hidden is None else column_loss + hidden


def start(problem: TiledProblem, log_constant: Tensor | None) -> Running:
    """The rows' maxima and sums before any column; a constant (N, 1) in nats is one more column."""
    least = variants.least_maximum(problem.options)
    if log_constant is None:
        return _zeros(problem, problem.N, 1) + least, _zeros(problem, problem.N, 1)
    exponent = log_constant * LOG2_E
    maximum = exponent.clamp(min=least)
    return maximum, torch.exp2(exponent - maximum)


def add_noise(problem: TiledProblem, row: Running, column: Running | None) -> None:
    backend, least = problem.backend, variants.least_maximum(problem.options)
    for side, state in zip(problem.noise_sides(), (row, column), strict=False):
        assert state is not None
        for columns in problem.noise_blocks(side.center):
            for rows in problem.row_chunks(len(columns)):
                part = (state[0][rows], state[1][rows])
                shift = side.row_shift_log2[rows]
                backend.add_ratios(side.queries[rows], columns, rows.start, 0, shift, part, None, least)


def log_of(problem: TiledProblem, running: Running) -> Tensor:
    return variants.row_loss(running[1], running[0] / LOG2_E, problem.options)


def gradients(
    problem: TiledProblem,
    needs: NeedsGrad,
    row_loss: Tensor,  # (N, 1), of the first pass
    column_loss: Tensor | None,
    weights: Tensor | None,  # (N, 1); None: 1
    scale: GradScale,
    products: Tensor | None = None,  # (N, T), as ``losses`` left them; overwritten
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Gradients of scale · Σ_i w_i loss_i, in the inputs' dtypes or in ``dtype``."""
    backend = problem.backend
    rows, share = _direction(problem, row_loss, weights)
    columns: _Direction | None = None
    if column_loss is not None:
        columns, more = _direction(problem, column_loss, weights)
        share += more
        scale = scale.times(0.5)
    margin = problem.positive if problem.options.angular_margin else None
    of_positive: Tensor | None = share if margin is None or margin.slope is None else share * margin.slope
    if not problem.options.paired:
        of_positive = None

    sums = _GradientSums(problem, needs)
    d_kappa = _noise_gradients(problem, needs, sums, rows, columns)
    _column_gradients(problem, sums, rows, columns, products)
    if problem.exchange is not None and problem.exchange.wants:
        sums.columns[problem.rank] = problem.exchange.home([[x] for x in sums.columns])
    anchors: RowGradArgs | None = None
    if sums.acc_rows is not None:
        center = problem.batch.center_k
        anchors = RowGradArgs(sums.acc_rows, of_positive, sums.rows, center, disposable=True, dtype=dtype)
    acc = Accumulator(sums.acc, sums.columns[problem.rank][sums.ranges[problem.rank]])
    out, dots = finish_sides(
        backend, problem.options, problem.batch, needs, acc, of_positive, anchors, scale.times(problem.kappa),
        disposable=True, dtype=dtype,
    )  # fmt: skip
    constants = problem.log_constants()
    if needs.temperature and dots is not None:
        if margin is not None and margin.kappa_correction is not None:
            d_kappa += (share * margin.kappa_correction).sum()
        if constants.columns is not None:
            for direction in (rows,) if columns is None else (rows, columns):
                d_kappa += (constants.rho * direction.share(constants.columns)).sum()
        out.kappa = (d_kappa + dots.sum()) * scale.value
    if needs.log_own and constants.rows is not None and constants.own_fraction is not None:
        of_own = rows.share(constants.rows) * constants.own_fraction
        out.log_own = (of_own * scale.value)[:, 0]
    return out


def reduced_gradients(
    problem: TiledProblem,
    needs: NeedsGrad,
    row_loss: Tensor,
    column_loss: Tensor | None,
    products: Tensor | None,
) -> Gradients:
    """Gradients of the losses' mean or sum, in the sums' dtype."""
    scale, sums = GradScale(None, problem.options.gradient_factor), problem.backend.precision.sums
    return gradients(problem, needs, row_loss, column_loss, None, scale, products, sums)


class _GradientSums:
    """Accumulators of the second pass."""

    def __init__(self, problem: TiledProblem, needs: NeedsGrad) -> None:
        self.ranges = grad_ranges(problem, needs)
        own = self.ranges[problem.rank]
        self.acc_rows = _zeros(problem, problem.N, problem.D) if needs.rows else None
        self.acc = _zeros(problem, own.stop - own.start, problem.D)
        self.rows = _zeros(problem, problem.N, 1)  # Σ_j G_ij
        self.columns = [_zeros(problem, counts.columns) for counts in problem.counts]  # by rank Σ_i G_ij


def _noise_gradients(
    problem: TiledProblem,
    needs: NeedsGrad,
    sums: _GradientSums,
    of_rows: _Direction,
    of_columns: _Direction | None,
) -> Tensor:
    """Adds the noise's part to the accumulators; returns what the columns' direction adds to dκ, 0-dim.

    That direction's part goes to the positives' gradient, before any key does: dκ is read off it.
    """
    backend, N = problem.backend, problem.N
    column_sums = sums.columns[problem.rank][:N, None]
    acc_keys: Tensor | None = None
    if of_columns is not None and problem.options.has_noise_columns:
        if needs.positives:
            acc_keys = sums.acc[:N]
        elif needs.temperature:
            acc_keys = _zeros(problem, N, problem.D)
    targets = ((of_rows, sums.acc_rows, sums.rows), (of_columns, acc_keys, column_sums))
    for side, (direction, acc, row_sums) in zip(problem.noise_sides(), targets, strict=False):
        if acc is None or direction is None:
            continue
        shift = side.row_shift_log2 + direction.loss * LOG2_E
        for columns in problem.noise_blocks(side.center):
            unused = _zeros(problem, len(columns))
            for rows in problem.row_chunks(len(columns)):
                w = None if direction.weights is None else direction.weights[rows]
                tile = backend.weighted_ratios(
                    side.queries[rows], columns, rows.start, 0, shift[rows], w, (row_sums[rows], unused), None
                )
                backend.grad_products(tile, columns.grad_rows, acc[rows], True)
                del tile
    if not needs.temperature or acc_keys is None:
        return _zeros(problem)
    dots = backend.unit_dots(acc_keys, problem.batch.columns[0], column_sums, problem.batch.center_q)
    return dots.sum()


def _column_gradients(
    problem: TiledProblem,
    sums: _GradientSums,
    of_rows: _Direction,
    of_columns: _Direction | None,
    products: Tensor | None,
) -> None:
    """Adds the part of all ranks' columns to the accumulators."""
    backend, symmetric = problem.backend, of_columns is not None
    shift, weights = problem.row_shift_log2 + of_rows.loss * LOG2_E, of_rows.weights
    row_bias, column_weights = shift, None
    column_shift: list[Tensor] = []
    if of_columns is not None:
        row_bias, column_shift = problem.column_direction(of_columns.loss)
        if of_columns.weights is not None:
            column_weights = problem.of_positives(of_columns.weights[:, 0])
    for owner, owned, grad in iter_ranks(problem, sums.acc, sums.ranges):
        counts, chosen = problem.counts[owner], sums.ranges[owner]
        for rows in problem.row_chunks(min(backend.column_block, counts.columns)):
            q = backend.centered_anchors(problem.batch, rows) if chosen.stop else None
            w = None if weights is None else weights[rows]
            for block in problem.column_blocks(counts, split=symmetric):
                other = None
                if symmetric and block.start < counts.positives:
                    w_columns = None if column_weights is None else column_weights[owner][block]
                    other = (row_bias[rows], column_shift[owner][block], w_columns)
                columns = owned.block(block)
                tile = backend.weighted_ratios(
                    problem.operands.queries[rows], columns, rows.start, block.start, shift[rows], w,
                    (sums.rows[rows], sums.columns[owner][block]), other,
                    None if products is None else products[rows, block],
                )  # fmt: skip
                first, last = max(block.start, chosen.start), min(block.stop, chosen.stop)
                acc = None
                if grad is not None and first < last:
                    acc = Accumulator(grad[first - chosen.start : last - chosen.start], None)
                acc_rows = None if sums.acc_rows is None else sums.acc_rows[rows]
                part = slice(first - block.start, last - block.start)
                backend.grad_products(tile, columns.grad_rows, acc_rows, True, part, q, acc)


@dataclass(slots=True, eq=False)
class _Direction:
    """The rows' direction, or the columns'; (N, 1) each."""

    loss: Tensor  # as the first pass returned it, but finite
    weights: Tensor | None  # w_i f'(loss_i), f as in ``variants.transformed_loss``; None: 1

    def share(self, log_constant: Tensor) -> Tensor:
        """Of a constant T_i, given by its logarithm, in the denominators: w_i T_i/(1 + R_i), (N, 1)."""
        share = (log_constant - self.loss).exp_()
        return share if self.weights is None else share * self.weights


def _direction(problem: TiledProblem, loss: Tensor, weights: Tensor | None) -> tuple[_Direction, Tensor]:
    """A direction, and h_i: the weighted share of all ratios in the denominator, R/(1 + R) or R/R, (N, 1)."""
    if problem.options.decoupled:
        empty = loss == -torch.inf
        share, loss = 1.0 - empty.to(loss.dtype), loss.masked_fill(empty, 0.0)
        # A function of −∞ may have the slope NaN, as logaddexp has.
        weights = None if weights is None else weights.masked_fill(empty, 0.0)
    else:
        share = -torch.expm1(-loss)
    if variants.transforms_loss(problem.options):
        slope = variants.transformed_loss(loss, problem.options)[1]
        weights = slope if weights is None else weights * slope
    return _Direction(loss, weights), share if weights is None else share * weights


def _zeros(problem: TiledProblem, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=problem.backend.precision.sums, device=problem.backend.device)
