"""The variants of the loss, a function each: what they change in the exponents and in a row's loss.

An exponent is z_ij = (κ + β) s_ij + b_ij − κ p_i for negative j of row i. A variant replaces one part of it; every
path over the logits (``dense``, ``tiled``) calls these functions and contains no formula of a variant itself.

    logit_scale          κ + β, the factor of a negative's cosine              (hardness)
    positive_cosine      p_i, by default s_ii                                  (angular_margin)
    log_constants        one number more in each denominator                   (noise="expected", own negatives)
    row_loss             from a denominator to a loss, log(1 + R) by default   (decoupled)
    transformed_loss     f(loss) and f'(loss), by default the loss itself                (focal_gamma)

Terms of single entries (ids, own hard negatives, filters) are in ``entry_terms``; a term that needs no logits at
all (label smoothing) is in ``smoothing``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from .geometry import cosine_with_margin
from .noise import log_mean_exp_cosine
from .options import Options, Similar

NO_RATIO = -1e30  # the maximum over no exponents; finite, so that a difference of two is


@dataclass(slots=True, eq=False)
class Positive:
    """What takes the place of s_ii in row i's loss, (N, 1) each."""

    value: Tensor  # p_i
    slope: Tensor | None = None  # dp_i/ds_ii; None: 1
    kappa_correction: Tensor | None = None  # slope_i s_ii − p_i: times −dloss/dp_i what Σ_j s_ij dloss/ds_ij lacks
    # of dloss/dκ; None: 0


@overload
def logit_scale(kappa: float, options: Options) -> float: ...
@overload
def logit_scale(kappa: Tensor, options: Options) -> Tensor: ...
@overload
def logit_scale(kappa: float | Tensor, options: Options) -> float | Tensor: ...
def logit_scale(kappa: float | Tensor, options: Options) -> float | Tensor:
    """The factor of a negative's cosine in an exponent. No derivative is taken of β's part."""
    return kappa + options.column_hardness


def needs_positive(options: Options) -> bool:
    """Whether the exponents need p_i and s_ii as numbers of their own, not only their difference to s_ij."""
    return bool(
        options.angular_margin or options.column_hardness or options.symmetric or options.similar is not None
    ) or (options.noise_kind == "expected" or options.log_own is not None)


def unchanged_positive(cosine: Tensor) -> Positive:
    """p_i = s_ii."""
    return Positive(cosine)


def positive_cosine(cosine: Tensor, half_squared_chord: Tensor, zero: Tensor, options: Options) -> Positive:
    """cos(θ_ii + m) with an angular margin m. zero: pairs with a zero row. (N, 1) each"""
    value, slope = cosine_with_margin(cosine, half_squared_chord, zero, options.angular_margin)
    return Positive(value, slope, slope * cosine - value)


@dataclass(slots=True, eq=False)
class LogConstants:
    """Logarithms of what joins a denominator beside the columns' ratios, (N, 1) each; None: nothing."""

    rows: Tensor | None = None  # log (T_i + O_i e^(−κ p_i))
    columns: Tensor | None = None  # log T_i, of the other direction
    rho: float | Tensor = 0.0  # d log c_D/dκ in T_i
    own_fraction: Tensor | None = None  # of own hard negatives in the rows'; None: none are given


def log_constants(options: Options, kappa: float | Tensor, positive: Tensor, D: int) -> LogConstants:
    """positive: p_i (N, 1), which may have no value to read where there are no constants."""
    out = LogConstants()
    if options.noise_kind == "expected":
        out.columns, out.rho = log_expected_noise(options, kappa, positive, D)
        out.rows = out.columns
    if options.log_own is not None:
        own = options.log_own.to(positive.dtype) - kappa * positive
        out.rows = own if out.columns is None else torch.logaddexp(out.columns, own)
        out.own_fraction = torch.ones_like(own) if out.columns is None else (own - out.rows).exp()
    return out


def log_expected_noise(
    options: Options, kappa: float | Tensor, positive: Tensor, D: int
) -> tuple[Tensor, float | Tensor]:
    """log T_i = log(λ M c_D(κ + β)) − κ p_i, (N, 1), and ρ = d log c_D/dκ."""
    log_c, rho = log_mean_exp_cosine(logit_scale(kappa, options), D)
    log_weight = options.log_noise_weight + math.log(options.num_noise)
    if isinstance(log_c, Tensor) and isinstance(rho, Tensor):
        return (log_c + log_weight).to(positive.dtype) - kappa * positive, rho.to(positive.dtype)
    return log_c + log_weight - kappa * positive, rho


def exponents_fit(options: Options, kappa_bound: float | None, limit: float) -> bool:
    """Whether every sum of e^z_ij stays below e^limit; kappa_bound: an upper bound of κ, None if unknown."""
    if kappa_bound is None or options.log_weights is not None:  # which a device may hold
        return False
    return 2 * kappa_bound + options.hardness + options.exponent_range[1] + options.log_columns <= limit


def can_hide_columns(options: Options) -> bool:
    """Whether a column that contains NaN can be masked in every row."""
    guided = options.similar is not None and options.similar.guide is not None
    return options.ids is not None or guided or options.exclude_diagonal


def similarity_limit(positive_score: Tensor, similar: Similar) -> Tensor:
    """The score above which a column does not count as a negative: limit, or min(score_ii + margin, threshold)."""
    if similar.limit is not None:
        return similar.limit
    if similar.margin is None:
        limit = torch.full_like(positive_score, math.inf)
    else:
        limit = positive_score + similar.margin
    return limit if similar.threshold is None else limit.clamp(max=similar.threshold)


def least_maximum(options: Options) -> float:
    """What row maxima start from: 0, the positive's own exponent, where the denominator contains it."""
    return NO_RATIO if options.decoupled else 0.0


def smallest_operand(dtype: torch.dtype) -> float:
    """The smallest ratio that takes part in a product, 2^−118 in fp32.

    Its products with the components of a unit row, down to 2^−8, are normal numbers. Subnormal ones make a CPU
    slow: a step at τ = 0.005 and N = 1500 takes 2030 ms with them and 55 ms without.
    """
    return torch.finfo(dtype).tiny * 2.0**8


def flush_tiny_(x: Tensor) -> Tensor:
    """Sets what is below ``smallest_operand`` to 0, in place; NaN stays NaN."""
    torch.hardshrink(x, smallest_operand(x.dtype), out=x)
    return x


def exp_normal_(z: Tensor) -> Tensor:
    """e^z in place, and 0 below ``smallest_operand``; NaN stays NaN.

    The exponents are cut before the exponential, which takes twelve times as long for a subnormal result.
    """
    return torch.threshold_(z, math.log(smallest_operand(z.dtype)), -math.inf).exp_()


def exp2_normal_(z: Tensor, unit_log2: float = 0.0) -> Tensor:
    """2^z in place, cut as ``exp_normal_`` cuts e^z; ``unit_log2`` is a part of z, and of the cut."""
    return torch.threshold_(z, math.log2(smallest_operand(z.dtype)) + unit_log2, -math.inf).exp2_()


def row_loss(total: Tensor, offset: Tensor | None, options: Options) -> Tensor:
    """log(1 + e^offset · total); decoupled without the 1, −∞ where there are no negatives. offset: None for 0."""
    if offset is None:
        return total.log() if options.decoupled else total.log1p()
    log_ratios = offset + total.log()
    if options.decoupled:
        return log_ratios
    # log(e^−offset + total) + offset would lose the digits of a small loss.
    return torch.where(offset > 0, torch.logaddexp(torch.zeros_like(offset), log_ratios), total.log1p())


def counted_loss(loss: Tensor, options: Options) -> Tensor:
    """The rows' losses as they are summed: a decoupled row without negatives counts 0; loss: ``row_loss``.

    Without positives such a row keeps the logarithm of its empty sum, −∞.
    """
    if options.decoupled and options.paired:
        loss = loss.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)
    return transformed_loss(loss, options)[0] if transforms_loss(options) else loss


def transforms_loss(options: Options) -> bool:
    """Whether the loss of a row is a function f of ``row_loss``, and not ``row_loss`` itself."""
    return options.focal_gamma != 0


def transformed_loss(loss: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """f(loss_i), and f'(loss_i), by which every path multiplies the weight of row i's gradient."""
    miss = -torch.expm1(-loss)  # 1 − p_i
    weight, ratio = miss**options.focal_gamma, torch.where(miss == 0, 1.0, loss / miss)
    return weight * loss, weight * (1 + options.focal_gamma * (1 - miss) * ratio)
