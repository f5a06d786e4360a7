"""The tile operations of the sweep by the Triton kernels: drop-in for ``TorchOps``; memory is made here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import noise, normalise, products, ratios, similarity
from .kernels.common import precision_of
from .kernels.settings import Settings, Tile, cdiv, default_settings, target_of
from .operands import Accumulator, Columns, Operands, Precision, Rows, RowSums, RowTerms, Scale, Side, Units

DEFAULT_WORKSPACE = 256 << 20
MIN_ROWS = 1024  # rows a chunk below which the traffic of the columns' accumulator would set the time
ALIGN = 16  # elements that strides are multiples of: kernels load the wider for it, tensor maps want 16 bytes


@dataclass(slots=True, eq=False)
class RowState:
    """Sums of one sweep's rows on their way."""

    terms: RowTerms
    units: Units
    columns: slice  # those whose gradients are asked for
    sums: Tensor | None  # (N, 1) Σ_j E_ij of the noise
    results: tuple[Tensor, Tensor, Tensor, Tensor]  # α, total, share, losses of the closed rows, (N, 1) each
    anchors: Tensor | None = None  # (C, D + PAD) weighted anchors of the rows closed last


class TritonOps:
    """One call's operations: its precision, settings and workspace."""

    chunk_rows = 128  # whole tiles of products
    most_rows = 1 << 40  # of a chunk
    column_block = 1 << 40  # tiles as wide as the matrix
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
        self.rounds = precision.low_precision_products
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

    def workspace(self, rows: int, columns: int) -> Tensor:
        """A tile's memory, overwritten by the next one's; rows are aligned. → (rows, columns)"""
        width = cdiv(columns, ALIGN) * ALIGN
        if self._tile is None or self._tile.numel() < rows * width:
            self._tile = None  # not beside the larger one
            self._tile = torch.empty(rows * width, dtype=self.precision.gradient, device=self.device)
        return self._tile[: rows * width].view(rows, width)[:, :columns]

    def _tile_for(self, special: dict[str, object], usual: Tile) -> Tile:
        return self.settings.guided if special["HAS_GUIDE"] else usual

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def products(self, n: int, D: int, once: bool) -> Tensor:
        """Memory for gradient products, to be overwritten."""
        return self.empty(n, D)

    def accumulator(self, columns: int, D: int, once: bool) -> Accumulator:
        """The same for the columns' gradients, and for their sums."""
        if not self.rounds:
            return Accumulator(self.empty(columns, D), None)
        if not self.settings.library_products:
            return Accumulator(self.empty(columns, D), self.empty(columns))
        padded = self._rows(columns, D + similarity.PAD, torch.float32)
        return Accumulator(padded[:, :D], padded[:, D])

    def _rows(self, n: int, D: int, dtype: torch.dtype) -> Tensor:
        """Memory for aligned rows. → (n, D)"""
        return torch.empty(n, cdiv(D, ALIGN) * ALIGN, dtype=dtype, device=self.device)[:, :D]

    def _copies(self, n: int, D: int) -> tuple[Tensor, Tensor | None]:
        """Memory for rows in the product dtype and, where that is another, in the gradient dtype."""
        product, gradient = self.precision.product, self.precision.gradient
        return self._rows(n, D, product), self._rows(n, D, gradient) if gradient != product else None

    # ------------------------------------------------------------------ rows

    def normalise(
        self,
        anchors: Tensor,  # (N, D)
        columns: list[Tensor],  # positives (N, D), then what there is beside
        bits: float | Tensor,
        centers: tuple[Tensor, Tensor] | None = None,  # of anchors and columns, (D,) each; None: this call's means
    ) -> tuple[Units, Operands]:
        """Norms and centres, and the operands of the similarity product; bits: κ log2(e)."""
        N, D = anchors.shape
        queries = self._rows(N, D, self.precision.product)
        keys, grad_keys = self._copies(sum(x.shape[0] for x in columns), D)
        center_q = (self.empty(D) if centers is None else centers[0]) if self.rounds else None
        center_k = self.empty(D) if centers is None else centers[1]
        r_q, r_k, shift, cosines, chords = self.empty(5, N, 1).unbind()
        normalise.normalise_pairs(
            anchors, columns[0], bits, queries, keys[:N], None if grad_keys is None else grad_keys[:N],
            (r_q, r_k, shift, cosines, chords), center_q, center_k, centers is None, self.settings.row_elements,
        )  # fmt: skip
        units = Units(Rows(anchors, r_q), [Rows(columns[0], r_k)], center_q, center_k, cosines, chords)
        start = N
        for x in columns[1:]:
            part = slice(start, start + x.shape[0])
            r = self._normalise_rows(x, center_k, keys[part], None if grad_keys is None else grad_keys[part])
            units.keys.append(Rows(x, r))
            start = part.stop
        return units, Operands(queries, keys, keys if grad_keys is None else grad_keys, shift)

    def _normalise_rows(self, x: Tensor, center: Tensor | None, rows: Tensor, grad_rows: Tensor | None) -> Tensor:
        r = self.empty(x.shape[0], 1)
        normalise.normalise_rows(x, center, rows, grad_rows, r, self.settings.row_elements)
        return r

    def queries(self, q: Rows, k: Rows, center: Tensor | None, bits: float | Tensor) -> tuple[Tensor, Tensor]:
        """bits · q̂ in the product dtype, and bits · q̂_i·(k̂_i − center) from unrounded rows. → (N, D), (N, 1)"""
        n, D = q.x.shape
        queries, shift = self._rows(n, D, self.precision.product), torch.empty_like(q.r)
        unused = [torch.empty_like(q.r) for _ in range(4)]
        normalise.normalise_pairs(
            q.x, k.x, bits, queries, None, None, (*unused[:2], shift, *unused[2:]), None, center, False,
            self.settings.row_elements,
        )  # fmt: skip
        return queries, shift

    def cosines(self, units: Units) -> Tensor:
        """s_ii, from unrounded rows. → (N, 1)"""
        assert units.cosines is not None
        return units.cosines

    def half_squared_chords(self, units: Units) -> Tensor:
        """½‖q̂_i − k̂_i‖², from unrounded rows: 1 − s_ii to its last digits. → (N, 1)"""
        assert units.chords is not None
        return units.chords

    def unit_rows(self, x: Tensor) -> Tensor:
        """x̂ in the product dtype. → (n, D)"""
        return self.given_noise(x, None)[0]

    def sampled_noise(
        self, seed: Tensor, rows: slice, num_noise: int, D: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Some of the random directions that ``seed`` stands for, centred: as ``given_noise``."""
        copy, grad_copy = self._copies(rows.stop - rows.start, D)
        noise.sample_noise(seed, rows.start, center, copy, grad_copy)
        return copy, copy if grad_copy is None else grad_copy

    def given_noise(self, x: Tensor, center: Tensor | None) -> tuple[Tensor, Tensor]:
        """x̂ − center in the product dtype and in the gradient dtype. (n, D), (D,) → (n, D), (n, D)"""
        copy, grad_copy = self._copies(*x.shape)
        self._normalise_rows(x, center, copy, grad_copy)
        return copy, copy if grad_copy is None else grad_copy

    def centered_anchors(self, units: Units, rows: slice) -> Tensor:
        """q̃_i in the gradient dtype, of some rows. → (n, D)"""
        q = units.anchors
        out = self._rows(rows.stop - rows.start, q.x.shape[1], self.precision.gradient)
        similarity.centered_anchors(q.x, q.r, units.center_q, rows.start, out)
        return out

    # ------------------------------------------------------------------ one sweep

    def start(self, terms: RowTerms, units: Units, columns: slice, acc: Accumulator | None) -> RowState:
        """Nothing summed yet; acc: where the gradients of some columns are to be summed."""
        alpha, total, share, losses = self.empty(4, *units.anchors.r.shape).unbind()
        return RowState(terms, units, columns, None, (alpha, total, share, losses))

    def exp_similarity(
        self, queries: Tensor, columns: Columns, rows: slice, state: RowState, closing: bool
    ) -> Tensor:
        """The tile E_ij = 2^(q_i·k_j + bias_ij − shift_i) of some rows; its row sums go to the state.

        closing: no more columns come, α_i is known.
        """
        n, terms = rows.stop - rows.start, state.terms
        out = self.workspace(n, len(columns))
        special = _special(columns, 0)
        tile = self._tile_for(special, self.settings.similarity)
        partials = similarity.exp_similarity(
            queries[rows], columns.rows, out, terms.shift[rows], rows.start, special, tile
        )  # fmt: skip
        if not closing:
            if state.sums is None:
                state.sums = self.zeros(*terms.shift.shape)
            state.sums[rows] += partials.sum(1, keepdim=True)
            return out
        anchors = x = r = None
        if state.columns.stop:
            x, r = state.units.anchors.x, state.units.anchors.r
            width = x.shape[1] + (similarity.PAD if self.rounds else 0)
            anchors = state.anchors = self._rows(n, width, self.precision.gradient)
        own = terms.own if isinstance(terms.own, Tensor) else None
        similarity.close_rows(
            partials, state.sums, own, terms.constant, terms.offset, state.results, rows.start,
            x, r, state.units.center_q, anchors, terms.decoupled,
        )  # fmt: skip
        return out

    def closed_anchors(self, state: RowState, rows: slice) -> Tensor:
        """α_i q̃_i in the gradient dtype, of the rows closed last, their weights behind them. → (n, D + PAD)"""
        assert state.anchors is not None
        return state.anchors

    def row_sums(self, state: RowState) -> RowSums:
        """What is known of the rows when all are closed."""
        alpha, total, share, losses = state.results
        return RowSums(alpha, losses, total, share)

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
        special = _special(columns, j0)
        of_rows, of_columns = ratios.ratio_sums(
            queries, columns.rows, i0, j0, shift, None if cols is None else cols[:2],
            special, self._tile_for(special, self.settings.ratios), floor,
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
        shift: Tensor,  # (C, 1)
        weights: Tensor | None,  # (C, 1)
        sums: tuple[Tensor, Tensor],  # of the tile's rows (C, 1) and columns (B,), added to
        cols: tuple[Tensor, Tensor, Tensor | None] | None = None,
        # row bias (C, 1), column shift (B,), column weights (B,)
    ) -> Tensor:
        """The tile G_ij = w_i 2^z_ij of the rows' z, plus w_j 2^z_ij of the columns'. → (C, B)"""
        out = self.workspace(queries.shape[0], len(columns))
        special = _special(columns, j0)
        of_rows, of_columns = ratios.weighted_ratios(
            queries, columns.rows, out, i0, j0, shift, weights, cols, special,
            self._tile_for(special, self.settings.ratios), _column_limits(columns),
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
        """acc_rows = tile @ keys, acc.grad = tile[:, columns]ᵀ @ anchors; or added to what they hold."""
        if acc_rows is None and acc is None:
            return
        products.grad_products(
            tile, keys, acc_rows, add_rows, tile[:, columns], anchors,
            None if acc is None else acc.grad, None if acc is None else acc.sums, add_columns,
            self.settings.products, self.settings.library_products,
        )  # fmt: skip

    # ------------------------------------------------------------------ normalisation backward

    def finish_pairs(
        self, units: Units, anchors: Side | None, positives: Side | None, scale: Scale
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Both sides' gradients from the sums over tiles, and the anchors' ⟨q̂_i, v_i⟩. → (N, D), (N, D), (N, 1)

        v_i = acc_i − share_i p̂_i + sums_i center, p̂_i the unit row of the pair, is the unit row's gradient but for
        its factors, dx_i = scale factor_i r_i (v_i − x̂_i ⟨x̂_i, v_i⟩) the row's.
        """
        if anchors is None and positives is None:
            return None, None, None
        q, k = units.anchors, units.keys[0]
        dq, dk, dots = normalise.normalise_backward(
            q.x,
            q.r,
            _side(anchors),
            k.x,
            k.r,
            _side(positives),
            scale.tensor,
            scale.number,
            self.settings.row_elements,
        )
        return dq, dk, dots

    def finish(self, rows: Rows, side: Side, scale: Scale) -> Tensor:
        """The same of rows that have no pair: hard negatives, a queue."""
        elements = self.settings.row_elements
        grad: Tensor = normalise.normalise_backward(
            rows.x, rows.r, _side(side), None, None, None, scale.tensor, scale.number, elements
        )[0]
        return grad

    def unit_dots(self, acc: Tensor, rows: Rows, weights: Tensor, center: Tensor | None) -> Tensor:
        """⟨x̂_i, acc_i + weight_i center⟩. → (N, 1)"""
        side = Side(acc, None, weights, center)
        dots: Tensor = normalise.normalise_backward(
            rows.x, rows.r, _side(side), None, None, None, None, 0.0, self.settings.row_elements
        )[2]
        return dots


def _special(columns: Columns, j0: int) -> dict[str, object]:
    """What is special about some entries, as the kernels take it."""
    ids, limits = columns.column_ids, columns.limits
    guide = None if limits is None else limits.guide
    return {
        "row_ids": None if ids is None else columns.row_ids,
        "column_ids": ids,
        "num_ids": 0 if ids is None else ids.numel(),
        "bias": columns.bias,
        "own_bias": columns.own_bias,
        "num_positives": columns.num_positives,
        "num_negatives": columns.num_negatives,
        "HAS_POSITIVES": columns.num_positives > j0,
        "HAS_OWN": columns.own_bias != 0,
        "HAS_IDS": ids is not None,
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
    return None if columns.limits is None else columns.limits.columns


def _side(side: Side | None) -> dict[str, object] | None:
    if side is None:
        return None
    return {name: getattr(side, name) for name in ("acc", "share", "sums", "center", "factor", "dtype")}


def _merge(parts: tuple[Tensor, Tensor], dim: int, running: tuple[Tensor, Tensor]) -> None:
    """Merges maxima and sums along ``dim`` into running ones, in place, always in the same order."""
    (maxima, sums), (maximum, total) = parts, running
    peak = torch.maximum(maximum, maxima.amax(dim, keepdim=dim == 1))
    sums.mul_(maxima.sub_(peak).exp2_())
    total.mul_(torch.exp2(maximum - peak)).add_(sums.sum(dim, keepdim=dim == 1))
    maximum.copy_(peak)
