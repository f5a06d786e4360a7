"""Losses whose targets are more than one positive per row: labels, classes, a teacher's distribution, weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..functional import cosine_logsumexp, info_nce
from ..geometry import unit_rows
from ..own_negatives import pair_cosines, scalar
from .ranks import Everyone, group_of, summed
from .terms import contrast, reducible

CHUNK = 1 << 20  # entries of a teacher's distribution that are held at once


@reducible
def supcon(rows: Tensor, labels: Tensor, *, temperature: float | Tensor = 0.1, **options: Any) -> Tensor:
    r"""Supervised contrastive loss (Khosla et al., NeurIPS 2020, arXiv:2004.11362, equation 2).

    .. math::
        \ell_i = \frac{-1}{|P(i)|} \sum_{p \in P(i)} \log \frac{e^{s_{ip}/\tau}}{\sum_{a \ne i} e^{s_{ia}/\tau}}

    P(i): the other rows with row i's label; a row without any counts 0. rows: (N, D), views below one another;
    labels: (N,) integers. Σ_p s_ip is q̂_i·Σ_p k̂_p, O(N·D) beside the sweep of four products. Of a single positive
    per row the loss is InfoNCE, which ``info_nce`` computes without the cancellation of this formula.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    every = cosine_logsumexp(rows, rows, temperature=temperature, exclude_diagonal=True, **options)
    with torch.autocast(rows.device.type, enabled=False):
        unit = unit_rows(rows, dtype)
        ranks = Everyone(rows, options)
        columns, of_all = ranks.gather(unit), _dense_ranks(ranks.gather(labels))
        totals, own = torch.zeros_like(columns).index_add(0, of_all, columns), of_all[ranks.own]  # of each label
        others = torch.bincount(of_all, minlength=len(of_all))[own] - 1
        mean = (unit * (totals[own] - unit)).sum(1) / others.clamp(min=1)
    return torch.where(others > 0, every - mean / scalar(temperature), 0.0)


def _dense_ranks(labels: Tensor) -> Tensor:
    """0, 1, … for the labels in ascending order, without waiting for a device. (N,) → (N,)"""
    ordered, places = labels.sort()
    ranks = F.pad((ordered[1:] != ordered[:-1]).long(), (1, 0)).cumsum(0)
    return torch.empty_like(ranks).scatter_(0, places, ranks)


@reducible
def cross_entropy(
    rows: Tensor, targets: Tensor, classes: Tensor, *, temperature: float | Tensor = 0.05, **options: Any
) -> Tensor:
    r"""Cross entropy over the cosines of rows and class vectors (NormFace, Wang et al. 2017, arXiv:1704.06369).

    −log(e^{s(x_i, c_{y_i})/τ} / Σ_t e^{s(x_i, c_t)/τ}); rows x: (N, D); targets y: (N,) integers in [0, T);
    classes c: (T, D). Not with a group: where every rank has the same classes, the mean over ranks of their own
    losses is that of all rows. Cost: four products of (N, T), which is never held.
    """
    if group_of(options) is not None:
        raise ValueError(
            "cross_entropy takes no group: give every rank the same classes, and average the ranks' losses, as "
            "DistributedDataParallel does"
        )
    numbers = torch.arange(len(classes), device=rows.device)
    others = cosine_logsumexp(
        rows, classes, temperature=temperature, row_ids=targets, column_ids=numbers, **options
    )
    return contrast(pair_cosines(rows, F.embedding(targets, classes)), temperature, others)


@reducible
def soft_labels(
    queries: Tensor,
    documents: Tensor,
    teacher_queries: Tensor,
    teacher_documents: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    teacher_temperature: float = 0.05,
    **options: Any,
) -> Tensor:
    r"""Cross entropy to a teacher's distribution over the batch, given by its embeddings.

    .. math::
        \ell_i = -\sum_j t_{ij} \log \frac{e^{s_{ij}/\tau}}{\sum_k e^{s_{ik}/\tau}}, \quad
        t_{ij} = \mathrm{softmax}_j(s^T_{ij}/\tau_T)

    (distillation, Hinton et al. 2015, arXiv:1503.02531). The KL divergence is
    less by the teacher's entropy, a constant: gradients are the same. queries (N, D); documents (T, D), the first
    N of them the queries' own; the teacher's (N, E) and (T, E), without gradient.

    Computed as InfoNCE plus Σ_{j≠i} t_ij (s_ii − s_ij)/τ, so that nothing cancels where teacher and student agree.
    That sum is q̂_i·Σ_{j≠i} t_ij (d̂_i − d̂_j), formed a chunk of rows at a time and again in the backward: O(N·D)
    memory. Cost: four products and, of the teacher, two of (N, T, E) and three of (N, T, D). With a group every
    rank holds the documents of all.
    """
    N = len(queries)
    if len(documents) < N:
        raise ValueError(
            f"documents must begin with one for each of the {N} queries, not be {len(documents)} rows"
        )
    others = cosine_logsumexp(queries, documents, temperature=temperature, exclude_diagonal=True, **options)
    loss = contrast(pair_cosines(queries, documents[:N]), temperature, others)
    teacher = teacher_queries.detach(), teacher_documents.detach()
    excess = _expected_excess(queries, documents, *teacher, teacher_temperature, Everyone(documents, options))
    return loss + excess / scalar(temperature)


def _expected_excess(
    queries: Tensor,
    documents: Tensor,
    t_queries: Tensor,
    t_documents: Tensor,
    t_temperature: float,
    ranks: Everyone,
) -> Tensor:
    """Σ_{j≠i} t_ij (s_ii − s_ij), (N,), with the teacher's t."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        q, own = unit_rows(queries, dtype), unit_rows(documents, dtype)
        t_q, t_own = (unit_rows(x, dtype) / t_temperature**0.5 for x in (t_queries, t_documents))
        d, t_d = ranks.gather(own), ranks.gather(t_own)
        place = torch.arange(ranks.own.start, ranks.own.start + len(q), device=q.device)
        most = max(1, CHUNK // len(d))
        parts = [
            checkpoint(_attend, rows, t_d, d, places, use_reentrant=False)
            for rows, places in zip(torch.split(t_q, most), torch.split(place, most), strict=True)
        ]
        means, shares = torch.split(torch.cat(parts), [d.shape[1], 1], 1)
        excess: Tensor = (q * (shares * own[: len(q)] - means)).sum(1)
        return excess


def _attend(rows: Tensor, columns: Tensor, values: Tensor, own: Tensor) -> Tensor:
    """Σ_j t_ij v_j over the columns but ``own`` (n,), and Σ_j t_ij over the same: (n, D + 1)."""
    t = torch.softmax(rows @ columns.T, 1).scatter(1, own[:, None], 0.0)
    return torch.cat([t @ values, t.sum(1, keepdim=True)], 1)


def clip(
    images: Tensor,
    texts: Tensor,
    *,
    weights: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    **options: Any,
) -> Tensor:
    r"""The loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3), with a weight per pair.

    Σ_i w_i (ℓ_i^{image→text} + ℓ_i^{text→image}) / (2 Σ_i w_i); images, texts: (N, D); weights: (N,) >= 0, None
    for 1. options: of :func:`fused_infonce.info_nce`, whose value and gradients with a group are those of this
    loss, too: every rank returns the mean over all ranks' pairs. The weights get no gradient then.
    """
    if weights is None:
        return info_nce(images, texts, temperature=temperature, symmetric=True, **options)
    losses = info_nce(images, texts, temperature=temperature, symmetric=True, reduction="none", **options)
    if group_of(options) is None:
        return (weights * losses).sum() / weights.sum()
    own = (weights.detach() * losses).sum() / summed(weights.sum(), options)
    return own + (summed(own, options) - own.detach())  # every rank's value, and the gradient of its own rows
