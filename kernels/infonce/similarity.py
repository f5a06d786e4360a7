"""Exponentiated similarity of one sweep.

    E_ij = 2^(q_i·k_j + bias_ij − shift_i),  q = bits q̂ (C, D), k = k̂ − c (T, D);  Σ_j E_ij in parts, by tiles

with 0 where the score q_i·k_j, or a guide's, is beyond the row's limit. E is stored in bf16, or in fp32 for fp32
operands, or not at all; products and sums are fp32.

Few tiles contain a row's own positive or end beyond the matrix: masks of single entries stand behind a branch that
all threads take alike, so that most tiles cost an addition, an exponential, a sum and a rounding per entry.

FLOPs: 2·C·T·D. Bytes: operands once, E once. Partials: C × tiles of T fp32, written and read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Cost,
    Counts,
    Terms,
    add_own_bias,
    guide_tile,
    holds_pairs,
    mask_equal_ids,
    mask_positives,
    operands,
    precision_of,
    readable_columns,
    similarity_tile,
    tile_of,
)  # fmt: skip
from .settings import Tile, cdiv, multiprocessors


@triton.jit(do_not_specialize=["i0", "N", "T", "num_positives", "num_negatives", "num_ids"])
def exp_similarity_kernel(
    queries,
    keys,
    E,  # (N, width), a pointer or, with USE_TMA, a descriptor of blocks (BLOCK_N, BLOCK_T); None: not stored
    partials,
    shift,
    terms,
    num_positives,
    num_negatives,
    num_ids,
    N,
    T,
    D,
    i0,
    width,  # columns of E that are written: T, or up to the next multiple of 16
    stride_qn,
    stride_kt,
    stride_en,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    tl.assume(D > 0)  # or zeros are made a second time, for a product without steps
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_t = tl.cdiv(T, BLOCK_T)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_t, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        pid_n, pid_t = tile_of(tile, tiles_n, tiles_t, GROUP)
        start_n = pid_n * BLOCK_N
        start_t = pid_t * BLOCK_T
        z = similarity_tile(
            queries, keys, start_n, start_t, N, T, D, stride_qn, stride_kt,
            BLOCK_N, BLOCK_T, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_t = start_t + tl.arange(0, BLOCK_T)
        rows = tl.minimum(offs_n, N - 1)
        if terms.limits is not None:
            scores = z
            if terms.guide is not None:
                scores = guide_tile(
                    terms.guide, i0 + start_n, start_t, i0 + N, T, BLOCK_N, BLOCK_T, BLOCK_D, PRECISION
                )
            z = tl.where(scores > tl.load(terms.limits + i0 + rows)[:, None], float("-inf"), z)
        if terms.ids is not None:
            z = mask_equal_ids(z, i0 + rows, offs_t, terms.ids, num_ids)
        if terms.second_ids is not None:
            z = mask_equal_ids(z, i0 + rows, offs_t, terms.second_ids, num_ids)
        z -= (tl.load(shift + rows) - terms.bias)[:, None]
        if (start_t + BLOCK_T > T) | holds_pairs(
            i0 + start_n, start_t, terms.own_bias, num_positives, BLOCK_N, BLOCK_T
        ):
            if terms.own_bias is not None:
                z = add_own_bias(z, i0 + offs_n, offs_t, terms.own_bias, num_positives, num_negatives)
            z = mask_positives(z, i0 + offs_n, offs_t, T, num_positives)
        e = tl.exp2(z)
        out = offs_n.to(tl.int64)
        tl.store(partials + out * tiles_t + pid_t, tl.sum(e, 1), mask=offs_n < N)
        if E is not None:
            if USE_TMA:
                E.store([start_n, start_t], e.to(E.dtype))
            else:
                tl.store(
                    E + out[:, None] * stride_en + offs_t[None, :],
                    e.to(E.dtype.element_ty),
                    mask=(offs_n[:, None] < N) & (offs_t[None, :] < width),
                )


def exp_similarity(
    queries: Tensor,  # (C, D) rows i0, i0 + 1, …
    keys: Tensor,  # (T, D)
    out: Tensor | None,  # (C, T)
    shift: Tensor,  # (C, 1)
    i0: int,
    terms: Terms,
    counts: Counts,
    settings: Tile,
) -> Tensor:
    """The tile E in ``out``; its row sums in parts, one a tile of columns. → (C, tiles)"""
    (C, D), T = queries.shape, keys.shape[0]
    tiles_t = cdiv(T, settings.block_n)
    partials = torch.empty(C, tiles_t, dtype=torch.float32, device=queries.device)
    tiles = cdiv(C, settings.block_m) * tiles_t
    q, k, E, use_tma = operands(queries, keys, out, settings)
    exp_similarity_kernel[(min(tiles, multiprocessors(queries.device) * settings.per_sm),)](
        q, k, E, partials, shift, terms, *counts,
        N=C, T=T, D=D, i0=i0, width=readable_columns(out),
        stride_qn=queries.stride(0), stride_kt=keys.stride(0), stride_en=0 if out is None else out.stride(0),
        BLOCK_N=settings.block_m, BLOCK_T=settings.block_n, BLOCK_D=settings.block_k, GROUP=settings.group,
        USE_TMA=use_tma, EVEN_D=D % settings.block_k == 0, PRECISION=precision_of(queries.dtype, queries.device),
        WARP_SPECIALIZE=settings.warp_specialize and use_tma,
        num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip
    return partials


def exp_similarity_cost(C: int, T: int, D: int, operand: int, stored: int, settings: Tile) -> Cost:
    """operand, stored: bytes of an element of the rows and of E (0 where it is not stored)."""
    partials = 4 * C * cdiv(T, settings.block_n)
    return Cost(2 * C * T * D, (C + T) * D * operand + C * T * stored + partials + 4 * C, partials)
