"""What several kernels share: the order of tiles, the tile of products, and the terms of its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .settings import Tile, cdiv, fp32_products

ALIGN = 16  # elements; kernels load several at once where strides and widths are multiples of it


@dataclass(frozen=True, slots=True)
class Cost:
    """What a launch does and holds, for roofs and for tests."""

    flops: int
    bytes: int  # read and written, each operand once
    workspace: int  # bytes that the launcher allocates beside its results


class Ids(NamedTuple):
    """Entries whose ids are equal are masked."""

    rows: Tensor  # (N,)
    columns: Tensor  # (num_ids,) of the first columns
    stride: int  # of both: how many ids each has


class Guide(NamedTuple):
    """Rows whose products, not the logits, are compared with the limits."""

    rows: Tensor  # (N, G)
    columns: Tensor  # (T, G)
    features: int  # G
    stride_n: int
    stride_t: int


class Terms(NamedTuple):
    """The terms of a tile's entries, one argument of the kernels; what is absent is compiled away."""

    bias: float = 0.0  # of all columns, bits
    own_bias: float | None = None  # of column N + hN + i in row i, its own hard negative, bits
    ids: Ids | None = None
    second_ids: Ids | None = None  # where each has two ids, of which either masks
    limits: Tensor | None = None  # (N, 1) scores above which a column does not count
    column_limits: Tensor | None = None  # (N,) likewise of the columns' direction
    guide: Guide | None = None
    column_bias: Tensor | None = None  # (T,) of each column, bits, in the rows' direction; read by ratios.py alone


class Counts(NamedTuple):
    """Numbers of columns: arguments of their own, for inside a tuple Triton compiles anew for some numbers."""

    num_positives: int = 0  # columns [0, N): column i is row i's positive; 0 where there are none
    num_negatives: int = 0  # columns [N, N + num_negatives): hard negatives
    num_ids: int = 0


@triton.jit
def tile_of(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows, column by column, so that operands are shared in the cache."""
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    size = min(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % size, inside // size


@triton.jit
def similarity_tile(
    queries,  # (N, D), a pointer or, with USE_TMA, a descriptor of blocks (BLOCK_N, BLOCK_D)
    keys,  # (T, D), likewise (BLOCK_T, BLOCK_D)
    start_n,
    start_t,
    N,
    T,
    D,
    stride_qn,
    stride_kt,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q_i·k_j of a tile, fp32. → (BLOCK_N, BLOCK_T)"""
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    if USE_TMA:
        for d in tl.range(0, D, BLOCK_D):
            q = queries.load([start_n, d])
            k = keys.load([start_t, d])
            acc = tl.dot(q, k.T, acc, input_precision=PRECISION)
    else:
        # Rows beyond the end repeat the last one: what they give is masked later, and loads need no mask.
        offs_n = tl.minimum(start_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        offs_t = tl.minimum(start_t + tl.arange(0, BLOCK_T), T - 1).to(tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        q_block = queries + offs_n[:, None] * stride_qn + offs_d[None, :]
        k_block = keys + offs_t[None, :] * stride_kt + offs_d[:, None]
        for d in tl.range(0, D, BLOCK_D):
            if EVEN_D:
                q = tl.load(q_block)
                k = tl.load(k_block)
            else:
                q = tl.load(q_block, mask=offs_d[None, :] < D - d, other=0.0)
                k = tl.load(k_block, mask=offs_d[:, None] < D - d, other=0.0)
            acc = tl.dot(q, k, acc, input_precision=PRECISION)
            q_block += BLOCK_D
            k_block += BLOCK_D
    return acc


@triton.jit
def guide_tile(
    guide, start_n, start_t, end_n, end_t,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The guide's scores of a tile. → (BLOCK_N, BLOCK_T)"""
    return similarity_tile(
        guide.rows, guide.columns, start_n, start_t, end_n, end_t, guide.features, guide.stride_n, guide.stride_t,
        BLOCK_N, BLOCK_T, BLOCK_D, False, False, PRECISION,
    )  # fmt: skip


@triton.jit
def mask_equal_ids(z, i, j, ids, num_ids):
    """−∞ where the row's id is the column's. z: (BLOCK_N, BLOCK_T); i, j: places in the whole matrix."""
    of_rows = tl.load(ids.rows + i * ids.stride)
    known = j < num_ids
    of_columns = tl.load(ids.columns + j * ids.stride, mask=known, other=0)
    return tl.where(known[None, :] & (of_rows[:, None] == of_columns[None, :]), float("-inf"), z)


@triton.jit
def holds_pairs(start_n, start_t, own_bias, num_positives, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Whether a tile with this corner has entries of rows and their own positives, or own hard negatives.

    There column − row is 0, or with hard negatives a multiple of N.
    """
    last = start_t + BLOCK_T - 1 - start_n  # the largest column − row of the tile
    first = start_t - (start_n + BLOCK_N - 1)
    nearest = 0
    if own_bias is not None:
        period = tl.maximum(num_positives, 1)
        nearest = tl.maximum(last, 0) // period * period
    return (num_positives > 0) & (last >= 0) & (nearest >= first)


@triton.jit
def mask_positives(z, i, j, end, num_positives):
    """−∞ where a row meets its own positive, and in columns from ``end`` on."""
    i = tl.where(num_positives > 0, i, -1)
    return tl.where((i[:, None] == j[None, :]) | (j >= end)[None, :], float("-inf"), z)


@triton.jit
def add_own_bias(z, i, j, own_bias, num_positives, num_negatives):
    """The bias of the rows' own hard negatives."""
    negative = j - num_positives
    inside = (negative >= 0) & (negative < num_negatives)
    mine = inside[None, :] & ((negative % tl.maximum(num_positives, 1))[None, :] == i[:, None])
    return tl.where(mine, z + own_bias, z)


def operands(queries: Tensor, keys: Tensor, out: Tensor | None, tile: Tile) -> tuple[object, object, object, bool]:
    """Rows and result as a kernel takes them, and whether as descriptors: those want strides in 16 bytes."""
    aligned = all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        for x in (queries, keys, out)
        if x is not None
    )
    if not (tile.tma and aligned):
        return queries, keys, out, False
    stored = None
    if out is not None:
        shape = [out.shape[0], readable_columns(out)]
        stored = TensorDescriptor(out, shape, list(out.stride()), [tile.block_m, tile.block_n])
    return (
        TensorDescriptor.from_tensor(queries, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(keys, [tile.block_n, tile.block_k]),
        stored,
        True,
    )


def readable_columns(x: Tensor | None) -> int:
    """Columns of x up to a multiple of ALIGN, where its rows' memory has as many; kernels write 0 beyond the last.

    With it loads and stores of several elements need no other code for widths that are no multiples.
    """
    if x is None:
        return 0
    whole = cdiv(x.shape[1], ALIGN) * ALIGN
    return whole if x.stride(0) >= x.storage_offset() % max(1, x.stride(0)) + whole else x.shape[1]


def row_block(D: int, elements: int) -> tuple[int, int]:
    """Rows and (padded) features that a program of the row kernels holds."""
    block_d = triton.next_power_of_2(D)
    return max(1, min(16, elements // block_d)), block_d


def row_warps(block_d: int) -> int:
    """Warps of a program of the row kernels: up to 32 elements of an input a thread, more would spill."""
    return 4 if block_d <= 2048 else 8 if block_d <= 4096 else 16


def precision_of(dtype: torch.dtype, device: torch.device) -> str:
    """How the kernels multiply operands of this dtype."""
    return fp32_products(device) if dtype == torch.float32 else "tf32"
