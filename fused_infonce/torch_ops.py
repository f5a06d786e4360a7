"""The tile operations of the sweep in plain torch: any device, no N×M tensor, in place, in cache-sized pieces.

Exponents are in base 2 throughout: the similarity product, or its queries, carry the factor κ·log2(e), shifts and
biases are in bits. What belongs to rows is (N, 1), what belongs to columns (T,): both broadcast over a tile.
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
ROW_MATRICES = 2  # of them fit where a tile does: in passes over rows several are read and written
ROUNDED_ROWS = 384  # of a product E @ k̃ in bf16: oneDNN leaves a core idle at many larger numbers
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
    scores: Tensor | None  # (n, T) a guide's


class TorchOps:
    """One call's operations: its precision, its workspace and the scratch memory they share."""

    chunk_rows = 1  # of which a chunk of rows is a multiple, where the workspace holds as many
    column_block = 8192  # columns of a tile of the two sweeps
    noise_block = noise.NOISE_BLOCK  # rows that are drawn at a time

    def __init__(self, precision: Precision, device: torch.device, workspace_bytes: int | None) -> None:
        self.precision = precision
        self.device = device
        self.rounds = precision.rounds
        self.factor = 1.0  # of the similarity product, where it is no part of the queries
        budget = workspace_bytes or DEFAULT_WORKSPACE.get(device.type, DEFAULT_DEVICE_WORKSPACE)
        # The rest is for the scratch of elementwise passes and what the libraries keep. glibc's allocator reuses a
        # tile of 21 MiB; from 32 MiB on each call would fault its pages in anew.
        self.tile_elements = min(TILE, max(1024, budget // 128))
        self.workspace_elements = budget // 3 // precision.gradient.itemsize
        self._like: Tensor | None = None  # a tensor of the sums' dtype: new_empty takes a third of empty's time
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

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory, in the sums' dtype if none is given."""
        if self._like is not None:
            return self._like.new_empty(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype or self.precision.sums, device=self.device)

    def accumulator(self, columns: int, D: int) -> Accumulator:
        """Memory for the columns' gradients, to be overwritten, and for their sums, 0."""
        return Accumulator(self.empty(columns, D), self.zeros(columns) if self.rounds else None)

    def _pieces(self, rows: int, columns: int) -> list[slice]:
        """Pieces of a tile that one pass of elementwise operations works on."""
        return steps(rows, self.tile_elements // columns)

    def _row_pieces(self, rows: int, D: int) -> list[slice]:
        """The same of rows (rows, D): their passes read and write more than one matrix."""
        return steps(rows, self.tile_elements // ROW_MATRICES // D)

    def _scratch(self, rows: slice, D: int) -> Tensor:
        """Memory for a piece of rows in the sums' dtype. → (n, D)"""
        return self.buffer("rows", (rows.stop - rows.start, D), self.precision.sums)

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
        self._like = q.r
        center_q = (self._mean(q) if centers is None else centers[0]) if self.rounds else None
        units = Units(q, keys, center_q, self._mean(keys[0]) if centers is None else centers[1])
        rows = self.empty(sum(map(len, keys)), anchors.shape[1], dtype=product)
        queries, shift = self.queries(q, keys[0], units.center_k, bits, cut(rows, slice(0, len(q))))
        self._fill_centered(rows, keys, units.center_k, first=1)
        grad_rows = rows
        if gradient != product:
            grad_rows = torch.empty_like(rows, dtype=gradient)
            self._fill_centered(grad_rows, keys, units.center_k)
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
        dots = []
        for piece in self._row_pieces(N, D):
            unit, centered, scratch = self._unit(q, piece), self._unit(k, piece), self._scratch(piece, D)
            out = None if keys is None else cut(keys, piece)
            if center is not None:
                exact = out is not None and out.dtype == sums
                centered = torch.sub(centered, center, out=out if exact else scratch)
            if out is not None and out is not centered:
                out.copy_(centered)
            dots.append(torch.mul(unit, centered, out=scratch).sum(1, keepdim=True))
            if kept is None:
                cut(queries, piece).copy_(torch.mul(unit, bits, out=scratch) if scaled else unit)
        return queries, _whole(dots).mul_(bits)

    def cosines(self, units: Units) -> Tensor:
        """s_ii, from unrounded rows. → (N, 1)"""
        q, k = units.anchors, units.keys[0]
        return self._row_sums(q, lambda i, out: torch.mul(self._unit(q, i), self._unit(k, i), out=out))

    def half_squared_chords(self, units: Units) -> Tensor:
        """½‖q̂_i − k̂_i‖², from unrounded rows: 1 − s_ii to its last digits. → (N, 1)"""
        q, k = units.anchors, units.keys[0]

        def squares(i: slice, out: Tensor) -> Tensor:
            return torch.sub(self._unit(q, i), self._unit(k, i), out=out).square_()

        return self._row_sums(q, squares) / 2

    def unit_dots(self, acc: Tensor, rows: Rows, weights: Tensor, center: Tensor | None) -> Tensor:
        """⟨x̂_i, acc_i + weight_i center⟩. → (N, 1)"""

        def products(i: slice, out: Tensor) -> Tensor:
            v = cut(acc, i)
            if center is not None:
                v = torch.addcmul(v, cut(weights, i), center, out=out)
            return torch.mul(v, self._unit(rows, i), out=out)

        return self._row_sums(rows, products)

    def _row_sums(self, rows: Rows, make: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Sums of the rows that ``make`` writes, a piece at a time, to the memory it is given. → (n, 1)"""
        n, D = rows.x.shape
        made = (make(piece, self._scratch(piece, D)) for piece in self._row_pieces(n, D))
        return _whole([x.sum(1, keepdim=True) for x in made])

    def unit_rows(self, x: Tensor) -> Tensor:
        """x̂ in the product dtype. → (n, D)"""
        out = torch.empty_like(x, dtype=self.precision.product)
        self._fill_centered(out, [self._rows(x.to(self.precision.sums))], None)
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
            self._fill_centered(copies[-1], [rows], center)
        return copies[0], copies[-1]

    def _noise_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.buffer(f"noise {dtype}", shape, dtype)

    def centered_anchors(self, units: Units, rows: slice, weights: Tensor | None = None) -> Tensor:
        """w_i q̃_i in the gradient dtype, of some rows, overwritten by the next ones; weights: (N, 1). → (n, D)"""
        q, center, D = units.anchors, units.center_q, units.anchors.x.shape[1]
        out = self.buffer("anchors", (rows.stop - rows.start, D), self.precision.gradient)
        for piece in self._row_pieces(*out.shape):
            i, part = moved(piece, rows.start), cut(out, piece)
            unit = self._unit(q, i)
            work = part if part.dtype == self.precision.sums else self._scratch(piece, D)
            if weights is not None:
                w = cut(weights, i)
                unit = torch.mul(unit, w, out=work)
                if center is not None:
                    unit.addcmul_(w, center, value=-1)
            elif center is not None:
                unit = torch.sub(unit, center, out=work)
            if unit is not part:
                part.copy_(unit)
        return out

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

    def _fill_centered(self, out: Tensor, parts: list[Rows], center: Tensor | None, first: int = 0) -> None:
        """x̂_i − center of the parts, one below the other, to ``out``, from the ``first`` part on."""
        start, D = sum(map(len, parts[:first])), out.shape[1]
        for rows in parts[first:]:
            for piece in self._row_pieces(len(rows), D):
                unit, part = self._unit(rows, piece), out[moved(piece, start)]
                if center is not None:
                    work = part if part.dtype == self.precision.sums else self._scratch(piece, D)
                    unit = torch.sub(unit, center, out=work)
                if unit is not part:
                    part.copy_(unit)
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
        for part in self.similarity(cut(queries, rows), columns, rows.start, 0):
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
                    part.diagonal.sub_(lost)  # from 0
            self._store(tile, out, part.rows)
        return out

    def closed_anchors(self, state: RowState, rows: slice) -> Tensor:
        """α_i q̃_i in the gradient dtype, of closed rows. → (n, D)"""
        return self.centered_anchors(state.units, rows, state.alpha)

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

    def similarity(self, queries: Tensor, columns: Columns, i0: int, j0: int) -> Iterator[Part]:
        """Row pieces of q_i·k_j in the sums' dtype, what is no negative in either direction masked.

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
            i, diagonal, scores = moved(piece, i0), None, None
            if columns.num_positives:
                diagonal = _diagonal(tile, i.start, j0).fill_(-math.inf)
            _mask_(tile, columns, i.start, j0)
            if columns.limits is not None and columns.limits.guide is not None:
                rows, others = columns.limits.guide
                scores = rows[i] @ others[j0 : j0 + tile.shape[1]].T
            yield Part(piece, tile, diagonal, scores)

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
            self._product(tile, keys, acc_rows, add_rows, ROUNDED_ROWS)
        if acc is not None and anchors is not None:
            step = 4 * self.tile_elements // anchors.shape[1]
            self._product(cut_columns(tile, columns).T, anchors, acc.grad, add_columns, step)

    def _product(self, a: Tensor, b: Tensor, out: Tensor, add: bool, step: int) -> None:
        """out = a @ b, or added to it; ``step`` rows at a time where the product is rounded before that."""
        if a.dtype == out.dtype:
            torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
            return
        for piece in steps(a.shape[0], step):
            some, part = a[piece], out[piece]
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

    def _finish(self, rows: Rows, pair: Rows | None, side: Side, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        factors = rows.r * scale if side.factor is None else rows.r * side.factor * scale
        (n, D), dtype = rows.x.shape, side.dtype or rows.x.dtype
        in_place = side.disposable and side.acc.dtype == dtype
        out, dots = side.acc if in_place else self.empty(n, D, dtype=dtype), []
        for piece in self._row_pieces(n, D):
            v, unit, scratch, dx = (
                cut(side.acc, piece),
                self._unit(rows, piece),
                self._scratch(piece, D),
                cut(out, piece),
            )
            work = dx if dx.dtype == v.dtype else self.buffer("gradient", dx.shape, v.dtype)
            if pair is not None and side.share is not None:
                share = cut(side.share, piece)
                if pair.unit is not None:
                    v = torch.addcmul(v, cut(pair.unit, piece), share, value=-1, out=work)
                else:
                    of_pair = cut(pair.x, piece).to(v.dtype)
                    v = torch.addcmul(v, of_pair, share * cut(pair.r, piece), value=-1, out=work)
            if side.center is not None and side.sums is not None:
                v = torch.addcmul(v, cut(side.sums, piece), side.center, out=work)
            dot = torch.mul(unit, v, out=scratch).sum(1, keepdim=True)
            dots.append(dot)
            torch.addcmul(v, unit, dot, value=-1, out=work).mul_(cut(factors, piece))
            if work is not dx:
                dx.copy_(work)
        return out, _whole(dots)


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
