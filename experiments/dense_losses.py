"""Every loss of ``fused_infonce.losses`` once more: all logits as one matrix, log_softmax, autograd.

Any dtype: in float64 they are the truth that the tests compare with, in bf16 what a user would write.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def masked(z: Tensor, mask: Tensor) -> Tensor:
    return z.masked_fill(mask, -math.inf)


def of(logits: list[Tensor], positive: Tensor) -> Tensor:
    """Rows' −log p of the positive: logits (N, ·) of the negatives and (N, 1) of the positive, any number each."""
    return torch.logsumexp(torch.cat([positive, *logits], 1), 1) - positive[:, 0]


def pairs(q: Tensor, d: Tensor) -> Tensor:
    return (unit(q) * unit(d)).sum(1, keepdim=True)


def eye(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=torch.bool)


def own(q: Tensor, n: Tensor) -> Tensor:
    return (unit(q)[:, None] * unit(n)).sum(-1)


def gte(q, d, n=None, *, tau, directions, partition_mode="joint", hardness_mode=None, hardness_strength=0.0):
    k, K = 1 / tau, 0 if n is None else n.shape[1]
    docs = d if n is None else torch.cat([d, n.transpose(0, 1).flatten(0, 1)])
    same = eye(q).repeat(1, 1 + K)
    s = unit(q) @ unit(docs).T
    is_hard = torch.arange(len(docs)) >= len(d)
    weighted = {
        None: torch.zeros_like(same),
        "in_batch_negatives": ~same,
        "hard_negatives": same & is_hard,
        "all_negatives": ~same | is_hard,
    }[hardness_mode]
    z = {"query_to_doc": k * s + hardness_strength * s.detach() * weighted}
    z["query_to_query"] = masked(k * unit(q) @ unit(q).T, eye(q))
    z["doc_to_query"] = k * unit(d) @ unit(q).T
    z["doc_to_doc"] = masked(k * unit(d) @ unit(docs).T, same)
    z = [z[name] for name in directions]
    positive = k * pairs(q, d)[:, 0]
    if partition_mode == "joint":
        return (torch.logsumexp(torch.cat(z, 1), 1) - positive).mean()
    return sum((torch.logsumexp(x, 1) - positive).mean() for x in z) / len(z)


def qwen3(q, d, n=None, *, tau, margin=0.1, doc_to_doc=True, ids=None):
    k, p, same = 1 / tau, pairs(q, d), eye(q)
    limit = p.detach() + (math.inf if margin is None else margin)
    equal = same if ids is None else ids[:, None] == ids[None]
    parts = [(unit(q) @ unit(d).T, equal), (unit(q) @ unit(q).T, same)]
    if doc_to_doc:
        parts.append((unit(d) @ unit(d).T, equal))
    if n is not None:
        parts.append((own(q, n), torch.zeros(n.shape[:2], dtype=torch.bool)))
    return of([masked(k * s, mask | (s > limit)) for s, mask in parts], k * p).mean()


def gemini(q, d, n=None, *, tau, query_ids=None, document_ids=None):
    k, equal = 1 / tau, eye(q)
    for ids in (query_ids, document_ids):
        equal = equal if ids is None else equal | (ids[:, None] == ids[None])
    parts = [masked(k * unit(q) @ unit(d).T, equal)] + ([] if n is None else [k * own(q, n)])
    return of(parts, k * pairs(q, d)).mean()


def embedding_gemma(q, d, n, *, tau, hardness=5.0):
    k, s = 1 / tau, own(q, n)
    parts = [masked(k * unit(q) @ unit(d).T, eye(q)), k * s + hardness * s.detach()]
    return of(parts, k * pairs(q, d)).mean()


def supcon(z, labels, *, tau):
    s = masked(unit(z) @ unit(z).T / tau, eye(z))
    positives = (labels[:, None] == labels[None]) & ~eye(z)
    log_p = torch.where(positives, s.log_softmax(1), 0.0)
    return -(log_p.sum(1) / positives.sum(1).clamp(min=1)).mean()


def debiased(q, d, *, tau, tau_plus=0.1):
    n, e = len(q) - 1, torch.exp(unit(q) @ unit(d).T / tau)
    positive = e.diagonal()
    g = ((e.sum(1) - positive) / n - tau_plus * positive) / (1 - tau_plus)
    return -torch.log(positive / (positive + n * g.clamp(min=math.exp(-1 / tau)))).mean()


def hcl(q, d, *, tau, tau_plus=0.1, beta=1.0):
    n, e = len(q) - 1, torch.exp(unit(q) @ unit(d).T / tau)
    positive, negative = e.diagonal(), e[~eye(q)].view(len(q), n)
    weight = negative**beta
    mean = (weight * negative).sum(1) / weight.sum(1)
    g = (mean - tau_plus * positive) / (1 - tau_plus)
    return -torch.log(positive / (positive + n * g.clamp(min=math.exp(-1 / tau)))).mean()


def focal(q, d, *, tau, gamma=0.5):
    loss = -(unit(q) @ unit(d).T / tau).log_softmax(1).diagonal()
    return ((1 - torch.exp(-loss)) ** gamma * loss).mean()


def soft_labels(q, d, t_q, t_d, *, tau, teacher_tau):
    target = (unit(t_q) @ unit(t_d).T / teacher_tau).softmax(1)
    return -(target * (unit(q) @ unit(d).T / tau).log_softmax(1)).sum(1).mean()


def clip(q, d, weights, *, tau):
    s = unit(q) @ unit(d).T / tau
    losses = -(s.log_softmax(1).diagonal() + s.log_softmax(0).diagonal()) / 2
    return (weights * losses).sum() / weights.sum()


def cross_entropy(x, targets, classes, *, tau):
    return F.cross_entropy(unit(x) @ unit(classes).T / tau, targets)


def matryoshka(q, d, *, tau, dims, weights):
    logits = [unit(q[:, :n]) @ unit(d[:, :n]).T / tau for n in dims]
    return sum(w * F.cross_entropy(z, torch.arange(len(q))) for w, z in zip(weights, logits, strict=True))
