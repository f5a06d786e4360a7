"""The tile operations of the sweep in plain torch: any device, no N×M tensor, in place, in cache-sized pieces.

Exponents are in base 2 throughout: the queries carry the factor κ·log2(e), shifts and biases are in bits.
On a CPU a product of bf16 rows is stored in bf16 (torch offers nothing wider there); all that follows it is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

TILE = 1 << 20  # elements that one pass of elementwise operations works on: 4 MiB of fp32
CENTER_ROWS = 1024  # rows that a centre is the mean of; any constant is exact, a mean is the most useful one
DEFAULT_WORKSPACE = {"cpu": 64 << 20}
DEFAULT_DEVICE_WORKSPACE = 256 << 20


@dataclass(frozen=True, slots=True)
class Precision:
    sums: torch.dtype  # sums, exponentials, positives and gradients' accumulators
    product: torch.dtype  # operands of the similarity product
    gradient: torch.dtype  # operands of the gradient products, and the stored exponentials

    @staticmethod
    def of(dtype: torch.dtype) -> Precision:
        """For products in ``dtype``; fp16 has not the range for exponentials, so its gradients use bf16."""
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        return Precision(sums, dtype, torch.bfloat16 if dtype == torch.float16 else dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Columns of the similarity matrix and what is special about some of its entries."""

    rows: Tensor  # (T, D) centred unit rows, product dtype
    grad_rows: Tensor  # (T, D) the same in the gradient dtype
    bias: float = 0.0  # log2 of every column's weight
    num_positives: int = 0  # columns [0, N): column i is row i's positive and no negative of it
    num_negatives: int = 0  # columns [N, N + H): hard negatives
    own_bias: float = 0.0  # log2-weight of column N + hN + i in row i
    row_ids: Tensor | None = None  # (N,)
    column_ids: Tensor | None = None  # (n,) of the first n columns; equal to the row's id: masked

    def block(self, columns: slice) -> Columns:
        """Some of the columns; what is special keeps its place in the whole matrix."""
        return replace(self, rows=self.rows[columns], grad_rows=self.grad_rows[columns])


class TorchOps:
    """One call's operations: its precision, its workspace and the scratch memory they share."""

    def __init__(self, precision: Precision, device: torch.device, workspace_bytes: int | None) -> None:
        self.precision = precision
        self.device = device
        budget = workspace_bytes or DEFAULT_WORKSPACE.get(device.type, DEFAULT_DEVICE_WORKSPACE)
        # A quarter goes to the scratch of elementwise passes and to products that wait for their fp32 sum.
        self.tile_elements = min(TILE, max(1024, budget // 64))
        self.workspace_elements = budget * 3 // 4 // precision.gradient.itemsize
        self._buffers: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ memory

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, the same for the same name."""
        size = math.prod(shape)
        flat = self._buffers.get(name)
        if flat is None or flat.numel() < size:
            flat = self._buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)

    def workspace(self, rows: int, columns: int) -> Tensor:
        """A tile's memory, overwritten by the next one's. → (rows, columns)"""
        return self.buffer("workspace", (rows, columns), self.precision.gradient)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.precision.sums, device=self.device)

    def _pieces(self, rows: int, columns: int) -> Iterator[slice]:
        step = max(1, self.tile_elements // columns)
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))

    # ------------------------------------------------------------------ rows

    def reciprocal_norms(self, x: Tensor) -> Tensor:
        """1/‖x_i‖, 0 for a zero row, NaN where the norm is not finite. (N, D) → (N,)"""
        norms: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=self.precision.sums)
        return norms.reciprocal().add_(norms, alpha=0).masked_fill_(norms == 0, 0)

    def center(self, x: Tensor, r: Tensor) -> Tensor:
        """Mean of up to CENTER_ROWS evenly spaced unit rows. (N, D), (N,) → (D,)"""
        step = -(-x.shape[0] // CENTER_ROWS)
        some = x[::step].to(self.precision.sums)
        return torch.mv(some.T, r[::step]).div_(some.shape[0])

    def unit_rows(
        self,
        x: Tensor,
        r: Tensor,
        dtype: torch.dtype,
        center: Tensor | None = None,
        factor: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """factor_i (x_i r_i − center) in ``dtype``. (N, D), (N,), (D,), (N,) → (N, D)"""
        if out is None:
            out = torch.empty(x.shape, dtype=dtype, device=self.device)
        for piece in self._pieces(*x.shape):
            unit = self._unit(x[piece], r[piece])
            if center is not None:
                unit.sub_(center)
            if factor is not None:
                unit.mul_(factor[piece, None])
            out[piece].copy_(unit)
        return out

    def pair_dots(self, q: Tensor, r_q: Tensor, k: Tensor, r_k: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """q̂_i·(k̂_i − center) and q̂_i·k̂_i, from unrounded rows. → (N,), (N,)"""
        dots, cosines = torch.empty_like(r_q), torch.empty_like(r_q)
        for piece in self._pieces(*q.shape):
            unit_q, unit_k = self._unit(q[piece], r_q[piece]), self._unit(k[piece], r_k[piece])
            torch.sum(unit_q * unit_k, 1, out=cosines[piece])
            torch.sum(unit_q.mul_(unit_k.sub_(center)), 1, out=dots[piece])
        return dots, cosines

    def _unit(self, x: Tensor, r: Tensor) -> Tensor:
        return x.to(self.precision.sums) * r[:, None]

    # ------------------------------------------------------------------ similarity

    def exp_similarity(self, queries: Tensor, columns: Columns, i0: int, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The tile E_ij = 2^(q_i·k_j + bias_ij − shift_i) of rows i0, i0 + 1, … and its row sums. → (C, T), (C,)"""
        out = self.workspace(queries.shape[0], columns.rows.shape[0])
        sums = torch.empty_like(shift)
        for piece, tile in self.similarity(queries, columns, i0, 0):
            tile.sub_(shift[piece, None]).exp2_()
            torch.sum(tile, 1, out=sums[piece])
            self._store(tile, out[piece])
        return out, sums

    def add_ratios(
        self,
        queries: Tensor,  # (C, D)
        columns: Columns,  # (B, D)
        i0: int,
        j0: int,
        shift: Tensor,  # (C,)
        rows: tuple[Tensor, Tensor],  # running maximum and Σ 2^(z − maximum), (C,) each
        cols: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        # row bias (C,), column shift (B,), and the columns' maximum and sum, (B,) each
    ) -> None:
        """Adds the ratios of a tile with the corner (i0, j0) to the running sums, in place.

        The rows' z_ij is q_i·k_j + bias_ij − shift_i, the columns' q_i·k_j + row_bias_i − column_shift_j.
        """
        for piece, tile in self.similarity(queries, columns, i0, j0):
            if cols is not None:
                row_bias, column_shift, maximum, total = cols
                other = self.buffer("other", tile.shape, self.precision.sums)
                torch.add(tile, row_bias[piece, None], out=other)
                merge_ratios(other, column_shift, 0, maximum, total)
            merge_ratios(tile, shift[piece], 1, rows[0][piece], rows[1][piece])

    def weighted_ratios(
        self,
        queries: Tensor,  # (C, D)
        columns: Columns,  # (B, D)
        i0: int,
        j0: int,
        shift: Tensor,  # (C,)
        weights: Tensor | None,  # (C,)
        sums: tuple[Tensor, Tensor],  # of the tile's rows (C,) and columns (B,), added to
        cols: tuple[Tensor, Tensor, Tensor | None] | None = None,
        # row bias (C,), column shift (B,), column weights (B,)
    ) -> Tensor:
        """The tile G_ij = w_i 2^z_ij of the rows' z, plus w_j 2^z_ij of the columns'. → (C, B)"""
        out = self.workspace(queries.shape[0], columns.rows.shape[0])
        for piece, tile in self.similarity(queries, columns, i0, j0):
            other = None
            if cols is not None:
                row_bias, column_shift, column_weights = cols
                other = self.buffer("other", tile.shape, self.precision.sums)
                torch.add(tile, row_bias[piece, None], out=other).sub_(column_shift).exp2_()
                if column_weights is not None:
                    other.mul_(column_weights)
            tile.sub_(shift[piece, None]).exp2_()
            if weights is not None:
                tile.mul_(weights[piece, None])
            if other is not None:
                tile.add_(other)
            sums[0][piece] += tile.sum(1)
            sums[1].add_(tile.sum(0))
            self._store(tile, out[piece])
        return out

    def similarity(self, queries: Tensor, columns: Columns, i0: int, j0: int) -> Iterator[tuple[slice, Tensor]]:
        """Row pieces of q_i·k_j + bias_ij, in the sums' dtype; the product itself fills the workspace."""
        product = self.workspace(queries.shape[0], columns.rows.shape[0]).view(self.precision.product)
        torch.mm(queries, columns.rows.T, out=product)
        for piece in self._pieces(*product.shape):
            tile = product[piece]
            if tile.dtype != self.precision.sums:
                tile = self.buffer("scratch", tile.shape, self.precision.sums).copy_(tile)
            _mask_(tile, columns, i0 + piece.start, j0)
            yield piece, tile

    @staticmethod
    def _store(tile: Tensor, out: Tensor) -> None:
        if tile.data_ptr() != out.data_ptr():
            out.copy_(tile)

    # ------------------------------------------------------------------ gradients

    def grad_rows(self, tile: Tensor, rows: Tensor, out: Tensor) -> None:
        """out += tile @ rows. (C, T), (T, D), (C, D)"""
        self._add_product(tile, rows, out)

    def grad_columns(self, tile: Tensor, rows: Tensor, out: Tensor) -> None:
        """out += tileᵀ @ rows. (C, T), (C, D), (T, D)"""
        self._add_product(tile.T, rows, out)

    def _add_product(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if a.dtype == out.dtype:
            out.addmm_(a, b)
            return
        step = max(1, 2 * self.tile_elements // b.shape[1])
        for start in range(0, a.shape[0], step):
            some = a[start : start + step]
            product = self.buffer("product", (some.shape[0], b.shape[1]), a.dtype)
            out[start : start + step].add_(torch.mm(some, b, out=product))

    def column_sums(self, tile: Tensor, weights: Tensor, out: Tensor) -> None:
        """out += tileᵀ @ weights, in the sums' dtype. (C, T), (C,), (T,)"""
        for piece in self._pieces(*tile.shape):
            part = tile[piece]
            if part.dtype != out.dtype:
                part = self.buffer("scratch", part.shape, out.dtype).copy_(part)
            out.addmv_(part.T, weights[piece])

    def finish(
        self,
        acc: Tensor,  # (N, D), overwritten with the gradient
        x: Tensor,  # (N, D)
        r: Tensor,  # (N,)
        scale: Tensor,  # 0-dim
        center: Tensor,  # (D,) of the other side
        center_weight: Tensor,  # (N,)
        pair: tuple[Tensor, Tensor, Tensor] | None,  # the other side's x (N, D), r (N,) and weight (N,)
        row_factor: Tensor | None = None,  # (N,)
    ) -> Tensor:
        """The gradient of the inputs from the sums over tiles, in place; returns ⟨x̂_i, v_i⟩. → (N,)

        v_i = row_factor_i acc_i − weight_i (pair_i − center) + center_weight_i center is the unit row's gradient,
        dx_i = scale r_i (v_i − x̂_i ⟨x̂_i, v_i⟩) the row's.
        """
        dots = torch.empty_like(r)
        for piece in self._pieces(*x.shape):
            v = acc[piece]
            if row_factor is not None:
                v.mul_(row_factor[piece, None])
            if pair is not None:
                other, r_other, weight = (part[piece] for part in pair)
                v.addcmul_(self._unit(other, r_other).sub_(center), weight[:, None], value=-1)
            v.addr_(center_weight[piece], center)
            unit = self._unit(x[piece], r[piece])
            dot = torch.sum(unit * v, 1, out=dots[piece])
            v.addcmul_(unit, dot[:, None], value=-1).mul_((r[piece] * scale)[:, None])
        return dots

    def unit_dots(self, acc: Tensor, x: Tensor, r: Tensor, center: Tensor, center_weight: Tensor) -> Tensor:
        """⟨x̂_i, acc_i + center_weight_i center⟩. → (N,)"""
        dots = torch.empty_like(r)
        for piece in self._pieces(*x.shape):
            v = torch.addr(acc[piece], center_weight[piece], center)
            torch.sum(v.mul_(self._unit(x[piece], r[piece])), 1, out=dots[piece])
        return dots


def _mask_(tile: Tensor, columns: Columns, i0: int, j0: int) -> None:
    """Biases and masks of the entries (i0 + a, j0 + b), in place; tile: (C, B)."""
    if columns.bias:
        tile.add_(columns.bias)
    N, H = columns.num_positives, columns.num_negatives
    if columns.own_bias:
        for start in range(N, N + H, N):
            _diagonal(tile, i0, j0 - start).add_(columns.own_bias)
    if columns.column_ids is not None and j0 < columns.column_ids.numel():
        assert columns.row_ids is not None
        ids = columns.column_ids[j0 : j0 + tile.shape[1]]
        same = columns.row_ids[i0 : i0 + tile.shape[0], None] == ids
        tile[:, : ids.numel()].masked_fill_(same, -math.inf)
    if N:
        _diagonal(tile, i0, j0).fill_(-math.inf)


def _diagonal(tile: Tensor, i0: int, j0: int) -> Tensor:
    """The entries of the tile, whose corner is (i0, j0), on the diagonal i == j; a view, perhaps empty."""
    return tile.diagonal(i0 - j0) if -tile.shape[0] < i0 - j0 < tile.shape[1] else tile.flatten()[:0]


def merge_ratios(z: Tensor, shift: Tensor, dim: int, maximum: Tensor, total: Tensor) -> None:
    """Merges Σ 2^(z − shift) along ``dim`` into a running maximum and sum; overwrites z."""
    peak = torch.maximum(maximum, z.amax(dim) - shift)
    total.mul_(torch.exp2(maximum - peak))
    z.sub_((shift + peak).unsqueeze(dim)).exp2_()
    total.add_(z.sum(dim))
    maximum.copy_(peak)
