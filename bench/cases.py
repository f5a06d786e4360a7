"""Inputs to measure with, the usual way to compute the loss, and the exact answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

REGIMES = ("trained", "middle", "random", "cone")


def regime(name: str, N: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Anchors and positives, float64 (N, D), as an encoder gives them at a stage of training.

    trained: positives at cosine 0.92 among random negatives (at τ = 0.05 and N = 4096 a loss of 5e-5);
    middle: at 0.5; random: unrelated; cone: every cosine about 0.98, an encoder before contrastive training.
    """
    generator = torch.Generator().manual_seed(seed)
    q, z, u = (F.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64)) for n in (N, N, 1))
    if name == "cone":
        spread = (1 / 0.98 - 1) ** 0.5
        return u + spread * q, u + spread * F.normalize(0.8 * q + 0.6 * z)
    cosine = {"trained": 0.92, "middle": 0.5, "random": 0.0}[name]
    return q, cosine * q + (1 - cosine**2) ** 0.5 * z


def naive(anchors: Tensor, positives: Tensor, temperature: float | Tensor = 0.05) -> Tensor:
    """The usual way: normalise, one matrix of logits, cross entropy."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


Result = dict[str, Tensor]  # loss, dq, dk, dtau


def exact(anchors: Tensor, positives: Tensor, temperature: float) -> Result:
    """Loss and gradients of the mean by the formulas, float64; ``dtau_rows``: each row's share of N·dτ."""
    q, k = anchors.double(), positives.double()
    norm_q, norm_k = q.norm(dim=1, keepdim=True), k.norm(dim=1, keepdim=True)
    q, k = q / norm_q, k / norm_k
    N, kappa = len(q), 1 / temperature
    difference = q @ k.T - (q * k).sum(1, keepdim=True)  # s_ij − s_ii
    z = (kappa * difference).fill_diagonal_(-torch.inf)
    top = z.amax(1, keepdim=True).clamp(min=0)
    ratios = (z - top).exp()
    total = ratios.sum(1, keepdim=True)
    p = ratios / ((-top).exp() + total)  # r_ij/(1 + R_i)
    losses = torch.where(top > 0, top + ((-top).exp() + total).log(), total.log1p())
    p_all = p - torch.diag(p.sum(1))
    dq, dk = kappa / N * p_all @ k, kappa / N * p_all.T @ q
    dtau_rows = -kappa * kappa * (p * difference).sum(1)
    return {
        "loss": losses.mean(),
        "dq": (dq - q * (q * dq).sum(1, keepdim=True)) / norm_q,
        "dk": (dk - k * (k * dk).sum(1, keepdim=True)) / norm_k,
        "dtau": dtau_rows.mean(),
        "dtau_rows": dtau_rows,
    }


def differentiated(
    loss: Callable[..., Tensor], anchors: Tensor, positives: Tensor, temperature: float, autocast: bool = False
) -> Result:
    """What ``loss`` gives for the same inputs."""
    q, k = anchors.clone().requires_grad_(), positives.clone().requires_grad_()
    tau = torch.tensor(temperature, dtype=q.dtype if q.dtype == torch.float64 else torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(q, k, temperature=tau)
    dq, dk, dtau = torch.autograd.grad(value, (q, k, tau))
    return {"loss": value.detach(), "dq": dq, "dk": dk, "dtau": dtau}


def errors(got: Result, want: Result, temperature: float) -> dict[str, float]:
    """‖error‖/‖exact‖ of loss, dq, dk; dτ against the mean |dτ_i|.

    Exact values below 1e-12 count as 0: the error is absolute then, dτ's in units of κ² (that of dκ, a cosine).
    """
    result = {}
    for name in ("loss", "dq", "dk", "dtau"):
        scale = want["dtau_rows"].abs().mean() if name == "dtau" else want[name].norm()
        error = (got[name].double() - want[name]).norm()
        if scale < 1e-12:
            scale = 1 / temperature**2 if name == "dtau" else 1
        result[name] = float(error / scale)
    return result
