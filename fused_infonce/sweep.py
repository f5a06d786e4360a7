"""The algorithm, written once over a backend's tile operations: one sweep, or two, over the similarity matrix.

z_ij = κ(s_ij − s_ii) + b_ij is the exponent of a ratio, R_i the sum of row i's ratios, log1p(R_i) its loss. With
keys centred by c (k̃ = k̂ − c), s_ij − s_ii = q̂_i·k̃_j − q̂_i·k̃_i: a tile of products and a shift a row.

- ``one_sweep``: E_ij = e^(z_ij − o_i) with an offset o_i known beforehand; ``finish`` makes gradients of what it
  leaves behind. Three products. Needs the range rule of ``Options.fits_one_sweep``, and one upstream gradient for
  all rows.
- ``losses`` and ``gradients``: running maxima and sums first, then the tile G of weighted shares. One product and
  three. Right for every temperature, for both directions and for a weight a row.

Gradients of unit rows, in both:  dq̂_i = κ [Σ_j G_ij k̃_j − h_i k̂_i + (Σ_j G_ij) c], h_i the share of all ratios,
and the mirror image for the keys. docs/numerics.md derives all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import noise
from .operands import Accumulator, Columns, RowSums, RowTerms, Scale, Side, Units
from .options import Options
from .torch_ops import TorchOps, cut, merge_ratios

LOG2_E = 1 / math.log(2)


@dataclass(slots=True)
class Needs:
    """Which gradients are asked for."""

    anchors: bool
    positives: bool
    negatives: bool
    queue: bool
    temperature: bool

    @property
    def rows(self) -> bool:
        """The temperature's gradient is read off the anchors'."""
        return self.anchors or self.temperature


@dataclass(slots=True, eq=False)
class Gradients:
    """Those that are asked for, in the inputs' shapes and dtypes; and dκ, 0-dim."""

    anchors: Tensor | None = None
    positives: Tensor | None = None
    negatives: Tensor | None = None
    queue: Tensor | None = None
    kappa: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.anchors, self.positives, self.negatives, self.queue


@dataclass(slots=True, eq=False)
class Tape:
    """What one sweep tells the backward, beside the inputs and the sums over tiles."""

    units: Units  # without the inputs themselves
    rows: RowSums
    constant: tuple[Tensor, float | Tensor] | None  # expected noise: t_i (N, 1), and ρ


class Sweep:
    """The operands of a call, normalised and centred once, and the two ways over them."""

    def __init__(
        self,
        ops: TorchOps,
        options: Options,
        kappa: float | Tensor,
        inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],  # (N, D), (N, D), (H, D), (Q, D)
        noise_rows: Tensor | None,  # (M, D)
    ) -> None:
        self.ops, self.options = ops, options
        self.noise_rows = noise_rows
        self.N, self.D = inputs[0].shape
        self.kappa_given = kappa  # a float has its constants without a device
        self.kappa = kappa.to(ops.precision.sums) if isinstance(kappa, Tensor) else kappa
        self.bits = self.kappa * LOG2_E  # κ in base 2
        columns = [x for x in inputs[1:] if x is not None]
        self.units, self.operands = ops.normalise(inputs[0], columns, self.bits)
        self.T = sum(x.shape[0] for x in columns)
        self.keys = self._keys()

    @functools.cached_property
    def cosines(self) -> Tensor:
        """s_ii, (N, 1)"""
        return self.ops.cosines(self.units)

    def _keys(self) -> Columns:
        """All columns but the noise."""
        options = self.options
        ids = options.ids
        if ids is not None and options.negative_ids is not None:
            ids = torch.cat([ids, options.negative_ids])
        return Columns(
            self.operands.keys,
            self.operands.grad_keys,
            num_positives=self.N,
            num_negatives=options.num_negatives,
            own_bias=options.own_log_weight * LOG2_E,
            row_ids=options.ids,
            column_ids=ids,
        )

    # ------------------------------------------------------------------ noise

    def _noise(self, center: Tensor | None) -> Iterator[Columns]:
        """The noise as columns centred by ``center``, a block at a time, the same at each call."""
        options, ops = self.options, self.ops
        M = options.num_noise if options.has_noise_columns else 0
        for start in range(0, M, ops.noise_block):
            block = slice(start, min(M, start + ops.noise_block))
            if self.noise_rows is not None:
                copies = ops.given_noise(self.noise_rows[block], center)
            else:
                assert options.seed is not None
                copies = ops.sampled_noise(options.seed, block, M, self.D, center)
            yield Columns(*copies, bias=options.log_noise_weight * LOG2_E)

    def _noise_sides(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows that meet the noise: their queries, their shift, and the centre of their columns."""
        if self.options.has_noise_columns:
            units = self.units
            yield self.operands.queries, self.operands.shift, units.center_k
            if self.options.symmetric:
                queries, shift = self.ops.queries(units.keys[0], units.anchors, units.center_q, self.bits)
                yield queries, shift, units.center_q

    def _log_constant(self) -> tuple[Tensor, float | Tensor] | None:
        """Expected noise: log T_i = log(λ M c_D(κ)) − κ s_ii, (N, 1), and ρ = d log c_D/dκ."""
        options = self.options
        if options.noise != "expected":
            return None
        log_c, rho = noise.log_mean_exp_cosine(self.kappa_given, self.D)
        log_weight = options.log_noise_weight + math.log(options.num_noise)
        if isinstance(log_c, Tensor) and isinstance(rho, Tensor):
            sums = self.ops.precision.sums
            return (log_c + log_weight).to(sums) - self.kappa * self.cosines, rho.to(sums)
        return log_c + log_weight - self.kappa * self.cosines, rho

    # ------------------------------------------------------------------ chunks

    def _row_chunks(self, columns: int) -> Iterator[slice]:
        """Equal chunks of rows, as many a chunk as the workspace holds."""
        most = max(1, min(self.N, self.ops.workspace_elements // columns))
        step = math.ceil(self.N / math.ceil(self.N / most))
        for start in range(0, self.N, step):
            yield slice(start, min(self.N, start + step))

    def _column_blocks(self, split: bool) -> Iterator[slice]:
        """Blocks of the keys; with ``split`` none straddles the end of the positives."""
        edges = [0, self.N, self.T] if split else [0, self.T]
        for first, last in pairwise(edges):
            for start in range(first, last, self.ops.column_block):
                yield slice(start, min(last, start + self.ops.column_block))

    # ------------------------------------------------------------------ one sweep

    def one_sweep(
        self, needs: Needs, kappa_bound: float
    ) -> tuple[Tensor, Tape, Tensor | None, Accumulator | None]:
        """Losses in nats, (N, 1), and what ``finish`` makes gradients of.

        The sums over tiles: Σ_j E_ij k̃_j, (N, D), and Σ_i α_i E_ij q̃_i of the wanted columns.
        """
        ops, queries = self.ops, self.operands.queries
        terms, constant = self._row_terms(kappa_bound)
        wanted = wanted_columns(self.options, needs)
        acc_rows = ops.empty(self.N, self.D) if needs.rows else None
        acc_columns = ops.accumulator(wanted.stop - wanted.start, self.D) if wanted.stop else None
        state = ops.start(terms, self.units, wanted, acc_columns)
        for block, columns in enumerate(self._noise(self.units.center_k)):
            for rows in self._row_chunks(len(columns)):
                tile = ops.exp_similarity(queries, columns, rows, state, closing=False)
                part = None if acc_rows is None else cut(acc_rows, rows)
                ops.grad_products(tile, columns.grad_rows, part, block > 0)
        add = self.options.has_noise_columns
        for rows in self._row_chunks(self.T):
            tile = ops.exp_similarity(queries, self.keys, rows, state, closing=True)
            part = None if acc_rows is None else cut(acc_rows, rows)
            anchors = None if acc_columns is None else ops.closed_anchors(state, rows)
            ops.grad_products(
                tile, self.keys.grad_rows, part, add, wanted, anchors, acc_columns, add_columns=rows.start > 0
            )
        sums = ops.row_sums(state)
        return sums.losses, Tape(self.units, sums, constant), acc_rows, acc_columns

    def _row_terms(self, kappa_bound: float) -> tuple[RowTerms, tuple[Tensor, float | Tensor] | None]:
        """What a row's sum is measured against; and t_i with ρ."""
        shift = self.operands.shift
        constant = self._log_constant()
        offset = None
        own: Tensor | float = 1.0
        if 2 * kappa_bound + self.options.offset_margin > 0:
            offset = (self.kappa * (1 - self.cosines)).add_(self.options.offset_margin).clamp_(min=0)
            shift = shift + offset * LOG2_E
            own = (-offset).exp_()
        if constant is None:
            return RowTerms(shift, offset, None, own), None
        t = (constant[0] if offset is None else constant[0] - offset).exp()
        return RowTerms(shift, offset, t, own + t), (t, constant[1])

    # ------------------------------------------------------------------ two sweeps

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """log1p(R_i) of the rows and, with both directions, of the columns; (N, 1) each, in nats."""
        ops, symmetric, queries = self.ops, self.options.symmetric, self.operands.queries
        row, column = self._start(), self._start() if symmetric else None
        self._add_noise(row, column)
        shift = self.operands.shift
        row_bias, column_shift = self._column_direction() if symmetric else (shift, shift)
        for rows in self._row_chunks(min(ops.column_block, self.T)):
            part = (cut(row[0], rows), cut(row[1], rows))
            for block in self._column_blocks(split=symmetric):
                other = None
                if column is not None and block.start < self.N:
                    other = (row_bias[rows], column_shift[block], column[0][block, 0], column[1][block, 0])
                keys = self.keys.block(block)
                ops.add_ratios(cut(queries, rows), keys, rows.start, block.start, cut(shift, rows), part, other)
        return _log1p_sum(*row), None if column is None else _log1p_sum(*column)

    def _add_noise(self, row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor] | None) -> None:
        for (queries, shift, center), state in zip(self._noise_sides(), (row, column), strict=False):
            assert state is not None
            for columns in self._noise(center):
                for rows in self._row_chunks(len(columns)):
                    part = (state[0][rows], state[1][rows])
                    self.ops.add_ratios(queries[rows], columns, rows.start, 0, shift[rows], part)

    def gradients(
        self,
        needs: Needs,
        row_loss: Tensor,  # (N, 1), from the first sweep
        column_loss: Tensor | None,
        weights: Tensor | None,  # (N, 1)
        scale: Scale,
    ) -> Gradients:
        """Gradients of scale · Σ_i w_i loss_i; without weights all w_i are 1."""
        ops = self.ops
        share = -torch.expm1(-row_loss)  # R/(1 + R)
        if column_loss is not None:
            share -= torch.expm1(-column_loss)
            scale = scale.times(0.5)
        if weights is not None:
            share *= weights

        wanted = wanted_columns(self.options, needs)
        acc_rows = ops.zeros(self.N, self.D) if needs.rows else None
        acc = Accumulator(ops.zeros(wanted.stop - wanted.start, self.D), None)
        row_sums, column_sums = ops.zeros(self.N, 1), ops.zeros(self.T)

        # The noise of the column direction goes to the positives' gradient, before any key does.
        acc_keys = acc.grad[: self.N] if needs.positives else None
        if acc_keys is None and needs.temperature and column_loss is not None and self.options.has_noise_columns:
            acc_keys = ops.zeros(self.N, self.D)
        sides = zip(
            self._noise_sides(),
            (row_loss, column_loss),
            (acc_rows, acc_keys),
            (row_sums, column_sums[: self.N, None]),
            strict=False,
        )
        for (queries, shift, center), loss, acc_side, sums in sides:
            if acc_side is None or loss is None:
                continue
            shift = shift + loss * LOG2_E
            for columns in self._noise(center):
                unused = ops.zeros(len(columns))
                for rows in self._row_chunks(len(columns)):
                    w = None if weights is None else weights[rows]
                    tile = ops.weighted_ratios(
                        queries[rows], columns, rows.start, 0, shift[rows], w, (sums[rows], unused)
                    )
                    ops.grad_products(tile, columns.grad_rows, acc_side[rows], True)
        d_kappa = ops.zeros()
        if needs.temperature and acc_keys is not None and column_loss is not None:
            of_noise = ops.unit_dots(
                acc_keys, self.units.keys[0], column_sums[: self.N, None], self.units.center_q
            )
            d_kappa += of_noise.sum()

        shift = self.operands.shift + row_loss * LOG2_E
        row_bias, column_shift = self._column_direction()
        if column_loss is not None:
            column_shift = column_shift + column_loss[:, 0] * LOG2_E
        for rows in self._row_chunks(min(ops.column_block, self.T)):
            q = ops.centered_anchors(self.units, rows) if wanted.stop else None
            for block in self._column_blocks(split=column_loss is not None):
                other = None
                if column_loss is not None and block.start < self.N:
                    w = None if weights is None else weights[block, 0]
                    other = (row_bias[rows], column_shift[block], w)
                keys = self.keys.block(block)
                w = None if weights is None else weights[rows]
                tile = ops.weighted_ratios(
                    self.operands.queries[rows], keys, rows.start, block.start, shift[rows], w,
                    (row_sums[rows], column_sums[block]), other,
                )  # fmt: skip
                first, last = max(block.start, wanted.start), min(block.stop, wanted.stop)
                of_columns = None
                if first < last:
                    of_columns = acc.part(slice(first - wanted.start, last - wanted.start))
                of_rows = None if acc_rows is None else acc_rows[rows]
                own = slice(first - block.start, last - block.start)
                ops.grad_products(tile, keys.grad_rows, of_rows, True, own, q, of_columns)

        side: Side | None = None
        if acc_rows is not None:
            side = Side(acc_rows, share, row_sums, self.units.center_k, disposable=True)
        acc.sums = column_sums[wanted]
        out, dots = _finish_sides(
            ops, self.options, self.units, needs, acc, share, side, scale.times(self.kappa), disposable=True
        )
        if needs.temperature and dots is not None:
            d_kappa += dots.sum() + self._constant_share(row_loss, column_loss, weights)
            out.kappa = d_kappa * scale.value
        return out

    def _start(self) -> tuple[Tensor, Tensor]:
        """Running maximum (bits) and sum of ratios; expected noise is one more column."""
        constant = self._log_constant()
        if constant is None:
            return self.ops.zeros(self.N, 1), self.ops.zeros(self.N, 1)
        exponent = constant[0] * LOG2_E
        maximum = exponent.clamp(min=0)
        return maximum, torch.exp2(exponent - maximum)

    def _column_direction(self) -> tuple[Tensor, Tensor]:
        """κ(s_ij − s_jj) = q_i·k_j + row_bias_i − column_shift_j, in bits; (N, 1) and (N,)."""
        shift = self.bits * self.cosines
        return shift - self.operands.shift, shift[:, 0]

    def _constant_share(
        self, row_loss: Tensor, column_loss: Tensor | None, weights: Tensor | None
    ) -> Tensor | float:
        """Expected noise: Σ_i w_i ρ T_i/(1 + R_i), over both directions."""
        constant = self._log_constant()
        if constant is None:
            return 0.0
        share = (constant[0] - row_loss).exp_()
        if column_loss is not None:
            share += (constant[0] - column_loss).exp_()
        return constant[1] * (share if weights is None else share * weights).sum()

    # ------------------------------------------------------------------ statistics

    def stats(self, t: float = 2.0) -> dict[str, Tensor]:
        """The figures of ``contrastive_stats``, from one product."""
        ops = self.ops
        row = self._start()
        shift = self.operands.shift
        self._add_noise(row, None)
        log_noise = torch.where(row[1] > 0, row[0] / LOG2_E + row[1].log(), -math.inf)

        count, cosine, potential = ops.zeros(), ops.zeros(), ops.zeros()
        hits = ops.zeros(self.N)
        shares = self.cosines - shift / self.bits  # q̂_i·c
        for rows in self._row_chunks(min(ops.column_block, self.T)):
            hit = torch.ones(rows.stop - rows.start, dtype=torch.bool, device=ops.device)
            for block in self._column_blocks(split=True):
                part = (row[0][rows], row[1][rows])
                for piece, tile in ops.similarity(
                    self.operands.queries[rows], self.keys.block(block), rows.start, block.start
                ):
                    i = slice(rows.start + piece.start, rows.start + piece.stop)
                    if block.start < self.N:
                        valid = tile > -math.inf
                        s = tile / self.bits + shares[i]
                        count += valid.sum()
                        cosine += s.masked_fill(~valid, 0).sum()
                        potential += (2 * t * (s - 1)).exp_().sum()
                        hit[piece] &= (tile <= shift[i]).all(1)
                    merge_ratios(tile, shift[i], 1, part[0][piece], part[1][piece])
            hits[rows] = hit.to(hits.dtype)
        losses = _log1p_sum(*row)
        return {
            "loss": losses.mean(),
            "noise_share": (log_noise - losses).exp().mean(),
            "accuracy": hits.mean(),
            "positive_cosine": self.cosines.mean(),
            "negative_cosine": cosine / count,
            "alignment": (2 - 2 * self.cosines).mean(),
            "uniformity": (potential / count).log(),
        }


def finish(
    ops: TorchOps,
    options: Options,
    tape: Tape,
    acc_rows: Tensor | None,
    acc_columns: Accumulator | None,
    needs: Needs,
    kappa: float | Tensor,
    scale: Scale,
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Gradients of scale · Σ_i loss_i from what one sweep left behind, in the inputs' dtypes or in ``dtype``."""
    units, rows, side = tape.units, tape.rows, None
    if acc_rows is not None:
        sums = rows.total  # Σ_j E_ij, less what the positive has lost
        if tape.constant is not None:
            sums = -tape.constant[0] if sums is None else sums - tape.constant[0]
        side = Side(acc_rows, rows.total, sums, units.center_k, rows.alpha, dtype=dtype)
    out, dots = _finish_sides(
        ops, options, units, needs, acc_columns, rows.share, side, scale.times(kappa), dtype=dtype
    )
    if needs.temperature and dots is not None:
        if tape.constant is not None:
            dots = dots + tape.constant[0] * tape.constant[1]
        out.kappa = (dots * rows.alpha).sum() * scale.value
    return out


def _finish_sides(
    ops: TorchOps,
    options: Options,
    units: Units,
    needs: Needs,
    acc: Accumulator | None,  # of the wanted columns
    share: Tensor | None,  # (N, 1) of all ratios of a row, where the positives have not lost it yet
    anchors: Side | None,
    scale: Scale,
    disposable: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Gradients, Tensor | None]:
    """The normalisation backward of every side; and ⟨q̂_i, dq̂_i⟩ but for its factors, (N, 1)."""
    out, positives = Gradients(), None
    first = wanted_columns(options, needs).start
    for (name, columns), rows in zip(_spans(options), units.keys, strict=True):
        if acc is None or not getattr(needs, name):
            continue
        part = acc.part(slice(columns.start - first, columns.stop - first))
        sums = None if part.sums is None else part.sums[:, None]
        if name == "positives":
            positives = Side(part.grad, share, sums, units.center_q, None, disposable, dtype)
        else:
            side = Side(part.grad, None, sums, units.center_q, None, disposable, dtype)
            setattr(out, name, ops.finish(rows, side, scale))
    dq, out.positives, dots = ops.finish_pairs(units, anchors, positives, scale)
    out.anchors = dq if needs.anchors else None
    return out, dots


def wanted_columns(options: Options, needs: Needs) -> slice:
    """The columns from the first to the last whose gradients are asked for; slice(0, 0): none."""
    wanted = [columns for name, columns in _spans(options) if getattr(needs, name)]
    return slice(wanted[0].start, wanted[-1].stop) if wanted else slice(0, 0)


def _spans(options: Options) -> Iterator[tuple[str, slice]]:
    """The inputs whose rows are columns of the similarity matrix, and where they lie."""
    start = 0
    for name, count in (
        ("positives", options.num_anchors),
        ("negatives", options.num_negatives),
        ("queue", options.num_queue),
    ):
        if count:
            yield name, slice(start, start + count)
            start += count


def _log1p_sum(maximum: Tensor, total: Tensor) -> Tensor:
    """log(1 + 2^maximum · total) in nats, for maximum >= 0."""
    m = maximum / LOG2_E
    return torch.where(m > 0, m + ((-m).exp() + total).log(), total.log1p())
