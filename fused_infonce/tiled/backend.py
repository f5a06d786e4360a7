"""The operations that a backend implements for the tiled algorithms, and the registry of backends.

A tile is a block of logits: C rows times the columns of a ``Columns``. Its entries' terms (masks, weights, limits)
are applied by the backend, never by the algorithms. A tile returned by one operation is valid until the next
operation that returns one: they share a workspace. Unless a method says otherwise its arguments are not modified.
Nothing here waits for a device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

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


class OnePassRows(Protocol):
    """Sums of all rows during one pass, and the exponentials of their tiles."""

    def exp_tile(
        self, queries: Tensor, columns: Columns, rows: slice, is_last_block: bool
    ) -> tuple[Tensor, Tensor | None]:
        """E_ij = 2^(q_i·k_j + b_ij − row_shift_i) of some rows, (C, T); their sums are kept.

        queries: (N, D), all of them. is_last_block: no more columns follow, so α_i is known afterwards. The second
        result is a factor (C, 1) by which the caller must multiply what it has summed of these rows before: their
        maximum has grown. None: 1.
        """

    def weighted_anchors(self, rows: slice) -> Tensor:
        """α_i q̃_i in the gradient dtype, of rows whose last block was computed last. → (C, D), overwritten by the
        next call. Or α_i H q̂_i with a reflection H that ``finish`` and ``finish_pairs`` undo (``RowGradArgs``).
        """

    def stats(self) -> RowStats:
        """Results of all rows, once every row's last block was computed."""


class TileBackend(Protocol):
    """The operations of one call: its precision, and the workspace that its tiles share."""

    precision: Precision
    device: torch.device
    supports_row_maximum: (
        bool  # whether one pass may take a row's maximum as its offset (its tiles hold whole rows)
    )
    workspace_elements: int  # of the gradient dtype, for a tile and the weighted anchors beside it
    max_chunk_rows: int
    chunk_multiple: int  # chunks of rows are multiples of it where the workspace holds as many
    multiprocessors: int  # that chunks of rows are to fill
    column_block: int  # columns of a tile in two passes
    noise_block: int  # noise vectors that are generated at a time

    def release(self) -> None:
        """Gives the memory of tiles back; the next tile allocates it again."""

    # Memory for gradients, uninitialised. single_chunk: nothing will be added to it.
    def row_products(self, n: int, D: int, single_chunk: bool) -> Tensor: ...
    def column_accumulator(self, n: int, D: int, single_chunk: bool) -> Accumulator: ...

    # Rows.
    def normalise(
        self,
        anchors: Tensor,  # (N, D)
        columns: list[Tensor],  # positives (N, D), and what else is given
        scale_log2: float | Tensor,
        centers: tuple[Tensor, Tensor]
        | None,  # of anchors and columns, (D,) each; None: means of this call's rows
        paired: bool = True,  # whether the first columns are the anchors' positives
    ) -> tuple[NormalizedBatch, Operands]:
        """Norms, centres and operands. scale_log2: the factor of s_ij in exponents of base 2.

        Without positives each anchor's is a zero row, which is not among the columns.
        """

    def queries(
        self, q: NormalizedRows, k: NormalizedRows, center: Tensor | None, scale_log2: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Operands of the product for q̂, (n, D), and scale_log2 q̂_i·(k̂_i − center) from unrounded rows, (n, 1)."""

    def pair_cosines(self, batch: NormalizedBatch) -> Tensor:
        """s_ii from unrounded rows, (N, 1)."""

    def pair_half_squared_chords(self, batch: NormalizedBatch) -> Tensor:
        """½‖q̂_i − k̂_i‖², which is 1 − s_ii to its last digits, (N, 1)."""

    def unit_rows(self, x: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x̂ − center in the product and in the gradient dtype, (n, D) each; the next call may overwrite them."""

    def sampled_noise(
        self, seed: Tensor, rows: slice, num_noise: int, D: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``unit_rows`` of some of the ``num_noise`` random vectors that ``seed`` stands for."""

    def centered_anchors(self, batch: NormalizedBatch, rows: slice) -> Tensor:
        """q̃_i in the gradient dtype, of some rows, (n, D); may share memory with the next."""

    # Tiles.
    def kept_products(self, rows: int, columns: int, beside: int) -> Tensor | None:
        """Memory for all products q_i·k_j, (rows, columns), where the workspace has as much and ``beside`` more
        columns for other tiles; None: it has not, or the backend always computes products anew.
        """

    def one_pass_rows(
        self,
        denominator: RowDenominator,
        batch: NormalizedBatch,
        columns: slice,
        acc: Accumulator | None,
        needs_tiles: bool,
    ) -> OnePassRows:
        """Sums that are still empty. columns: those that ``acc`` accumulates gradients of. needs_tiles: whether
        the tiles of ``exp_tile`` are read; if not, they may be empty.
        """

    def add_ratios(
        self,
        queries: Tensor,  # (C, D)
        columns: Columns,  # (B, D)
        i0: int,
        j0: int,
        row_shift_log2: Tensor,  # (C, 1)
        rows: tuple[Tensor, Tensor],  # running maximum (base 2) and Σ 2^(z − maximum), (C, 1) each
        cols: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        # row bias (C, 1), column shift (B,), and the columns' running maximum and sum, (B,) each
        least_maximum_log2: float,
        products: Tensor | None = None,  # (C, B) of ``kept_products``
    ) -> None:
        """Adds the ratios of a tile with the corner (i0, j0) to running maxima and sums, in place, and
        leaves q_i·k_j in ``products``.

        The rows' exponent is q_i·k_j + b_ij − row_shift_i, the columns' q_i·k_j + row_bias_i − column_shift_j.
        """

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
        # row bias (C, 1), column shift (B,), column weights (B,)
        products: Tensor | None = None,  # (C, B) as ``add_ratios`` left them
    ) -> Tensor:
        """The tile G_ij = w_i 2^z_ij of the rows' exponents, plus w_j 2^z_ij of the columns', (C, B); in the place
        of ``products`` if they are given.
        """

    def grad_products(
        self,
        tile: Tensor,  # (C, T)
        keys: Tensor,  # (T, D)
        acc_rows: Tensor | None,  # (C, D)
        add_rows: bool,
        columns: slice = slice(0, 0),
        anchors: Tensor | None = None,  # (C, D), or as ``weighted_anchors`` returned them
        acc: Accumulator | None = None,  # of these columns
        add_columns: bool = True,
    ) -> None:
        """acc_rows = tile @ keys and acc.grad = tile[:, columns]ᵀ @ anchors, or added to what they hold."""

    # Gradients of the inputs from those of their unit rows.
    def finish_pairs(
        self,
        batch: NormalizedBatch,
        anchors: RowGradArgs | None,
        positives: RowGradArgs | None,
        scale: GradScale,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dx_i = scale inv_norm_i (v_i − x̂_i ⟨x̂_i, v_i⟩), v_i as in ``RowGradArgs``, of anchors and of positives,
        (N, D) each; and the anchors' ⟨q̂_i, v_i⟩, (N, 1).
        """

    def finish(self, rows: NormalizedRows, args: RowGradArgs, scale: GradScale) -> Tensor:
        """The same for rows without a pair."""

    def unit_dots(self, acc: Tensor, rows: NormalizedRows, weights: Tensor, center: Tensor | None) -> Tensor:
        """⟨x̂_i, acc_i + weight_i center⟩, (n, 1)."""


def make_backend(
    name: str, precision: Precision, device: torch.device, workspace_bytes: int | None, rows: int, columns: int
) -> TileBackend:
    """The backend of a call by its name. rows, columns: of this rank's anchors and of all ranks' columns."""
    if name == "triton":
        from .triton_backend import TritonBackend  # imported here, because Triton need not be installed

        return TritonBackend(precision, device, workspace_bytes, rows, columns)
    from .torch_backend import TorchBackend  # imported here, because it imports this module

    return TorchBackend(precision, device, workspace_bytes)
