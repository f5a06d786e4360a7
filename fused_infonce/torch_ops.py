"""The tile operations of the sweep in plain torch: any device, no N×M tensor, in place, in cache-sized pieces.

Exponents are in base 2 throughout: the queries carry the factor κ·log2(e), shifts and biases are in bits. What
belongs to rows is (N, 1), what belongs to columns (T,): both broadcast over a tile.
On a CPU a product of bf16 rows is stored in bf16 (torch offers nothing wider there); all that follows it is fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import noise
from .operands import Accumulator, Columns, Operands, Precision, Rows, RowSums, RowTerms, Scale, Side, Units

TILE = 1 << 19  # elements that one pass of elementwise operations works on: 2 MiB of fp32
CENTER_ROWS = 1024  # rows that a centre is the mean of; any constant is exact, a mean is the most useful one
FEW_CENTER_ROWS = 64  # the same where products do not round: little is gained by more
ALIASED = 2048  # bytes: rows of a multiple of it meet in few sets of a CPU's cache, a fifth of a product's time
GAP = 64  # bytes, a cache line, that keep such rows apart
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
    diagonal: Tensor | None  # (n, 1) its entries of rows' own columns, masked; a view; None: there are none
    pairs: Tensor | None  # (n, 1) what stood there
    scores: Tensor | None  # (n, T) a guide's


class TorchOps:
    """One call's operations: its precision, its workspace and the scratch memory they share."""

    column_block = 8192  # columns of a tile of the two sweeps
    noise_block = noise.NOISE_BLOCK  # rows that are drawn at a time

    def __init__(self, precision: Precision, device: torch.device, workspace_bytes: int | None) -> None:
        self.precision = precision
        self.device = device
        self.rounds = precision.rounds
        self.factor = 1.0  # of the similarity product, where it is no part of the queries
        budget = workspace_bytes or DEFAULT_WORKSPACE.get(device.type, DEFAULT_DEVICE_WORKSPACE)
        # The rest is for the scratch of elementwise passes and what the libraries keep. glibc's allocator reuses a
        # tile of 24 MiB; from 32 MiB on each call would fault its pages in anew.
        self.tile_elements = min(TILE, max(1024, budget // 128))
        self.workspace_elements = budget * 3 // 8 // precision.gradient.itemsize
        self._like: Tensor | None = None  # a tensor of the sums' dtype: new_empty takes a third of empty's time
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
        """A tile's memory, overwritten by the next one's; on a CPU its rows may lie apart. → (rows, columns)"""
        dtype, stride = self.precision.gradient, columns
        if self.device.type == "cpu" and columns * dtype.itemsize % ALIASED == 0:
            stride += GAP // dtype.itemsize
        size = rows * stride
        if self._tile is None or self._tile.numel() < size:
            if dtype == self.precision.sums:
                self._tile = self.empty(rows, stride)
            else:
                self._tile = torch.empty(rows, stride, dtype=dtype, device=self.device)
        tile = self._tile
        if tile.shape != (rows, stride):  # what one tile holds pays for no view
            tile = tile.view(-1)[:size].view(rows, stride)
        return tile if stride == columns else tile[:, :columns]

    def release(self) -> None:
        """Gives the memory of tiles and scratch back."""
        self._buffers.clear()
        self._tile = self._like = None

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.precision.sums, device=self.device)

    def empty(self, *shape: int) -> Tensor:
        if self._like is not None:
            return self._like.new_empty(shape)
        return torch.empty(shape, dtype=self.precision.sums, device=self.device)

    def accumulator(self, columns: int, D: int) -> Accumulator:
        """Memory for the columns' gradients, to be overwritten."""
        return Accumulator(self.empty(columns, D), self.zeros(columns) if self.rounds else None)

    def _pieces(self, rows: int, columns: int) -> Iterator[slice]:
        step = max(1, self.tile_elements // columns)
        for start in range(0, rows, step):
            yield slice(start, min(rows, start + step))

    def _by_pieces(
        self,
        shape: torch.Size,
        make: Callable[[slice], tuple[Tensor, ...]],
        dtypes: tuple[torch.dtype, ...],
        out: Tensor | None = None,
    ) -> list[Tensor]:
        """What ``make`` gives for rows (n, D), a cache-sized piece at a time, in the dtypes.

        out: memory for the first of them.
        """
        n, D = shape
        if n * D <= self.tile_elements and out is None:
            parts = make(slice(0, n))
            return [x if x.dtype == t else x.to(t) for x, t in zip(parts, dtypes, strict=True)]
        wholes: list[Tensor] = []
        for piece in self._pieces(n, D):
            parts = make(piece)
            if not wholes:
                wholes = [x.new_empty(n, x.shape[1], dtype=t) for x, t in zip(parts, dtypes, strict=True)]
                wholes[0] = wholes[0] if out is None else out
            for whole, part in zip(wholes, parts, strict=True):
                whole[piece].copy_(part)
        return wholes

    # ------------------------------------------------------------------ rows

    def normalise(
        self,
        anchors: Tensor,  # (N, D)
        columns: list[Tensor],  # positives (N, D), then what there is beside
        bits: float | Tensor,
        centers: tuple[Tensor, Tensor] | None = None,  # of anchors and columns, (D,) each; None: this call's means
    ) -> tuple[Units, Operands]:
        """Norms and centres, and the operands of the similarity product; bits: κ log2(e)."""
        product, gradient = self.precision.product, self.precision.gradient
        self.factor = bits if isinstance(bits, float) and product == self.precision.sums else 1.0
        q, keys = self._rows(anchors), [self._rows(x) for x in columns]
        self._like = q.r
        center_q = (self._mean(q) if centers is None else centers[0]) if self.rounds else None
        units = Units(q, keys, center_q, self._mean(keys[0]) if centers is None else centers[1])
        rows = None
        if len(keys) > 1:
            rows = torch.empty(sum(map(len, keys)), anchors.shape[1], dtype=product, device=self.device)
            self._fill_centered(rows[len(q) :], keys[1:], units.center_k)
        if q.unit is not None and not self.rounds and self.factor != 1 and rows is None:
            # Products are exact: those of the pairs are made where they are asked for, or read off the diagonal.
            rows = self._unit(keys[0], slice(0, len(q))) - units.center_k
            return units, Operands(q.unit, rows, rows, None)
        queries, shift, first = self._queries(q, keys[0], units.center_k, bits, rows)
        grad_rows = rows = first if rows is None else rows
        if gradient != product:
            grad_rows = torch.empty_like(rows, dtype=gradient)
            self._fill_centered(grad_rows, keys, units.center_k)
        return units, Operands(queries, rows, grad_rows, shift)

    def own_products(self, units: Units, bits: float | Tensor) -> Tensor:
        """bits q̂_i·k̃_i, from unrounded rows. → (N, 1)"""
        return self._queries(units.anchors, units.keys[0], units.center_k, bits)[1]

    def queries(self, q: Rows, k: Rows, center: Tensor | None, bits: float | Tensor) -> tuple[Tensor, Tensor]:
        """Operands of the similarity product for q̂, and bits · q̂_i·(k̂_i − center) from unrounded rows.

        (N, D), (N, D), (D,), 0-dim → (N, D), (N, 1)
        """
        return self._queries(q, k, center, bits)[:2]

    def _queries(
        self, q: Rows, k: Rows, center: Tensor | None, bits: float | Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and k̂ − center in the product dtype, in the first N rows of ``keys``."""

        def make(piece: slice) -> tuple[Tensor, Tensor, Tensor]:
            unit, centered = self._unit(q, piece), self._unit(k, piece)
            if center is not None:
                centered = centered - center
            return centered, unit if self.factor != 1 else unit * bits, (unit * centered).sum(1, keepdim=True)

        dtypes = (self.precision.product, self.precision.product, self.precision.sums)
        rows, queries, dots = self._by_pieces(q.x.shape, make, dtypes, None if keys is None else keys[: len(k)])
        return queries, dots * bits, rows

    def cosines(self, units: Units) -> Tensor:
        """s_ii, from unrounded rows. → (N, 1)"""
        q, k = units.anchors, units.keys[0]

        def make(piece: slice) -> tuple[Tensor]:
            return ((self._unit(q, piece) * self._unit(k, piece)).sum(1, keepdim=True),)

        return self._by_pieces(q.x.shape, make, (self.precision.sums,))[0]

    def half_squared_chords(self, units: Units) -> Tensor:
        """½‖q̂_i − k̂_i‖², from unrounded rows: 1 − s_ii to its last digits. → (N, 1)"""
        q, k = units.anchors, units.keys[0]

        def make(piece: slice) -> tuple[Tensor]:
            chords = self._unit(q, piece) - self._unit(k, piece)
            return (chords.square_().sum(1, keepdim=True) / 2,)

        return self._by_pieces(q.x.shape, make, (self.precision.sums,))[0]

    def unit_rows(self, x: Tensor) -> Tensor:
        """x̂ in the product dtype. → (n, D)"""
        return self.given_noise(x, None)[0]

    def sampled_noise(
        self, seed: Tensor, rows: slice, num_noise: int, D: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Some of the random directions that ``seed`` stands for, a whole block, centred: as ``given_noise``."""
        block = rows.start // noise.NOISE_BLOCK
        return self.given_noise(
            noise.sample_block(seed, block, num_noise, D, self.precision.sums, self.device), center
        )

    def given_noise(self, x: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
        """x̂ − center in the product dtype and in the gradient dtype. (n, D), (D,) → (n, D), (n, D)"""
        rows, precision = self._rows(x.to(self.precision.sums)), self.precision
        dtypes = dict.fromkeys((precision.product, precision.gradient))
        copies = [self._centered(rows, center, dtype) for dtype in dtypes]
        return copies[0], copies[-1]

    def centered_anchors(self, units: Units, rows: slice) -> Tensor:
        """q̃_i in the gradient dtype, of some rows. → (n, D)"""
        q, center = units.anchors, units.center_q

        def make(piece: slice) -> tuple[Tensor]:
            unit = self._unit(q, moved(piece, rows.start))
            return (unit if center is None else unit - center,)

        shape = torch.Size((rows.stop - rows.start, q.x.shape[1]))
        return self._by_pieces(shape, make, (self.precision.gradient,))[0]

    def _rows(self, x: Tensor) -> Rows:
        r: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=self.precision.sums)
        rows = Rows(x, r.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0))
        if x.numel() <= self.tile_elements:
            rows.unit = x * rows.r
        return rows

    def _unit(self, rows: Rows, piece: slice) -> Tensor:
        """x̂_i = x_i r_i, not to be written to. → (n, D)"""
        if rows.unit is not None:
            return cut(rows.unit, piece)
        return cut(rows.x, piece) * cut(rows.r, piece)

    def _centered(
        self, rows: Rows, center: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """x̂_i − center. → (n, D)"""

        def make(piece: slice) -> tuple[Tensor]:
            unit = self._unit(rows, piece)
            return (unit if center is None else unit - center,)

        return self._by_pieces(rows.x.shape, make, (dtype,), out)[0]

    def _fill_centered(self, out: Tensor, parts: list[Rows], center: Tensor | None) -> None:
        """The parts' centred rows, one below the other, in ``out``."""
        start = 0
        for rows in parts:
            self._centered(rows, center, out.dtype, out[start : start + len(rows)])
            start += len(rows)

    def _mean(self, rows: Rows) -> Tensor:
        """Mean of evenly spaced unit rows. → (D,)"""
        step = -(-len(rows) // (CENTER_ROWS if self.rounds else FEW_CENTER_ROWS))
        if rows.unit is not None:
            return (rows.unit if step == 1 else rows.unit[::step]).mean(0)
        some = rows.x[::step].to(self.precision.sums)
        return torch.mv(some.T, rows.r[::step, 0]).div_(some.shape[0])

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
        out = self.workspace(rows.stop - rows.start, len(columns))
        for part in self.similarity(cut(queries, rows), columns, rows.start, 0, terms.shift is None):
            i, tile, shift = moved(part.rows, rows.start), part.tile, part.pairs
            as_rows_(part, columns, i, 0)
            if terms.shift is not None:
                shift = cut(terms.shift, i)
            assert shift is not None
            tile.sub_(shift).exp2_()
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
                    part.diagonal.sub_(lost)  # from 0
            self._store(tile, out, part.rows)
        return out

    def closed_anchors(self, state: RowState, rows: slice) -> Tensor:
        """α_i q̃_i in the gradient dtype, of closed rows. → (n, D)"""
        q, center, alphas = state.units.anchors, state.units.center_q, state.alpha
        assert alphas is not None
        if q.unit is not None and center is None:
            return cut(q.unit, rows) * cut(alphas, rows)

        def make(piece: slice) -> tuple[Tensor]:
            i = moved(piece, rows.start)
            alpha = cut(alphas, i)
            scaled = cut(q.x, i) * (cut(q.r, i) * alpha) if q.unit is None else cut(q.unit, i) * alpha
            return (scaled if center is None else scaled.addcmul_(alpha, center, value=-1),)

        shape = torch.Size((rows.stop - rows.start, q.x.shape[1]))
        return self._by_pieces(shape, make, (self.precision.gradient,))[0]

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
        for part in self.similarity(queries, columns, i0, j0):
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
            self._store(tile, out, piece)
        return out

    def similarity(
        self, queries: Tensor, columns: Columns, i0: int, j0: int, with_pairs: bool = False
    ) -> Iterator[Part]:
        """Row pieces of q_i·k_j in the sums' dtype, what is no negative in either direction masked.

        with_pairs: keep what the mask of the rows' own columns hides.
        The product itself fills the workspace. ``as_rows_`` and ``as_columns_`` do what one direction asks for.
        """
        product = self.workspace(queries.shape[0], columns.rows.shape[0])
        if product.dtype != self.precision.product:
            product = product.view(self.precision.product)
        torch.addmm(product, queries, columns.rows.T, beta=0, alpha=self.factor, out=product)
        for piece in self._pieces(*product.shape):
            tile = cut(product, piece)
            if tile.dtype != self.precision.sums:
                tile = self.buffer("scratch", tile.shape, self.precision.sums).copy_(tile)
            i, diagonal, pairs, scores = moved(piece, i0), None, None, None
            if columns.num_positives:
                diagonal = _diagonal(tile, i.start, j0)
                if with_pairs:
                    pairs = diagonal.clone()
                diagonal.fill_(-math.inf)
            _mask_(tile, columns, i.start, j0)
            if columns.limits is not None and columns.limits.guide is not None:
                rows, others = columns.limits.guide
                scores = rows[i] @ others[j0 : j0 + tile.shape[1]].T
            yield Part(piece, tile, diagonal, pairs, scores)

    def _store(self, tile: Tensor, out: Tensor, piece: slice) -> None:
        if tile.dtype != out.dtype:  # else the tile is a part of it
            out[piece].copy_(tile)

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
            self._product(tile, keys, acc_rows, add_rows)
        if acc is not None and anchors is not None:
            self._product(cut_columns(tile, columns).T, anchors, acc.grad, add_columns)

    def _product(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
            return
        step = max(1, 2 * self.tile_elements // b.shape[1])
        for start in range(0, a.shape[0], step):
            some, part = a[start : start + step], out[start : start + step]
            product = torch.mm(some, b, out=self.buffer("product", (some.shape[0], b.shape[1]), a.dtype))
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

    def _finish(self, rows: Rows, pair: Rows | None, side: Side, scale: float | Tensor) -> list[Tensor]:
        factors = rows.r * scale if side.factor is None else rows.r * side.factor * scale
        dtype = side.dtype or rows.x.dtype

        def make(piece: slice) -> tuple[Tensor, Tensor]:
            v, unit = cut(side.acc, piece), self._unit(rows, piece)
            if pair is not None and side.share is not None:
                share = cut(side.share, piece)
                if pair.unit is not None:
                    v = torch.addcmul(v, cut(pair.unit, piece), share, value=-1)
                else:
                    v = torch.addcmul(v, cut(pair.x, piece).to(v.dtype), share * cut(pair.r, piece), value=-1)
            if side.center is not None and side.sums is not None:
                v = torch.addcmul(v, cut(side.sums, piece), side.center)
            dots = (unit * v).sum(1, keepdim=True)
            return torch.addcmul(v, unit, dots, value=-1).mul_(cut(factors, piece)), dots

        out = side.acc if side.disposable and side.acc.dtype == dtype else None
        return self._by_pieces(rows.x.shape, make, (dtype, factors.dtype), out)

    def unit_dots(self, acc: Tensor, rows: Rows, weights: Tensor, center: Tensor | None) -> Tensor:
        """⟨x̂_i, acc_i + weight_i center⟩. → (N, 1)"""

        def make(piece: slice) -> tuple[Tensor]:
            v = cut(acc, piece)
            if center is not None:
                v = torch.addcmul(v, cut(weights, piece), center)
            return ((v * self._unit(rows, piece)).sum(1, keepdim=True),)

        return self._by_pieces(rows.x.shape, make, (self.precision.sums,))[0]


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
            _diagonal(tile, i.start, j0 - start).add_(columns.own_bias)


def as_columns_(tile: Tensor, scores: Tensor | None, columns: Columns, j0: int) -> None:
    """What only the columns see, in place: rows too similar to them. tile: q_i·k_j + row_bias_i."""
    if columns.limits is not None and columns.limits.columns is not None:
        limit = columns.limits.columns[j0 : j0 + tile.shape[1]]
        tile.masked_fill_((tile if scores is None else scores) > limit, -math.inf)


def _diagonal(tile: Tensor, i0: int, j0: int) -> Tensor:
    """The entries of the tile, whose corner is (i0, j0), on the diagonal i == j: a view. → (n, 1)"""
    i, j = max(0, j0 - i0), max(0, i0 - j0)  # where it enters the tile
    length = max(0, min(tile.shape[0] - i, tile.shape[1] - j))
    down, right = tile.stride()
    start = tile.storage_offset() + i * down + j * right if length else 0
    return tile.as_strided((length, 1), (down + right, 1), start)


def merge_ratios(z: Tensor, shift: Tensor, dim: int, maximum: Tensor, total: Tensor) -> None:
    """Merges Σ 2^(z − shift) along ``dim`` into a running maximum and sum; overwrites z."""
    peak = torch.maximum(maximum, z.amax(dim, keepdim=dim == 1) - shift)
    total.mul_(torch.exp2(maximum - peak))
    z.sub_(shift + peak).exp2_()
    total.add_(z.sum(dim, keepdim=dim == 1))
    maximum.copy_(peak)
