"""Memory of the torch backend: budgets, the workspace that tiles share, and scratch for elementwise passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .operands import Accumulator, Precision

TILE_ELEMENTS = 1 << 19  # that one pass of elementwise operations works on: 2 MiB of fp32, a core's cache
ROW_MATRICES = 2  # passes over rows read and write several matrices, so each gets 1/2 of it
FP32_CHUNK_ROWS = 1024  # more rows per chunk gain nothing, and with few columns cost 4 % at N = 2048
CACHE_ALIAS_BYTES = 2048  # rows whose length is a multiple share few cache sets: a fifth of a product's time
GAP_BYTES = 64  # a cache line, which keeps such rows apart
COLUMN_MAJOR_MIN_ROWS = 2048  # from here on Eᵀ @ q̃ in bf16 takes oneDNN half the time with column-major operands
CPU_WORKSPACE_BYTES = 64 << 20
DEVICE_WORKSPACE_BYTES = 256 << 20


class TorchMemory:
    """One call's precision and memory."""

    def __init__(self, precision: Precision, device: torch.device, workspace_bytes: int | None) -> None:
        self.precision = precision
        self.device = device
        budget = workspace_bytes or (CPU_WORKSPACE_BYTES if device.type == "cpu" else DEVICE_WORKSPACE_BYTES)
        self.tile_elements = min(TILE_ELEMENTS, max(1024, budget // 128))
        # The rest is for the scratch of elementwise passes and what libraries keep. A tile of 21 MiB is memory
        # that glibc's allocator reuses; from 32 MiB on each call would fault its pages in again.
        self.workspace_elements = budget // 3 // precision.gradient.itemsize
        self.max_chunk_rows = 1 << 40 if precision.low_precision_products else FP32_CHUNK_ROWS
        self._scratch: dict[str, Tensor] = {}
        self._tile: Tensor | None = None

    def release(self) -> None:
        self._scratch.clear()
        self._tile = None

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.precision.sums, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.precision.sums, device=self.device)

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory, the same for the same name. New memory for each slice would leave holes in the
        allocator's heap: 30 MiB more at the peak.
        """
        held, size = self._scratch.get(name), math.prod(shape)
        if held is None or held.numel() < size:
            held = self._scratch[name] = self.empty(size, dtype=dtype)
        return held[:size].view(shape)

    def tile(self, rows: int, columns: int) -> Tensor:
        """The workspace as a tile, overwritten by the next one; on a CPU its rows may lie apart."""
        stride = self._tile_stride(columns)
        size = rows * stride
        if self._tile is None or self._tile.numel() < size:
            self._tile = None  # freed before the larger one is allocated
            self._tile = self.empty(size, dtype=self.precision.gradient)
        return self._tile[:size].view(rows, stride)[:, :columns]

    def kept_products(self, rows: int, columns: int, beside: int) -> Tensor | None:
        stride = self._tile_stride(columns)
        if rows * (stride + beside) > self.workspace_elements:
            return None
        return self.empty(rows, stride, dtype=self.precision.product)[:, :columns]

    def _tile_stride(self, columns: int) -> int:
        itemsize = self.precision.gradient.itemsize  # as wide as the product's
        aliased = self.device.type == "cpu" and columns * itemsize % CACHE_ALIAS_BYTES == 0
        return columns + GAP_BYTES // itemsize if aliased else columns

    def matrix(self, n: int, D: int, dtype: torch.dtype, column_major: bool, name: str | None = None) -> Tensor:
        """Uninitialised memory, scratch if it has a name. → (n, D)"""
        shape = (D, n + GAP_BYTES // dtype.itemsize) if column_major else (n, D)
        memory = self.empty(*shape, dtype=dtype) if name is None else self.scratch(name, shape, dtype)
        return memory[:, :n].T if column_major else memory

    def row_products(self, n: int, D: int, single_chunk: bool) -> Tensor:
        return self.matrix(n, D, self._stored(single_chunk), False)

    def column_accumulator(self, n: int, D: int, single_chunk: bool) -> Accumulator:
        grad = self.matrix(n, D, self._stored(single_chunk), self.is_column_major(n))
        return Accumulator(grad, self.zeros(n) if self.precision.low_precision_products else None)

    def _stored(self, single_chunk: bool) -> torch.dtype:
        """Nothing is added to the products of a single chunk, so they stay as narrow as they come."""
        return self.precision.gradient if single_chunk else self.precision.sums

    def is_column_major(self, columns: int) -> bool:
        """Whether Eᵀ @ q̃, (columns, D), and q̃ are stored by columns."""
        narrow = self.precision.gradient != self.precision.sums
        return columns >= COLUMN_MAJOR_MIN_ROWS and self.device.type == "cpu" and narrow

    def row_step(self, D: int) -> int:
        """Rows (n, D) that one elementwise pass works on."""
        return max(1, self.tile_elements // ROW_MATRICES // D)
