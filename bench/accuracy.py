"""Errors of loss and gradients against float64, at four stages of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.candidates import Candidate, Unsupported
from bench.cases import TEMPERATURE, Case, errors, make_batch, result_of
from bench.gate import outcome


def all_errors(
    case: Case, candidates: list[Candidate], device: str, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Job ``accuracy``: yields ``start`` and ``result`` for each candidate."""
    batch = make_batch(case, device, given_noise=True)
    answer = None
    for candidate in candidates:
        yield "start", {"candidate": candidate.name}
        try:
            loss = candidate.loss_for(case)
            if candidate.loss != "InfoNCE":
                raise Unsupported(f"another loss: {candidate.loss}")
            if answer is None:
                answer = candidate.answer(batch, case)
            found = errors(result_of(loss, batch, case, device), answer, TEMPERATURE)
        except Exception as error:
            yield "result", {"candidate": candidate.name, **outcome(error)}
            continue
        facts = {"errors": found, "exact_loss": float(answer["loss"])}
        yield "result", {"candidate": candidate.name, "status": "ok", **facts}
