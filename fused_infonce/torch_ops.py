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

TILE = 1 << 19  # elements that one pass of elementwise operations works on: 2 MiB of fp32
CENTER_ROWS = 1024  # rows that a centre is the mean of; any constant is exact, a mean is the most useful one
SMALL_PRODUCT = 1 << 24
DEFAULT_WORKSPACE = {"cpu": 64 << 20}
DEFAULT_DEVICE_WORKSPACE = 256 << 20


@dataclass(slots=True)
class Precision:
    sums: torch.dtype  # sums, exponentials, positives and gradients' accumulators
    product: torch.dtype  # operands of the similarity product
    gradient: torch.dtype  # operands of the gradient products, and the stored exponentials

    @staticmethod
    def of(dtype: torch.dtype, device: torch.device, size: int) -> Precision:
        """For products in ``dtype`` of ``size`` multiply-adds.

        Small ones run in the sums' dtype on a CPU, where bf16 products are no faster and round their results.
        fp16 has not the range for exponentials, so its gradients use bf16.
        """
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        if device.type == "cpu" and size <= SMALL_PRODUCT:
            dtype = sums
        return Precision(sums, dtype, torch.bfloat16 if dtype == torch.float16 else dtype)


@dataclass(slots=True, eq=False)
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


class Rows:
    """One of the inputs, its rows' reciprocal norms and a centre; unit rows are made a piece at a time."""

    def __init__(self, x: Tensor, r: Tensor) -> None:
        self.x, self.r = x, r  # (n, D), (n,)
        self.center: Tensor  # (D,), set by TorchOps.rows
        self._unit: Tensor | None = None  # all of them, where that is little
        self._centered: Tensor | None = None

    def __len__(self) -> int:
        return self.x.shape[0]

    def unit(self, piece: slice) -> Tensor:
        """x̂_i = x_i r_i, not to be written to. → (rows, D)"""
        if self._unit is not None:
            return cut(self._unit, piece)
        return cut(self.x, piece).to(self.r.dtype) * cut(self.r, piece)[:, None]

    def centered(self, piece: slice, factor: Tensor | None = None) -> Tensor:
        """factor_i (x̂_i − center), not to be written to; factor: (rows,). → (rows, D)"""
        if self._centered is not None:
            kept = cut(self._centered, piece)
            return kept if factor is None else kept * factor[:, None]
        if factor is None:
            return self.unit(piece).sub(self.center)
        scaled = cut(self.x, piece).to(self.r.dtype) * (cut(self.r, piece) * factor)[:, None]
        return scaled.addr_(factor, self.center, alpha=-1)

    def keep_unit(self) -> None:
        self._unit = self.unit(slice(0, len(self)))

    def kept_centered(self, dtype: torch.dtype) -> Tensor | None:
        """All centred rows, where they are kept in this dtype."""
        return self._centered if self._centered is not None and self._centered.dtype == dtype else None

    def keep_centered(self, rows: Tensor | None = None) -> None:
        """Keeps ``rows``, which hold them already, or makes them."""
        self._centered = self.centered(slice(0, len(self))) if rows is None else rows


class TorchOps:
    """One call's operations: its precision, its workspace and the scratch memory they share."""

    def __init__(self, precision: Precision, device: torch.device, workspace_bytes: int | None) -> None:
        self.precision = precision
        self.device = device
        budget = workspace_bytes or DEFAULT_WORKSPACE.get(device.type, DEFAULT_DEVICE_WORKSPACE)
        # The rest is for the scratch of elementwise passes and what the libraries keep. glibc's allocator reuses a
        # tile of 24 MiB; from 32 MiB on each call would fault its pages in anew.
        self.tile_elements = min(TILE, max(1024, budget // 128))
        self.workspace_elements = budget * 3 // 8 // precision.gradient.itemsize
        self._buffers: dict[str, Tensor] = {}
        self._tile: Tensor | None = None

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
        if self._tile is None or self._tile.shape != (rows, columns):
            self._tile = self.buffer("workspace", (rows, columns), self.precision.gradient)
        return self._tile

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.precision.sums, device=self.device)

    def _pieces(self, rows: int, columns: int) -> Iterator[slice]:
        step = max(1, self.tile_elements // columns)
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))

    # ------------------------------------------------------------------ rows

    def rows(self, x: Tensor, center: Tensor | None = None) -> Rows:
        """x with 1/‖x_i‖, 0 for a zero row, centred by ``center`` or else by its own mean. (N, D)"""
        r: Tensor = torch.linalg.vector_norm(x, dim=1, dtype=self.precision.sums)
        rows = Rows(x, r.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0))
        small = x.numel() <= self.tile_elements
        if small:
            rows.keep_unit()
        rows.center = self._mean(rows) if center is None else center
        if small:
            rows.keep_centered()
        return rows

    def _mean(self, rows: Rows) -> Tensor:
        """Mean of up to CENTER_ROWS evenly spaced unit rows. → (D,)"""
        n = len(rows)
        if n <= CENTER_ROWS:
            return rows.unit(slice(0, n)).mean(0)
        step = -(-n // CENTER_ROWS)
        some = rows.x[::step].to(self.precision.sums)
        return torch.mv(some.T, rows.r[::step]).div_(some.shape[0])

    def normalise_pairs(self, q: Rows, k: Rows, factor: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """factor · q̂ in the product dtype, q̂_i·(k̂_i − center) from unrounded rows, and k̂ − center in ``keys``.

        (N, D), (N, D), 0-dim → (N, D), (N,); keys: (N, D) in the product dtype
        """
        dots = torch.empty_like(q.r)
        queries = torch.empty(q.x.shape, dtype=self.precision.product, device=self.device)
        for piece in self._pieces(*q.x.shape):
            unit, centered = q.unit(piece), k.centered(piece)
            torch.sum(unit * centered, 1, out=cut(dots, piece))
            if keys is not None:
                cut(keys, piece).copy_(centered)
            torch.mul(unit, factor, out=cut(queries, piece))
        return queries, dots

    def centered_rows(
        self, rows: Rows, chunk: slice, dtype: torch.dtype, factor: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """factor_i (x̂_i − center) of a chunk of n rows in ``dtype``; factor: (n,). → (n, D)"""
        n, D = chunk.stop - chunk.start, rows.x.shape[1]
        if out is None and n * D <= self.tile_elements:
            return rows.centered(chunk, factor).to(dtype)
        if out is None:
            out = torch.empty(n, D, dtype=dtype, device=self.device)
        for piece in self._pieces(n, D):
            of_input = slice(chunk.start + piece.start, chunk.start + piece.stop)
            cut(out, piece).copy_(rows.centered(of_input, None if factor is None else cut(factor, piece)))
        return out

    def cosines(self, q: Rows, k: Rows) -> Tensor:
        """q̂_i·k̂_i, from unrounded rows. → (N,)"""
        dots = torch.empty_like(q.r)
        for piece in self._pieces(*q.x.shape):
            torch.sum(q.unit(piece) * k.unit(piece), 1, out=cut(dots, piece))
        return dots

    # ------------------------------------------------------------------ similarity

    def exp_similarity(self, queries: Tensor, columns: Columns, i0: int, shift: Tensor) -> tuple[Tensor, Tensor]:
        """The tile E_ij = 2^(q_i·k_j + bias_ij − shift_i) of rows i0, i0 + 1, … and its row sums."""
        out = self.workspace(queries.shape[0], columns.rows.shape[0])
        sums = torch.empty_like(shift)
        for piece, tile in self.similarity(queries, columns, i0, 0):
            tile.sub_(cut(shift, piece)[:, None]).exp2_()
            torch.sum(tile, 1, out=cut(sums, piece))
            self._store(tile, cut(out, piece))
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
                torch.add(tile, cut(row_bias, piece)[:, None], out=other)
                merge_ratios(other, column_shift, 0, maximum, total)
            merge_ratios(tile, cut(shift, piece), 1, cut(rows[0], piece), cut(rows[1], piece))

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
                torch.add(tile, cut(row_bias, piece)[:, None], out=other).sub_(column_shift).exp2_()
                if column_weights is not None:
                    other.mul_(column_weights)
            tile.sub_(cut(shift, piece)[:, None]).exp2_()
            if weights is not None:
                tile.mul_(cut(weights, piece)[:, None])
            if other is not None:
                tile.add_(other)
            cut(sums[0], piece).add_(tile.sum(1))
            sums[1].add_(tile.sum(0))
            self._store(tile, cut(out, piece))
        return out

    def similarity(self, queries: Tensor, columns: Columns, i0: int, j0: int) -> Iterator[tuple[slice, Tensor]]:
        """Row pieces of q_i·k_j + bias_ij, in the sums' dtype; the product itself fills the workspace."""
        product = self.workspace(queries.shape[0], columns.rows.shape[0])
        if product.dtype != self.precision.product:
            product = product.view(self.precision.product)
        torch.mm(queries, columns.rows.T, out=product)
        for piece in self._pieces(*product.shape):
            tile = cut(product, piece)
            if tile.dtype != self.precision.sums:
                tile = self.buffer("scratch", tile.shape, self.precision.sums).copy_(tile)
            _mask_(tile, columns, i0 + piece.start, j0)
            yield piece, tile

    @staticmethod
    def _store(tile: Tensor, out: Tensor) -> None:
        if tile.data_ptr() != out.data_ptr():
            out.copy_(tile)

    # ------------------------------------------------------------------ gradients

    def grad_rows(self, tile: Tensor, rows: Tensor, out: Tensor, add: bool = True) -> None:
        """out = tile @ rows, or out += with ``add``. (C, T), (T, D), (C, D)"""
        self._product(tile, rows, out, add)

    def grad_columns(self, tile: Tensor, rows: Tensor, out: Tensor, add: bool = True) -> None:
        """out = tileᵀ @ rows, or out += with ``add``. (C, T), (C, D), (T, D)"""
        self._product(tile.T, rows, out, add)

    def _product(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
            return
        step = max(1, 2 * self.tile_elements // b.shape[1])
        for start in range(0, a.shape[0], step):
            some, part = a[start : start + step], out[start : start + step]
            product = torch.mm(some, b, out=self.buffer("product", (some.shape[0], b.shape[1]), a.dtype))
            part.add_(product) if add else part.copy_(product)

    def column_sums(self, tile: Tensor, weights: Tensor, out: Tensor) -> None:
        """out += tileᵀ @ weights, in the sums' dtype. (C, T), (C,), (T,)"""
        for piece in self._pieces(*tile.shape):
            part = cut(tile, piece)
            if part.dtype != out.dtype:
                part = self.buffer("scratch", part.shape, out.dtype).copy_(part)
            out.addmv_(part.T, cut(weights, piece))

    def finish(
        self,
        acc: Tensor,  # (N, D), overwritten with the gradient
        rows: Rows,  # (N, D)
        factors: Tensor,  # (N,) or 0-dim
        pair: tuple[Rows, Tensor] | None,  # the other side's rows (N, D) and their weights (N,)
        center: tuple[Tensor, Tensor] | None,  # the other side's centre (D,) and its weights (N,)
    ) -> Tensor:
        """The gradient of the inputs from the sums over tiles, in place; returns ⟨x̂_i, v_i⟩. → (N,)

        v_i = acc_i − weight_i p̃_i + center_weight_i center, p̃_i the centred row of the pair, is the unit row's
        gradient but for its factor, dx_i = factor_i r_i (v_i − x̂_i ⟨x̂_i, v_i⟩) the row's.
        """
        dots = rows.r.new_empty(len(rows), 1)
        factors = rows.r * factors
        for piece in self._pieces(*rows.x.shape):
            v = cut(acc, piece)
            if pair is not None:
                v.addcmul_(pair[0].centered(piece), cut(pair[1], piece)[:, None], value=-1)
            if center is not None:
                v.addr_(cut(center[1], piece), center[0])
            unit = rows.unit(piece)
            dot = torch.sum(unit * v, 1, keepdim=True, out=cut(dots, piece))
            v.addcmul_(unit, dot, value=-1).mul_(cut(factors, piece)[:, None])
        return dots[:, 0]

    def unit_dots(self, acc: Tensor, rows: Rows, center: tuple[Tensor, Tensor]) -> Tensor:
        """⟨x̂_i, acc_i + weight_i center⟩. → (N,)"""
        dots = torch.empty_like(rows.r)
        for piece in self._pieces(*rows.x.shape):
            v = torch.addr(cut(acc, piece), cut(center[1], piece), center[0])
            torch.sum(v.mul_(rows.unit(piece)), 1, out=cut(dots, piece))
        return dots


def cut(x: Tensor, rows: slice) -> Tensor:
    """x[rows], without the price of a view where that is all of x."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


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
