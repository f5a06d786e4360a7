"""Gradient products, fp32 accumulation, by a kernel or by the library (cuBLAS).

    rows:     acc_q  = E k̃           (C, T) · (T, D) → (C, D)
    columns:  acc_k += Eᵀ (α H q̂)    (T, C) · (C, D) → (T, D)

One launch makes both: its first programs hold tiles of the rows' product, the others of the columns'.

No operand of a product is used by anything else. Triton (3.6 to 3.9) gives a tile that a product and a reduction
read one buffer less than the product's other operand; on Hopper, where products run asynchronously, the next copy
then overwrites what a pending product still reads.

FLOPs: 2·C·T·D each. Bytes: E and the operands once, the accumulators once (twice where they are added to).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Cost, precision_of, readable_columns, tile_of
from .settings import Tile, cdiv


@triton.jit
def product_tile(
    tile,
    E,  # (C, T)
    B,  # (T, D), or with TRANSPOSED (C, D)
    out,  # (C, D), or with TRANSPOSED (T, D)
    M,
    K,
    D,
    width,  # columns of E that may be read; those beyond its own are 0
    stride_en,
    stride_b,
    stride_o,
    ADD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of E @ B or Eᵀ @ B: M rows of the result, K summed over."""
    pid_m, pid_d = tile_of(tile, tl.cdiv(M, BLOCK_M), tl.cdiv(D, BLOCK_D), GROUP)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        k = offs_k.to(tl.int64)
        here = (offs_k < K)[:, None] & (offs_d < D)[None, :]
        b = tl.load(B + k[:, None] * stride_b + offs_d[None, :], mask=here, other=0.0)
        if TRANSPOSED:
            # A mask, for a clamped index along the contiguous axis would make each element a load of its own.
            here = (offs_k < K)[:, None] & (offs_m < width)[None, :]
            e = tl.load(E + k[:, None] * stride_en + offs_m[None, :], mask=here, other=0.0)
            acc = tl.dot(tl.trans(e), b, acc, input_precision=PRECISION)
        else:
            rows = tl.minimum(offs_m, M - 1).to(tl.int64)
            e = tl.load(E + rows[:, None] * stride_en + k[None, :], mask=(offs_k < width)[None, :], other=0.0)
            acc = tl.dot(e, b, acc, input_precision=PRECISION)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    block = out + offs_m.to(tl.int64)[:, None] * stride_o + offs_d[None, :]
    if ADD:
        acc += tl.load(block, mask=mask, other=0.0)
    tl.store(block, acc, mask=mask)


@triton.jit(do_not_specialize=["C", "T", "T_columns", "row_tiles"])
def grad_products_kernel(
    E,  # (C, T)
    keys,  # (T, D)
    acc_rows,  # (C, D)
    E_columns,  # (C, T') the columns whose gradients are asked for
    anchors,  # (C, D)
    acc_columns,  # (T', D)
    C,
    T,
    T_columns,
    D,
    width,
    width_columns,
    row_tiles,
    stride_en,
    stride_kt,
    stride_rn,
    stride_an,
    stride_ct,
    ADD_ROWS: tl.constexpr,
    ADD_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < row_tiles:
        if acc_rows is not None:
            product_tile(
                pid, E, keys, acc_rows, C, T, D, width, stride_en, stride_kt, stride_rn,
                ADD_ROWS, False, BLOCK_M, BLOCK_D, BLOCK_K, GROUP, PRECISION,
            )  # fmt: skip
    else:
        if acc_columns is not None:
            product_tile(
                pid - row_tiles, E_columns, anchors, acc_columns, T_columns, C, D, width_columns, stride_en,
                stride_an, stride_ct, ADD_COLUMNS, True, BLOCK_M, BLOCK_D, BLOCK_K, GROUP, PRECISION,
            )  # fmt: skip


def grad_products(
    tile: Tensor,  # (C, T)
    keys: Tensor | None,  # (T, D)
    acc_rows: Tensor | None,  # (C, D)
    add_rows: bool,
    tile_columns: Tensor | None,  # (C, T') a part of the tile
    anchors: Tensor | None,  # (C, D)
    acc_columns: Tensor | None,  # (T', D)
    add_columns: bool,
    settings: Tile,
    library: bool,
) -> None:
    """Both products, or the one whose accumulator is there; what is not added to is overwritten."""
    if library:
        if acc_rows is not None:
            _library_product(tile, keys, acc_rows, add_rows)
        if acc_columns is not None:
            _library_product(tile_columns.T, anchors, acc_columns, add_columns)
        return
    C, T = tile.shape
    D = (acc_columns if acc_rows is None else acc_rows).shape[1]
    T_columns = 0 if acc_columns is None else acc_columns.shape[0]
    tiles_d = cdiv(D, settings.block_n)
    row_tiles = 0 if acc_rows is None else cdiv(C, settings.block_m) * tiles_d
    column_tiles = cdiv(T_columns, settings.block_m) * tiles_d
    grad_products_kernel[(row_tiles + column_tiles,)](
        tile, keys, acc_rows, tile_columns, anchors, acc_columns,
        C, T, T_columns, D, readable_columns(tile), readable_columns(tile_columns), row_tiles,
        tile.stride(0),
        0 if keys is None else keys.stride(0),
        0 if acc_rows is None else acc_rows.stride(0),
        0 if anchors is None else anchors.stride(0),
        0 if acc_columns is None else acc_columns.stride(0),
        ADD_ROWS=add_rows, ADD_COLUMNS=add_columns,
        BLOCK_M=settings.block_m, BLOCK_D=settings.block_n, BLOCK_K=settings.block_k, GROUP=settings.group,
        PRECISION=precision_of(tile.dtype, tile.device),
        num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip


def _library_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **wider)
    else:
        torch.mm(a, b, out=out, **wider)


def product_cost(M: int, K: int, D: int, operand: int, add: bool) -> Cost:
    """Of one of the two products, (M, K) · (K, D)."""
    return Cost(2 * M * K * D, (M + D) * K * operand + 4 * M * D * (1 + add), 0)
