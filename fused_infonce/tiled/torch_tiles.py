"""Tile operations of the torch backend: the logits slice by slice, and their products with rows.

On a CPU a product of bf16 rows is stored in bf16 (torch offers nothing wider there); all that follows is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..entry_terms import apply_to_columns_, apply_to_rows_, guide_scores, mask_
from ..variants import exp2_normal_
from .operands import Accumulator, Columns
from .problem import row_slices
from .torch_memory import COLUMN_MAJOR_MIN_ROWS
from .torch_rows import TorchRows

BF16_PRODUCT_ROWS = 384  # of a product E @ k̃ in bf16: oneDNN leaves a core idle at many larger numbers


@dataclass(slots=True, eq=False)
class TileSlice:
    """Some rows of a tile of logits."""

    rows: slice  # of the tile
    tile: Tensor  # (n, T), in the sums' dtype
    diagonal: Tensor | None  # (n,) the positives' entries, masked; a view
    scores: Tensor | None  # (n, T) a guide's


class TorchTiles(TorchRows):
    column_block = 8192

    def logit_slices(
        self,
        queries: Tensor,
        columns: Columns,
        i0: int,
        j0: int,
        out: Tensor | None = None,
        is_computed: bool = False,
        keep: bool = False,
    ) -> Iterator[TileSlice]:
        """Slices of q_i·k_j in the sums' dtype, with the terms that both directions share.

        The product fills ``out``, by default the workspace; with ``is_computed`` it is there already. Where its
        dtype is that of the sums the slices are parts of it, unless ``keep`` is set. The caller applies one
        direction's terms.
        """
        product = self.tile(queries.shape[0], columns.rows.shape[0]) if out is None else out
        if product.dtype != self.precision.product:
            product = product.view(self.precision.product)
        if not is_computed:
            torch.addmm(product, queries, columns.rows.T, beta=0, alpha=self.product_scale, out=product)
        for rows in row_slices(product.shape[0], self.tile_elements // product.shape[1]):
            tile = product[rows]
            if keep or tile.dtype != self.precision.sums:
                tile = self.scratch("logits", tuple(tile.shape)).copy_(tile)
            i = rows.start + i0
            diagonal = mask_(tile, columns.terms, i, j0)
            yield TileSlice(rows, tile, diagonal, guide_scores(tile, columns.terms, i, j0))

    def add_ratios(
        self,
        queries: Tensor,
        columns: Columns,
        i0: int,
        j0: int,
        row_shift_log2: Tensor,
        rows: tuple[Tensor, Tensor],
        cols: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        least_maximum_log2: float,
        products: Tensor | None = None,
    ) -> None:
        for part in self.logit_slices(queries, columns, i0, j0, products, keep=products is not None):
            i = part.rows
            if cols is not None:
                row_bias, column_shift, maximum, total = cols
                logits = self._column_logits(part, columns, row_bias[i], j0)
                self.merge_ratios(logits, column_shift, 0, maximum, total)
            apply_to_rows_(part.tile, part.scores, columns.terms, i0 + i.start, j0)
            self.merge_ratios(part.tile, row_shift_log2[i], 1, rows[0][i], rows[1][i])

    def weighted_ratios(
        self,
        queries: Tensor,
        columns: Columns,
        i0: int,
        j0: int,
        row_shift_log2: Tensor,
        weights: Tensor | None,
        sums: tuple[Tensor, Tensor],
        cols: tuple[Tensor, Tensor, Tensor | None] | None,
        products: Tensor | None = None,
    ) -> Tensor:
        is_computed = products is not None
        out = self.tile(queries.shape[0], columns.rows.shape[0]) if products is None else products
        out = out.view(self.precision.gradient)
        for part in self.logit_slices(queries, columns, i0, j0, out, is_computed):
            i, tile, other = part.rows, part.tile, None
            if cols is not None:
                row_bias, column_shift, column_weights = cols
                other = self._exp2_(self._column_logits(part, columns, row_bias[i], j0).sub_(column_shift))
                if column_weights is not None:
                    other.mul_(column_weights)
            apply_to_rows_(tile, part.scores, columns.terms, i0 + i.start, j0)
            self._exp2_(tile.sub_(row_shift_log2[i]))
            if weights is not None:
                tile.mul_(weights[i])
            if other is not None:
                tile.add_(other)
            sums[0][i].add_(tile.sum(1, keepdim=True))
            sums[1].add_(tile.sum(0))
            if tile.dtype != out.dtype:
                out[i].copy_(tile)
        return out

    def _column_logits(self, part: TileSlice, columns: Columns, row_bias: Tensor, j0: int) -> Tensor:
        """A slice with the terms of the columns' direction, in scratch memory."""
        out = self.scratch("columns", tuple(part.tile.shape))
        torch.add(part.tile, row_bias, out=out)
        apply_to_columns_(out, part.scores, columns.terms, j0)
        return out

    def grad_products(
        self,
        tile: Tensor,
        keys: Tensor,
        acc_rows: Tensor | None,
        add_rows: bool,
        columns: slice = slice(0, 0),
        anchors: Tensor | None = None,
        acc: Accumulator | None = None,
        add_columns: bool = True,
    ) -> None:
        if acc_rows is not None:
            self._product(tile, keys, acc_rows, add_rows, BF16_PRODUCT_ROWS)
        if acc is not None and anchors is not None:
            step = min(COLUMN_MAJOR_MIN_ROWS, 4 * self.tile_elements // anchors.shape[1])
            self._product(tile[:, columns].T, anchors, acc.grad, add_columns, step)

    def _product(self, a: Tensor, b: Tensor, out: Tensor, add: bool, step: int) -> None:
        """out = a @ b, or added to it; ``step`` rows at a time where the product is rounded."""
        if a.dtype == self.precision.sums:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
            return
        for rows in row_slices(a.shape[0], step):
            some, part = a[rows], out[rows]
            if part.dtype == a.dtype:
                torch.mm(some, b, out=part)
                continue
            is_column_major = out.stride(0) == 1  # as b is
            product = self.matrix(some.shape[0], b.shape[1], a.dtype, is_column_major, "product")
            torch.mm(some, b, out=product)
            part.add_(product) if add else part.copy_(product)

    def merge_ratios(self, z: Tensor, shift: Tensor, dim: int, maximum: Tensor, total: Tensor) -> None:
        """Merges Σ 2^(z − shift) along ``dim`` into a running maximum and sum; overwrites z."""
        peak = torch.maximum(maximum, z.amax(dim, keepdim=dim == 1) - shift)
        total.mul_(torch.exp2(maximum - peak))
        self._exp2_(z.sub_(shift + peak))
        total.add_(z.sum(dim, keepdim=dim == 1))
        maximum.copy_(peak)

    def _exp2_(self, z: Tensor) -> Tensor:
        return exp2_normal_(z) if self.may_be_tiny else z.exp2_()
