"""The algorithm, written once over a backend's tile operations: one sweep, or two, over the similarity matrix.

z_ij = κ(s_ij − s_ii) + b_ij is the exponent of a ratio, R_i the sum of row i's ratios, log1p(R_i) its loss. With
keys centred by c (k̃ = k̂ − c), s_ij − s_ii = q̂_i·k̃_j − q̂_i·k̃_i: a tile of products and a shift a row.

- ``one_sweep``: E_ij = e^(z_ij − o_i) with an offset o_i known beforehand; gradients are formed at once. Three
  products. Needs the range rule of ``Options.fits_one_sweep``, and one upstream gradient for all rows.
- ``losses`` and ``gradients``: running maxima and sums first, then the tile G of weighted shares. One product and
  three. Right for every temperature, for both directions and for a weight a row.

Gradients of unit rows, in both:  dq̂_i = κ [Σ_j G_ij k̃_j − h_i k̃_i + (Σ_j G_ij − h_i) c], h_i the share of all
ratios, and the mirror image for the keys. docs/numerics.md derives all of it.
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
from .options import Options
from .torch_ops import Columns, Rows, TorchOps, cut, merge_ratios

LOG2_E = 1 / math.log(2)
COLUMN_BLOCK = 8192  # columns of a tile of the two sweeps


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
    anchors: Tensor | None = None
    positives: Tensor | None = None
    negatives: Tensor | None = None
    queue: Tensor | None = None
    kappa: Tensor | None = None  # 0-dim

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.anchors, self.positives, self.negatives, self.queue


@dataclass(slots=True, eq=False)
class Span:
    """One of the inputs whose rows are columns of the similarity matrix, and where they lie."""

    name: str
    rows: Rows
    columns: slice


class Sweep:
    """The operands of a call, normalised and centred once, and the two ways over them."""

    def __init__(
        self,
        ops: TorchOps,
        options: Options,
        kappa: float | Tensor,
        anchors: Tensor,  # (N, D)
        positives: Tensor,  # (N, D)
        negatives: Tensor | None,  # (H, D)
        queue: Tensor | None,  # (Q, D)
        noise_rows: Tensor | None,  # (M, D)
    ) -> None:
        self.ops, self.options = ops, options
        self.noise_rows = noise_rows
        self.N, self.D = anchors.shape
        sums = ops.precision.sums
        self.kappa_given = kappa  # a float has its constants without a device
        if not isinstance(kappa, Tensor):
            kappa = torch.full((), kappa, dtype=sums, device=ops.device)
        self.kappa = kappa.to(sums)
        self.bits = self.kappa * LOG2_E  # κ in base 2

        self.anchors, self.positives = ops.rows(anchors), ops.rows(positives)
        self.center_q, self.center_k = self.anchors.center, self.positives.center
        self.spans = list(self._spans(negatives, queue))
        self.T = self.spans[-1].columns.stop
        product = ops.precision.product
        rows = self.positives.kept_centered(product) if self.T == self.N else None
        made = rows is not None
        if rows is None:
            rows = torch.empty(self.T, self.D, dtype=product, device=ops.device)
        # κ log2(e) q̂_i, (N, D), and q̂_i·k̃_i, (N,)
        out = None if made else rows[: self.N]
        self.queries, self.dots = ops.normalise_pairs(self.anchors, self.positives, self.bits, out)
        self.keys = self._keys(rows)

    @functools.cached_property
    def cosines(self) -> Tensor:
        """s_ii, (N,)"""
        return self.ops.cosines(self.anchors, self.positives)

    def _spans(self, negatives: Tensor | None, queue: Tensor | None) -> Iterator[Span]:
        yield Span("positives", self.positives, slice(0, self.N))
        start = self.N
        for name, x in (("negatives", negatives), ("queue", queue)):
            if x is not None:
                yield Span(name, self.ops.rows(x, self.center_k), slice(start, start + x.shape[0]))
                start += x.shape[0]

    def _keys(self, rows: Tensor) -> Columns:
        """All columns but the noise; ``rows`` holds the positives' already."""
        ops, options, precision = self.ops, self.options, self.ops.precision
        for span in self.spans[1:]:
            ops.centered_rows(span.rows, slice(0, len(span.rows)), rows.dtype, out=rows[span.columns])
        grad_rows = rows
        if precision.gradient != precision.product:
            grad_rows = torch.empty_like(rows, dtype=precision.gradient)
            for span in self.spans:
                ops.centered_rows(
                    span.rows, slice(0, len(span.rows)), grad_rows.dtype, out=grad_rows[span.columns]
                )
        if precision.product == precision.sums:
            for span in self.spans:
                span.rows.keep_centered(rows[span.columns])
        ids = options.ids
        if ids is not None and options.negative_ids is not None:
            ids = torch.cat([ids, options.negative_ids])
        return Columns(
            rows,
            grad_rows,
            num_positives=self.N,
            num_negatives=options.num_negatives,
            own_bias=options.own_log_weight * LOG2_E,
            row_ids=options.ids,
            column_ids=ids,
        )

    # ------------------------------------------------------------------ noise

    def _noise(self, center: Tensor) -> Iterator[Columns]:
        """The noise as columns centred by ``center``, a block at a time, the same at each call."""
        options, precision = self.options, self.ops.precision
        for block in range(noise.num_blocks(options.num_noise) if options.has_noise_columns else 0):
            if self.noise_rows is not None:
                x = self.noise_rows[block * noise.NOISE_BLOCK : (block + 1) * noise.NOISE_BLOCK].to(precision.sums)
            else:
                assert options.seed is not None
                x = noise.sample_block(
                    options.seed, block, options.num_noise, self.D, precision.sums, self.ops.device
                )
            rows = self.ops.rows(x, center)
            copies = [
                self.ops.centered_rows(rows, slice(0, len(rows)), dtype)
                for dtype in dict.fromkeys((precision.product, precision.gradient))
            ]
            yield Columns(copies[0], copies[-1], bias=options.log_noise_weight * LOG2_E)

    def _noise_sides(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows that meet the noise: their queries, q̂_i·k̃_i in bits, and the centre of their columns."""
        if self.options.has_noise_columns:
            yield self.queries, self.bits * self.dots, self.center_k
            if self.options.symmetric:
                queries, dots = self.ops.normalise_pairs(self.positives, self.anchors, self.bits, None)
                yield queries, self.bits * dots, self.center_q

    def _log_constant(self) -> tuple[Tensor, float | Tensor] | None:
        """Expected noise: log T_i = log(λ M c_D(κ)) − κ s_ii, (N,), and ρ = d log c_D/dκ."""
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
            for start in range(first, last, COLUMN_BLOCK):
                yield slice(start, min(last, start + COLUMN_BLOCK))

    # ------------------------------------------------------------------ one sweep

    def one_sweep(self, needs: Needs, kappa_bound: float, memory: dict[str, Tensor]) -> tuple[Tensor, Gradients]:
        """Losses in nats, (N,), and the gradients of their sum, in ``memory``: by name, of the inputs' shapes."""
        ops, dtype = self.ops, self.ops.precision.gradient
        shift = self.bits * self.dots
        own = torch.ones_like(shift)  # the positive's term, e^(−o_i), and the constant's
        offset = None
        if 2 * kappa_bound + self.options.offset_margin > 0:
            offset = (self.kappa * (1 - self.cosines)).add_(self.options.offset_margin).clamp_(min=0)
            shift += offset * LOG2_E
            own = (-offset).exp_()
        constant = self._log_constant()
        if constant is not None:
            t = (constant[0] if offset is None else constant[0] - offset).exp()
            own += t
        sums = ops.zeros(self.N)
        alpha = torch.empty_like(sums)  # 1/(own + Σ_j E_ij)
        acc_rows = memory.get("anchors")
        wanted = [span for span in self.spans if getattr(needs, span.name)]
        accs = [memory[span.name] for span in wanted]
        weights = [ops.zeros(len(span.rows)) for span in wanted]  # A_j = Σ_i α_i E_ij

        for block, columns in enumerate(self._noise(self.center_k)):
            for rows in self._row_chunks(columns.rows.shape[0]):
                self._exp_tile(rows, columns, shift, sums, acc_rows, add=block > 0)
        for rows in self._row_chunks(self.T):
            add = self.options.has_noise_columns
            tile = self._exp_tile(rows, self.keys, shift, sums, acc_rows, add)
            factor = torch.add(cut(own, rows), cut(sums, rows), out=cut(alpha, rows)).reciprocal_()
            if wanted:
                q = ops.centered_rows(self.anchors, rows, dtype, factor)
                for span, acc, weight in zip(wanted, accs, weights, strict=True):
                    part = tile if len(self.spans) == 1 else tile[:, span.columns]
                    ops.grad_columns(part, q, acc, add=rows.start > 0)
                    ops.column_sums(part, factor, weight)

        total = sums if constant is None else sums + t
        d_kappa = None
        if acc_rows is not None:
            of_center = None if constant is None else (self.center_k, -t)
            dots = ops.finish(acc_rows, self.anchors, self.kappa * alpha, (self.positives, total), of_center)
            if needs.temperature:
                d_kappa = alpha.dot(dots if constant is None else dots + t * constant[1])
        self._finish_columns(wanted, accs, weights, alpha * total, self.kappa)
        losses = total.log1p()
        if offset is not None:
            losses = torch.where(offset > 0, torch.logaddexp(ops.zeros(), offset + total.log()), losses)
        gradients = {span.name: acc for span, acc in zip(wanted, accs, strict=True)}
        return losses, Gradients(acc_rows if needs.anchors else None, **gradients, kappa=d_kappa)

    def _exp_tile(
        self, rows: slice, columns: Columns, shift: Tensor, sums: Tensor, acc_rows: Tensor | None, add: bool
    ) -> Tensor:
        tile, tile_sums = self.ops.exp_similarity(cut(self.queries, rows), columns, rows.start, cut(shift, rows))
        cut(sums, rows).add_(tile_sums)
        if acc_rows is not None:
            self.ops.grad_rows(tile, columns.grad_rows, cut(acc_rows, rows), add)
        return tile

    def _finish_columns(
        self, wanted: list[Span], accs: list[Tensor], weights: list[Tensor], share: Tensor, scale: Tensor
    ) -> None:
        """Of the keys' unit rows: the weights' sums are A, ``share`` is what the positives lose."""
        for span, acc, weight in zip(wanted, accs, weights, strict=True):
            pair = None
            if span.name == "positives":
                pair = (self.anchors, share)
                weight = weight - share
            self.ops.finish(acc, span.rows, scale, pair, (self.center_q, weight))

    # ------------------------------------------------------------------ two sweeps

    def losses(self) -> tuple[Tensor, Tensor | None]:
        """log1p(R_i) of the rows and, with both directions, of the columns; (N,) each, in nats."""
        ops, symmetric = self.ops, self.options.symmetric
        row, column = self._start(), self._start() if symmetric else None
        for (queries, shift, center), state in zip(self._noise_sides(), (row, column), strict=False):
            assert state is not None
            for columns in self._noise(center):
                for rows in self._row_chunks(columns.rows.shape[0]):
                    part = (state[0][rows], state[1][rows])
                    ops.add_ratios(queries[rows], columns, rows.start, 0, shift[rows], part)
        shift = self.bits * self.dots
        row_bias, column_shift = self._column_direction()
        for rows in self._row_chunks(min(COLUMN_BLOCK, self.T)):
            part = (row[0][rows], row[1][rows])
            for block in self._column_blocks(split=symmetric):
                other = None
                if column is not None and block.start < self.N:
                    other = (row_bias[rows], column_shift[block], column[0][block], column[1][block])
                keys = self.keys.block(block)
                ops.add_ratios(self.queries[rows], keys, rows.start, block.start, shift[rows], part, other)
        return _log1p_sum(*row), None if column is None else _log1p_sum(*column)

    def gradients(
        self,
        needs: Needs,
        row_loss: Tensor,  # (N,), from the first sweep
        column_loss: Tensor | None,
        weights: Tensor | None,  # (N,)
        scale: Tensor,  # 0-dim
    ) -> Gradients:
        """Gradients of scale · Σ_i w_i loss_i; without weights all w_i are 1."""
        ops, dtype = self.ops, self.ops.precision.gradient
        share = -torch.expm1(-row_loss)  # R/(1 + R)
        if column_loss is not None:
            share -= torch.expm1(-column_loss)
            scale = scale / 2
        if weights is not None:
            share *= weights

        acc_rows = ops.zeros(self.N, self.D) if needs.rows else None
        wanted = [span for span in self.spans if getattr(needs, span.name)]
        accs = [ops.zeros(len(span.rows), self.D) for span in wanted]
        row_sums, column_sums = ops.zeros(self.N), ops.zeros(self.T)

        # The noise of the column direction goes to the positives' gradient, before any key does.
        acc_keys = accs[0] if needs.positives else None
        if acc_keys is None and needs.temperature and column_loss is not None and self.options.has_noise_columns:
            acc_keys = ops.zeros(self.N, self.D)
        sides = zip(
            self._noise_sides(),
            (row_loss, column_loss),
            (acc_rows, acc_keys),
            (row_sums, column_sums[: self.N]),
            strict=False,
        )
        for (queries, shift, center), loss, acc, sums in sides:
            if acc is None or loss is None:
                continue
            shift = shift + loss * LOG2_E
            for columns in self._noise(center):
                unused = ops.zeros(columns.rows.shape[0])
                for rows in self._row_chunks(columns.rows.shape[0]):
                    w = None if weights is None else weights[rows]
                    tile = ops.weighted_ratios(
                        queries[rows], columns, rows.start, 0, shift[rows], w, (sums[rows], unused)
                    )
                    ops.grad_rows(tile, columns.grad_rows, acc[rows])
        d_kappa = ops.zeros()
        if needs.temperature and acc_keys is not None and column_loss is not None:
            d_kappa += ops.unit_dots(acc_keys, self.positives, (self.center_q, column_sums[: self.N])).sum()

        shift = self.bits * self.dots + row_loss * LOG2_E
        row_bias, column_shift = self._column_direction()
        if column_loss is not None:
            column_shift = column_shift + column_loss * LOG2_E
        for rows in self._row_chunks(min(COLUMN_BLOCK, self.T)):
            q = ops.centered_rows(self.anchors, rows, dtype) if wanted else None
            for block in self._column_blocks(split=column_loss is not None):
                other = None
                if column_loss is not None and block.start < self.N:
                    w = None if weights is None else weights[block]
                    other = (row_bias[rows], column_shift[block], w)
                keys = self.keys.block(block)
                w = None if weights is None else weights[rows]
                tile = ops.weighted_ratios(
                    self.queries[rows], keys, rows.start, block.start, shift[rows], w,
                    (row_sums[rows], column_sums[block]), other,
                )  # fmt: skip
                if acc_rows is not None:
                    ops.grad_rows(tile, keys.grad_rows, acc_rows[rows])
                for span, acc in zip(wanted, accs, strict=True):
                    first = max(block.start, span.columns.start)
                    last = min(block.stop, span.columns.stop)
                    if q is not None and first < last:
                        part = acc[first - span.columns.start : last - span.columns.start]
                        ops.grad_columns(tile[:, first - block.start : last - block.start], q, part)

        if acc_rows is not None:
            of_center = (self.center_k, row_sums - share)
            dots = ops.finish(acc_rows, self.anchors, self.kappa * scale, (self.positives, share), of_center)
            d_kappa += dots.sum()
            d_kappa += self._constant_share(row_loss, column_loss, weights)
        column_parts = [column_sums[span.columns] for span in wanted]
        self._finish_columns(wanted, accs, column_parts, share, self.kappa * scale)
        gradients = {span.name: acc for span, acc in zip(wanted, accs, strict=True)}
        return Gradients(acc_rows if needs.anchors else None, **gradients, kappa=d_kappa * scale)

    def _start(self) -> tuple[Tensor, Tensor]:
        """Running maximum (bits) and sum of ratios; expected noise is one more column."""
        constant = self._log_constant()
        if constant is None:
            return self.ops.zeros(self.N), self.ops.zeros(self.N)
        exponent = constant[0] * LOG2_E
        maximum = exponent.clamp(min=0)
        return maximum, torch.exp2(exponent - maximum)

    def _column_direction(self) -> tuple[Tensor, Tensor]:
        """κ(s_ij − s_jj) = q_i·k_j + row_bias_i − column_shift_j, in bits; (N,) each."""
        return self.bits * (self.cosines - self.dots), self.bits * self.cosines

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
        return constant[1] * (share.sum() if weights is None else share.dot(weights))

    # ------------------------------------------------------------------ statistics

    def stats(self, t: float = 2.0) -> dict[str, Tensor]:
        """The figures of ``contrastive_stats``, from one product."""
        ops = self.ops
        row = self._start()
        shift = self.bits * self.dots
        for queries, _, center in self._noise_sides():
            for columns in self._noise(center):
                for rows in self._row_chunks(columns.rows.shape[0]):
                    ops.add_ratios(
                        queries[rows], columns, rows.start, 0, shift[rows], (row[0][rows], row[1][rows])
                    )
        log_noise = torch.where(row[1] > 0, row[0] / LOG2_E + row[1].log(), -math.inf)

        count, cosine, potential = ops.zeros(), ops.zeros(), ops.zeros()
        hits = ops.zeros(self.N)
        shares = self.cosines - self.dots  # q̂_i·c
        for rows in self._row_chunks(min(COLUMN_BLOCK, self.T)):
            hit = torch.ones(rows.stop - rows.start, dtype=torch.bool, device=ops.device)
            for block in self._column_blocks(split=True):
                part = (row[0][rows], row[1][rows])
                for piece, tile in ops.similarity(
                    self.queries[rows], self.keys.block(block), rows.start, block.start
                ):
                    i = slice(rows.start + piece.start, rows.start + piece.stop)
                    if block.start < self.N:
                        valid = tile > -math.inf
                        s = tile / self.bits + shares[i, None]
                        count += valid.sum()
                        cosine += s.masked_fill(~valid, 0).sum()
                        potential += (2 * t * (s - 1)).exp_().sum()
                        hit[piece] &= (tile <= shift[i, None]).all(1)
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


def _log1p_sum(maximum: Tensor, total: Tensor) -> Tensor:
    """log(1 + 2^maximum · total) in nats, for maximum >= 0."""
    m = maximum / LOG2_E
    return torch.where(m > 0, m + ((-m).exp() + total).log(), total.log1p())
