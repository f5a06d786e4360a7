"""Exponentiated similarity of one sweep, and the closing of its rows.

    E_ij = 2^(q_i·k_j + bias_ij − shift_i),  q = bits q̂ (C, D), k = k̂ − c (T, D);  Σ_j E_ij in parts, by tiles

with 0 where the score q_i·k_j, or a guide's, is beyond the row's limit.

E is stored in bf16, or in fp32 for fp32 operands; products and sums are fp32. Then, of C rows whose columns are
all done, with own_i = e^(−o_i) + t_i:

    α_i = 1/(own_i + Σ_j E_ij),  total_i = Σ_j E_ij + t_i,  share_i = α_i total_i
    loss_i = log(1 + e^(o_i) total_i), decoupled log(e^(o_i) total_i) and own_i = t_i
    anchors_i = [α_i (q̂_i − c_q) | α_i]  (C, D + PAD), the operand of the columns' gradient product

FLOPs: 2·C·T·D. Bytes: operands once, E once. Partials: C × tiles of T fp32, written and read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Cost, as_rows, masked, operands, precision_of, similarity_tile, tile_of
from .settings import Tile, cdiv, num_programs

PAD = 16  # columns beyond D of the anchors: α_i, then zeros, so that strides stay multiples of 16


@triton.jit(do_not_specialize=["i0", "N", "num_ids", "num_positives", "num_negatives"])
def exp_similarity_kernel(
    queries,
    keys,
    E,
    partials,
    shift,
    row_ids,
    column_ids,
    N,
    T,
    D,
    i0,
    stride_qn,
    stride_kt,
    stride_en,
    num_ids,
    bias,
    own_bias,
    num_positives,
    num_negatives,
    limits,
    guide_rows,
    guide_columns,
    guide_features,
    stride_guide_n,
    stride_guide_t,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_POSITIVES: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_LIMITS: tl.constexpr,
    HAS_GUIDE: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_t = tl.cdiv(T, BLOCK_T)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_t, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        pid_n, pid_t = tile_of(tile, tiles_n, tiles_t, GROUP)
        z = similarity_tile(
            queries, keys, pid_n * BLOCK_N, pid_t * BLOCK_T, N, T, D, stride_qn, stride_kt,
            BLOCK_N, BLOCK_T, BLOCK_D, USE_TMA, EVEN_D, PRECISION,
        )  # fmt: skip
        offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = tl.minimum(offs_n, N - 1)
        if HAS_GUIDE:
            scores = similarity_tile(
                guide_rows, guide_columns, i0 + pid_n * BLOCK_N, pid_t * BLOCK_T, i0 + N, T, guide_features,
                stride_guide_n, stride_guide_t, BLOCK_N, BLOCK_T, BLOCK_D, False, False, PRECISION,
            )  # fmt: skip
        z = masked(z, i0 + rows, offs_t, row_ids, column_ids, num_ids, bias, HAS_POSITIVES, HAS_IDS)
        if not HAS_GUIDE:
            scores = z
        z = as_rows(
            z, scores, i0 + rows, offs_t, limits, own_bias, num_positives, num_negatives, HAS_LIMITS, HAS_OWN
        )
        e = tl.exp2(z - tl.load(shift + rows)[:, None])
        e = tl.where(offs_t[None, :] < T, e, 0.0)
        out = offs_n.to(tl.int64)
        tl.store(partials + out * tiles_t + pid_t, tl.sum(e, 1), mask=offs_n < N)
        tl.store(
            E + out[:, None] * stride_en + offs_t[None, :],
            e.to(E.dtype.element_ty),
            mask=(offs_n[:, None] < N) & (offs_t[None, :] < T),
        )


def exp_similarity(
    queries: Tensor,  # (C, D) rows i0, i0 + 1, …
    keys: Tensor,  # (T, D)
    out: Tensor,  # (C, T)
    shift: Tensor,  # (C, 1)
    i0: int,
    special: dict[str, object],  # about some entries
    settings: Tile,
) -> Tensor:
    """The tile E in ``out``; its row sums in parts, one a tile of columns. → (C, tiles)"""
    (C, D), T = queries.shape, keys.shape[0]
    tiles_t = cdiv(T, settings.block_n)
    partials = torch.empty(C, tiles_t, dtype=torch.float32, device=out.device)
    tiles = cdiv(C, settings.block_m) * tiles_t
    q, k, use_tma = operands(queries, keys, settings)
    exp_similarity_kernel[(min(tiles, num_programs(out.device) * settings.per_sm),)](
        q, k, out, partials, shift,
        N=C, T=T, D=D, i0=i0,
        stride_qn=queries.stride(0), stride_kt=keys.stride(0), stride_en=out.stride(0),
        **special,
        BLOCK_N=settings.block_m, BLOCK_T=settings.block_n, BLOCK_D=settings.block_k, GROUP=settings.group,
        USE_TMA=use_tma, EVEN_D=D % settings.block_k == 0, PRECISION=precision_of(queries.dtype, queries.device),
        WARP_SPECIALIZE=settings.warp_specialize and use_tma,
        num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip
    return partials


def exp_similarity_cost(C: int, T: int, D: int, operand: int, stored: int, settings: Tile) -> Cost:
    """operand, stored: bytes of an element of the rows and of E."""
    partials = 4 * C * cdiv(T, settings.block_n)
    return Cost(2 * C * T * D, (C + T) * D * operand + C * T * stored + partials + 4 * C, partials)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to the last digits of small x too (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def write_anchors(
    out, x, r, center_q, offs_n, offs_x, mask_n, alpha, D, stride_xn, stride_xd, stride_on,
    BLOCK_D: tl.constexpr, HAS_CENTER: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """α_i (x_i r_i − c_q), and α_i behind it where PAD; offs_n: rows of ``out``, offs_x: of ``x``."""
    inv_norm = tl.load(r + offs_x, mask=mask_n, other=0.0)
    for start in tl.range(0, D + PAD, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = mask_n[:, None] & (offs_d < D)[None, :]
        rows = tl.load(
            x + offs_x[:, None] * stride_xn + offs_d[None, :].to(tl.int64) * stride_xd, mask=inside, other=0.0
        )
        # α times unit rows, not times 1/norm: the product of the two may leave fp32's range.
        rows = rows.to(tl.float32) * inv_norm[:, None]
        if HAS_CENTER:
            rows -= tl.load(center_q + offs_d, mask=offs_d < D, other=0.0)[None, :]
        rows *= alpha[:, None]
        if PAD > 0:
            rows = tl.where((offs_d == D)[None, :], alpha[:, None], rows)
        tl.store(
            out + offs_n[:, None] * stride_on + offs_d[None, :],
            rows.to(out.dtype.element_ty),
            mask=mask_n[:, None] & (offs_d < D + PAD)[None, :],
        )


@triton.jit(do_not_specialize=["i0", "C", "tiles"])
def close_rows_kernel(
    partials,
    sums,
    own,
    constant,
    offset,
    alpha_out,
    total_out,
    share_out,
    loss_out,
    x,
    r,
    center_q,
    anchors,
    C,
    tiles,
    i0,
    D,
    stride_xn,
    stride_xd,
    stride_an,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    HAS_ANCHORS: tl.constexpr,
    HAS_CENTER: tl.constexpr,
    DECOUPLED: tl.constexpr,
    PAD: tl.constexpr,
):
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < C
    i = i0 + offs_n
    # Reduced once, after the loop: Triton's own pass that moves reductions out of loops fails where the number of
    # tiles is a multiple of 16.
    block = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in tl.range(0, tiles, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        block += tl.load(
            partials + offs_n[:, None] * tiles + offs_p[None, :],
            mask=mask_n[:, None] & (offs_p < tiles)[None, :],
            other=0.0,
        )
    total = tl.sum(block, 1)
    if HAS_SUMS:
        total += tl.load(sums + i, mask=mask_n, other=0.0)
    own_term = tl.full((BLOCK_N,), 0.0 if DECOUPLED else 1.0, tl.float32)
    if HAS_OWN:
        own_term = tl.load(own + i, mask=mask_n, other=1.0)
    alpha = 1.0 / (own_term + total)
    if DECOUPLED:  # a row without negatives
        alpha = tl.where(own_term + total == 0.0, 0.0, alpha)
    if HAS_CONSTANT:
        total += tl.load(constant + i, mask=mask_n, other=0.0)
    loss = log1p(total)
    if HAS_OFFSET:
        o = tl.load(offset + i, mask=mask_n, other=0.0)
        # log(1 + e^o total), o > 0: the larger of 0 and y is taken out
        y = o + tl.log(total)
        if DECOUPLED:
            loss = y
        far = tl.maximum(y, 0.0) + log1p(tl.exp(tl.minimum(y, 0.0) - tl.maximum(y, 0.0)))
        if not DECOUPLED:
            loss = tl.where(o > 0, tl.where(total == total, far, total), loss)
    tl.store(alpha_out + i, alpha, mask=mask_n)
    tl.store(total_out + i, total, mask=mask_n)
    tl.store(share_out + i, alpha * total, mask=mask_n)
    tl.store(loss_out + i, loss, mask=mask_n)
    if HAS_ANCHORS:
        write_anchors(
            anchors, x, r, center_q, offs_n, i, mask_n, alpha, D, stride_xn, stride_xd, stride_an,
            BLOCK_D, HAS_CENTER, PAD,
        )  # fmt: skip


def close_rows(
    partials: Tensor,  # (C, tiles)
    sums: Tensor | None,  # (N, 1) what other columns gave
    own: Tensor | None,  # (N, 1); None: 1, or 0 where the positive is not in the denominator
    constant: Tensor | None,  # (N, 1) t_i
    offset: Tensor | None,  # (N, 1) o_i
    results: tuple[Tensor, Tensor, Tensor, Tensor],  # α, total, share, loss, (N, 1) each
    i0: int,
    x: Tensor | None,  # (N, D) the anchors, where their rows are asked for
    r: Tensor | None,  # (N, 1)
    center_q: Tensor | None,  # (D,)
    anchors: Tensor | None,  # (C, D + PAD), or (C, D) where they are not centred
    decoupled: bool,
) -> None:
    """Closes rows i0, i0 + 1, … of one sweep."""
    C, tiles = partials.shape
    block_n = 16
    close_rows_kernel[(cdiv(C, block_n),)](
        partials, sums, own, constant, offset, *results, x, r, center_q, anchors,
        C, tiles, i0,
        0 if x is None else x.shape[1],
        0 if x is None else x.stride(0), 0 if x is None else x.stride(1),
        0 if anchors is None else anchors.stride(0),
        BLOCK_N=block_n, BLOCK_P=32, BLOCK_D=128,
        HAS_SUMS=sums is not None, HAS_OWN=own is not None, HAS_CONSTANT=constant is not None,
        HAS_OFFSET=offset is not None, HAS_ANCHORS=anchors is not None, HAS_CENTER=center_q is not None,
        DECOUPLED=decoupled, PAD=0 if anchors is None or x is None else anchors.shape[1] - x.shape[1],
        num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["i0", "C"])
def centered_anchors_kernel(
    x, r, center_q, out, C, i0, D, stride_xn, stride_xd, stride_on,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_CENTER: tl.constexpr,
):  # fmt: skip
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    one = tl.full((BLOCK_N,), 1.0, tl.float32)
    write_anchors(
        out, x, r, center_q, offs_n, i0 + offs_n, offs_n < C, one, D, stride_xn, stride_xd, stride_on,
        BLOCK_D, HAS_CENTER, 0,
    )  # fmt: skip


def centered_anchors(x: Tensor, r: Tensor, center_q: Tensor | None, i0: int, out: Tensor) -> None:
    """q̂_i − c_q of rows i0, i0 + 1, … in ``out``, (C, D)."""
    C, D = out.shape
    centered_anchors_kernel[(cdiv(C, 16),)](
        x, r, center_q, out, C, i0, D, x.stride(0), x.stride(1), out.stride(0),
        BLOCK_N=16, BLOCK_D=128, HAS_CENTER=center_q is not None, num_warps=4,
    )  # fmt: skip
