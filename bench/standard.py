"""The standard implementations in plain torch: every matrix of logits is stored, and autograd differentiates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Batch, Case, Loss


def standard(case: Case) -> Loss:
    """Returns the loss of a case as it is written in most repositories."""
    tau = case.temperature
    if case.mode == "gte":
        return lambda batch: _gte(batch.q, batch.k, tau)
    if case.mode == "matryoshka":
        return lambda batch: torch.stack([_pairs(batch.q[:, :d], batch.k[:, :d], tau)[0] for d in case.dims]).sum()
    if case.mode == "symmetric":
        return lambda batch: torch.stack(_pairs(batch.q, batch.k, tau)).mean()
    return lambda batch: _one_way(batch, tau)


def _pairs(q: Tensor, k: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns InfoNCE over the columns and over the rows of the logits."""
    logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / temperature
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels), F.cross_entropy(logits.T, labels)


def _one_way(batch: Batch, temperature: float) -> Tensor:
    q, k = F.normalize(batch.q, dim=1), batch.k
    if batch.negatives is not None:
        k = torch.cat([k, batch.negatives])
    cosines = q @ F.normalize(k, dim=1).T
    noise = batch.noise
    if isinstance(noise, int) and noise:
        noise = torch.randn(noise, q.shape[1], device=q.device)
    if isinstance(noise, Tensor):  # a separate product, because noise has no gradient
        cosines = torch.cat([cosines, q @ F.normalize(noise, dim=1).T], 1)
    return F.cross_entropy(cosines / temperature, torch.arange(len(q), device=q.device))


def _gte(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """The improved contrastive loss of GTE (Li et al. 2023, equation 3): four directions, one denominator."""
    q, d = F.normalize(queries, dim=1), F.normalize(documents, dim=1)
    between = q @ d.T / temperature  # (N, N)
    itself = torch.eye(len(q), dtype=torch.bool, device=q.device)
    within = [(x @ x.T / temperature).masked_fill(itself, -torch.inf) for x in (q, d)]
    log_z = torch.cat([between, within[0], between.T, within[1]], 1).logsumexp(1)
    return (log_z - between.diagonal()).mean()
