"""The loss as the formula says it, with the whole N×M matrix, in float64: the ground truth of every test.

Written to be read, not to be fast. It keeps to the ratio form log1p(Σ e^(z_ij)), z_ij = (s_ij − s_ii)/τ, since
``F.cross_entropy`` cancels for trained rows even in float64; autograd gives its gradients, of any order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .geometry import cosine_with_margin, unit_rows
from .noise import log_mean_exp_cosine, sample_all
from .options import Options, Similar
from .resolve import Call


def reference_loss(call: Call) -> Tensor:
    """The loss in nats, (N,) or reduced to 0-dim; computed in float64, float32 out unless an input is float64."""
    options = call.options
    anchors, positives, negatives, queue = call.inputs
    assert positives is not None
    noise = call.noise_rows
    if options.seed is not None:
        noise = sample_all(options.seed, options.num_noise, anchors.shape[1], anchors.device)
    q = unit_rows(anchors, torch.float64)
    k = unit_rows(positives, torch.float64)
    extra = [unit_rows(x, torch.float64) for x in (negatives, queue) if x is not None]
    g = None if noise is None else unit_rows(noise.detach(), torch.float64)
    tau = torch.as_tensor(call.temperature, dtype=torch.float64, device=q.device).reshape(())
    kappa = torch.where(tau > 0, 1 / tau, math.nan)

    pairs = _pair_bias(options, q.device)
    columns = torch.cat([k, *extra])
    scores = None
    if options.similar is not None and options.similar.guide is not None:
        guide_rows, guide_columns = (unit_rows(x, torch.float64) for x in options.similar.guide)
        scores = guide_rows @ guide_columns.T
    every = torch.cat([pairs, _extra_bias(options, q.device)], 1)
    own = _own_logits(call, q, k, kappa)
    losses = _direction(q, columns, k, g, every, kappa, options, scores, own)
    if options.symmetric:
        back = _direction(k, q, q, g, pairs, kappa, options, None if scores is None else scores[:, : len(q)].T)
        losses = (losses + back) / 2
    reduced = {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[options.reduction]
    return reduced.to(torch.promote_types(call.dtype, torch.float32))


def reference_logsumexp(call: Call) -> Tensor:
    """The log-sum-exp over the columns of every row, (N,); computed as ``reference_loss`` is."""
    options, similar = call.options, call.options.similar
    rows, _, columns, _ = call.inputs
    assert columns is not None
    s = unit_rows(rows, torch.float64) @ unit_rows(columns, torch.float64).T  # (N, T)
    tau = torch.as_tensor(call.temperature, dtype=torch.float64, device=s.device).reshape(())
    kappa = torch.where(tau > 0, 1 / tau, math.nan)
    left_out = torch.zeros_like(s, dtype=torch.bool)
    if options.exclude_diagonal:
        left_out.fill_diagonal_(True)
    if options.ids is not None and options.negative_ids is not None:
        left_out |= _same_ids(options.ids, options.negative_ids)
    if similar is not None:
        scores = s
        if similar.guide is not None:
            guide_rows, guide_columns = (unit_rows(x, torch.float64) for x in similar.guide)
            scores = guide_rows @ guide_columns.T
        limit = similar.threshold if similar.limit is None else similar.limit
        assert limit is not None
        left_out |= scores > limit
    hidden = 0 * columns.double().sum()  # NaN where a column is, also one that every row leaves out
    z = kappa * s + options.hardness * s.detach() + hidden
    if options.log_weights is not None:
        z = z + options.log_weights.double()
        left_out = left_out | (options.log_weights == -math.inf)
    empty = left_out.all(1)
    sums = z.masked_fill(left_out & ~empty[:, None], -math.inf).logsumexp(1)
    return sums.masked_fill(empty, -math.inf).to(torch.promote_types(call.dtype, torch.float32))


def _direction(
    q: Tensor,  # (N, D), unit rows
    columns: Tensor,  # (T, D)
    positives: Tensor,  # (N, D)
    noise: Tensor | None,  # (M, D)
    bias: Tensor,  # (N, T), −inf where a column is the row's positive or masked
    kappa: Tensor,
    options: Options,
    scores: Tensor | None,  # (N, T) a guide's cosines
    own: Tensor | None = None,  # (N, H) logits of own hard negatives, −inf where they are another row's or masked
) -> Tensor:
    """log1p, or decoupled log, of the sum of the ratios e^z over every column but the positive."""
    s, positive = q @ columns.T, (q * positives).sum(1, keepdim=True)  # (N, T), (N, 1)
    if options.similar is not None:
        bias = bias.masked_fill(_too_similar(options.similar, s, positive, scores), -math.inf)
    if options.angular_margin:
        zero = ~(q.any(1, keepdim=True) & positives.any(1, keepdim=True))
        half_squared_chord = (q - positives).square().sum(1, keepdim=True) / 2
        positive, _ = cosine_with_margin(positive, half_squared_chord, zero, options.angular_margin)
    z = torch.where(bias.isinf(), bias, kappa * (s - positive) + bias + options.column_hardness * s.detach())
    if noise is not None:
        s = q @ noise.T
        more = kappa * (s - positive) + options.log_noise_weight + options.column_hardness * s.detach()
        z = torch.cat([z, more], 1)
    if own is not None:
        z = torch.cat([z, torch.where(own == -math.inf, own, own - kappa * positive)], 1)
    if options.noise_kind == "expected":
        # the derivative is that at κ + β, of κ alone
        log_c, _ = log_mean_exp_cosine(kappa + options.column_hardness, q.shape[1])
        z = torch.cat([z, options.log_noise_weight + math.log(options.num_noise) + log_c - kappa * positive], 1)
    z = z + 0 * (kappa * positive + columns.sum())  # NaN reaches a row whose every negative is masked, too
    if options.decoupled:  # a row without negatives counts 0
        empty = (z == -math.inf).all(1, keepdim=True)
        return z.masked_fill(empty, 0).logsumexp(1).masked_fill(empty[:, 0], 0)
    m = z.detach().amax(1).clamp(min=0)
    ratios = (z - m[:, None]).exp().sum(1)
    loss = torch.where(m > 0, m + ((-m).exp() + ratios).log(), ratios.log1p())
    if not options.focal_gamma:
        return loss
    return (-torch.expm1(-loss.clamp(min=1e-300))) ** options.focal_gamma * loss  # the power has no slope at 0


def _own_logits(call: Call, q: Tensor, k: Tensor, kappa: Tensor) -> Tensor | None:
    """Logits (N, H) of own hard negatives: as columns for every row, of which a row sees its own."""
    own, options, N = call.own, call.options, len(q)
    if own is None:
        return None
    flat = own.rows.flatten(0, -2)
    owners, each = own.owners, torch.arange(N, device=q.device)
    if owners is None:
        owners = each.repeat_interleave(own.rows.shape[1])
    s = q @ unit_rows(flat, torch.float64).T
    left_out = owners[None] != each[:, None]
    if own.ids is not None and options.ids is not None:
        ids = options.ids if options.ids.ndim == 1 else options.ids[:, 1]
        left_out = left_out | _same_ids(ids, own.ids.flatten())
    if options.similar is not None:
        scores, positive = s, (q * k).sum(1, keepdim=True)
        if options.similar.guide is not None and own.guide is not None:
            rows, columns = (unit_rows(x, torch.float64) for x in options.similar.guide)
            scores = rows @ unit_rows(own.guide.flatten(0, -2), torch.float64).T
            positive = (rows * columns[:N]).sum(1, keepdim=True)
        left_out = left_out | (scores > _limit(options.similar, positive))
    z = kappa * s + options.hard_negative_weight + options.own_hardness * s.detach()
    hidden = torch.where(owners[None] == each[:, None], 0 * s, 0.0).sum(
        1, keepdim=True
    )  # NaN, also of masked ones
    return z.masked_fill(left_out, -math.inf) + hidden


def _too_similar(similar: Similar, s: Tensor, positive: Tensor, scores: Tensor | None) -> Tensor:  # (N, T)
    if scores is not None:
        s, positive = scores, scores.diagonal()[:, None]
    return s > _limit(similar, positive)


def _limit(similar: Similar, positive: Tensor) -> Tensor:  # (N, 1)
    limit = torch.full_like(positive, math.inf) if similar.margin is None else positive + similar.margin
    return limit if similar.threshold is None else limit.clamp(max=similar.threshold)


def _same_ids(rows: Tensor, columns: Tensor) -> Tensor:
    """Whether the id is equal, or either of two. (N,), (T,) or (N, 2), (T, 2) → (N, T)"""
    same = rows[:, None] == columns[None, :]
    return same if rows.ndim == 1 else same.any(2)


def _pair_bias(options: Options, device: torch.device) -> Tensor:  # (N, N)
    bias = torch.zeros(options.counts.positives, options.counts.positives, dtype=torch.float64, device=device)
    if options.ids is not None:
        bias.masked_fill_(_same_ids(options.ids, options.ids), -math.inf)
    return bias.fill_diagonal_(-math.inf)


def _extra_bias(options: Options, device: torch.device) -> Tensor:  # (N, H + Q)
    N, H, Q = options.counts.positives, options.counts.negatives, options.counts.queue
    bias = torch.zeros(N, H + Q, dtype=torch.float64, device=device)
    if options.own_log_weight:
        own = torch.arange(N, device=device)[:, None] == torch.arange(H, device=device)[None, :] % N
        bias[:, :H].masked_fill_(own, options.own_log_weight)
    if options.ids is not None and options.negative_ids is not None:
        ids = options.ids if options.ids.ndim == 1 else options.ids[:, 1]  # a hard negative has a document's id
        bias[:, :H].masked_fill_(_same_ids(ids, options.negative_ids), -math.inf)
    return bias
