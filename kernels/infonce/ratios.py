"""The two kernels of two sweeps: maxima and sums of ratios, and the tile of weighted ratios.

    rows:     z_ij  = q_i·k_j + bias_ij − shift_i
    columns:  z'_ij = q_i·k_j + bias_ij + row_bias_i − column_shift_j        (the other direction; in bits, both)

z is −∞ where q_i·k_j is beyond the row's limit, z' where q_i·k_j + row_bias_i is beyond the column's, or a guide's
score is. The first gives, of every tile, the maximum of z (and of the positive's 0) and Σ 2^(z − maximum) over its
columns, and the same over its rows for z'. The second gives G_ij = w_i 2^z_ij (+ w_j 2^z'_ij), stored as operand
of the gradient products, and its sums over rows and columns in fp32.

FLOPs: 2·C·B·D each. Bytes: operands once; the second stores G. Partials: 4 or 8 bytes a row and tile of columns,
and a column and tile of rows.
"""

from __future__ import annotations

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


@triton.jit(do_not_specialize=["i0", "j0", "N", "T", "num_positives", "num_negatives", "num_ids"])
def ratios_kernel(
    queries,
    keys,
    shift,
    row_bias,  # with the next one of the columns' direction; None: that is not computed
    column_shift,
    row_weights,
    column_weights,
    G,  # the second kernel's; None: the first
    row_maxima,
    row_sums,
    column_maxima,
    column_sums,
    terms,
    num_positives,
    num_negatives,
    num_ids,
    N,
    T,
    D,
    i0,
    j0,
    width,  # columns of G that are written: T, or up to the next multiple of 16
    stride_qn,
    stride_kt,
    stride_gn,
    floor,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_t = tl.cdiv(T, BLOCK_T)
    for tile in tl.range(tl.program_id(0), tiles_n * tiles_t, tl.num_programs(0)):
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
        columns = tl.minimum(offs_t, T - 1)
        if terms.guide is not None:
            scores = guide_tile(
                terms.guide, i0 + start_n, j0 + start_t, i0 + N, j0 + T, BLOCK_N, BLOCK_T, BLOCK_D, PRECISION
            )
        if terms.ids is not None:
            z = mask_equal_ids(z, i0 + rows, j0 + columns, terms.ids, num_ids)
        if terms.second_ids is not None:
            z = mask_equal_ids(z, i0 + rows, j0 + columns, terms.second_ids, num_ids)
        holds = holds_pairs(i0 + start_n, j0 + start_t, terms.own_bias, num_positives, BLOCK_N, BLOCK_T)
        if holds | (start_t + BLOCK_T > T):
            z = mask_positives(z, i0 + offs_n, j0 + offs_t, j0 + T, num_positives)
        of_rows = z
        if terms.limits is not None:
            if terms.guide is None:
                scores = z
            of_rows = tl.where(scores > tl.load(terms.limits + i0 + rows)[:, None], float("-inf"), z)
        if terms.column_bias is not None:  # after the limits, which compare scores without weights
            of_rows += tl.load(terms.column_bias + j0 + columns)[None, :]
        of_rows += tl.where(offs_n < N, terms.bias - tl.load(shift + rows), float("-inf"))[:, None]
        if terms.own_bias is not None:
            if holds:
                of_rows = add_own_bias(
                    of_rows, i0 + offs_n, j0 + offs_t, terms.own_bias, num_positives, num_negatives
                )
        if row_bias is not None:
            of_columns = z + tl.where(offs_n < N, tl.load(row_bias + rows) + terms.bias, float("-inf"))[:, None]
            if terms.column_limits is not None:
                if terms.guide is None:
                    scores = of_columns
                limit = tl.load(terms.column_limits + j0 + columns)
                of_columns = tl.where(scores > limit[None, :], float("-inf"), of_columns)
            of_columns -= tl.load(column_shift + columns)[None, :]
        row_out = offs_n.to(tl.int64) * tiles_t + pid_t
        column_out = pid_n.to(tl.int64) * T + offs_t
        if G is not None:
            g = tl.exp2(of_rows)
            if row_weights is not None:
                g *= tl.load(row_weights + rows)[:, None]
            if row_bias is not None:
                other = tl.exp2(of_columns)
                if column_weights is not None:
                    other *= tl.load(column_weights + columns)[None, :]
                g += other
            tl.store(row_sums + row_out, tl.sum(g, 1), mask=offs_n < N)
            tl.store(column_sums + column_out, tl.sum(g, 0), mask=offs_t < T)
            out = G + offs_n.to(tl.int64)[:, None] * stride_gn + offs_t[None, :]
            mask = (offs_n[:, None] < N) & (offs_t[None, :] < width)
            tl.store(out, g.to(G.dtype.element_ty), mask=mask)
        else:
            # A maximum passes over NaN, the sum does not: NaN reaches the result there.
            maximum = tl.maximum(tl.max(of_rows, 1), floor)
            tl.store(row_maxima + row_out, maximum, mask=offs_n < N)
            tl.store(row_sums + row_out, tl.sum(tl.exp2(of_rows - maximum[:, None]), 1), mask=offs_n < N)
            if row_bias is not None:
                maximum = tl.maximum(tl.max(of_columns, 0), floor)
                tl.store(column_maxima + column_out, maximum, mask=offs_t < T)
                total = tl.sum(tl.exp2(of_columns - maximum[None, :]), 0)
                tl.store(column_sums + column_out, total, mask=offs_t < T)


def _launch(
    queries: Tensor, keys: Tensor, i0: int, j0: int, terms: Terms, counts: Counts, settings: Tile, **more
) -> None:
    (N, D), T = queries.shape, keys.shape[0]
    tiles = cdiv(N, settings.block_m) * cdiv(T, settings.block_n)
    q, k, _, use_tma = operands(queries, keys, None, settings)
    G = more["G"]
    ratios_kernel[(min(tiles, multiprocessors(queries.device) * settings.per_sm),)](
        q, k, **more, terms=terms, **counts._asdict(), N=N, T=T, D=D, i0=i0, j0=j0, width=readable_columns(G),
        stride_qn=queries.stride(0), stride_kt=keys.stride(0), stride_gn=0 if G is None else G.stride(0),
        BLOCK_N=settings.block_m, BLOCK_T=settings.block_n, BLOCK_D=settings.block_k, GROUP=settings.group,
        USE_TMA=use_tma, EVEN_D=D % settings.block_k == 0, PRECISION=precision_of(queries.dtype, queries.device),
        num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip


def ratio_sums(
    queries: Tensor,  # (C, D) rows i0, i0 + 1, …
    keys: Tensor,  # (B, D) columns j0, j0 + 1, …
    i0: int,
    j0: int,
    shift: Tensor,  # (C, 1)
    cols: tuple[Tensor, Tensor] | None,  # row bias (C, 1), column shift (B,)
    terms: Terms,
    counts: Counts,
    settings: Tile,
    floor: float = 0.0,  # of the maxima: the positive's own exponent
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Maxima and sums in parts: (C, tiles of columns) and, of the other direction, (tiles of rows, B) each."""
    C, B = queries.shape[0], keys.shape[0]
    of_rows = [shift.new_empty(C, cdiv(B, settings.block_n)) for _ in range(2)]
    of_columns = [None, None]
    if cols is not None:
        of_columns = [shift.new_empty(cdiv(C, settings.block_m), B) for _ in range(2)]
    row_bias, column_shift = (None, None) if cols is None else cols
    _launch(
        queries, keys, i0, j0, terms, counts, settings, shift=shift, row_bias=row_bias, column_shift=column_shift,
        row_weights=None, column_weights=None, G=None, floor=floor,
        row_maxima=of_rows[0], row_sums=of_rows[1], column_maxima=of_columns[0], column_sums=of_columns[1],
    )  # fmt: skip
    return tuple(of_rows), None if cols is None else tuple(of_columns)


def weighted_ratios(
    queries: Tensor,  # (C, D)
    keys: Tensor,  # (B, D)
    out: Tensor,  # (C, B)
    i0: int,
    j0: int,
    shift: Tensor,  # (C, 1)
    weights: Tensor | None,  # (C, 1)
    cols: tuple[Tensor, Tensor, Tensor | None] | None,  # row bias (C, 1), column shift (B,), column weights (B,)
    terms: Terms,
    counts: Counts,
    settings: Tile,
) -> tuple[Tensor, Tensor]:
    """The tile G in ``out``; its sums in parts: of rows (C, tiles of columns), of columns (tiles of rows, B)."""
    C, B = out.shape
    row_sums = shift.new_empty(C, cdiv(B, settings.block_n))
    column_sums = shift.new_empty(cdiv(C, settings.block_m), B)
    row_bias, column_shift, column_weights = (None, None, None) if cols is None else cols
    _launch(
        queries, keys, i0, j0, terms, counts, settings, shift=shift, row_bias=row_bias, column_shift=column_shift,
        row_weights=weights, column_weights=column_weights, G=out, floor=0.0,
        row_maxima=None, row_sums=row_sums, column_maxima=None, column_sums=column_sums,
    )  # fmt: skip
    return row_sums, column_sums


def ratios_cost(C: int, B: int, D: int, operand: int, stored: int, both: bool, settings: Tile) -> Cost:
    """Of one launch; stored: bytes of an element of G, 0 for the first kernel; both: both directions."""
    of_rows, of_columns = C * cdiv(B, settings.block_n), cdiv(C, settings.block_m) * B
    partials = 4 * (of_rows + of_columns) if stored else 8 * (of_rows + of_columns * both)
    vectors = 4 * C + both * 4 * (C + B)
    return Cost(2 * C * B * D, (C + B) * D * operand + C * B * stored + partials + vectors, partials)
