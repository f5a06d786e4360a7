"""What several kernels share: the order of tiles, the tile of products, and what is special about its entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .settings import Tile, fp32_products


@dataclass(frozen=True, slots=True)
class Cost:
    """What a launch does and holds, for roofs and for tests."""

    flops: int
    bytes: int  # read and written, each operand once
    workspace: int  # bytes that the launcher allocates beside its results


# What may be special about some entries, as the kernels take it; here nothing is.
NOTHING_SPECIAL = {
    "row_ids": None, "column_ids": None, "num_ids": 0, "bias": 0.0, "own_bias": 0.0, "num_positives": 0,
    "num_negatives": 0, "limits": None, "guide_rows": None, "guide_columns": None, "guide_features": 0,
    "stride_guide_n": 0, "stride_guide_t": 0, "HAS_POSITIVES": False, "HAS_OWN": False, "HAS_IDS": False,
    "HAS_LIMITS": False, "HAS_GUIDE": False,
}  # fmt: skip


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
def masked(
    z,  # (BLOCK_N, BLOCK_T)
    i,  # (BLOCK_N,) rows of the whole matrix
    j,  # (BLOCK_T,) columns of it
    row_ids,  # (N,), or (N, 2)
    column_ids,  # (num_ids,), or (num_ids, 2)
    num_ids,
    bias,
    HAS_POSITIVES: tl.constexpr,
    HAS_IDS: tl.constexpr,  # how many ids a row has, of which an equal one masks: 0, 1 or 2
):
    """What both directions see: the bias of all columns, in bits; −∞ for equal ids and the positive."""
    z += bias
    known = j < num_ids
    for which in tl.static_range(HAS_IDS):
        of_rows = tl.load(row_ids + i * HAS_IDS + which)
        of_columns = tl.load(column_ids + j * HAS_IDS + which, mask=known, other=0)
        z = tl.where(known[None, :] & (of_rows[:, None] == of_columns[None, :]), float("-inf"), z)
    if HAS_POSITIVES:
        z = tl.where(i[:, None] == j[None, :], float("-inf"), z)
    return z


@triton.jit
def as_rows(
    z,  # (BLOCK_N, BLOCK_T)
    scores,  # (BLOCK_N, BLOCK_T), z where there is no guide
    i,
    j,
    limits,  # (N, 1)
    own_bias,
    num_positives,
    num_negatives,
    HAS_LIMITS: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """What only the rows see: −∞ for columns too similar to them, and their own hard negatives' bias, in bits."""
    if HAS_LIMITS:
        z = tl.where(scores > tl.load(limits + i)[:, None], float("-inf"), z)
    if HAS_OWN:
        negative = j - num_positives
        inside = (negative >= 0) & (negative < num_negatives)
        own = inside[None, :] & ((negative % num_positives)[None, :] == i[:, None])
        z = tl.where(own, z + own_bias, z)
    return z


def operands(queries: Tensor, keys: Tensor, tile: Tile) -> tuple[object, object, bool]:
    """The rows as a kernel takes them, and whether as descriptors, which want strides of multiples of 16 bytes."""
    aligned = all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
        for x in (queries, keys)
    )
    if not (tile.tma and aligned):
        return queries, keys, False
    return (
        TensorDescriptor.from_tensor(queries, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(keys, [tile.block_n, tile.block_k]),
        True,
    )


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
