"""Losses that correct the sum over negatives for those that are positives, or are too easy.

n is the number of a row's negatives, those of all ranks of a group, R_i = Σ_{j≠i} e^{(s_ij − s_ii)/τ}.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import cosine_logsumexp
from ..own_negatives import pair_cosines, scalar
from .ranks import count
from .terms import reducible


@reducible
def debiased(
    anchors: Tensor,
    positives: Tensor,
    *,
    tau_plus: float = 0.1,
    temperature: float | Tensor = 0.5,
    **options: Any,
) -> Tensor:
    r"""The debiased contrastive loss (Chuang et al., NeurIPS 2020, arXiv:2007.00224).

    loss_i = log(1 + n g_i), g_i = max((R_i/n − τ⁺)/(1 − τ⁺), e^{−(1 + s_ii)/τ})

    anchors, positives: (N, D), N >= 2; tau_plus: τ⁺, the probability that a column is of the anchor's class, in
    [0, 1). Cost: four products of the similarity matrix. In the paper's own case of two views, its negatives are
    the other rows of both; here they are the other positives.
    """
    log_n = _log_num_negatives(anchors, options)
    total = cosine_logsumexp(anchors, positives, temperature=temperature, exclude_diagonal=True, **options)
    return _corrected(total - log_n, pair_cosines(anchors, positives), log_n, tau_plus, temperature)


@reducible
def hcl(
    anchors: Tensor,
    positives: Tensor,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    temperature: float | Tensor = 0.5,
    **options: Any,
) -> Tensor:
    r"""Hard negatives by importance weights (Robinson et al., ICLR 2021, arXiv:2010.04592).

    As :func:`debiased`, R_i/n replaced by Σ_j w_ij e^{(s_ij − s_ii)/τ} / Σ_j w_ij, w_ij = e^{β s_ij/τ}. The
    weights have their gradient, as in the authors' code. Both sums are log-sum-exps, at τ/(1 + β) and at τ/β.

    anchors, positives: (N, D), N >= 2; beta: concentration β > 0 of the weights on negatives of high cosine. Cost:
    eight products.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, not {beta}; debiased is the loss with beta = 0")
    log_n = _log_num_negatives(anchors, options)
    weighted, weights = (
        cosine_logsumexp(anchors, positives, temperature=temperature / b, exclude_diagonal=True, **options)
        for b in (1 + beta, beta)
    )
    return _corrected(weighted - weights, pair_cosines(anchors, positives), log_n, tau_plus, temperature)


def _log_num_negatives(anchors: Tensor, options: dict[str, Any]) -> float:
    """log n; ValueError, on every rank, where n = 0."""
    rows = count(anchors, options)
    if rows < 2:
        raise ValueError(
            f"anchors must be at least 2 rows, on all ranks together, not {rows}: their negatives are each other"
        )
    return math.log(rows - 1)


def _corrected(
    log_mean: Tensor, positive: Tensor, log_n: float, tau_plus: float, temperature: float | Tensor
) -> Tensor:
    """log_mean: the logarithm of the mean over negatives, (N,)."""
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus must be a probability, 0 <= tau_plus < 1, not {tau_plus}")
    kappa = 1 / scalar(temperature)
    ratio, least = log_mean - kappa * positive, -kappa * (1 + positive)
    if tau_plus:
        excess = math.log(tau_plus) - ratio  # of τ⁺ over R/n; the difference is positive where this is negative
        inside = ratio + torch.log1p(-torch.exp(torch.where(excess < 0, excess, -1.0))) - math.log1p(-tau_plus)
        ratio = torch.where(excess < 0, inside, least)
    return F.softplus(torch.maximum(ratio, least) + log_n, threshold=40)
