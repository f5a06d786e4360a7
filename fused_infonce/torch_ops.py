"""The tile operations of the sweep in plain torch: any device, no N×M tensor, in place, in cache-sized pieces.

Exponents are in base 2 throughout: the similarity product, or its queries, carry the factor κ·log2(e), shifts and
biases are in bits. What belongs to rows is (N, 1), what belongs to columns (T,): both broadcast over a tile.
On a CPU a product of bf16 rows is stored in bf16 (torch offers nothing wider there); all that follows it is fp32.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import noise
from .operands import Accumulator, Columns, Operands, Precision, Rows, RowSums, RowTerms, Scale, Side, Units

TILE = 1 << 19  # elements that one pass of elementwise operations works on: 2 MiB of fp32
ROW_MATRICES = 2  # of them fit where a tile does: in passes over rows several are read and written
ROUNDED_ROWS = 384  # of a product E @ k̃ in bf16: oneDNN leaves a core idle at many larger numbers
UNROUNDED_ROWS = 1024  # of a chunk in fp32: more gain nothing, and with few columns cost 4 % at N = 2048
CENTER_ROWS = 64  # rows that a centre is the mean of; any constant is exact
MORE_CENTER_ROWS = 1024  # the same where sums of centred rows are rounded, but for a
SMALL_BATCH = 256  # rows: a mean over more would take 4 % of its time
ALIASED = 2048  # bytes: rows of a multiple of it meet in few sets of a CPU's cache, a fifth of a product's time
GAP = 64  # bytes, a cache line, that keep such rows apart
COLUMNWISE = 2048  # rows from which on Eᵀ @ q̃ in bf16 takes oneDNN half the time where columns lie together
DEFAULT_WORKSPACE = {"cpu": 64 << 20}
DEFAULT_DEVICE_WORKSPACE = 256 << 20


@dataclass(slots=True, eq=False)
class RowState:
    """Sums of one sweep's rows on their way."""

    terms: RowTerms
    units: Units
    columns: slice  # those whose gradients are asked for
    column_sums: Tensor | None  # (n,) their Σ_i α_i E_ij over closed rows
    sums: Tensor | None = None  # (N, 1) Σ_j E_ij
    alpha: Tensor | None = None  # (N, 1) 1/(own_i + Σ_j E_ij), of the rows that are closed


@dataclass(slots=True, eq=False)
class Part:
    """Some rows of a tile of products."""

    rows: slice  # of the tile
    tile: Tensor  # (n, T)
    diagonal: Tensor | None  # (n,) its entries of rows' own columns, masked; a view; None: there are none
    scores: Tensor | None  # (n, T) a guide's


class TorchOps:
    """One call's operations: its precision, its workspace and the scratch memory they share."""

    chunk_rows = 1  # of which a chunk of rows is a multiple, where the workspace holds as many
    column_block = 8192  # columns of a tile of the two sweeps
    noise_block = noise.NOISE_BLOCK  # rows that are drawn at a time

    def __init__(self, precision: Precision, device: torch.device, workspace_bytes: int | None) -> None:
        self.precision = precision
        self.device = device
        self.rounds = precision.low_precision_products
        self.factor = 1.0  # of the similarity product, where it is no part of the queries
        budget = workspace_bytes or DEFAULT_WORKSPACE.get(device.type, DEFAULT_DEVICE_WORKSPACE)
        self.tile_elements = min(TILE, max(1024, budget // 128))
        # The rest is for the scratch of elementwise passes and what libraries keep. A tile of 21 MiB is memory
        # that glibc's allocator reuses; from 32 on each call would fault its pages in anew.
        self.workspace_elements = budget // 3 // precision.gradient.itemsize
        self.most_rows = UNROUNDED_ROWS if not self.rounds else 1 << 40
        # (*shape) → uninitialised memory, in the sums' dtype if no other is given
        self.empty: Callable[..., Tensor] = functools.partial(torch.empty, dtype=precision.sums, device=device)
        self._buffers: dict[str, Tensor] = {}
        self._tile: Tensor | None = None

    # ------------------------------------------------------------------ memory

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory, the same for the same name."""
        held = self._buffers.get(name)
        if held is not None and held.shape == shape:
            return held
        size = math.prod(shape)
        if held is None or held.numel() < size:
            held = self._buffers[name] = self.empty(*shape, dtype=dtype)
            return held
        return held.view(-1)[:size].view(shape)

    def workspace(self, rows: int, columns: int) -> Tensor:
        """A tile's memory, overwritten by the next one's; on a CPU its rows may lie apart. → (rows, columns)"""
        dtype, stride = self.precision.gradient, columns
        if self.device.type == "cpu" and columns * dtype.itemsize % ALIASED == 0:
            stride += GAP // dtype.itemsize
        size = rows * stride
        if self._tile is None or self._tile.numel() < size:
            self._tile = None  # before there is another
            self._tile = self.empty(rows, stride, dtype=dtype)
        tile = self._tile
        if tile.shape != (rows, stride):  # what one tile holds pays for no view
            tile = tile.view(-1)[:size].view(rows, stride)
        return tile if stride == columns else tile[:, :columns]

    def release(self) -> None:
        """Gives the memory of tiles and scratch back."""
        self._buffers.clear()
        self._tile = None

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.precision.sums, device=self.device)

    def products(self, n: int, D: int, once: bool) -> Tensor:
        """Memory for gradient products, to be overwritten; once: nothing is added to it, and it is as narrow."""
        return self._matrix(n, D, self._stored(once), False)

    def accumulator(self, columns: int, D: int, once: bool) -> Accumulator:
        """The same for the columns' gradients, and memory for their sums, 0."""
        grad = self._matrix(columns, D, self._stored(once), self._columnwise(columns))
        return Accumulator(grad, self.zeros(columns) if self.rounds else None)

    def _stored(self, once: bool) -> torch.dtype:
        return self.precision.gradient if once and self.rounds else self.precision.sums

    def _columnwise(self, columns: int) -> bool:
        """Whether Eᵀ @ q̃, (columns, D), and q̃ are stored by columns."""
        precision = self.precision
        return columns >= COLUMNWISE and self.device.type == "cpu" and precision.gradient != precision.sums

    def _matrix(self, n: int, D: int, dtype: torch.dtype, columnwise: bool, name: str | None = None) -> Tensor:
        """Uninitialised memory, a buffer's if it has a name. columnwise: a column lies in one piece. → (n, D)"""
        shape = (D, n + GAP // dtype.itemsize) if columnwise else (n, D)
        memory = self.empty(*shape, dtype=dtype) if name is None else self.buffer(name, shape, dtype)
        return memory[:, :n].T if columnwise else memory

    def _pieces(self, rows: int, columns: int) -> list[slice]:
        """Pieces of a tile that one pass of elementwise operations works on."""
        return steps(rows, self.tile_elements // columns)

    def _row_step(self, D: int) -> int:
        """The same of rows (n, D): their passes read and write more than one matrix."""
        return max(1, self.tile_elements // ROW_MATRICES // D)

    def _scratch(self, like: Tensor) -> Tensor:
        """Memory for a piece of rows in the sums' dtype. (n, D) → (n, D)"""
        return self.buffer("rows", like.shape, self.precision.sums)

    # ------------------------------------------------------------------ rows

    def normalise(
        self,
        anchors: Tensor,  # (N, D)
        columns: list[Tensor],  # positives (N, D), then what there is beside
        bits: float | Tensor,
        centers: tuple[Tensor, Tensor] | None = None,  # of anchors and columns, (D,) each; None: this call's means
    ) -> tuple[Units, Operands]:
        """Norms and centres, and the operands of the similarity product; bits: the factor of s_ij in exponents."""
        product, gradient = self.precision.product, self.precision.gradient
        self.factor = bits if isinstance(bits, float) else 1.0
        q, keys = self._rows(anchors), [self._rows(x) for x in columns]
        center_q = (self._mean(q) if centers is None else centers[0]) if self.rounds else None
        units = Units(q, keys, center_q, self._mean(keys[0]) if centers is None else centers[1])
        lengths = [x.shape[0] for x in columns]
        rows = self.empty(sum(lengths), anchors.shape[1], dtype=product)
        places = torch.split(rows, lengths) if len(keys) > 1 else (rows,)
        queries, shift = self.queries(q, keys[0], units.center_k, bits, places[0])
        for k, out in zip(keys[1:], places[1:], strict=True):
            self._center(k, units.center_k, out)
        grad_rows = rows
        if gradient != product:
            grad_rows = torch.empty_like(rows, dtype=gradient)
            for k, out in zip(keys, torch.split(grad_rows, lengths), strict=True):
                self._center(k, units.center_k, out)
        return units, Operands(queries, rows, grad_rows, shift)

    def queries(
        self, q: Rows, k: Rows, center: Tensor | None, bits: float | Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Operands of the similarity product for q̂, and bits · q̂_i·(k̂_i − center) from unrounded rows.

        keys: memory for k̂ − center, in its dtype. (N, D), (N, D), (D,), 0-dim → (N, D), (N, 1)
        """
        (N, D), sums, product = q.x.shape, self.precision.sums, self.precision.product
        scaled = self.factor == 1  # by bits, or else the product is
        kept = q.unit if product == sums and not scaled else None
        queries = self.empty(N, D, dtype=product) if kept is None else kept
        exact = keys is not None and keys.dtype == sums
        step, dots = self._row_step(D), []
        parts = zip(pieces(step, queries, keys), self._units(q, step), self._units(k, step, "pair"), strict=True)
        for (query, key), unit, centered in parts:
            scratch = self._scratch(unit)
            if center is not None:
                centered = torch.sub(centered, center, out=key if exact else scratch)
            if key is not None and key is not centered:
                key.copy_(centered)
            dots.append(torch.mul(unit, centered, out=scratch).sum(1, keepdim=True))
            if kept is None:
                query.copy_(torch.mul(unit, bits, out=scratch) if scaled else unit)
        return queries, _whole(dots).mul_(bits)

    def cosines(self, units: Units) -> Tensor:
        """s_ii, from unrounded rows. → (N, 1)"""
        return self._pair_sums(units, torch.mul)

    def half_squared_chords(self, units: Units) -> Tensor:
        """½‖q̂_i − k̂_i‖², from unrounded rows: 1 − s_ii to its last digits. → (N, 1)"""
        return self._pair_sums(units, lambda q, k, out: torch.sub(q, k, out=out).square_()).div_(2)

    def _pair_sums(self, units: Units, make: Callable[..., Tensor]) -> Tensor:
        """Sums of the rows that ``make`` writes of q̂ and k̂ to the memory it is given. → (N, 1)"""
        step = self._row_step(units.anchors.x.shape[1])
        pairs = zip(self._units(units.anchors, step), self._units(units.keys[0], step, "pair"), strict=True)
        return _whole([make(q, k, out=self._scratch(q)).sum(1, keepdim=True) for q, k in pairs])

    def unit_dots(self, acc: Tensor, rows: Rows, weights: Tensor, center: Tensor | None) -> Tensor:
        """⟨x̂_i, acc_i + weight_i center⟩. → (N, 1)"""
        step, dots = self._row_step(acc.shape[1]), []
        for (v, w), unit in zip(pieces(step, acc, weights), self._units(rows, step), strict=True):
            scratch = self._scratch(unit)
            if center is not None:
                v = torch.addcmul(v, w, center, out=scratch)
            dots.append(torch.mul(v, unit, out=scratch).sum(1, keepdim=True))
        return _whole(dots)

    def unit_rows(self, x: Tensor) -> Tensor:
        """x̂ in the product dtype. → (n, D)"""
        out = torch.empty_like(x, dtype=self.precision.product)
        self._center(self._rows(x.to(self.precision.sums)), None, out)
        return out

    def sampled_noise(
        self, seed: Tensor, rows: slice, num_noise: int, D: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Some of the random directions that ``seed`` stands for, a whole block, centred: as ``given_noise``."""
        out = self._noise_buffer((rows.stop - rows.start, D), self.precision.sums)
        noise.sample_block(seed, rows.start // noise.NOISE_BLOCK, num_noise, D, out.dtype, self.device, out)
        return self.given_noise(out, center)

    def given_noise(self, x: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
        """x̂ − center in the product dtype and in the gradient dtype, overwritten by the next block's.

        (n, D), (D,) → (n, D), (n, D)
        """
        rows, copies = self._rows(x.to(self.precision.sums)), []
        for dtype in dict.fromkeys((self.precision.product, self.precision.gradient)):
            copies.append(self._noise_buffer(x.shape, dtype))
            self._center(rows, center, copies[-1])
        return copies[0], copies[-1]

    def _noise_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.buffer(f"noise {dtype}", shape, dtype)

    def centered_anchors(
        self, units: Units, rows: slice, weights: Tensor | None = None, columnwise: bool = False
    ) -> Tensor:
        """w_i q̃_i in the gradient dtype, of some rows, overwritten by the next ones; weights: (n, 1). → (n, D)"""
        n, D, gradient = rows.stop - rows.start, units.anchors.x.shape[1], self.precision.gradient
        out = self._matrix(n, D, gradient, columnwise, "anchors")
        self._center(units.anchors.part(rows), units.center_q, out, weights)
        return out

    def _rows(self, x: Tensor) -> Rows:
        r: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=self.precision.sums)
        rows = Rows(x, r.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0))
        if x.numel() <= self.tile_elements:
            rows.unit = x * rows.r
        return rows

    def _units(self, rows: Rows, step: int, memory: str = "unit") -> Iterable[Tensor]:
        """x̂_i = x_i r_i, ``step`` at a time, not to be written to, overwritten by the next. → (n, D) each

        memory: another name for rows that are needed beside others. (New memory for each piece would leave holes
        in the allocator's heap: 30 MiB more at the peak.)
        """
        if rows.unit is not None:
            return (rows.unit,) if rows.unit.shape[0] <= step else torch.split(rows.unit, step)
        return (
            torch.mul(x, r, out=self.buffer(memory, x.shape, r.dtype)) for x, r in pieces(step, rows.x, rows.r)
        )

    def _center(self, rows: Rows, center: Tensor | None, out: Tensor, weights: Tensor | None = None) -> None:
        """w_i (x̂_i − center) to ``out``; weights: (n, 1)."""
        step, exact = self._row_step(out.shape[1]), out.dtype == self.precision.sums
        for (part, w), unit in zip(pieces(step, out, weights), self._units(rows, step), strict=True):
            work = part if exact else self._scratch(unit)
            if w is not None:
                unit = torch.mul(unit, w, out=work)
                if center is not None:
                    unit.addcmul_(w, center, value=-1)
            elif center is not None:
                unit = torch.sub(unit, center, out=work)
            if unit is not part:
                part.copy_(unit)

    def _mean(self, rows: Rows) -> Tensor:
        """Mean of the first unit rows. → (D,)"""
        n = rows.r.shape[0]
        first = slice(0, MORE_CENTER_ROWS if self.rounds and n > SMALL_BATCH else CENTER_ROWS)
        if rows.unit is not None:
            return rows.unit[first].mean(0)
        x, r = rows.x[first], rows.r[first, 0]
        return torch.mv(x.to(r.dtype).T, r).div_(r.shape[0])

    # ------------------------------------------------------------------ one sweep

    def start(self, terms: RowTerms, units: Units, columns: slice, acc: Accumulator | None) -> RowState:
        """Nothing summed yet; acc: where the gradients of some columns are to be summed."""
        return RowState(terms, units, columns, None if acc is None else acc.sums)

    def exp_similarity(
        self, queries: Tensor, columns: Columns, rows: slice, state: RowState, closing: bool
    ) -> Tensor:
        """The tile E_ij = 2^(q_i·k_j + bias_ij − shift_i) of some rows; its row sums go to the state.

        closing: no more columns come, α_i is known. Where the gradient products
        are exact the closed rows' diagonal is −Σ_j E_ij − t_i, what the positives lose, if that is all they do.
        """
        terms, shape = state.terms, state.units.anchors.r.shape
        out = self.workspace(rows.stop - rows.start, columns.rows.shape[0])
        for part in self.similarity(cut(queries, rows), columns, rows.start, 0, out):
            i, tile = moved(part.rows, rows.start), part.tile
            as_rows_(part, columns, i, 0)
            tile.sub_(cut(terms.shift, i)).exp2_()
            sums = tile.sum(1, keepdim=True)
            if state.sums is None and sums.shape == shape:
                state.sums = sums
            else:
                if state.sums is None:
                    state.sums = self.zeros(*shape)
                sums = cut(state.sums, i).add_(sums)
            if closing:
                alpha = (sums + (cut(terms.own, i) if isinstance(terms.own, Tensor) else terms.own)).reciprocal_()
                if terms.decoupled:  # a row without negatives
                    alpha.nan_to_num_(nan=math.nan, posinf=0.0)
                if sums.shape == shape:
                    state.alpha = alpha
                else:
                    if state.alpha is None:
                        state.alpha = self.empty(*shape)
                    state.alpha[i] = alpha
                if state.column_sums is not None:
                    state.column_sums.addmv_(cut_columns(tile, state.columns).T, alpha[:, 0])
                if not self.rounds and terms.whole and part.diagonal is not None:
                    lost = sums if terms.constant is None else sums + cut(terms.constant, i)
                    part.diagonal.sub_(lost.squeeze(1))  # from 0
            if tile.dtype != out.dtype:  # else the tile is a part of it
                out[part.rows].copy_(tile)
        return out

    def closed_anchors(self, state: RowState, rows: slice) -> Tensor:
        """α_i q̃_i in the gradient dtype, of closed rows. → (n, D)"""
        assert state.alpha is not None
        columnwise = self._columnwise(state.columns.stop - state.columns.start)
        return self.centered_anchors(state.units, rows, cut(state.alpha, rows), columnwise)

    def row_sums(self, state: RowState) -> RowSums:
        """What is known of the rows when all are closed."""
        terms, offset, constant = state.terms, state.terms.offset, state.terms.constant
        assert state.sums is not None
        assert state.alpha is not None
        total = state.sums if constant is None else state.sums + constant
        if offset is None:
            losses = total.log1p()
        elif terms.decoupled:
            losses = offset + total.log()
        else:
            far = torch.logaddexp(self.zeros(), offset + total.log())
            losses = torch.where(offset > 0, far, total.log1p())
        if not self.rounds and terms.whole:
            return RowSums(state.alpha, losses, None, None)
        return RowSums(state.alpha, losses, total, state.alpha * total)

    # ------------------------------------------------------------------ two sweeps

    def add_ratios(
        self,
        queries: Tensor,  # (C, D)
        columns: Columns,  # (B, D)
        i0: int,
        j0: int,
        shift: Tensor,  # (C, 1)
        rows: tuple[Tensor, Tensor],  # running maximum and Σ 2^(z − maximum), (C, 1) each
        cols: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        # row bias (C, 1), column shift (B,), and the columns' maximum and sum, (B,) each
        floor: float = 0.0,
    ) -> None:
        """Adds the ratios of a tile with the corner (i0, j0) to the running sums, in place.

        The rows' z_ij is q_i·k_j + bias_ij − shift_i, the columns' q_i·k_j + row_bias_i − column_shift_j.
        floor: what the maxima start from.
        """
        for part in self.similarity(queries, columns, i0, j0):
            piece, tile = part.rows, part.tile
            if cols is not None:
                row_bias, column_shift, maximum, total = cols
                other = self.buffer("other", tile.shape, self.precision.sums)
                torch.add(tile, cut(row_bias, piece), out=other)
                as_columns_(other, part.scores, columns, j0)
                merge_ratios(other, column_shift, 0, maximum, total)
            as_rows_(part, columns, moved(piece, i0), j0)
            merge_ratios(tile, cut(shift, piece), 1, cut(rows[0], piece), cut(rows[1], piece))

    def weighted_ratios(
        self,
        queries: Tensor,  # (C, D)
        columns: Columns,  # (B, D)
        i0: int,
        j0: int,
        shift: Tensor,  # (C, 1)
        weights: Tensor | None,  # (C, 1)
        sums: tuple[Tensor, Tensor],  # of the tile's rows (C, 1) and columns (B,), added to
        cols: tuple[Tensor, Tensor, Tensor | None] | None = None,
        # row bias (C, 1), column shift (B,), column weights (B,)
    ) -> Tensor:
        """The tile G_ij = w_i 2^z_ij of the rows' z, plus w_j 2^z_ij of the columns'. → (C, B)"""
        out = self.workspace(queries.shape[0], columns.rows.shape[0])
        for part in self.similarity(queries, columns, i0, j0, out):
            piece, tile, other = part.rows, part.tile, None
            if cols is not None:
                row_bias, column_shift, column_weights = cols
                other = self.buffer("other", tile.shape, self.precision.sums)
                torch.add(tile, cut(row_bias, piece), out=other)
                as_columns_(other, part.scores, columns, j0)
                other.sub_(column_shift).exp2_()
                if column_weights is not None:
                    other.mul_(column_weights)
            as_rows_(part, columns, moved(piece, i0), j0)
            tile.sub_(cut(shift, piece)).exp2_()
            if weights is not None:
                tile.mul_(cut(weights, piece))
            if other is not None:
                tile.add_(other)
            cut(sums[0], piece).add_(tile.sum(1, keepdim=True))
            sums[1].add_(tile.sum(0))
            if tile.dtype != out.dtype:
                out[piece].copy_(tile)
        return out

    def similarity(
        self, queries: Tensor, columns: Columns, i0: int, j0: int, out: Tensor | None = None
    ) -> Iterator[Part]:
        """Row pieces of q_i·k_j in the sums' dtype, what is no negative in either direction masked.

        The product itself fills ``out``, the workspace if none is given. ``as_rows_`` and ``as_columns_`` do what
        one direction asks for.
        """
        product = self.workspace(queries.shape[0], columns.rows.shape[0]) if out is None else out
        if product.dtype != self.precision.product:
            product = product.view(self.precision.product)
        torch.addmm(product, queries, columns.rows.T, beta=0, alpha=self.factor, out=product)
        for piece in self._pieces(*product.shape):
            tile = cut(product, piece)
            if tile.dtype != self.precision.sums:
                tile = self.buffer("scratch", tile.shape, self.precision.sums).copy_(tile)
            i, diagonal, scores = moved(piece, i0), None, None
            if columns.num_positives:
                diagonal = tile.diagonal(i.start - j0).fill_(-math.inf)
            if columns.bias or columns.column_ids is not None:
                _mask_(tile, columns, i.start, j0)
            if columns.limits is not None and columns.limits.guide is not None:
                rows, others = columns.limits.guide
                scores = rows[i] @ others[j0 : j0 + tile.shape[1]].T
            yield Part(piece, tile, diagonal, scores)

    # ------------------------------------------------------------------ gradients

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
        """acc_rows = tile @ keys, acc.grad = tile[:, columns]ᵀ @ anchors; or added to what they hold."""
        if acc_rows is not None:
            self._product(tile, keys, acc_rows, add_rows, ROUNDED_ROWS)
        if acc is not None and anchors is not None:
            step = min(COLUMNWISE, 4 * self.tile_elements // anchors.shape[1])
            self._product(cut_columns(tile, columns).T, anchors, acc.grad, add_columns, step)

    def _product(self, a: Tensor, b: Tensor, out: Tensor, add: bool, step: int) -> None:
        """out = a @ b, or added to it; ``step`` rows at a time where products are rounded."""
        if a.dtype == self.precision.sums:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
            return
        for piece in steps(a.shape[0], step):
            some, part = cut(a, piece), cut(out, piece)
            if part.dtype == a.dtype:
                torch.mm(some, b, out=part)
                continue
            columnwise = out.stride(0) == 1  # as b is
            product = self._matrix(some.shape[0], b.shape[1], a.dtype, columnwise, "product")
            torch.mm(some, b, out=product)
            part.add_(product) if add else part.copy_(product)

    # ------------------------------------------------------------------ normalisation backward

    def finish_pairs(
        self, units: Units, anchors: Side | None, positives: Side | None, scale: Scale
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Both sides' gradients from the sums over tiles, and the anchors' ⟨q̂_i, v_i⟩. → (N, D), (N, D), (N, 1)

        v_i = acc_i − share_i p̂_i + sums_i center, p̂_i the unit row of the pair, is the unit row's gradient but for
        its factors, dx_i = scale factor_i r_i (v_i − x̂_i ⟨x̂_i, v_i⟩) the row's.
        """
        q, k, factor = units.anchors, units.keys[0], scale.value
        dq, dots = (None, None) if anchors is None else self._finish(q, k, anchors, factor)
        return dq, None if positives is None else self._finish(k, q, positives, factor)[0], dots

    def finish(self, rows: Rows, side: Side, scale: Scale) -> Tensor:
        """The same of rows that have no pair: hard negatives, a queue."""
        return self._finish(rows, None, side, scale.value)[0]

    def _finish(self, rows: Rows, pair: Rows | None, side: Side, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        factors = rows.r * scale if side.factor is None else rows.r * side.factor * scale
        (n, D), dtype = rows.x.shape, side.dtype or rows.x.dtype
        sums, in_place = self.precision.sums, side.disposable and side.acc.dtype == dtype
        out = side.acc if in_place else self.empty(n, D, dtype=dtype)
        others, lost = None, side.share  # what a row loses is the pair's: lost_i others_i
        if pair is not None and lost is not None:
            others, lost = (pair.x, lost * pair.r) if pair.unit is None else (pair.unit, lost)
        step, dots = self._row_step(D), []
        parts = pieces(step, side.acc, out, factors, others, lost, side.sums)
        for (v, dx, by, other, share, weight), unit in zip(parts, self._units(rows, step), strict=True):
            work = dx if dx.dtype == sums else self.buffer("gradient", dx.shape, sums)
            if v.dtype != sums or v.stride(1) != 1:
                v = work.copy_(v)
            if other is not None:
                v = torch.addcmul(v, other.to(sums), share, value=-1, out=work)
            if side.center is not None and weight is not None:
                v = torch.addcmul(v, weight, side.center, out=work)
            dot = torch.mul(unit, v, out=self._scratch(unit)).sum(1, keepdim=True)
            dots.append(dot)
            torch.addcmul(v, unit, dot, value=-1, out=work).mul_(by)
            if work is not dx:
                dx.copy_(work)
        return out, _whole(dots)


def pieces(step: int, *tensors: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """Their rows, ``step`` at a time; they themselves where that is all of them, for a view has its price."""
    assert tensors[0] is not None
    if tensors[0].shape[0] <= step:
        return (tensors,)
    return zip(*(itertools.repeat(None) if x is None else torch.split(x, step) for x in tensors), strict=False)


def steps(n: int, step: int) -> list[slice]:
    """[0, n) in pieces of ``step``, of 1 at least."""
    if n <= step:
        return [slice(0, n)]
    step = max(1, step)
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def _whole(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def cut(x: Tensor, rows: slice) -> Tensor:
    """x[rows], without the price of a view where that is all of x."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


def cut_columns(x: Tensor, columns: slice) -> Tensor:
    return x if columns.stop - columns.start == x.shape[1] else x[:, columns]


def moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by) if by else rows


def _mask_(tile: Tensor, columns: Columns, i0: int, j0: int) -> None:
    """Equal ids and the columns' bias of the entries (i0 + a, j0 + b), in place; tile: (C, B)."""
    if columns.bias:
        tile.add_(columns.bias)
    if columns.column_ids is not None and j0 < columns.column_ids.numel():
        assert columns.row_ids is not None
        ids = columns.column_ids[j0 : j0 + tile.shape[1]]
        same = columns.row_ids[i0 : i0 + tile.shape[0], None] == ids
        tile[:, : ids.numel()].masked_fill_(same, -math.inf)


def as_rows_(part: Part, columns: Columns, i: slice, j0: int) -> None:
    """What only the rows i see, in place: columns too similar to them, and their own hard negatives' weight."""
    tile, scores = part.tile, part.scores
    if columns.limits is not None:
        limit = cut(columns.limits.rows, i)
        tile.masked_fill_((tile if scores is None else scores) > limit, -math.inf)
    N, H = columns.num_positives, columns.num_negatives
    if columns.own_bias:
        for start in range(N, N + H, N):
            tile.diagonal(i.start - (j0 - start)).add_(columns.own_bias)


def as_columns_(tile: Tensor, scores: Tensor | None, columns: Columns, j0: int) -> None:
    """What only the columns see, in place: rows too similar to them. tile: q_i·k_j + row_bias_i."""
    if columns.limits is not None and columns.limits.columns is not None:
        limit = columns.limits.columns[j0 : j0 + tile.shape[1]]
        tile.masked_fill_((tile if scores is None else scores) > limit, -math.inf)


def merge_ratios(z: Tensor, shift: Tensor, dim: int, maximum: Tensor, total: Tensor) -> None:
    """Merges Σ 2^(z − shift) along ``dim`` into a running maximum and sum; overwrites z."""
    peak = torch.maximum(maximum, z.amax(dim, keepdim=dim == 1) - shift)
    total.mul_(torch.exp2(maximum - peak))
    z.sub_(shift + peak).exp2_()
    total.add_(z.sum(dim, keepdim=dim == 1))
    maximum.copy_(peak)
