"""Helpers that judge an implementation of InfoNCE: inputs, the exact answer, relative errors, and peak memory.

Nothing in this module calls the losses of the package, so it can check them as well as any other implementation;
the tests and the benchmarks use it. It may change without notice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends

# Stage of training → the temperature that such embeddings are trained at.
REGIMES = {"cone": 0.05, "random": 0.05, "middle": 0.05, "trained": 0.05, "retrieval": 0.01}
ONE_CONE = 2**32  # the seed of what all rows of a regime share, whatever the seed of the rows is
RETRIEVAL_RANK = 39  # directions of the negatives' spread: 0.25/√39 = 0.04

Result = dict[str, Tensor]  # loss, dq, dk; dtau and dtau_rows of exact answers; dnegatives where there are some


def embeddings(
    regime: str, N: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Returns anchors and positives, (N, D) each, as an encoder gives them at a stage of training.

    ``trained``: positives at cosine 0.92 among random negatives (at τ = 0.05 and N = 4096 a loss of 5e-5);
    ``middle``: positives at 0.5; ``random``: unrelated pairs; ``cone``: every cosine is about 0.98, as before
    contrastive training; ``retrieval``: negatives at 0.75 ± 0.04 and positives at 0.9, as E5 (Wang et al. 2022)
    gives them with its temperature of 0.01.
    """

    def normal(rows: int, columns: int, source: torch.Generator) -> Tensor:
        return torch.randn(rows, columns, generator=source, dtype=dtype, device=device)

    own, shared = (torch.Generator(device).manual_seed(s) for s in (seed, ONE_CONE))
    if regime == "retrieval":
        axis = F.normalize(normal(1, D, shared))
        basis = normal(RETRIEVAL_RANK, D, shared)
        basis -= basis @ axis.T * axis
        q, z = (F.normalize(normal(N, RETRIEVAL_RANK, own) @ basis) for _ in "qz")
        k = 0.6 * q + 0.8 * F.normalize(z - q * (q * z).sum(1, keepdim=True))
        return 0.75**0.5 * axis + 0.5 * q, 0.75**0.5 * axis + 0.5 * k
    q, z = (F.normalize(normal(N, D, own)) for _ in "qz")
    if regime == "cone":
        axis, spread = F.normalize(normal(1, D, shared)), (1 / 0.98 - 1) ** 0.5
        return axis + spread * q, axis + spread * F.normalize(0.8 * q + 0.6 * z)
    cosine = {"trained": 0.92, "middle": 0.5, "random": 0.0}[regime]
    return q, cosine * q + (1 - cosine**2) ** 0.5 * z


@contextlib.contextmanager
def half_precision_products() -> Iterator[None]:
    """Inside, products of bf16 and fp16 rows run in that dtype, also on CPUs that are faster in fp32.

    Errors that are measured so are those of the devices that round the products.
    """
    decide = backends.multiplies_faster
    backends.multiplies_faster = lambda dtype, device_type: True  # type: ignore[assignment]
    try:
        yield
    finally:
        backends.multiplies_faster = decide


def naive(anchors: Tensor, positives: Tensor, temperature: float | Tensor = 0.05) -> Tensor:
    """The standard implementation: normalised rows, one matrix of logits, cross entropy."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


def exact(
    anchors: Tensor,
    positives: Tensor,
    temperature: float,
    *,
    negatives: Tensor | None = None,
    noise: Tensor | None = None,
    log_constant: float | None = None,
    symmetric: bool = False,
) -> Result:
    """Returns the mean loss and its gradients by the formulas, in float64, a chunk of rows at a time.

    ``log_constant`` is the logarithm of a constant term of every row's denominator, such as the expectation of
    Σ_m e^(κ cos). ``dtau_rows`` holds N times each row's share of dτ.
    """
    if symmetric:
        ahead, back = exact(anchors, positives, temperature), exact(positives, anchors, temperature)
        pairs = (("loss", "loss"), ("dq", "dk"), ("dk", "dq"), ("dtau", "dtau"), ("dtau_rows", "dtau_rows"))
        return {a: (ahead[a] + back[b]) / 2 for a, b in pairs}
    parts = [x.detach().double() for x in (positives, negatives, noise) if x is not None]
    q, columns = anchors.detach().double(), torch.cat(parts)
    norm_q, norm_c = q.norm(dim=1, keepdim=True), columns.norm(dim=1, keepdim=True)
    q, columns = q / norm_q, columns / norm_c  # (N, D), (T, D)
    N, kappa = len(q), 1 / temperature
    cosines = (q * columns[:N]).sum(1, keepdim=True)  # s_ii
    losses, dq, dtau_rows = q.new_empty(N), torch.empty_like(q), q.new_empty(N)
    dc = torch.zeros_like(columns)
    step = max(1, 2**24 // len(columns))
    for start in range(0, N, step):
        rows = slice(start, min(N, start + step))
        difference = q[rows] @ columns.T - cosines[rows]  # s_ij − s_ii, (C, T)
        z = kappa * difference
        z.diagonal(start).fill_(-torch.inf)
        top = z.amax(1, keepdim=True).clamp(min=0)
        ratios = (z - top).exp()
        total = ratios.sum(1, keepdim=True)
        if log_constant is not None:
            total += (log_constant - kappa * cosines[rows] - top).exp()
        denominator = (-top).exp() + total
        p = ratios / denominator  # r_ij/(1 + R_i)
        losses[rows] = torch.where(top > 0, top + denominator.log(), total.log1p())[:, 0]
        dtau_rows[rows] = -kappa * kappa * (p * difference).sum(1)
        share = total / denominator  # of all negatives and of the constant
        dq[rows] = kappa / N * (p @ columns - share * columns[rows])
        dc += kappa / N * (p.T @ q[rows])
        dc[rows] -= kappa / N * share * q[rows]
    dq = (dq - q * (q * dq).sum(1, keepdim=True)) / norm_q
    dc = (dc - columns * (columns * dc).sum(1, keepdim=True)) / norm_c
    found = {"loss": losses.mean(), "dq": dq, "dk": dc[:N], "dtau": dtau_rows.mean(), "dtau_rows": dtau_rows}
    if negatives is not None:
        found["dnegatives"] = dc[N : N + len(negatives)]
    return found


def relative_errors(got: Result, want: Result, temperature: float) -> dict[str, float]:
    """Returns ‖error‖/‖exact‖ of everything in ``got``; dτ is compared with the mean |dτ_i|.

    Exact values below 1e-12 count as 0: the error is absolute then, dτ's in units of κ² (that of dκ, a cosine).
    """
    result = {}
    for name in got:
        scale = want["dtau_rows"].abs().mean() if name == "dtau" else want[name].norm()
        error = (got[name].double() - want[name]).norm()
        unit = 1 / temperature**2 if name == "dtau" else 1.0
        result[name] = float(error / (unit if scale < 1e-12 else scale))
    return result


# ------------------------------------------------------------------ the machine


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16; elsewhere torch emulates it, which is slow for every implementation."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def added_memory(step: Callable[[], object], device: str) -> int:
    """Returns the bytes at the peak of ``step`` beyond what was held before it.

    On a CPU this is the high-water mark of the process, so call it in a fresh process for a small number.
    """
    if device == "cpu":
        before = begin_peak()
        step()
        return max(0, process_memory("VmHWM") - before)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def begin_peak() -> int:
    """Resets the process's high-water mark where the system allows it. Returns the bytes that it holds."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def process_memory(field: str) -> int:
    """Returns a field of /proc/self/status in bytes. ``ru_maxrss`` would begin with what the parent held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
