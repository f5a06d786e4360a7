"""Peak memory of one loss, forward and backward, beyond its inputs: on a CPU in a fresh process for each.

``beyond`` leaves out what scales with N·D alone: the gradients, their accumulators and the normalised rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.candidates import Candidate
from bench.cases import Batch, Case, run_step
from bench.gate import outcome

MIB = 2**20


def peak(
    case: Case, candidates: list[Candidate], device: str, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Job ``memory``: yields ``start`` and ``result`` for each candidate. On a CPU: one, in a new process."""
    for candidate in candidates:
        yield "start", {"candidate": candidate.name}
        try:
            loss = candidate.loss_for(case)
            small = replace(case.at(512), D=256)  # large enough for every library that the case needs to be loaded
            run_step(candidate.loss_for(small), _random(small, device), small, device)
            batch = _random(case, device)
            used = _added(lambda loss=loss, batch=batch: run_step(loss, batch, case, device), device)
        except Exception as error:
            yield "result", {"candidate": candidate.name, **outcome(error)}
            continue
        # Alive at once at the least: gradients and their accumulators, both in fp32; or normalised rows.
        rows = 2 * case.N + case.negatives
        unavoidable = rows * case.D * (8 if case.gradients else case.product_dtype.itemsize)
        found = {"all": used / MIB, "beyond": (used - unavoidable) / MIB, "inputs": rows * case.D * 4 / MIB}
        yield "result", {"candidate": candidate.name, "status": "ok", "mib": found}


def _random(case: Case, device: str) -> Batch:
    """Rows of any kind, drawn without a copy."""

    def rows(n: int) -> Tensor:
        return torch.randn(n, case.D, device=device, requires_grad=case.gradients)

    return Batch(rows(case.N), rows(case.N), rows(case.negatives) if case.negatives else None, case.noise)


def _added(step: Any, device: str) -> int:
    """Bytes at the peak of ``step`` beyond what was held before it."""
    if device == "cpu":
        before = begin_peak()
        step()
        return max(0, status("VmHWM") - before)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def begin_peak() -> int:
    """Bytes that the process holds; where the system allows it, its high-water mark begins anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    """Bytes, of this process alone: ru_maxrss would begin with what the parent held when it forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
