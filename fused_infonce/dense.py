"""The loss of a small batch: all its logits are one tensor, and the formulas stand here as torch operations.

With unit rows q̂_i and columns x̂_j (positives, hard negatives, queue, noise), s_ij = q̂_i·x̂_j, p_i the positive's
cosine, κ = 1/τ, β the hardness and b_ij the log-weight of an entry, −∞ where it is masked:

    z_ij   = (κ + β) s_ij + b_ij − κ p_i        the logarithm of negative j's ratio to the positive
    R_i    = Σ_j e^z_ij + T_i                   T_i: expected noise and own hard negatives, a constant
    loss_i = log(1 + R_i)                       decoupled: log R_i
    dloss_i/ds_ij = κ e^z_ij / (1 + R_i)        G_ij;  dloss_i/dp_i = −κ R_i / (1 + R_i)

The positive is left out of the sum, so nothing cancels where R_i is small. One vector c is subtracted from every
column, which changes no difference s_ij − s_ii: rows of a narrow cone keep their digits. docs/numerics.md derives
all of it. ``fused_infonce.tiled`` computes the same for batches whose logits do not fit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import entry_terms, noise, variants
from .entry_terms import EntryTerms, Limits
from .options import Options
from .resolve import Call
from .tiled.operands import Gradients, NeedsGrad, Precision, column_spans, grad_range

MAX_LOGITS = 1 << 19  # 2 MiB of fp32, about what a core's cache holds beside the operands of the products
MAX_ELEMENTS = 1 << 22  # of all rows together; the noise vectors, too, are held at once
LOGIT_BYTES = 32  # an upper bound of what this path holds per logit, compared with a caller's workspace_bytes
CENTER_ROWS = 64  # rows whose mean is the centre; any constant is exact
MAX_EXPONENT = 60.0  # up to it e^z, sums of it and their reciprocals times a usual weight are normal fp32 numbers


class Softmax(NamedTuple):
    """The ratios of one direction and their denominators; (N, T + M) and (N, 1), transposed for columns."""

    ratios: Tensor  # e^(z − m), m an offset per row; 0 at the positive
    alpha: Tensor  # f'(loss)/(e^−m + total), f' usually 1; decoupled: 1/total
    total: Tensor  # e^−m R_i
    constant: Tensor | None  # the part of T_i in it


class Residuals(NamedTuple):
    """What the backward reads beside the temperature: tensors of this module's own, never a caller's."""

    unit_anchors: Tensor  # q̂ (N, D)
    inv_norm_anchors: Tensor  # (N, 1), 0 for a zero row
    unit_columns: Tensor  # x̂ (T + M, D): positives, hard negatives, queue, noise
    inv_norm_columns: Tensor  # (T + M, 1)
    grad_columns: Tensor  # x̂ − c in the dtype of the gradient products, (T + M, D)
    center: Tensor  # c (D,)
    row_ratios: Tensor
    row_alpha: Tensor
    row_total: Tensor
    row_constant: Tensor | None
    column_ratios: Tensor | None  # of the other direction, where the loss is symmetric
    column_alpha: Tensor | None
    column_total: Tensor | None
    column_constant: Tensor | None
    slope: Tensor | None  # dp_i/ds_ii and the correction of dκ, where p_i is not s_ii
    kappa_correction: Tensor | None
    own_fraction: Tensor | None  # of own hard negatives in row_constant, (N, 1)


def fits(call: Call) -> bool:
    """Whether the batch is small enough. Shapes alone decide, so that results are reproducible to the bit."""
    options = call.options
    if call.backend != "torch" or options.exchange is not None:
        return False
    N, columns = options.counts.rows, options.counts.columns
    if options.has_noise_columns:
        columns += options.num_noise
    most = MAX_LOGITS
    if options.workspace_bytes is not None:
        most = min(most, options.workspace_bytes // LOGIT_BYTES)
    return N * columns <= most and (N + columns) * call.inputs[0].shape[1] <= MAX_ELEMENTS


class _Rows(NamedTuple):
    """Unit rows; columns are positives, hard negatives, queue and noise, in this order."""

    q: Tensor  # (N, D)
    inv_norm_q: Tensor  # (N, 1), 0 for a zero row
    x: Tensor  # (T + M, D)
    inv_norm_x: Tensor  # (T + M, 1)
    center: Tensor  # c (D,)
    centered: Tensor  # x̂ − c (T + M, D)


def losses(call: Call, kappa: float | Tensor, precision: Precision) -> tuple[Tensor, Tensor | None, Residuals]:
    """Losses of the rows and, where the loss is symmetric, of the columns, (N, 1) each; and the residuals."""
    options, N = call.options, call.options.counts.rows
    rows = _unit_rows(call, precision)
    q, x, scale = rows.q, rows.x, variants.logit_scale(kappa, options)
    z = q.to(precision.product) @ rows.centered.to(precision.product).T
    z = z.to(precision.sums).mul_(scale)
    if options.paired:
        positive_logit = (q * rows.centered[:N]).sum(1, keepdim=True).mul_(scale)  # summed from unrounded rows
    else:  # of a positive whose cosine is 0
        positive_logit = (q @ rows.center).unsqueeze(1).mul_(-scale)
    # z_ij = (κ + β) q̂_i·(x̂_j − c) so far; less the shift of its row it is the exponent.
    cosine, positive, shift, constants = None, None, positive_logit, variants.LogConstants()
    if variants.needs_positive(options):
        cosine = (q * x[:N]).sum(1, keepdim=True) if options.paired else torch.zeros_like(positive_logit)
        positive = _positive(rows, cosine, options)
        shift = positive_logit + (kappa * positive.value - scale * cosine)
        constants = variants.log_constants(options, kappa, positive.value, q.shape[1])
    z_back: Tensor | None = None
    if _masks_positives_only(options):
        if options.masked_diagonal:
            z.fill_diagonal_(-math.inf)
    else:
        z, z_back = _with_entry_terms(z, rows, options, scale, positive_logit, cosine)
    row_loss, ahead = _softmax(z.sub_(shift), constants.rows, call, 1)
    column_loss: Tensor | None = None
    back: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None, None, None, None)
    if z_back is not None and positive is not None:
        back_constant = None if constants.columns is None else constants.columns.T
        column_loss, back = _softmax(z_back.sub_((kappa * positive.value).T), back_constant, call, 0)
        column_loss = column_loss.T
    if variants.can_hide_columns(options):
        hidden = rows.centered[: options.counts.columns].sum() * 0  # NaN where a column is, masked in every row
        row_loss, column_loss = row_loss + hidden, None if column_loss is None else column_loss + hidden
    slopes = (None, None) if positive is None else (positive.slope, positive.kappa_correction)
    grad_columns = rows.centered.to(precision.gradient)
    kept = Residuals(
        rows.q, rows.inv_norm_q, rows.x, rows.inv_norm_x, grad_columns, rows.center, *ahead, *back, *slopes,
        constants.own_fraction,
    )  # fmt: skip
    return row_loss, column_loss, kept


def _unit_rows(call: Call, precision: Precision) -> _Rows:
    options, sums = call.options, precision.sums
    noise_vectors = call.noise_rows
    if options.seed is not None:
        D, device, M = call.inputs[0].shape[1], call.inputs[0].device, options.num_noise
        blocks = [noise.sample_block(options.seed, b, M, D, sums, device) for b in range(noise.num_blocks(M))]
        noise_vectors = torch.cat(blocks)
    parts = [x.to(sums) for x in (*call.inputs[1:], noise_vectors) if x is not None]
    x = torch.cat(parts) if len(parts) > 1 else parts[0]
    q = call.inputs[0].to(sums)
    inv_norm_q, inv_norm_x = _inverse_norms(q), _inverse_norms(x)
    q, x = q * inv_norm_q, x * inv_norm_x
    center = x[: min(CENTER_ROWS, options.counts.positives or options.counts.columns)].mean(0)
    return _Rows(q, inv_norm_q, x, inv_norm_x, center, x - center)


def _inverse_norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norms.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0)


def _positive(rows: _Rows, cosine: Tensor, options: Options) -> variants.Positive:
    q, k = rows.q, rows.x[: len(rows.q)]
    if not options.angular_margin:
        return variants.unchanged_positive(cosine)
    half_squared_chord = (q - k).square_().sum(1, keepdim=True).div_(2)
    zero = (rows.inv_norm_q == 0) | (rows.inv_norm_x[: len(q)] == 0)
    return variants.positive_cosine(cosine, half_squared_chord, zero, options)


def _masks_positives_only(options: Options) -> bool:
    """Whether the positives' entries are the only ones that differ from (κ + β) s_ij, in one direction."""
    return (
        options.ids is None
        and options.log_weights is None
        and options.similar is None
        and not options.own_log_weight
        and not options.has_noise_columns
        and not options.symmetric
    )


def _with_entry_terms(
    z: Tensor,  # (N, T + M), overwritten
    rows: _Rows,
    options: Options,
    scale: float | Tensor,
    positive_logit: Tensor,  # (N, 1)
    cosine: Tensor | None,  # (N, 1)
) -> tuple[Tensor, Tensor | None]:
    """The logits with masks and weights: (κ + β) s_ij − c_i of rows, (κ + β) s_ij of columns (N + M, N)."""
    N, T = options.counts.rows, options.counts.columns
    tile = z[:, :T] if options.has_noise_columns else z
    to_cosine = None if cosine is None else scale * cosine - positive_logit  # (κ + β) q̂_i·c
    terms = _entry_terms(options, scale, to_cosine, cosine, rows.q.dtype)
    entry_terms.mask_(tile, terms, 0, 0)
    scores = entry_terms.guide_scores(tile, terms, 0, 0)
    z_back = None
    if options.symmetric and to_cosine is not None:
        z_back = tile[:, :N] + to_cosine
        entry_terms.apply_to_columns_(z_back, None if scores is None else scores[:, :N], terms, 0)
        if options.has_noise_columns:
            of_noise = (rows.x[T:] @ rows.x[:N].T).mul_(scale).add_(options.log_noise_weight)  # (M, N)
            z_back = torch.cat([z_back, of_noise])
    entry_terms.apply_to_rows_(tile, scores, terms, 0, 0)
    if options.has_noise_columns and options.log_noise_weight:
        z[:, T:].add_(options.log_noise_weight)
    return z, z_back


def _entry_terms(
    options: Options, scale: float | Tensor, to_cosine: Tensor | None, cosine: Tensor | None, dtype: torch.dtype
) -> EntryTerms:
    N, H, limits = options.counts.rows, options.counts.negatives, None
    if options.similar is not None and cosine is not None and to_cosine is not None:
        similar = options.similar
        if similar.guide is not None:
            of_rows, of_columns = (x * _inverse_norms(x) for x in (y.to(dtype) for y in similar.guide))
            guide = of_rows, of_columns
            own = (guide[0] * guide[1][:N]).sum(1, keepdim=True) if options.paired else cosine
            limit = variants.similarity_limit(own, similar)
            limits = Limits(limit, limit[:, 0], guide)
        else:
            limit = scale * variants.similarity_limit(cosine, similar)
            limits = Limits(limit - to_cosine, limit[:, 0])
    return EntryTerms(
        0.0, options.masked_diagonal, H, options.own_log_weight, options.ids, options.column_ids, limits,
        None if options.log_weights is None else options.log_weights.to(dtype),
    )  # fmt: skip


def _softmax(
    z: Tensor, constant: Tensor | None, call: Call, dim: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Losses, and the ratios with their denominators (see ``Residuals``), of exponents z, overwritten."""
    options, offset = call.options, None
    if options.decoupled or not variants.exponents_fit(options, call.kappa_bound, MAX_EXPONENT):
        offset = z.amax(dim, keepdim=True)
        if constant is not None:
            offset = torch.maximum(offset, constant)
            constant = constant - offset.clamp(min=variants.least_maximum(options))
        z.sub_(offset.clamp_(min=variants.least_maximum(options)))
    ratios = z.exp_() if offset is None else variants.exp_normal_(z)
    total = ratios.sum(dim, keepdim=True)
    if constant is not None:
        constant = constant.exp()
        total = total + constant
    if options.decoupled:  # a row without negatives has no gradient
        alpha = total.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0)
    else:
        alpha = (total + (1.0 if offset is None else (-offset).exp_())).reciprocal_()
    losses = variants.row_loss(total, offset, options)
    if variants.transforms_loss(options):
        alpha.mul_(variants.transformed_loss(losses, options)[1])
    return losses, (ratios, alpha, total, constant)


def gradients(
    kept: Residuals,
    options: Options,
    needs: NeedsGrad,
    kappa: float | Tensor,
    upstream: Tensor | None,  # 0-dim, of the reduced loss, or (N,) of the rows' losses; None: 1
    dtypes: list[torch.dtype | None],  # of the four inputs
) -> Gradients:
    """Gradients of the loss times ``upstream``."""
    N, q, x = options.counts.rows, kept.unit_anchors, kept.unit_columns
    low_precision = kept.grad_columns.dtype != x.dtype
    G, lost, of_constant, of_own, of_noise = _weighted_ratios(kept, options, kappa, upstream)
    if not variants.exponents_fit(options, kappa if isinstance(kappa, float) else None, MAX_EXPONENT):
        variants.flush_tiny_(G)
    of_positive = lost if kept.slope is None else lost * kept.slope  # −dloss/ds_ii
    if options.paired and not low_precision:
        G.diagonal().sub_(of_positive[:, 0])  # from 0
    out, d_kappa = Gradients(), None
    if needs.rows:
        v = G.to(kept.grad_columns.dtype) @ kept.grad_columns
        if low_precision:
            v = v.to(q.dtype)
            if options.paired:
                v.addcmul_(of_positive, x[:N], value=-1)
        on_diagonal = options.paired and not low_precision and kept.slope is None
        if not on_diagonal or options.symmetric or kept.row_constant is not None:
            v.addcmul_(G.sum(1, keepdim=True), kept.center)  # elsewhere these sums are 0
        out.anchors, dots = _through_norm(v, q, kept.inv_norm_anchors, dtypes[0])
        d_kappa = dots.sum() if needs.temperature else None
    chosen = grad_range(options.counts, needs.columns)
    if chosen.stop:
        unit, inv_norm = x, kept.inv_norm_columns
        if chosen.stop - chosen.start < len(x):
            G, unit, inv_norm = G[:, chosen], x[chosen], inv_norm[chosen]
        v = _column_products(G, q, kept.grad_columns.dtype)
        if needs.positives:
            if low_precision:
                v[:N].addcmul_(of_positive, q, value=-1)
            if of_noise is not None:
                v[:N] += of_noise
        v, _ = _through_norm(v, unit, inv_norm, None)
        for i, (name, columns) in enumerate(column_spans(options.counts), start=1):
            if name in needs.columns:
                part = v[columns.start - chosen.start : columns.stop - chosen.start]
                setattr(out, name, part.to(dtypes[i]))
    if needs.temperature and d_kappa is not None:
        if kept.kappa_correction is not None:
            d_kappa = d_kappa + (lost * kept.kappa_correction).sum()
        if of_noise is not None:
            d_kappa = d_kappa + (of_noise * x[:N]).sum()
        if of_constant is not None:
            scale = variants.logit_scale(kappa, options)
            d_kappa = d_kappa + of_constant.sum() * noise.log_mean_exp_cosine(scale, q.shape[1])[1]
        out.kappa = d_kappa / kappa
    if needs.log_own and of_own is not None:
        out.log_own = (of_own / kappa)[:, 0]
    return out


def _weighted_ratios(
    kept: Residuals, options: Options, kappa: float | Tensor, upstream: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dloss/ds_ij of the negatives (N, T + M); its share of the positive, of expected noise and of own hard
    negatives, (N, 1) each; and the positives' gradient (N, D) from the noise of the columns' direction. κ is a
    factor of all five.
    """
    N, T = options.counts.rows, options.counts.columns
    w: float | Tensor = kappa * options.gradient_factor * (0.5 if options.symmetric else 1.0)
    if upstream is not None:
        if not options.paired:  # a function of −∞ may have the slope NaN, as logaddexp has
            upstream = upstream.masked_fill(kept.row_total[:, 0] == 0, 0.0)
        w = (upstream if upstream.ndim == 0 else upstream.unsqueeze(1)) * w
    alpha = kept.row_alpha * w
    G, lost = kept.row_ratios * alpha, kept.row_total * alpha
    of_constant = None if kept.row_constant is None else kept.row_constant * alpha
    of_own = None
    if of_constant is not None and kept.own_fraction is not None:
        of_own = of_constant * kept.own_fraction
        of_constant = of_constant - of_own if options.noise_kind == "expected" else None
    if kept.column_ratios is None or kept.column_alpha is None or kept.column_total is None:
        return G, lost, of_constant, of_own, None
    alpha = kept.column_alpha * (w.T if isinstance(w, Tensor) and w.ndim else w)  # (1, N)
    G_back = kept.column_ratios * alpha  # (N + M, N)
    G[:, :N] += G_back[:N]
    lost = lost + (kept.column_total * alpha).T
    if of_constant is not None and kept.column_constant is not None:
        of_constant = of_constant + (kept.column_constant * alpha).T
    of_noise = G_back[N:].T @ kept.unit_columns[T:] if options.has_noise_columns else None
    return G, lost, of_constant, of_own, of_noise


def _column_products(G: Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """Gᵀ q̂ in q̂'s dtype; products of lower precision take q̂ less its centre. (N, T), (N, D) → (T, D)"""
    if dtype == q.dtype:
        return G.T @ q
    center = q[:CENTER_ROWS].mean(0)
    v = (G.to(dtype).T @ (q - center).to(dtype)).to(q.dtype)
    return v.addcmul_(G.sum(0).unsqueeze(1), center)


def _through_norm(v: Tensor, unit: Tensor, inv_norm: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The gradient of rows from that of their unit rows, v, which is overwritten; and ⟨x̂_i, v_i⟩ (n, 1)."""
    dots = (unit * v).sum(1, keepdim=True)
    return v.addcmul_(unit, dots, value=-1).mul_(inv_norm).to(dtype or v.dtype), dots
