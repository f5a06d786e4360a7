"""The algorithm, written once over a backend's tile operations: one sweep, or two, over the similarity matrix.

z_ij = κ(s_ij − s_ii) + b_ij is the exponent of a ratio, R_i the sum of row i's ratios, log1p(R_i) its loss. With
keys centred by c (k̃ = k̂ − c), s_ij − s_ii = q̂_i·k̃_j − q̂_i·k̃_i: a tile of products and a shift a row. The variants
of the loss change little of it: another factor of s_ij (hardness), another positive than s_ii (a margin), log R_i
(decoupled).

- ``one_sweep``: E_ij = e^(z_ij − o_i) with an offset o_i known beforehand; ``finish`` makes gradients of what it
  leaves behind. Three products. Needs the range rule of ``Options.fits_one_sweep``, and one upstream gradient for
  all rows.
- ``losses`` and ``gradients``: running maxima and sums first, then the tile G of weighted shares. One product and
  three. Right for every temperature, for both directions and for a weight a row.

With a process group (``Options.exchange``) a rank's rows meet everyone's columns: all in one matrix, own first
(``one_sweep``), or a rank's after the other's (two sweeps); the sums of columns go home to their rank.

Gradients of unit rows, in both:  dq̂_i = κ [Σ_j G_ij k̃_j − h_i k̂_i + (Σ_j G_ij) c], h_i the share of all ratios,
and the mirror image for the keys. docs/numerics.md derives all of it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import noise
from .distributed import Counts
from .geometry import cosine_with_margin
from .operands import Accumulator, Columns, Limits, RowSums, RowTerms, Scale, Side, Units
from .options import Options
from .torch_ops import TorchOps, as_rows_, cut, merge_ratios, moved, steps

LOG2_E = 1 / math.log(2)
_COLUMNS = {  # the inputs that are columns, by which of them are asked for
    asked: frozenset(itertools.compress(("positives", "negatives", "queue"), asked))
    for asked in itertools.product((False, True), repeat=3)
}
NO_RATIO = -1e30  # the maximum of no ratios, in bits; finite, so that differences of two are


@dataclass(slots=True)
class Needs:
    """Which gradients are asked for."""

    anchors: bool
    positives: bool
    negatives: bool
    queue: bool
    temperature: bool

    @property
    def columns(self) -> frozenset[str]:
        return _COLUMNS[self.positives, self.negatives, self.queue]

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
class Positive:
    """What takes the place of s_ii in row i's loss, (N, 1) each."""

    value: Tensor  # p_i
    slope: Tensor  # dp_i/ds_ii, times a row's share what the positive loses
    turn: Tensor  # slope_i s_ii − p_i, times the share what ⟨q̂_i, dq̂_i⟩ lacks of dκ


@dataclass(slots=True, eq=False)
class Tape:
    """What one sweep tells the backward, beside the inputs and the sums over tiles."""

    units: Units  # without the inputs themselves
    rows: RowSums
    constant: tuple[Tensor, float | Tensor] | None  # expected noise: t_i (N, 1), and ρ
    margin: Positive | None


class Sweep:
    """The operands of a call, normalised and centred once, and the two ways over them.

    N and T are this rank's rows and columns; there is one rank where ``options`` knows of no others.
    """

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
        self.bits = (self.kappa + options.hardness) * LOG2_E  # the factor of s_ij in a ratio's exponent, in base 2
        columns = [x for x in inputs[1:] if x is not None]
        self.exchange = exchange = options.exchange
        self.rank = 0 if exchange is None else exchange.rank
        self.counts = [options.counts] if exchange is None else exchange.counts  # by rank
        centers = None if exchange is None else exchange.centers(inputs[0], inputs[1], ops.precision.sums)
        self.units, self.operands = ops.normalise(inputs[0], columns, self.bits, centers)
        self.T = self.operands.keys.shape[0]
        self.margin = self._positive() if options.angular_margin else None
        self.turned: Tensor | None = None  # κ p_i − (κ + hardness) s_ii in bits, (N, 1); None: 0
        own = self.operands.own_products
        if options.angular_margin or options.hardness:
            self.turned = self.kappa * LOG2_E * self.positive - self.bits * self.cosines
        self.shift = own if self.turned is None else own + self.turned  # z_ij = q_i·k_j − shift_i in bits, (N, 1)
        self.ids = None if options.ids is None else self._ids(options.ids)
        self.keys = self._keys()

    @functools.cached_property
    def cosines(self) -> Tensor:
        """s_ii, (N, 1)"""
        return self.ops.cosines(self.units)

    @property
    def positive(self) -> Tensor:
        """p_i, cos(θ_ii + m) or s_ii, (N, 1)"""
        return self.cosines if self.margin is None else self.margin.value

    def _positive(self) -> Positive:
        s, m = self.cosines, self.options.angular_margin
        zero = (self.units.anchors.r == 0) | (self.units.keys[0].r == 0)
        value, slope = cosine_with_margin(s, self.ops.half_squared_chords(self.units), zero, m)
        return Positive(value, slope, slope * s - value)

    @functools.cached_property
    def limits(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
        """Scores beyond which a column is too similar, (N, 1), and the unit rows of a guide."""
        similar = self.options.similar
        if similar is None:
            return None
        guide, scores = None, self.cosines
        if similar.guide is not None:
            rows, columns = (self.ops.unit_rows(x) for x in similar.guide)
            guide = rows, columns
            scores = (rows * columns[: self.N]).sum(1, keepdim=True, dtype=self.ops.precision.sums)
        limit = torch.full_like(scores, math.inf) if similar.margin is None else scores + similar.margin
        return limit if similar.threshold is None else limit.clamp(max=similar.threshold), guide

    def _limits_of(self, owner: int) -> Limits | None:
        """The limits as tiles take them, between this rank's rows and the owner's columns."""
        if self.options.similar is None or self.limits is None:
            return None
        limit, guide = self.limits
        if guide is not None:
            return Limits(limit, limit[:, 0], guide)
        columns = self._limits_of_columns[owner] if self.options.symmetric else None
        return Limits(self.bits * (limit - self.cosines) + self.operands.own_products, columns)

    @functools.cached_property
    def _limits_of_columns(self) -> list[Tensor]:
        assert self.limits is not None
        return self._of_positives((self.bits * self.limits[0])[:, 0])

    def _ids(self, ids: Tensor) -> list[Tensor]:
        """Of each rank's first columns: its positives', and its negatives' where those have any."""
        options, exchange = self.options, self.exchange
        if options.negative_ids is not None:
            ids = torch.cat([ids, options.negative_ids])
        if exchange is None:
            return [ids]
        masked = exchange.masks_negatives
        lengths = [counts.positives + counts.negatives * masked for counts in exchange.counts]
        return exchange.gather(ids.long(), lengths)

    def _keys(self) -> Columns:
        """This rank's columns, all but the noise."""
        options = self.options
        ids = self.ids
        return Columns(
            self.operands.keys,
            self.operands.grad_keys,
            num_positives=self.N,
            num_negatives=options.counts.negatives,
            own_bias=options.own_log_weight * LOG2_E,
            row_ids=None if ids is None else ids[self.rank][: self.N],
            column_ids=None if ids is None else ids[self.rank],
            limits=self._limits_of(self.rank),
        )

    def _keys_of(self, owner: int, rows: Tensor) -> Columns:
        """Another rank's columns: none of them is a row's own."""
        ids = self.ids
        return Columns(
            rows,
            rows.to(self.ops.precision.gradient),
            row_ids=self.keys.row_ids,
            column_ids=None if ids is None else ids[owner],
            limits=self._limits_of(owner),
        )

    def _visits(self, acc: Tensor | None, wanted: list[slice]) -> Iterator[tuple[int, Columns, Tensor | None]]:
        """Every rank's columns, this one's first, with memory for the gradients of those that are wanted.

        In the end ``acc``, this rank's own memory, has what all ranks have summed for it.
        """
        if self.exchange is None:
            yield 0, self.keys, acc
            return
        lengths = [columns.stop - columns.start for columns in wanted]
        for owner, rows, sums in self.exchange.tour(self.operands.keys, acc, lengths):
            yield owner, self.keys if owner == self.rank else self._keys_of(owner, rows), sums

    def _wanted(self, needs: Needs) -> list[slice]:
        """The columns of every rank from the first to the last whose gradients are asked for."""
        wants = needs.columns if self.exchange is None else self.exchange.wants
        return [wanted_columns(counts, wants) for counts in self.counts]

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
            yield self.operands.queries, self.shift, units.center_k
            if self.options.symmetric:
                queries, shift = self.ops.queries(units.keys[0], units.anchors, units.center_q, self.bits)
                yield queries, shift if self.turned is None else shift + self.turned, units.center_q

    def _log_constant(self) -> tuple[Tensor, float | Tensor] | None:
        """Expected noise: log T_i = log(λ M c_D(κ)) − κ p_i, (N, 1), and ρ = d log c_D/dκ; κ + hardness in c_D."""
        options = self.options
        if options.noise != "expected":
            return None
        log_c, rho = noise.log_mean_exp_cosine(self.kappa_given + options.hardness, self.D)
        log_weight = options.log_noise_weight + math.log(options.num_noise)
        if isinstance(log_c, Tensor) and isinstance(rho, Tensor):
            sums = self.ops.precision.sums
            return (log_c + log_weight).to(sums) - self.kappa * self.positive, rho.to(sums)
        return log_c + log_weight - self.kappa * self.positive, rho

    # ------------------------------------------------------------------ chunks

    def _row_chunks(self, columns: int) -> list[slice]:
        """Equal chunks of rows, as many a chunk as the workspace holds with their weighted anchors."""
        most = min(self.ops.most_rows, max(1, self.ops.workspace_elements // (columns + self.D)))
        if most >= self.N:
            return [slice(0, self.N)]
        even = math.ceil(self.N / math.ceil(self.N / most))
        step = min(most, math.ceil(even / self.ops.chunk_rows) * self.ops.chunk_rows)
        return steps(self.N, step)

    def _column_blocks(self, counts: Counts, split: bool) -> Iterator[slice]:
        """Blocks of a rank's columns; with ``split`` none straddles the end of the positives."""
        edges = [0, counts.positives, counts.columns] if split else [0, counts.columns]
        for first, last in itertools.pairwise(edges):
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
        keys, wanted = self.keys, wanted_columns(self.options.counts, needs.columns)
        places: list[list[slice]] = []
        if self.exchange is not None:
            keys, wanted, places = self._everyones()
        add, chunks = self.options.has_noise_columns, self._row_chunks(keys.rows.shape[0])
        once = len(chunks) == 1
        acc_rows = ops.products(self.N, self.D, once and not add) if needs.rows else None
        acc_columns = None
        if wanted.stop:
            acc_columns = ops.accumulator(wanted.stop - wanted.start, self.D, once and self.exchange is None)
        state = ops.start(terms, self.units, wanted, acc_columns)
        if add:
            self._sweep_noise(state, acc_rows)
            ops.release()  # a block of wide noise is as large as a tile
        for rows in chunks:
            tile = ops.exp_similarity(queries, keys, rows, state, closing=True)
            part = None if acc_rows is None else cut(acc_rows, rows)
            anchors = None if acc_columns is None else ops.closed_anchors(state, rows)
            ops.grad_products(
                tile, keys.grad_rows, part, add, wanted, anchors, acc_columns, add_columns=rows.start > 0
            )
            del tile
        if self.exchange is not None and acc_columns is not None:
            acc_columns = self._home(acc_columns, places).part(wanted_columns(self.options.counts, needs.columns))
        sums = ops.row_sums(state)
        return sums.losses, Tape(self.units, sums, constant, self.margin), acc_rows, acc_columns

    def _sweep_noise(self, state: Any, acc_rows: Tensor | None) -> None:
        """The noise's part of one sweep."""
        ops = self.ops
        for block, columns in enumerate(self._noise(self.units.center_k)):
            for rows in self._row_chunks(len(columns)):
                tile = ops.exp_similarity(self.operands.queries, columns, rows, state, closing=False)
                part = None if acc_rows is None else cut(acc_rows, rows)
                ops.grad_products(tile, columns.grad_rows, part, block > 0)
                del tile  # the next may take other memory

    def _everyones(self) -> tuple[Columns, slice, list[list[slice]]]:
        """All ranks' columns in one matrix; those whose gradients are asked for; and where each rank's lie.

        Own positives and negatives first, so that what is special keeps its place; then the others'; then all
        queues, which are seldom asked for.
        """
        exchange, ops = self.exchange, self.ops
        assert exchange is not None
        rows = exchange.gather(self.operands.keys, exchange.lengths("columns"))
        owners = [self.rank, *exchange.others]
        pairs = [counts.positives + counts.negatives for counts in self.counts]
        order = [(owner, slice(0, pairs[owner])) for owner in owners]
        order += [(owner, slice(pairs[owner], self.counts[owner].columns)) for owner in owners]
        everyone = torch.cat([rows[owner][part] for owner, part in order])
        grad_rows = everyone.to(ops.precision.gradient)
        ids = self.ids
        if ids is not None:
            none = torch.cat(ids).min() - 1  # an id that nobody has
            full = [torch.cat([x, none.expand(pairs[r] - len(x))]) for r, x in enumerate(ids)]
            ids = [torch.cat([full[owner] for owner in owners])]
        keys = replace(self.keys, rows=everyone, grad_rows=grad_rows, column_ids=None if ids is None else ids[0])
        last = {"queue": len(everyone), "positives": sum(pairs), "negatives": sum(pairs)}
        places: list[list[slice]] = [[] for _ in self.counts]
        stop = max((last[name] for name in exchange.wants), default=0)
        start = 0
        for owner, part in order:
            if start < stop:
                places[owner].append(slice(start, start + part.stop - part.start))
            start += part.stop - part.start
        return keys, slice(0, stop), places

    def _home(self, acc: Accumulator, places: list[list[slice]]) -> Accumulator:
        """All ranks' sums for this rank's columns; places: where each rank's columns lie in ``acc``."""
        exchange = self.exchange
        assert exchange is not None
        grad = exchange.home([[acc.grad[part] for part in parts] for parts in places])
        if acc.sums is None:
            return Accumulator(grad, None)
        return Accumulator(grad, exchange.home([[acc.sums[part] for part in parts] for parts in places]))

    def _row_terms(self, kappa_bound: float) -> tuple[RowTerms, tuple[Tensor, float | Tensor] | None]:
        """What a row's sum is measured against; and t_i with ρ."""
        options, offset = self.options, None
        decoupled, hardness = options.decoupled, options.hardness
        constant = self._log_constant()
        own: Tensor | float = 0.0 if decoupled else 1.0
        if decoupled or 2 * kappa_bound + hardness + options.offset_margin > 0:
            offset = (self.kappa * (1 - self.positive)).add_(hardness + options.offset_margin)
            if not decoupled:
                own = (-offset.clamp_(min=0)).exp_()
        whole = self.margin is None
        shift = self.shift if offset is None else self.shift + offset * LOG2_E
        if constant is None:
            return RowTerms(shift, offset, None, own, decoupled, whole), None
        t = (constant[0] if offset is None else constant[0] - offset).exp()
        return RowTerms(shift, offset, t, own + t, decoupled, whole), (t, constant[1])

    # ------------------------------------------------------------------ two sweeps

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """log1p(R_i), or log R_i, of the rows and, with both directions, of the columns; (N, 1) each, in nats.

        log 0 = −∞ where a row has no negatives left.
        """
        ops, symmetric, queries = self.ops, self.options.symmetric, self.operands.queries
        row = self._start()
        columns: list[tuple[Tensor, Tensor]] = []  # by rank
        if symmetric:
            columns = [(ops.zeros(c.positives, 1) + self.floor, ops.zeros(c.positives, 1)) for c in self.counts]
            columns[self.rank] = self._start()
        self._add_noise(row, columns[self.rank] if symmetric else None)
        shift = self.shift
        row_bias, column_shift = self._column_direction() if symmetric else (shift, [])
        for owner, everything, _ in self._visits(None, []):
            counts = self.counts[owner]
            for rows in self._row_chunks(min(ops.column_block, counts.columns)):
                part = (cut(row[0], rows), cut(row[1], rows))
                for block in self._column_blocks(counts, split=symmetric):
                    other = None
                    if symmetric and block.start < counts.positives:
                        maximum, total = columns[owner]
                        other = (row_bias[rows], column_shift[owner][block], maximum[block, 0], total[block, 0])
                    keys, q = everything.block(block), cut(queries, rows)
                    ops.add_ratios(q, keys, rows.start, block.start, cut(shift, rows), part, other, self.floor)
        if not symmetric:
            return self._log_of(*row), None
        column = columns[0] if self.exchange is None else self.exchange.merged(columns)
        return self._log_of(*row), self._log_of(*column)

    def _add_noise(self, row: tuple[Tensor, Tensor], column: tuple[Tensor, Tensor] | None) -> None:
        for (queries, shift, center), state in zip(self._noise_sides(), (row, column), strict=False):
            assert state is not None
            for columns in self._noise(center):
                for rows in self._row_chunks(len(columns)):
                    part = (state[0][rows], state[1][rows])
                    self.ops.add_ratios(queries[rows], columns, rows.start, 0, shift[rows], part, None, self.floor)

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
        share, row_loss = self._share(row_loss)
        if column_loss is not None:
            more, column_loss = self._share(column_loss)
            share += more
            scale = scale.times(0.5)
        if weights is not None:
            share *= weights
        lost = share if self.margin is None else share * self.margin.slope

        everyones_wanted = self._wanted(needs)
        wanted = everyones_wanted[self.rank]
        acc_rows = ops.zeros(self.N, self.D) if needs.rows else None
        acc = Accumulator(ops.zeros(wanted.stop - wanted.start, self.D), None)
        row_sums, all_column_sums = ops.zeros(self.N, 1), [ops.zeros(counts.columns) for counts in self.counts]
        column_sums = all_column_sums[self.rank]

        # The noise of the column direction goes to the positives' gradient, before any key does.
        acc_keys: Tensor | None = None
        if column_loss is not None and self.options.has_noise_columns:
            if needs.positives:
                acc_keys = acc.grad[: self.N]
            elif needs.temperature:
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
                    del tile
        d_kappa = ops.zeros()
        if needs.temperature and acc_keys is not None:
            of_noise = ops.unit_dots(
                acc_keys, self.units.keys[0], column_sums[: self.N, None], self.units.center_q
            )
            d_kappa += of_noise.sum()

        shift = self.shift + row_loss * LOG2_E
        row_bias = shift
        column_shift: list[Tensor] = []
        column_weights: list[Tensor] | None = None
        if column_loss is not None:
            row_bias, column_shift = self._column_direction(column_loss)
            column_weights = None if weights is None else self._of_positives(weights[:, 0])
        for owner, everything, grad in self._visits(acc.grad, everyones_wanted):
            counts, chosen = self.counts[owner], everyones_wanted[owner]
            for rows in self._row_chunks(min(ops.column_block, counts.columns)):
                q = ops.centered_anchors(self.units, rows) if chosen.stop else None
                for block in self._column_blocks(counts, split=column_loss is not None):
                    other = None
                    if column_loss is not None and block.start < counts.positives:
                        w = None if column_weights is None else column_weights[owner][block]
                        other = (row_bias[rows], column_shift[owner][block], w)
                    keys = everything.block(block)
                    w = None if weights is None else weights[rows]
                    tile = ops.weighted_ratios(
                        self.operands.queries[rows], keys, rows.start, block.start, shift[rows], w,
                        (row_sums[rows], all_column_sums[owner][block]), other,
                    )  # fmt: skip
                    first, last = max(block.start, chosen.start), min(block.stop, chosen.stop)
                    of_columns = None
                    if grad is not None and first < last:
                        of_columns = Accumulator(grad[first - chosen.start : last - chosen.start], None)
                    of_rows = None if acc_rows is None else acc_rows[rows]
                    own = slice(first - block.start, last - block.start)
                    ops.grad_products(tile, keys.grad_rows, of_rows, True, own, q, of_columns)
        if self.exchange is not None and self.exchange.wants:
            column_sums = self.exchange.home([[sums] for sums in all_column_sums])

        side: Side | None = None
        if acc_rows is not None:
            side = Side(acc_rows, lost, row_sums, self.units.center_k, disposable=True)
        acc.sums = column_sums[wanted]
        out, dots = _finish_sides(
            ops, self.options, self.units, needs, acc, lost, side, scale.times(self.kappa),
            disposable=True,
        )  # fmt: skip
        if needs.temperature and dots is not None:
            if self.margin is not None:
                d_kappa += (share * self.margin.turn).sum()
            d_kappa += dots.sum() + self._constant_share(row_loss, column_loss, weights)
            out.kappa = d_kappa * scale.value
        return out

    def _share(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The share of all ratios in the denominator, R/(1 + R) or R/R, (N, 1); and the loss, finite."""
        if not self.options.decoupled:
            return -torch.expm1(-loss), loss
        empty = loss == -math.inf
        return 1.0 - empty.to(loss.dtype), loss.masked_fill(empty, 0.0)

    def _start(self) -> tuple[Tensor, Tensor]:
        """Running maximum (bits) and sum of ratios; expected noise is one more column."""
        constant = self._log_constant()
        if constant is None:
            return self.ops.zeros(self.N, 1) + self.floor, self.ops.zeros(self.N, 1)
        exponent = constant[0] * LOG2_E
        maximum = exponent.clamp(min=self.floor)
        return maximum, torch.exp2(exponent - maximum)

    def _column_direction(self, loss: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """The columns' z_ij − loss_j = q_i·k_j + row_bias_i − column_shift_j, bits; (N, 1) and, by rank, (N,)."""
        shift = self.bits * self.cosines
        row_bias = shift - self.operands.own_products
        if self.turned is not None:
            shift = shift + self.turned
        return row_bias, self._of_positives((shift if loss is None else shift + loss * LOG2_E)[:, 0])

    def _of_positives(self, x: Tensor) -> list[Tensor]:
        """One number for each positive, (N,), of every rank."""
        return [x] if self.exchange is None else self.exchange.gather(x, self.exchange.lengths("positives"))

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

    @property
    def floor(self) -> float:
        """Of running maxima: that of the positive's own ratio, where the denominator holds it."""
        return NO_RATIO if self.options.decoupled else 0.0

    def _log_of(self, maximum: Tensor, total: Tensor) -> Tensor:
        """log(1 + 2^maximum · total), decoupled without the 1, in nats."""
        m = maximum / LOG2_E
        if self.options.decoupled:
            return m + total.log()
        return torch.where(m > 0, m + ((-m).exp() + total).log(), total.log1p())

    # ------------------------------------------------------------------ statistics

    def stats(self, t: float = 2.0) -> dict[str, Tensor]:
        """The figures of ``contrastive_stats``, from one product."""
        ops = self.ops
        row = self._start()
        shift = self.shift
        self._add_noise(row, None)
        log_noise = torch.where(row[1] > 0, row[0] / LOG2_E + row[1].log(), -math.inf)

        count, cosine, potential = ops.zeros(), ops.zeros(), ops.zeros()
        hits = ops.zeros(self.N)
        shares = self.cosines - shift / self.bits  # q̂_i·c
        for rows in self._row_chunks(min(ops.column_block, self.T)):
            hit = torch.ones(rows.stop - rows.start, dtype=torch.bool, device=ops.device)
            for block in self._column_blocks(self.counts[0], split=True):
                part = (row[0][rows], row[1][rows])
                keys = self.keys.block(block)
                for found in ops.similarity(self.operands.queries[rows], keys, rows.start, block.start):
                    piece, tile = found.rows, found.tile
                    i = moved(piece, rows.start)
                    if block.start < self.N:
                        valid = tile > -math.inf
                        s = tile / self.bits + shares[i]
                        count += valid.sum()
                        cosine += s.masked_fill(~valid, 0).sum()
                        potential += (2 * t * (s - 1)).exp_().sum()
                        hit[piece] &= (tile <= shift[i]).all(1)
                    as_rows_(found, keys, i, block.start)
                    merge_ratios(tile, shift[i], 1, part[0][piece], part[1][piece])
            hits[rows] = hit.to(hits.dtype)
        losses = self._log_of(*row)
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
    units, rows, margin, side = tape.units, tape.rows, tape.margin, None
    total, share = rows.total, rows.share
    if margin is not None and total is not None and share is not None:
        total, share = total * margin.slope, share * margin.slope
    if acc_rows is not None:
        sums = rows.total  # Σ_j E_ij, less what the positive has lost
        if tape.constant is not None:
            sums = -tape.constant[0] if sums is None else sums - tape.constant[0]
        side = Side(acc_rows, total, sums, units.center_k, rows.alpha, dtype=dtype)
    out, dots = _finish_sides(
        ops, options, units, needs, acc_columns, share, side, scale.times(kappa), dtype=dtype
    )
    if needs.temperature and dots is not None:
        if tape.constant is not None:
            dots = dots + tape.constant[0] * tape.constant[1]
        if margin is not None and rows.total is not None:
            dots = dots + rows.total * margin.turn
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
    first = wanted_columns(options.counts, needs.columns).start
    for (name, columns), rows in zip(column_spans(options.counts), units.keys, strict=True):
        if acc is None or not getattr(needs, name):
            continue
        part = acc.part(moved(columns, -first))
        sums = None if part.sums is None else part.sums[:, None]
        if name == "positives":
            positives = Side(part.grad, share, sums, units.center_q, None, disposable, dtype)
        else:
            side = Side(part.grad, None, sums, units.center_q, None, disposable, dtype)
            setattr(out, name, ops.finish(rows, side, scale))
    dq, out.positives, dots = ops.finish_pairs(units, anchors, positives, scale)
    out.anchors = dq if needs.anchors else None
    return out, dots


@functools.lru_cache(maxsize=64)  # shapes seldom change, and small batches feel it
def wanted_columns(counts: Counts, wants: frozenset[str]) -> slice:
    """A rank's columns from the first to the last whose gradients are asked for; slice(0, 0): none."""
    wanted = [columns for name, columns in column_spans(counts) if name in wants]
    return slice(wanted[0].start, wanted[-1].stop) if wanted else slice(0, 0)


@functools.lru_cache(maxsize=64)
def column_spans(counts: Counts) -> list[tuple[str, slice]]:
    """The inputs whose rows are columns of the similarity matrix, and where they lie."""
    spans, start = [], 0
    for name in ("positives", "negatives", "queue"):
        count = getattr(counts, name)
        if count:
            spans.append((name, slice(start, start + count)))
            start += count
    return spans
