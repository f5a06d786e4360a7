"""The backend of the Triton kernels: launches them, and makes the memory they need."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import variants
from ..distributed import mean_unit_row
from ..kernels import noise, normalise, products, ratios, similarity
from ..kernels.common import precision_of
from ..kernels.settings import Settings, Tile, cdiv, default_settings, target_of
from .backend import OnePassRows
from .operands import (
    Accumulator,
    Columns,
    GradScale,
    NormalizedBatch,
    NormalizedRows,
    Operands,
    Precision,
    RowDenominator,
    RowGradArgs,
    RowStats,
)  # fmt: skip

DEFAULT_WORKSPACE = 256 << 20
MIN_ROWS = 1024  # rows a chunk below which the traffic of the columns' accumulator would set the time
ALIGN = 16  # elements that strides are multiples of: kernels load the wider for it, tensor maps want 16 bytes


class TritonBackend:
    """See ``backend.TileBackend``."""

    chunk_multiple = 128  # whole tiles of products
    max_chunk_rows = 1 << 40
    supports_row_maximum = False  # a program sees a tile of a row, never the whole row
    column_block = 1 << 40  # tiles are as wide as the matrix
    noise_block = 8192  # rows that are drawn at a time

    def __init__(
        self,
        precision: Precision,
        device: torch.device,
        workspace_bytes: int | None,
        rows: int,
        columns: int,
        settings: Settings | None = None,
    ) -> None:
        self.precision = precision
        self.device = device
        dtype = precision.product
        self.settings = settings or default_settings(
            target_of(device), dtype, precision_of(dtype, device), rows, columns
        )
        stored = precision.gradient.itemsize
        budget = workspace_bytes or max(DEFAULT_WORKSPACE, min(rows, MIN_ROWS) * columns * stored)
        # Partials, weighted anchors and vectors take the rest.
        self.workspace_elements = budget * 7 // 8 // stored
        self._tile: Tensor | None = None

    # ------------------------------------------------------------------ memory

    def release(self) -> None:
        """Gives the tiles' memory back."""
        self._tile = None

    def tile(self, rows: int, columns: int) -> Tensor:
        """A tile's memory, overwritten by the next one's; rows are aligned. → (rows, columns)"""
        width = cdiv(columns, ALIGN) * ALIGN
        if self._tile is None or self._tile.numel() < rows * width:
            self._tile = None  # not beside the larger one
            self._tile = torch.empty(rows * width, dtype=self.precision.gradient, device=self.device)
        return self._tile[: rows * width].view(rows, width)[:, :columns]

    def tile_settings(self, special: dict[str, object], usual: Tile) -> Tile:
        return self.settings.guided if special["HAS_GUIDE"] else usual

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def row_products(self, n: int, D: int, single_chunk: bool) -> Tensor:
        return self.empty(n, D)

    def column_accumulator(self, n: int, D: int, single_chunk: bool) -> Accumulator:
        if not self.precision.low_precision_products:
            return Accumulator(self.empty(n, D), None)
        padded = self._rows(n, D + similarity.PAD, torch.float32)
        return Accumulator(padded[:, :D], padded[:, D])

    def _rows(self, n: int, D: int, dtype: torch.dtype) -> Tensor:
        """Memory for aligned rows. → (n, D)"""
        return torch.empty(n, cdiv(D, ALIGN) * ALIGN, dtype=dtype, device=self.device)[:, :D]

    def anchor_rows(self, n: int, D: int) -> Tensor:
        """Memory for weighted anchors, and for their weights where the products sum those."""
        pad = similarity.PAD if self.precision.low_precision_products else 0
        return self._rows(n, D + pad, self.precision.gradient)

    def _copies(self, n: int, D: int) -> tuple[Tensor, Tensor | None]:
        """Memory for rows in the product dtype and, where that is another, in the gradient dtype."""
        product, gradient = self.precision.product, self.precision.gradient
        return self._rows(n, D, product), self._rows(n, D, gradient) if gradient != product else None

    # ------------------------------------------------------------------ rows

    def normalise(
        self,
        anchors: Tensor,  # (N, D)
        columns: list[Tensor],  # positives (N, D), and what else is given
        scale_log2: float | Tensor,
        centers: tuple[Tensor, Tensor] | None,
        paired: bool = True,
    ) -> tuple[NormalizedBatch, Operands]:
        N, D = anchors.shape
        pair, pairs = (columns[0], N) if paired else (anchors.new_zeros(1, D).expand(N, D), 0)
        if not paired and centers is None:
            centers = mean_unit_row(anchors, torch.float32), mean_unit_row(columns[0], torch.float32)
        queries = self._rows(N, D, self.precision.product)
        keys, grad_keys = self._copies(sum(x.shape[0] for x in columns), D)
        center_q = (
            (self.empty(D) if centers is None else centers[0]) if self.precision.low_precision_products else None
        )
        center_k = self.empty(D) if centers is None else centers[1]
        r_q, r_k, shift, cosines, chords = self.empty(5, N, 1).unbind()
        normalise.normalise_pairs(
            anchors, pair, scale_log2, queries, keys[:N] if paired else None,
            None if grad_keys is None or not paired else grad_keys[:N],
            (r_q, r_k, shift, cosines, chords), center_q, center_k, centers is None, self.settings.row_elements,
        )  # fmt: skip
        rows = [NormalizedRows(columns[0], r_k)] if paired else []
        start = pairs
        for x in columns[len(rows) :]:
            part = slice(start, start + x.shape[0])
            r = self._normalise_rows(x, center_k, keys[part], None if grad_keys is None else grad_keys[part])
            rows.append(NormalizedRows(x, r))
            start = part.stop
        batch = NormalizedBatch(NormalizedRows(anchors, r_q), rows, center_q, center_k, cosines, chords)
        return batch, Operands(queries, keys, keys if grad_keys is None else grad_keys, shift)

    def _normalise_rows(self, x: Tensor, center: Tensor | None, rows: Tensor, grad_rows: Tensor | None) -> Tensor:
        r = self.empty(x.shape[0], 1)
        normalise.normalise_rows(x, center, rows, grad_rows, r, self.settings.row_elements)
        return r

    def queries(
        self, q: NormalizedRows, k: NormalizedRows, center: Tensor | None, scale_log2: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        n, D = q.x.shape
        queries, shift = self._rows(n, D, self.precision.product), torch.empty_like(q.inv_norm)
        unused = [torch.empty_like(q.inv_norm) for _ in range(4)]
        normalise.normalise_pairs(
            q.x, k.x, scale_log2, queries, None, None, (*unused[:2], shift, *unused[2:]), None, center, False,
            self.settings.row_elements,
        )  # fmt: skip
        return queries, shift

    def pair_cosines(self, batch: NormalizedBatch) -> Tensor:
        assert batch.cosines is not None
        return batch.cosines

    def pair_half_squared_chords(self, batch: NormalizedBatch) -> Tensor:
        assert batch.half_squared_chords is not None
        return batch.half_squared_chords

    def sampled_noise(
        self, seed: Tensor, rows: slice, num_noise: int, D: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        copy, grad_copy = self._copies(rows.stop - rows.start, D)
        noise.sample_noise(seed, rows.start, center, copy, grad_copy)
        return copy, copy if grad_copy is None else grad_copy

    def unit_rows(self, x: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
        copy, grad_copy = self._copies(*x.shape)
        self._normalise_rows(x, center, copy, grad_copy)
        return copy, copy if grad_copy is None else grad_copy

    def centered_anchors(self, batch: NormalizedBatch, rows: slice) -> Tensor:
        q = batch.anchors
        out = self._rows(rows.stop - rows.start, q.x.shape[1], self.precision.gradient)
        similarity.centered_anchors(q.x, q.inv_norm, batch.center_q, rows.start, out)
        return out

    # ------------------------------------------------------------------ tiles

    def one_pass_rows(
        self, denominator: RowDenominator, batch: NormalizedBatch, columns: slice, acc: Accumulator | None
    ) -> OnePassRows:
        return TritonOnePassRows(self, denominator, batch, columns)

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
    ) -> None:
        special = _special(columns, j0)
        of_rows, of_columns = ratios.ratio_sums(
            queries, columns.rows, i0, j0, row_shift_log2, None if cols is None else cols[:2],
            special, self.tile_settings(special, self.settings.ratios), least_maximum_log2,
            _column_limits(columns),
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
    ) -> Tensor:
        out = self.tile(queries.shape[0], len(columns))
        special = _special(columns, j0)
        of_rows, of_columns = ratios.weighted_ratios(
            queries, columns.rows, out, i0, j0, row_shift_log2, weights, cols, special,
            self.tile_settings(special, self.settings.ratios), _column_limits(columns),
        )  # fmt: skip
        sums[0].add_(of_rows.sum(1, keepdim=True))
        sums[1].add_(of_columns.sum(0))
        return out

    # ------------------------------------------------------------------ gradients

    def grad_products(
        self,
        tile: Tensor,  # (C, T)
        keys: Tensor,  # (T, D)
        acc_rows: Tensor | None,  # (C, D)
        add_rows: bool,
        columns: slice = slice(0, 0),
        anchors: Tensor | None = None,  # (C, D), or (C, D + PAD)
        acc: Accumulator | None = None,  # of these columns
        add_columns: bool = True,
    ) -> None:
        if acc_rows is None and acc is None:
            return
        products.grad_products(
            tile, keys, acc_rows, add_rows, tile[:, columns], anchors,
            None if acc is None else acc.grad, add_columns, self.settings.products, self.settings.library_products,
        )  # fmt: skip

    # ------------------------------------------------------------------ backward of the normalisation

    def finish_pairs(
        self,
        batch: NormalizedBatch,
        anchors: RowGradArgs | None,
        positives: RowGradArgs | None,
        scale: GradScale,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if anchors is None and positives is None:
            return None, None, None
        if anchors is not None and anchors.positive_coeff is None and positives is None:
            dq, dots = self._finish_one(batch.anchors, anchors, scale)
            return dq, None, dots
        q, k = batch.anchors, batch.columns[0]
        dq, dk, dots = normalise.normalise_backward(
            q.x, q.inv_norm, _side(anchors), k.x, k.inv_norm, _side(positives), scale.tensor, scale.number,
            self.settings.row_elements,
        )  # fmt: skip
        return dq, dk, dots

    def finish(self, rows: NormalizedRows, args: RowGradArgs, scale: GradScale) -> Tensor:
        grad = self._finish_one(rows, args, scale)[0]
        assert grad is not None
        return grad

    def unit_dots(self, acc: Tensor, rows: NormalizedRows, weights: Tensor, center: Tensor | None) -> Tensor:
        dots = self._finish_one(rows, RowGradArgs(acc, None, weights, center), GradScale(None, 0.0))[1]
        assert dots is not None
        return dots

    def _finish_one(
        self, rows: NormalizedRows, args: RowGradArgs, scale: GradScale
    ) -> tuple[Tensor | None, Tensor | None]:
        dx, _, dots = normalise.normalise_backward(
            rows.x, rows.inv_norm, _side(args), None, None, None, scale.tensor, scale.number,
            self.settings.row_elements,
        )  # fmt: skip
        return dx, dots


class TritonOnePassRows:
    """Sums of the rows of one pass; the offsets are known before it."""

    def __init__(
        self,
        backend: TritonBackend,
        denominator: RowDenominator,
        batch: NormalizedBatch,
        columns: slice,  # whose gradients are requested
    ) -> None:
        self.backend, self.denominator, self.batch, self.columns = backend, denominator, batch, columns
        shape = batch.anchors.inv_norm.shape
        self.sums: Tensor | None = None  # (N, 1) of the columns so far, but for the last block
        alpha, total, share, losses = backend.empty(4, *shape).unbind()
        self.results = (alpha, total, share, losses)  # (N, 1) each, of the rows whose last block is computed
        self.anchors: Tensor | None = None  # (C, D + PAD) weighted anchors of the rows computed last
        own, constant = denominator.positive_term, denominator.constant
        self.own = own if constant is None else constant + own  # what the negatives' sum is added to

    def exp_tile(
        self, queries: Tensor, columns: Columns, rows: slice, is_last_block: bool
    ) -> tuple[Tensor, Tensor | None]:
        backend, n, known = self.backend, rows.stop - rows.start, self.denominator
        out = backend.tile(n, len(columns))
        special = _special(columns, 0)
        tile = backend.tile_settings(special, backend.settings.similarity)
        partials = similarity.exp_similarity(
            queries[rows], columns.rows, out, known.row_shift_log2[rows], rows.start, special, tile
        )  # fmt: skip
        if not is_last_block:
            if self.sums is None:
                self.sums = torch.zeros_like(known.row_shift_log2)
            self.sums[rows] += partials.sum(1, keepdim=True)
            return out, None
        anchors = x = inv_norm = None
        if self.columns.stop:
            x, inv_norm = self.batch.anchors.x, self.batch.anchors.inv_norm
            anchors = self.anchors = backend.anchor_rows(n, x.shape[1])
        own = self.own if isinstance(self.own, Tensor) else None
        similarity.close_rows(
            partials, self.sums, own, known.constant, known.offset, self.results, rows.start,
            x, inv_norm, self.batch.center_q, anchors, known.options.decoupled,
        )  # fmt: skip
        if variants.transforms_loss(known.options):
            alpha, _, share, losses = (x[rows] for x in self.results)
            slope = variants.transformed_loss(losses, known.options)[1]
            for weighted in (alpha, share) if anchors is None else (alpha, share, anchors):
                weighted.mul_(slope)
        return out, None

    def weighted_anchors(self, rows: slice) -> Tensor:
        """With the weights behind them, (C, D + PAD), where products are of low precision."""
        assert self.anchors is not None
        return self.anchors

    def stats(self) -> RowStats:
        alpha, _, share, losses = self.results
        constant = self.denominator.constant
        return RowStats(alpha, losses, share, None if constant is None else alpha * constant)


def _special(columns: Columns, j0: int) -> dict[str, object]:
    """The terms of entries, as the kernels take them."""
    terms = columns.terms
    ids, limits = terms.column_ids, terms.limits
    guide = None if limits is None else limits.guide
    return {
        "row_ids": None if ids is None else terms.row_ids,
        "column_ids": ids,
        "num_ids": 0 if ids is None else len(ids),
        "bias": terms.bias,
        "own_bias": terms.own_bias,
        "num_positives": terms.num_positives,
        "num_negatives": terms.num_negatives,
        "HAS_POSITIVES": terms.num_positives > j0,
        "HAS_OWN": terms.own_bias != 0,
        "HAS_IDS": 0 if ids is None else ids.ndim,
        "limits": None if limits is None else limits.rows,
        "guide_rows": None if guide is None else guide[0],
        "guide_columns": None if guide is None else guide[1],
        "guide_features": 0 if guide is None else guide[0].shape[1],
        "stride_guide_n": 0 if guide is None else guide[0].stride(0),
        "stride_guide_t": 0 if guide is None else guide[1].stride(0),
        "HAS_LIMITS": limits is not None,
        "HAS_GUIDE": guide is not None,
    }


def _column_limits(columns: Columns) -> Tensor | None:
    limits = columns.terms.limits
    return None if limits is None else limits.columns


def _side(args: RowGradArgs | None) -> dict[str, object] | None:
    """One side of the normalisation backward, as the kernel takes it."""
    if args is None:
        return None
    return {
        "acc": args.acc, "share": args.positive_coeff, "sums": args.center_weight, "center": args.center,
        "factor": args.alpha, "dtype": args.dtype,
    }  # fmt: skip


def _merge(parts: tuple[Tensor, Tensor], dim: int, running: tuple[Tensor, Tensor]) -> None:
    """Merges maxima and sums along ``dim`` into running ones, in place, always in the same order."""
    (maxima, sums), (maximum, total) = parts, running
    peak = torch.maximum(maximum, maxima.amax(dim, keepdim=dim == 1))
    sums.mul_(maxima.sub_(peak).exp2_())
    total.mul_(torch.exp2(maximum - peak)).add_(sums.sum(dim, keepdim=dim == 1))
    maximum.copy_(peak)
