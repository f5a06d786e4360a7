"""The backend of the Triton kernels: tiles of logits, and one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import variants
from ..kernels import products, ratios, similarity
from ..kernels import rows as row_kernels
from ..kernels.common import Counts, Guide, Ids, Terms
from ..kernels.settings import Tile
from .backend import OnePassRows
from .operands import Accumulator, Columns, NormalizedBatch, RowDenominator, RowStats
from .triton_rows import TritonRows


class TritonBackend(TritonRows):
    """See ``backend.TileBackend``."""

    supports_row_maximum = False  # a program sees a tile of a row, never the whole row

    def one_pass_rows(
        self,
        denominator: RowDenominator,
        batch: NormalizedBatch,
        columns: slice,
        acc: Accumulator | None,
        needs_tiles: bool,
    ) -> OnePassRows:
        return TritonOnePassRows(self, denominator, batch, columns, needs_tiles)

    def tile_settings(self, terms: Terms, usual: Tile) -> Tile:
        return self.settings.guided if terms.guide is not None else usual

    def add_ratios(
        self,
        queries: Tensor,  # (C, D)
        columns: Columns,  # (B, D)
        i0: int,
        j0: int,
        row_shift_log2: Tensor,  # (C, 1)
        rows: tuple[Tensor, Tensor],  # running maximum and Σ 2^(z − maximum), (C, 1) each
        cols: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        least_maximum_log2: float,
        products: Tensor | None = None,
    ) -> None:
        assert products is None
        terms, counts = _terms(columns)
        of_rows, of_columns = ratios.ratio_sums(
            queries, columns.rows, i0, j0, row_shift_log2, None if cols is None else cols[:2],
            terms, counts, self.tile_settings(terms, self.settings.ratios), least_maximum_log2,
        )  # fmt: skip
        _merge(of_rows, 1, rows)
        if cols is not None and of_columns is not None:
            _merge(of_columns, 0, cols[2:])

    def weighted_ratios(
        self,
        queries: Tensor,  # (C, D)
        columns: Columns,  # (B, D)
        i0: int,
        j0: int,
        row_shift_log2: Tensor,  # (C, 1)
        weights: Tensor | None,  # (C, 1)
        sums: tuple[Tensor, Tensor],  # of the tile's rows (C, 1) and columns (B,), added to
        cols: tuple[Tensor, Tensor, Tensor | None] | None,
        products: Tensor | None = None,
    ) -> Tensor:
        assert products is None
        out = self.tile(queries.shape[0], len(columns))
        terms, counts = _terms(columns)
        of_rows, of_columns = ratios.weighted_ratios(
            queries, columns.rows, out, i0, j0, row_shift_log2, weights, cols, terms, counts,
            self.tile_settings(terms, self.settings.ratios),
        )  # fmt: skip
        sums[0].add_(of_rows.sum(1, keepdim=True))
        sums[1].add_(of_columns.sum(0))
        return out

    def grad_products(
        self,
        tile: Tensor,  # (C, T)
        keys: Tensor,  # (T, D)
        acc_rows: Tensor | None,  # (C, D)
        add_rows: bool,
        columns: slice = slice(0, 0),
        anchors: Tensor | None = None,  # (C, D)
        acc: Accumulator | None = None,  # of these columns
        add_columns: bool = True,
    ) -> None:
        if acc_rows is None and acc is None:
            return
        products.grad_products(
            tile, keys, acc_rows, add_rows, tile[:, columns], anchors,
            None if acc is None else acc.grad, add_columns, self.settings.products, self.settings.library_products,
        )  # fmt: skip


class TritonOnePassRows:
    """Sums of the rows of one pass; the offsets are known before it."""

    def __init__(
        self,
        backend: TritonBackend,
        denominator: RowDenominator,
        batch: NormalizedBatch,
        columns: slice,  # whose gradients are requested
        needs_tiles: bool,
    ) -> None:
        self.backend, self.denominator, self.batch, self.columns = backend, denominator, batch, columns
        self.needs_tiles = needs_tiles
        self.sums: Tensor | None = None  # (N, 1) of the columns so far, but for the last block
        # (N, 1) each, of the rows whose last block is computed
        self.alpha, self.total, self.share, self.losses = backend.vectors(4, len(batch.anchors.inv_norm))
        self.anchors: Tensor | None = None  # (C, D) weighted anchors of the rows computed last
        own, constant = denominator.positive_term, denominator.constant
        self.own = own if constant is None else constant + own  # what the negatives' sum is added to

    def exp_tile(
        self, queries: Tensor, columns: Columns, rows: slice, is_last_block: bool
    ) -> tuple[Tensor, Tensor | None]:
        backend, n, shift = self.backend, rows.stop - rows.start, self.denominator.row_shift_log2
        out = backend.tile(n, len(columns)) if self.needs_tiles else None
        terms, counts = _terms(columns)
        partials = similarity.exp_similarity(
            queries[rows], columns.rows, out, shift[rows], rows.start, terms, counts,
            backend.tile_settings(terms, backend.settings.similarity),
        )  # fmt: skip
        if is_last_block:
            self._close(partials, rows)
        else:
            if self.sums is None:
                self.sums = torch.zeros_like(shift)
            self.sums[rows] += partials.sum(1, keepdim=True)
        return queries[:0] if out is None else out, None

    def _close(self, partials: Tensor, rows: slice) -> None:
        """Computes α_i and what follows from it."""
        backend, known, batch = self.backend, self.denominator, self.batch
        x = inv_norm = self.anchors = None
        if self.columns.stop:
            x, inv_norm = batch.anchors.x, batch.anchors.inv_norm
            self.anchors = backend.rows(rows.stop - rows.start, x.shape[1], backend.precision.gradient)
        row_kernels.close_rows(
            partials, self.sums, self.own if isinstance(self.own, Tensor) else None, known.constant, known.offset,
            (self.alpha, self.total, self.share, self.losses), rows.start, x, inv_norm, batch.center_q,
            self.anchors, known.options.decoupled, backend.settings.row_elements,
        )  # fmt: skip
        if variants.transforms_loss(known.options):
            slope = variants.transformed_loss(self.losses[rows], known.options)[1]
            weighted = [self.alpha[rows], self.share[rows]]
            for x in weighted if self.anchors is None else (*weighted, self.anchors):
                x.mul_(slope)

    def weighted_anchors(self, rows: slice) -> Tensor:
        """α_i H q̂_i (``kernels.rows``), or α_i q̂_i where products are exact."""
        assert self.anchors is not None
        return self.anchors

    def stats(self) -> RowStats:
        constant = self.denominator.constant
        return RowStats(self.alpha, self.losses, self.share, None if constant is None else self.alpha * constant)


def _terms(columns: Columns) -> tuple[Terms, Counts]:
    """The terms of entries, as the kernels take them."""
    terms = columns.terms
    guide = None
    ids: list[Ids] = []
    if terms.row_ids is not None and terms.column_ids is not None:
        each = terms.row_ids.ndim  # (N,), or (N, 2)
        both = (x.view(len(x), each).unbind(1) for x in (terms.row_ids, terms.column_ids))
        ids = [Ids(of_rows, of_columns, each) for of_rows, of_columns in zip(*both, strict=True)]
    if terms.limits is not None and terms.limits.guide is not None:
        rows, guides = terms.limits.guide
        guide = Guide(rows, guides, rows.shape[1], rows.stride(0), guides.stride(0))
    found = Terms(
        bias=float(terms.bias),
        own_bias=float(terms.own_bias) if terms.own_bias else None,
        ids=ids[0] if ids else None,
        second_ids=ids[1] if len(ids) > 1 else None,
        limits=None if terms.limits is None else terms.limits.rows,
        column_limits=None if terms.limits is None else terms.limits.columns,
        guide=guide,
        column_bias=terms.column_bias,
    )
    return found, Counts(terms.num_positives, terms.num_negatives, len(ids[0].columns) if ids else 0)


def _merge(parts: tuple[Tensor, Tensor], dim: int, running: tuple[Tensor, Tensor]) -> None:
    """Merges maxima and sums along ``dim`` into running ones, in place, always in the same order."""
    (maxima, sums), (maximum, total) = parts, running
    peak = torch.maximum(maximum, maxima.amax(dim, keepdim=dim == 1))
    sums.mul_(maxima.sub_(peak).exp2_())
    total.mul_(torch.exp2(maximum - peak)).add_(sums.sum(dim, keepdim=dim == 1))
    maximum.copy_(peak)
