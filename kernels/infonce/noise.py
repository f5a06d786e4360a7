"""Random directions: Philox normals of (seed, row, column), normalised and centred, any range of rows alone.

    g_m ~ N(0, I),  rows_m = ĝ_m − c   in the product dtype (and in the gradient dtype where that is another)

Counter (column, row low, row high, 0) gives four numbers: those of the columns column + i·BLOCK_D/4. The seed is
read from the device: a captured graph that draws it anew gets fresh noise. Bytes: the rows, written once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import Cost


@triton.jit
def normals(seed, row, column):
    """Four standard normal numbers a counter (Box–Muller). row: scalar int64; column: (n,)"""
    low = (row & 0xFFFFFFFF).to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    zero = tl.zeros(column.shape, tl.uint32)
    a, b, c, d = tl.philox(seed, column.to(tl.uint32), zero + low, zero + high, zero)
    x0, x1 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b))
    x2, x3 = tl.pair_uniform_to_normal(tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d))
    return x0, x1, x2, x3


@triton.jit
def store_noise(rows, grad_rows, g, r, center, at, offs_d, D):
    g = g * r
    if center is not None:
        g -= tl.load(center + offs_d, mask=offs_d < D, other=0.0)
    tl.store(rows + at + offs_d, g.to(rows.dtype.element_ty), mask=offs_d < D)
    if grad_rows is not None:
        tl.store(grad_rows + at + offs_d, g.to(grad_rows.dtype.element_ty), mask=offs_d < D)


@triton.jit(do_not_specialize=["first"])
def noise_kernel(seed, center, rows, grad_rows, first, D, stride_rn, QUARTER: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, QUARTER)
    x0, x1, x2, x3 = normals(tl.load(seed), first + n, offs)
    x0 = tl.where(offs < D, x0, 0.0)
    x1 = tl.where(offs + QUARTER < D, x1, 0.0)
    x2 = tl.where(offs + 2 * QUARTER < D, x2, 0.0)
    x3 = tl.where(offs + 3 * QUARTER < D, x3, 0.0)
    square = tl.sum(x0 * x0) + tl.sum(x1 * x1) + tl.sum(x2 * x2) + tl.sum(x3 * x3)
    r = 1.0 / tl.sqrt(tl.maximum(square, 1e-30))
    at = n * stride_rn
    store_noise(rows, grad_rows, x0, r, center, at, offs, D)
    store_noise(rows, grad_rows, x1, r, center, at, offs + QUARTER, D)
    store_noise(rows, grad_rows, x2, r, center, at, offs + 2 * QUARTER, D)
    store_noise(rows, grad_rows, x3, r, center, at, offs + 3 * QUARTER, D)


def sample_noise(
    seed: Tensor,  # (1,) int64
    first: int,  # the first of the rows
    center: Tensor | None,  # (D,)
    rows: Tensor,  # (n, D)
    grad_rows: Tensor | None,  # (n, D)
) -> None:
    """Rows first, first + 1, … of the random directions that ``seed`` stands for."""
    n, D = rows.shape
    quarter = max(1, triton.next_power_of_2(D) // 4)
    noise_kernel[(n,)](seed, center, rows, grad_rows, first, D, rows.stride(0), QUARTER=quarter, num_warps=4)


def sample_noise_cost(n: int, D: int, operand: int, copies: int) -> Cost:
    return Cost(0, copies * n * D * operand, 0)
