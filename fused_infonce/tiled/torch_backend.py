"""The torch backend: any device, no N×M tensor, in place, in cache-sized slices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import noise
from ..entry_terms import apply_to_rows_
from ..variants import exp2_normal_, least_maximum, row_loss, transformed_loss, transforms_loss
from .backend import OnePassRows
from .operands import Accumulator, Columns, NormalizedBatch, RowDenominator, RowStats
from .problem import LOG2_E, shift_slice
from .torch_tiles import TileSlice, TorchTiles

# Where ratios can be far below 1, tiles hold 2^20 times them: their products with components of unit rows, and the
# sums of these, stay normal numbers, which a CPU adds several times as fast as subnormal ones.
TINY_TILE_UNIT_LOG2 = 20.0


class TorchBackend(TorchTiles):
    """See ``backend.TileBackend``; memory, rows and tiles are in the ``torch_…`` files."""

    chunk_multiple = 1
    multiprocessors = 1
    noise_block = noise.NOISE_BLOCK
    supports_row_maximum = True

    def one_pass_rows(
        self,
        denominator: RowDenominator,
        batch: NormalizedBatch,
        columns: slice,
        acc: Accumulator | None,
        needs_tiles: bool,  # they are computed in place, needed or not
    ) -> OnePassRows:
        return TorchOnePassRows(self, denominator, batch, columns, None if acc is None else acc.sums)


class TorchOnePassRows:
    """Sums of the rows of one pass. Their maxima are kept in base 2, where they are the rows' offsets."""

    def __init__(
        self,
        backend: TorchBackend,
        denominator: RowDenominator,
        batch: NormalizedBatch,
        columns: slice,  # whose gradients are requested
        column_sums: Tensor | None,  # (n,) their Σ_i α_i E_ij
    ) -> None:
        N = len(batch.anchors.x)
        self.backend, self.denominator, self.batch = backend, denominator, batch
        self.columns, self.column_sums = columns, column_sums
        self.sums, self.alpha = backend.zeros(N, 1), backend.empty(N, 1)
        self.maximum: Tensor | None = None
        self.unit_log2 = 0.0  # a tile holds 2^unit_log2 E_ij, and ``sums`` their sums
        if denominator.offset_is_maximum:
            self.unit_log2 = TINY_TILE_UNIT_LOG2
            self.maximum = backend.zeros(N, 1) + least_maximum(denominator.options)
            if denominator.constant is not None:
                self.maximum = torch.maximum(self.maximum, denominator.constant * LOG2_E)
        # Exact products can sum the positive's share with the negatives': −Σ_j E_ij stands on the tile's diagonal.
        self.on_diagonal = denominator.positive_on_diagonal and not backend.precision.low_precision_products

    def exp_tile(
        self, queries: Tensor, columns: Columns, rows: slice, is_last_block: bool
    ) -> tuple[Tensor, Tensor | None]:
        backend = self.backend
        out = backend.tile(rows.stop - rows.start, len(columns))
        rescale = None if self.maximum is None else backend.empty(len(out), 1)
        for part in backend.logit_slices(queries[rows], columns, rows.start, 0, out):
            i, tile = shift_slice(part.rows, rows.start), part.tile
            apply_to_rows_(tile, part.scores, columns.terms, i.start, 0)
            shift = self.denominator.row_shift_log2[i]
            if self.maximum is not None and rescale is not None:
                maximum = torch.maximum(self.maximum[i], tile.amax(1, keepdim=True) - shift)
                rescale[part.rows] = factor = torch.exp2(self.maximum[i] - maximum)
                self.sums[i] *= factor
                self.maximum[i] = maximum
                shift = shift + (maximum - self.unit_log2)
            tile.sub_(shift)
            tile.exp2_() if self.maximum is None else exp2_normal_(tile, self.unit_log2)
            self.sums[i] += tile.sum(1, keepdim=True)
            if is_last_block:
                self._close(part, i)
            if tile.dtype != out.dtype:  # elsewhere the tile is a part of it
                out[part.rows].copy_(tile)
        return out, rescale

    def _close(self, part: TileSlice, rows: slice) -> None:
        """Computes α_i, and what follows from it for the tile."""
        total, positive_term = self._total(rows)
        alpha = (total + positive_term).reciprocal_()
        if self.denominator.options.decoupled:  # a row without negatives
            alpha.nan_to_num_(nan=math.nan, posinf=0.0)
        if transforms_loss(self.denominator.options):
            alpha.mul_(transformed_loss(self._losses(total, rows), self.denominator.options)[1])
        self.alpha[rows] = alpha
        if self.column_sums is not None:
            self.column_sums.addmv_(part.tile[:, self.columns].T, alpha[:, 0])
        if self.on_diagonal and part.diagonal is not None:
            part.diagonal.sub_(total.squeeze(1) * 2.0**self.unit_log2)  # from 0

    def _total(self, rows: slice) -> tuple[Tensor, Tensor | float]:
        """R_i and the positive's part of the denominator, both times e^(−o_i)."""
        total, term = self.sums[rows], self.denominator.positive_term
        if self.unit_log2:
            total = total * 2.0**-self.unit_log2
        if self.denominator.constant is not None:
            total = total + self._constant(rows)
        if self.maximum is not None and not self.denominator.options.decoupled:
            return total, torch.exp2(-self.maximum[rows])
        return total, term[rows] if isinstance(term, Tensor) else term

    def _constant(self, rows: slice) -> Tensor:
        constant = self.denominator.constant
        assert constant is not None
        if self.maximum is None:
            return constant[rows]
        return (constant[rows] - self.maximum[rows] / LOG2_E).exp_()

    def _losses(self, total: Tensor, rows: slice) -> Tensor:
        offset = self.denominator.offset if self.maximum is None else self.maximum / LOG2_E
        return row_loss(total, None if offset is None else offset[rows], self.denominator.options)

    def weighted_anchors(self, rows: slice) -> Tensor:
        column_major = self.backend.is_column_major(self.columns.stop - self.columns.start)
        return self.backend.centered_anchors(self.batch, rows, self.alpha[rows], column_major)

    def stats(self) -> RowStats:
        known, every = self.denominator, slice(0, len(self.sums))
        total, _ = self._total(every)
        losses = self._losses(total, every)
        unit = 2.0**self.unit_log2
        constant_share = None if known.constant is None else self.alpha * self._constant(every) * unit
        share = None if self.on_diagonal else self.alpha * total * unit
        return RowStats(self.alpha, losses, share, constant_share, unit)
