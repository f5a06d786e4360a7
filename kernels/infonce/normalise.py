"""Normalisation of rows, forward and backward.

Forward, of anchors x and positives y in one pass, each input read once, each output written once:

    r_i = 1/‖x_i‖ (0 for a zero row),  queries_i = bits q̂_i,  keys_i = k̂_i − c,
    s_ii = q̂_i·k̂_i,  ½‖q̂_i − k̂_i‖²,  shift_i = bits q̂_i·(k̂_i − c)          from unrounded rows, in fp32

The centres c (of the keys) and c_q (of the anchors) are means of 16 evenly spaced unit rows, which every program
forms for itself (any constant is exact; the mean of 16 leaves centred rows 3 % longer than the mean of all would).
Bytes: 2·N·D inputs, 2·N·D operands (3 where the gradient products take another dtype); no FLOPs to speak of.

Backward, of both sides in one pass, with acc the sums over tiles, p̂ the other side's unit rows:

    v_i = factor_i acc_i − share_i p̂_i + sums_i center,   dx_i = scale r_i (v_i − x̂_i ⟨x̂_i, v_i⟩)

or, where a centre is given and no sums, H acc_i in the place of acc_i, with the reflection H of ``mirror_of``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Cost, row_block, row_warps
from .settings import cdiv, multiprocessors

CENTER_ROWS = 16


@triton.jit
def load_rows(x, offs_n, offs_d, mask, stride_n, stride_d):
    rows = tl.load(
        x + offs_n.to(tl.int64)[:, None] * stride_n + offs_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0
    )
    return rows.to(tl.float32)


@triton.jit
def reciprocal_norm(x):
    """(n, D) → (n,); 0 where the norm is 0."""
    norm = tl.sqrt_rn(tl.sum(x * x, 1))
    return tl.where(
        norm == 0.0, 0.0, tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), tl.where(norm == 0.0, 1.0, norm))
    )


@triton.jit
def mirror_of(center, offs_d, D):
    """The vector w of the reflection H = I − wwᵀ that takes the centre c to ±|c| e_0. → (1, BLOCK_D), |w|² = 2

    Householder's: w ∝ c/|c| − σ e_0, with the sign σ = −sign(c_0) for which nothing cancels; any c is exact.
    """
    c = tl.load(center + offs_d, mask=offs_d < D, other=0.0)
    norm = tl.sqrt(tl.sum(c * c, 0))
    c = c / tl.where(norm == 0.0, 1.0, norm)
    w = tl.where(offs_d == 0, c + tl.where(c >= 0.0, 1.0, -1.0), c)
    return (w * tl.sqrt(2.0 / tl.sum(w * w, 0)))[None, :]


@triton.jit
def reflect(rows, w):
    """H x_i. rows: (n, BLOCK_D); w: (1, BLOCK_D)"""
    return rows - tl.sum(rows * w, 1)[:, None] * w


@triton.jit
def mean_unit_row(x, N, D, stride_n, stride_d, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Mean of ROWS evenly spaced unit rows, or of all where they are fewer. → (1, BLOCK_D)"""
    offs_d = tl.arange(0, BLOCK_D)
    count = tl.minimum(N, ROWS)
    total = tl.zeros((1, BLOCK_D), tl.float32)
    for n in tl.range(0, count):
        at = (tl.zeros((1,), tl.int64) + n) * N // count
        row = load_rows(x, at, offs_d, (offs_d < D)[None, :], stride_n, stride_d)
        total += row * reciprocal_norm(row)[:, None]
    return total / count


@triton.jit(do_not_specialize=["N"])
def normalise_pairs_kernel(
    x,
    y,
    queries,
    keys,
    grad_keys,
    r_x,
    r_y,
    shift,
    cosines,
    chords,
    center_q,
    center_k,
    bits,
    N,
    D,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_qn,
    stride_kn,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CENTER_ROWS: tl.constexpr,
    MAKE_CENTERS: tl.constexpr,
    BITS_ON_DEVICE: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    c = tl.zeros((1, BLOCK_D), tl.float32)
    if MAKE_CENTERS:
        c = mean_unit_row(y, N, D, stride_yn, stride_yd, BLOCK_D, CENTER_ROWS)
        if tl.program_id(0) == 0:
            tl.store(center_k + offs_d[None, :], c, mask=in_d[None, :])
            if center_q is not None:
                c_q = mean_unit_row(x, N, D, stride_xn, stride_xd, BLOCK_D, CENTER_ROWS)
                tl.store(center_q + offs_d[None, :], c_q, mask=in_d[None, :])
    elif center_k is not None:
        c = tl.load(center_k + offs_d[None, :], mask=in_d[None, :], other=0.0)
    factor = bits
    if BITS_ON_DEVICE:
        factor = tl.load(bits)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = offs_n < N
        mask = in_n[:, None] & in_d[None, :]
        q = load_rows(x, offs_n, offs_d, mask, stride_xn, stride_xd)
        k = load_rows(y, offs_n, offs_d, mask, stride_yn, stride_yd)
        r_q = reciprocal_norm(q)
        r_k = reciprocal_norm(k)
        q = q * r_q[:, None]
        k = k * r_k[:, None]
        tl.store(r_x + offs_n, r_q, mask=in_n)
        tl.store(r_y + offs_n, r_k, mask=in_n)
        tl.store(cosines + offs_n, tl.sum(q * k, 1), mask=in_n)
        tl.store(chords + offs_n, 0.5 * tl.sum((q - k) * (q - k), 1), mask=in_n)
        k = tl.where(mask, k - c, 0.0)
        tl.store(shift + offs_n, factor * tl.sum(q * k, 1), mask=in_n)
        at = offs_n.to(tl.int64)[:, None]
        tl.store(queries + at * stride_qn + offs_d[None, :], (q * factor).to(queries.dtype.element_ty), mask=mask)
        if keys is not None:
            tl.store(keys + at * stride_kn + offs_d[None, :], k.to(keys.dtype.element_ty), mask=mask)
        if grad_keys is not None:
            tl.store(grad_keys + at * stride_kn + offs_d[None, :], k.to(grad_keys.dtype.element_ty), mask=mask)


def normalise_pairs(
    x: Tensor,  # (N, D) anchors
    y: Tensor,  # (N, D) positives
    bits: float | Tensor,
    queries: Tensor,  # (N, D)
    keys: Tensor | None,  # (N, D)
    grad_keys: Tensor | None,  # (N, D), where it is another dtype than the keys'
    vectors: tuple[Tensor, ...],  # 1/‖x‖, 1/‖y‖, shift, cosines, ½‖q̂ − k̂‖², (N, 1) each
    center_q: Tensor | None,  # (D,)
    center_k: Tensor | None,
    make_centers: bool,  # write the centres, or else read that of the keys
    row_elements: int,
) -> None:
    """Everything that is known of the pairs before a product, in the memory given."""
    N, D = x.shape
    block_n, block_d = row_block(D, row_elements)
    normalise_pairs_kernel[(min(cdiv(N, block_n), 4 * multiprocessors(x.device)),)](
        x, y, queries, keys, grad_keys, *vectors, center_q, center_k, bits, N, D,
        *x.stride(), *y.stride(), queries.stride(0), 0 if keys is None else keys.stride(0),
        BLOCK_N=block_n, BLOCK_D=block_d, CENTER_ROWS=CENTER_ROWS, MAKE_CENTERS=make_centers,
        BITS_ON_DEVICE=isinstance(bits, Tensor), num_warps=row_warps(block_d),
    )  # fmt: skip


def normalise_pairs_cost(N: int, D: int, element: int, operand: int, copies: int) -> Cost:
    """copies: operands written, queries among them."""
    return Cost(0, 2 * N * D * element + copies * N * D * operand + 20 * N, 0)


@triton.jit(do_not_specialize=["N"])
def normalise_rows_kernel(
    x, center, rows, grad_rows, r_out, N, D, stride_xn, stride_xd, stride_rn,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    k = load_rows(x, offs_n, offs_d, mask, stride_xn, stride_xd)
    r = reciprocal_norm(k)
    tl.store(r_out + offs_n, r, mask=offs_n < N)
    k = k * r[:, None]
    if center is not None:
        k -= tl.load(center + offs_d, mask=offs_d < D, other=0.0)[None, :]
    at = offs_n.to(tl.int64)[:, None] * stride_rn + offs_d[None, :]
    tl.store(rows + at, k.to(rows.dtype.element_ty), mask=mask)
    if grad_rows is not None:
        tl.store(grad_rows + at, k.to(grad_rows.dtype.element_ty), mask=mask)


def normalise_rows(
    x: Tensor,  # (n, D)
    center: Tensor | None,  # (D,)
    rows: Tensor,  # (n, D)
    grad_rows: Tensor | None,  # (n, D), where it is another dtype
    r: Tensor,  # (n, 1)
    row_elements: int,
) -> None:
    """Centred unit rows and reciprocal norms of columns that are nobody's positives."""
    N, D = x.shape
    block_n, block_d = row_block(D, row_elements)
    normalise_rows_kernel[(cdiv(N, block_n),)](
        x, center, rows, grad_rows, r, N, D, *x.stride(), rows.stride(0),
        BLOCK_N=block_n, BLOCK_D=block_d, num_warps=row_warps(block_d),
    )  # fmt: skip


class Side(NamedTuple):
    """One side's gradient of unit rows, as the kernel takes it."""

    acc: Tensor  # (n, D)
    stride: int  # of acc's rows
    grad: Tensor  # (n, D), written
    share: Tensor | None  # (n, 1)
    center: Tensor | None  # (D,)
    sums: Tensor | None  # (n, 1), the centre's weight; None: acc is reflected along the centre
    sums_stride: int
    factor: Tensor | None  # (n, 1)


@triton.jit
def gradient_rows(side, unit, r, other, scale, offs_n, offs_d, in_n, mask, D):
    """Writes the rows' gradient, (n, D). → ⟨x̂_i, v_i⟩, (n,)"""
    at = offs_n.to(tl.int64)
    v = tl.load(side.acc + at[:, None] * side.stride + offs_d[None, :], mask=mask, other=0.0)
    if side.factor is not None:  # first, and not with r: the product of the two may leave fp32's range
        v *= tl.load(side.factor + at, mask=in_n, other=0.0)[:, None]
    if side.center is not None:
        if side.sums is None:
            v = reflect(v, mirror_of(side.center, offs_d, D))
        else:
            c = tl.load(side.center + offs_d, mask=offs_d < D, other=0.0)
            v += tl.load(side.sums + at * side.sums_stride, mask=in_n, other=0.0)[:, None] * c[None, :]
    if other is not None:
        v -= tl.load(side.share + at, mask=in_n, other=0.0)[:, None] * other
    dots = tl.sum(unit * v, 1)
    grad = (v - unit * dots[:, None]) * (r * scale)[:, None]
    tl.store(side.grad + at[:, None] * D + offs_d[None, :], grad.to(side.grad.dtype.element_ty), mask=mask)
    return dots


@triton.jit(do_not_specialize=["N"])
def normalise_backward_kernel(
    x, y, r_x, r_y, side_x, side_y, dots, scale, number, N, D, stride_xn, stride_xd, stride_yn, stride_yd,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    mask = in_n[:, None] & (offs_d < D)[None, :]
    r_1 = tl.load(r_x + offs_n, mask=in_n, other=0.0)
    unit_x = load_rows(x, offs_n, offs_d, mask, stride_xn, stride_xd) * r_1[:, None]
    unit_y = None
    if y is not None:
        r_2 = tl.load(r_y + offs_n, mask=in_n, other=0.0)
        unit_y = load_rows(y, offs_n, offs_d, mask, stride_yn, stride_yd) * r_2[:, None]
    factor = number
    if scale is not None:
        factor *= tl.load(scale)
    if side_x is not None:
        dot = gradient_rows(side_x, unit_x, r_1, unit_y, factor, offs_n, offs_d, in_n, mask, D)
        tl.store(dots + offs_n, dot, mask=in_n)
    if side_y is not None:
        gradient_rows(side_y, unit_y, r_2, unit_x, factor, offs_n, offs_d, in_n, mask, D)


def normalise_backward(
    x: Tensor,  # (n, D)
    r_x: Tensor,  # (n, 1)
    side_x: Side | None,  # None: no gradient
    y: Tensor | None,  # (n, D) the pairs; None: there are none
    r_y: Tensor | None,
    side_y: Side | None,
    scale: Tensor | None,  # 0-dim; None: 1
    number: float,  # times this
    row_elements: int,
) -> Tensor | None:
    """Writes the sides' gradients. → ⟨x̂_i, v_i⟩, (n, 1)"""
    N, D = x.shape
    dots = None if side_x is None else torch.empty_like(r_x)
    block_n, block_d = row_block(D, row_elements)
    normalise_backward_kernel[(cdiv(N, block_n),)](
        x, y, r_x, r_y, side_x, side_y, dots, scale, number, N, D,
        *x.stride(), *((0, 0) if y is None else y.stride()),
        BLOCK_N=block_n, BLOCK_D=block_d, num_warps=row_warps(block_d),
    )  # fmt: skip
    return dots


def normalise_backward_cost(N: int, D: int, element: int, sides: int) -> Cost:
    """Inputs and accumulators read, gradients written."""
    return Cost(0, sides * N * D * (2 * element + 4), 0)
