"""The closing of the rows of one sweep, and the anchors as operands of the columns' gradient product.

Of C rows whose columns are all done, with own_i = e^(−o_i) + t_i and S_i = Σ_j E_ij:

    α_i = 1/(own_i + S_i),  total_i = S_i + t_i,  share_i = α_i total_i
    loss_i = log(1 + e^(o_i) total_i), decoupled log(e^(o_i) total_i) and own_i = t_i
    anchors_i = α_i H q̂_i  (C, D),  or α_i q̂_i where no centre is given

The reflection H (``normalise.mirror_of``) takes the anchors' centre to one feature. The other features are then as
small as those of centred rows, and lose as little when they are rounded; the product needs no column for the
centre's weight, and ``normalise_backward`` reflects it back. Two sweeps know the weight, and take q̂_i − c_q.

Bytes: partials, inputs and anchors once. No FLOPs to speak of.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import row_block, row_warps
from .normalise import load_rows, mirror_of, reflect
from .settings import cdiv


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to the last digits of small x too (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit(do_not_specialize=["i0", "C", "tiles"])
def close_rows_kernel(
    partials, sums, own, constant, offset, alpha_out, total_out, share_out, loss_out, x, r, center_q, anchors,
    C, tiles, i0, D, stride_xn, stride_xd, stride_an,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < C
    i = i0 + offs_n
    # Reduced once, after the loop: Triton's own pass that moves reductions out of loops fails where the number of
    # tiles is a multiple of 16.
    block = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for start in tl.range(0, tiles, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        inside = mask_n[:, None] & (offs_p < tiles)[None, :]
        block += tl.load(partials + offs_n[:, None] * tiles + offs_p[None, :], mask=inside, other=0.0)
    total = tl.sum(block, 1)
    if sums is not None:
        total += tl.load(sums + i, mask=mask_n, other=0.0)
    own_term = tl.full((BLOCK_N,), 0.0 if DECOUPLED else 1.0, tl.float32)
    if own is not None:
        own_term = tl.load(own + i, mask=mask_n, other=1.0)
    alpha = 1.0 / (own_term + total)
    if DECOUPLED:  # a row without negatives
        alpha = tl.where(own_term + total == 0.0, 0.0, alpha)
    if constant is not None:
        total += tl.load(constant + i, mask=mask_n, other=0.0)
    loss = log1p(total)
    if offset is not None:
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
    if anchors is not None:
        offs_d = tl.arange(0, BLOCK_D)
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        # α times unit rows, not times 1/norm: the product of the two may leave fp32's range.
        q = load_rows(x, i, offs_d, mask, stride_xn, stride_xd) * tl.load(r + i, mask=mask_n, other=0.0)[:, None]
        if center_q is not None:
            q = reflect(q, mirror_of(center_q, offs_d, D))
        q *= alpha[:, None]
        tl.store(
            anchors + offs_n[:, None] * stride_an + offs_d[None, :], q.to(anchors.dtype.element_ty), mask=mask
        )


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
    center_q: Tensor | None,  # (D,); None: rows are not reflected
    anchors: Tensor | None,  # (C, D)
    decoupled: bool,
    row_elements: int,
) -> None:
    """Closes rows i0, i0 + 1, … of one sweep."""
    C, tiles = partials.shape
    D = 0 if x is None else x.shape[1]
    block_n, block_d = (16, 1) if x is None else row_block(D, row_elements)
    close_rows_kernel[(cdiv(C, block_n),)](
        partials, sums, own, constant, offset, *results, x, r, center_q, anchors, C, tiles, i0, D,
        0 if x is None else x.stride(0), 0 if x is None else x.stride(1), 0 if x is None else anchors.stride(0),
        BLOCK_N=block_n, BLOCK_P=32, BLOCK_D=block_d, DECOUPLED=decoupled, num_warps=row_warps(block_d),
    )  # fmt: skip


@triton.jit(do_not_specialize=["i0", "C"])
def centered_anchors_kernel(
    x, r, center_q, out, C, i0, D, stride_xn, stride_xd, stride_on, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < C
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    inv_norm = tl.load(r + i0 + offs_n, mask=mask_n, other=0.0)
    q = load_rows(x, i0 + offs_n, offs_d, mask, stride_xn, stride_xd) * inv_norm[:, None]
    if center_q is not None:
        q -= tl.load(center_q + offs_d, mask=offs_d < D, other=0.0)[None, :]
    tl.store(out + offs_n[:, None] * stride_on + offs_d[None, :], q.to(out.dtype.element_ty), mask=mask)


def centered_anchors(
    x: Tensor, r: Tensor, center_q: Tensor | None, i0: int, out: Tensor, row_elements: int
) -> None:
    """q̂_i − c_q of rows i0, i0 + 1, … in ``out``, (C, D)."""
    C, D = out.shape
    block_n, block_d = row_block(D, row_elements)
    centered_anchors_kernel[(cdiv(C, block_n),)](
        x, r, center_q, out, C, i0, D, x.stride(0), x.stride(1), out.stride(0),
        BLOCK_N=block_n, BLOCK_D=block_d, num_warps=row_warps(block_d),
    )  # fmt: skip
