"""The gate: a candidate is timed only if its loss and gradients agree with float64."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import TEMPERATURE, Batch, Case, Loss, make_batch, result_of, run_step
from bench.registry import Candidate, Unsupported, first_line
from bench.standard import standard
from fused_infonce.testing import Result, exact, relative_errors

# Largest relative errors of the loss and of each gradient at τ = 0.05; they grow with 1/τ, as logits do. A logit
# of 20 that is rounded to bf16 is off by up to 0.06, its ratio by 6 %, as in the standard implementation under
# autocast; 5e-3 lets tf32 pass in fp32. The error is printed beside each time.
TOLERANCE = {"fp32": 5e-3, "bf16": 0.1, "fp16": 2e-2}
LARGEST_TOLERANCE = 0.5
NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
)  # messages of the system and CUDA's libraries
# Multiply-adds of the float64 answer's matrix product; larger cases are checked at fewer rows.
BUDGET = {"cpu": 4096**2 * 768, "cuda": 32768**2 * 768}


class Wrong(Exception):  # noqa: N818 (a result, not an error)
    """An answer is off."""

    def __init__(self, found: dict[str, float]) -> None:
        worst = max(found, key=lambda name: found[name] if found[name] == found[name] else torch.inf)
        super().__init__(f"{worst} is off by {found[worst]:.1e}")
        self.found = found


def exact_answer(batch: Batch, case: Case, noise: str = "sampled") -> Result:
    """Returns the exact loss and gradients of a batch in float64.

    InfoNCE's and Matryoshka's are the formulas; GTE's are autograd's through the standard implementation, whose
    loss float64 gives to eleven digits at the stage *trained* as well.
    """
    q, k, tau = batch.q.detach().double(), batch.k.detach().double(), case.temperature
    if case.mode == "gte":
        rows = Batch(q.requires_grad_(), k.requires_grad_(), None, 0)
        loss = standard(case)(rows)
        dq, dk = torch.autograd.grad(loss, (rows.q, rows.k))
        return {"loss": loss.detach(), "dq": dq, "dk": dk}
    if case.mode == "matryoshka":
        parts = {dim: exact(q[:, :dim], k[:, :dim], tau) for dim in case.dims}
        grads = {side: sum(F.pad(x[side], (0, case.D - dim)) for dim, x in parts.items()) for side in ("dq", "dk")}
        return {"loss": torch.stack([x["loss"] for x in parts.values()]).sum(), **grads}
    directions, log_constant = batch.noise if isinstance(batch.noise, Tensor) else None, None
    if noise == "expected":
        from scipy.special import hyp0f1

        log_constant = math.log(case.noise) + math.log(hyp0f1(case.D / 2, tau**-2 / 4))
        directions = None
    return exact(
        q,
        k,
        tau,
        negatives=batch.negatives,
        noise=directions,
        log_constant=log_constant,
        symmetric=case.mode == "symmetric",
    )


class Gate:
    """Holds the inputs and exact answers of a case, which its candidates share."""

    def __init__(self, case: Case, device: str) -> None:
        columns = case.N * (4 if case.mode == "gte" else 1) + case.noise + case.negatives
        share = (BUDGET[device] / (case.N * columns * case.D)) ** 0.5
        self.case = case if share >= 1 else case.at(max(64, int(case.N * share) // 64 * 64))
        self.full, self.device = case, device
        self.batch: Batch | None = None
        self.answers: dict[str, Result] = {}

    def check(self, candidate: Candidate, loss: Loss) -> dict[str, Any]:
        """Returns relative errors and the rows they were measured at; raises Wrong where one is too large."""
        if candidate.loss != "InfoNCE":
            return {}
        if self.batch is None:
            self.batch = make_batch(self.case, self.device, given_noise=True)
        if candidate.expects not in self.answers:
            self.answers[candidate.expects] = exact_answer(self.batch, self.case, candidate.expects)
        if self.case != self.full:
            loss = candidate.loss_for(self.case)
        temperature = self.case.temperature
        got = result_of(loss, self.batch, self.case, self.device)
        found = relative_errors(got, self.answers[candidate.expects], temperature)
        tolerance = min(LARGEST_TOLERANCE, TOLERANCE[self.case.dtype] * max(1, TEMPERATURE / temperature))
        if not all(value <= tolerance for value in found.values()):  # also rejects NaN
            raise Wrong(found)
        if self.case.noise and candidate.expects == "sampled":
            value = float(run_step(loss, make_batch(self.case, self.device), self.case, self.device))
            off = abs(value / float(got["loss"]) - 1)
            # Four relative standard deviations of a row's sum over noise: e^(κ cos) varies by e^(κ²/D).
            if not off <= 4 * (math.expm1(1 / temperature**2 / self.case.D) / self.case.noise) ** 0.5:
                raise Wrong({"loss with its own noise": off})
        return {"errors": found, "checked_at": self.case.N}


def outcome(error: Exception) -> dict[str, Any]:
    """Returns the status and reason that are recorded for a candidate that gave no result."""
    if isinstance(error, Unsupported):
        return {"status": "skipped", "reason": str(error)}
    if isinstance(error, Wrong):
        return {"status": "wrong", "reason": str(error), "errors": error.found}
    text = str(error)
    memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(x in text for x in NO_MEMORY)
    return {"status": "out of memory" if memory else "failed", "reason": first_line(error)}
