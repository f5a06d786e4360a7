"""The measurements of a case: time, memory and accuracy, each a generator of events for ``bench.worker``.

The events are ``start`` before a candidate runs, ``alive`` as a sign of life, and ``result``, a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bench.cases import Batch, Case, Loss, make_batch, result_of, run_step
from bench.floor import COPY, FLOOR, copy, floor
from bench.gate import Gate, exact_answer, outcome
from bench.registry import Candidate, Unsupported
from fused_infonce.testing import Result, added_memory, half_precision_products, relative_errors

MIN_TURNS = 5
TURN_SECONDS = 0.1  # shorter calls are repeated, so that most find caches as they left them
MAX_CALLS = 2000
LONG_CALLS = 3  # on a GPU, of a step that takes longer than the seconds it is given

Facts = dict[str, Any]
Event = tuple[str, Facts]
Step = Callable[[], object]
Times = dict[str, Any]  # median, p20, p80 in milliseconds, and the number of calls


def each(candidates: Iterable[Any], work: Callable[[Any], Facts]) -> Iterator[Event]:
    """Yields the facts of each candidate, or why there are none."""
    for candidate in candidates:
        yield "start", {"candidate": candidate.name}
        try:
            facts = {"status": "ok", **work(candidate)}
        except Exception as error:
            facts = outcome(error)
        yield "result", {"candidate": candidate.name, **facts}


# ------------------------------------------------------------------ accuracy


def accuracy(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Measures the errors of loss and gradients against float64; bf16 products are rounded on every machine."""
    batch = make_batch(case, device, given_noise=True)
    answers: dict[str, Result] = {}

    def work(candidate: Candidate) -> Facts:
        loss = candidate.loss_for(case)
        if candidate.loss != "InfoNCE":
            raise Unsupported(f"another loss: {candidate.loss}")
        if candidate.expects not in answers:
            answers[candidate.expects] = exact_answer(batch, case, candidate.expects)
        answer = answers[candidate.expects]
        with half_precision_products():
            found = relative_errors(result_of(loss, batch, case, device), answer, case.temperature)
        return {"errors": found, "exact_loss": float(answer["loss"])}

    yield from each(candidates, work)


# ------------------------------------------------------------------ memory

MIB = 2**20


def memory(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Measures the peak of a step beyond its inputs. On a CPU it takes one candidate in a fresh process.

    ``beyond`` leaves out what scales with N·D: the gradients, their accumulators and the normalised rows.
    """

    def work(candidate: Candidate) -> Facts:
        loss = candidate.loss_for(case)
        small = replace(case.at(512), D=256)  # large enough to load every library that the case needs
        run_step(candidate.loss_for(small), _random(small, device), small, device)
        batch = _random(case, device)
        used = added_memory(lambda: run_step(loss, batch, case, device), device)
        # At least these are alive at once: gradients and their accumulators, both fp32; or normalised rows.
        rows = 2 * case.N + case.negatives
        unavoidable = rows * case.D * (8 if case.gradients else case.product_dtype.itemsize)
        return {
            "mib": {"all": used / MIB, "beyond": (used - unavoidable) / MIB, "inputs": rows * case.D * 4 / MIB}
        }

    yield from each(candidates, work)


def _random(case: Case, device: str) -> Batch:
    """Draws rows without a copy; their values do not matter."""

    def rows(n: int) -> torch.Tensor:
        return torch.randn(n, case.D, device=device, requires_grad=case.gradients)

    return Batch(rows(case.N), rows(case.N), rows(case.negatives) if case.negatives else None, case.noise)


# ------------------------------------------------------------------ time


def loss(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Measures the time of every candidate that passes the gate, and of the bare products.

    On a CPU candidates take turns; on a GPU each is timed by itself by ``triton.testing.do_bench``.
    """
    gate, batch = Gate(case, device), make_batch(case, device)
    steps: dict[str, Step] = {}
    checked: dict[str, Facts] = {}
    for candidate in candidates:
        yield "start", {"candidate": candidate.name}
        try:
            made = candidate.loss_for(case)
            yield "alive", {}  # importing, checking and running may each take their time
            checked[candidate.name] = gate.check(candidate, made) | {"loss": candidate.loss}

            def step(made: Loss = made) -> object:
                return run_step(made, batch, case, device)

            for _ in range(2):
                step()
                yield "alive", {}
            steps[candidate.name] = step
        except Exception as error:
            yield "result", {"candidate": candidate.name, **outcome(error)}

    def row(name: str, ms: Times) -> Event:
        rate = {} if name == COPY else {"tflops": case.flops / ms["median"] / 1e9}
        return "result", {"candidate": name, "status": "ok", "ms": ms, **rate, **checked.get(name, {})}

    bounds: dict[str, Callable[[], Step]] = {FLOOR: lambda: floor(case, batch), COPY: lambda: copy(batch)}
    if device == "cpu":
        for name, make in bounds.items():
            yield "start", {"candidate": name}
            steps[name] = make()
            steps[name]()
        times: dict[str, list[float]] = {name: [] for name in steps}
        for name in _interleaved(steps, seconds, times):
            yield ("start", {"candidate": name}) if name else ("alive", {})
        yield from (row(name, summary(values)) for name, values in times.items())
        return
    # The bare products come last: candidates may need the memory that they hold.
    for name, make in ({name: lambda step=step: step for name, step in steps.items()} | bounds).items():
        yield "start", {"candidate": name}
        try:
            event = row(name, _on_gpu(make(), seconds))
        except Exception as error:
            event = "result", {"candidate": name, **outcome(error)}
        yield event


def _interleaved(steps: dict[str, Step], seconds: float, times: dict[str, list[float]]) -> Iterator[str]:
    """Calls every step in turns until it has had ``seconds`` and MIN_TURNS, and appends milliseconds to ``times``.

    What disturbs the machine for a while disturbs all of them. Yields the name before the first call of each step,
    and "" now and then as a sign of life.
    """
    spent, turns = dict.fromkeys(steps, 0.0), dict.fromkeys(steps, 0)
    waiting, reported = list(steps), time.perf_counter()
    while waiting:
        waiting = waiting[1:] + waiting[:1]  # no step always follows the same one
        for name in waiting:
            if not times[name]:
                yield name
            began = now = time.perf_counter()
            while now - began < TURN_SECONDS:
                start = time.perf_counter()
                steps[name]()
                now = time.perf_counter()
                times[name].append(1e3 * (now - start))
            spent[name] += now - began
            turns[name] += 1
            if now > reported + 0.5:
                reported = now
                yield ""
        waiting = [
            name
            for name in waiting
            if turns[name] < MIN_TURNS or (spent[name] < seconds and len(times[name]) < MAX_CALLS)
        ]


def summary(milliseconds: list[float]) -> Times:
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low, middle, high = torch.tensor(milliseconds, dtype=torch.float64).quantile(at).tolist()
    return {"median": middle, "p20": low, "p80": high, "repeats": len(milliseconds)}


def _on_gpu(step: Step, seconds: float) -> Times:
    """Times a step by CUDA events, after a warm-up, with the L2 cache flushed before each call."""
    from triton.testing import do_bench

    first = _by_events(step)
    if first > 1e3 * seconds:  # do_bench would make eight calls or more
        return summary([_by_events(step) for _ in range(LONG_CALLS)])
    times = do_bench(step, warmup=max(25, 100 * seconds), rep=1000 * seconds, return_mode="all")
    torch.cuda.synchronize()
    return summary(times)


def _by_events(step: Step) -> float:
    """Returns the milliseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def clock_for(device: str) -> Callable[[Step], float]:
    """Returns a function that gives the milliseconds of one call: by the wall clock, or by CUDA events."""
    if device == "cpu":

        def wall(step: Step) -> float:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)

        return wall
    from triton.testing import do_bench

    return lambda step: float(do_bench(step, warmup=25, rep=100, return_mode="median"))
