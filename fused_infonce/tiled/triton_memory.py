"""Memory of the Triton backend: the tile, and rows and vectors with the alignment that its kernels want."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.common import ALIGN, precision_of
from ..kernels.settings import Settings, cdiv, default_settings, multiprocessors, target_of, workspace_of
from .operands import Accumulator, Precision

MIN_ROWS = 1024  # rows per chunk below which the traffic of the columns' accumulator would set the time


class TritonMemory:
    """Precision, launch settings and workspace of one call."""

    chunk_multiple = 128  # whole tiles of products
    max_chunk_rows = 1 << 40
    column_block = 1 << 40  # tiles are as wide as the matrix

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
        self.multiprocessors = multiprocessors(device)
        stored = precision.gradient.itemsize
        budget = workspace_bytes or max(workspace_of(device), min(rows, MIN_ROWS) * columns * stored)
        # Partials, weighted anchors and vectors take the rest.
        self.workspace_elements = budget * 7 // 8 // stored
        self._tile: Tensor | None = None

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

    def kept_products(self, rows: int, columns: int, beside: int) -> Tensor | None:
        return None  # the kernels compute a tile's products in registers and store its exponentials

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def vectors(self, count: int, n: int) -> tuple[Tensor, ...]:
        """Vectors in one allocation, each aligned, so that kernels compile once for all n. → (n, 1) each"""
        return self.empty(count, cdiv(n, ALIGN) * ALIGN, 1)[:, :n].unbind()

    def rows(self, n: int, D: int, dtype: torch.dtype) -> Tensor:
        """Memory for aligned rows. → (n, D)"""
        return torch.empty(n, cdiv(D, ALIGN) * ALIGN, dtype=dtype, device=self.device)[:, :D]

    def copies(self, n: int, D: int) -> tuple[Tensor, Tensor | None]:
        """Memory for rows in the product dtype and, where that is another, in the gradient dtype."""
        product, gradient = self.precision.product, self.precision.gradient
        return self.rows(n, D, product), self.rows(n, D, gradient) if gradient != product else None

    def row_products(self, n: int, D: int, single_chunk: bool) -> Tensor:
        return self.empty(n, D)

    def column_accumulator(self, n: int, D: int, single_chunk: bool) -> Accumulator:
        return Accumulator(self.rows(n, D, torch.float32), None)
