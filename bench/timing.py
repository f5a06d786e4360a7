"""Time: candidates in turn, again and again, on a CPU; ``triton.testing.do_bench`` on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from bench.candidates import COPY, FLOOR, Candidate, copy, floor
from bench.cases import Case, make_batch, run_step
from bench.gate import Gate, outcome

ROUNDS = 5  # at least
TURN = 0.1  # seconds: calls that are shorter are repeated, so that most find caches as they left them
MOST_ROUNDS = 2000
LONG_CALLS = 3  # on a GPU, of what takes longer than the seconds it is given

Step = Callable[[], object]
Times = dict[str, Any]  # median, p20, p80 in milliseconds, and how many repeats


def time_all(
    case: Case, candidates: list[Candidate], device: str, seconds: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Job ``loss``: each candidate through the gate, those that pass against the clock with the bare products.

    Yields ``start``, ``alive`` and, a candidate each, ``result``.
    """
    gate, batch = Gate(case, device), make_batch(case, device)
    steps: dict[str, Step] = {}
    facts: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        yield "start", {"candidate": candidate.name}
        try:
            loss = candidate.loss_for(case)
            yield "alive", {}  # importing, checking and running may each take their time
            facts[candidate.name] = gate.check(candidate, loss) | {"loss": candidate.loss}

            def step(loss: Any = loss) -> object:
                return run_step(loss, batch, case, device)

            for _ in range(2):
                step()
                yield "alive", {}
            steps[candidate.name] = step
        except Exception as error:
            found = outcome(error)
        else:
            continue
        yield "result", {"candidate": candidate.name, **found}
    bare: dict[str, Callable[[], Step]] = {FLOOR: lambda: floor(case, batch), COPY: lambda: copy(batch)}
    if device == "cpu":
        for name, make in bare.items():
            yield "start", {"candidate": name}
            steps[name] = make()
            steps[name]()
        yield from _results(case, facts, _interleaved(steps, seconds))
        return
    # The bare products last: their memory would be missed.
    for name, make in ({name: lambda step=step: step for name, step in steps.items()} | bare).items():
        yield "start", {"candidate": name}
        try:
            found = {name: _on_gpu(make(), seconds)}
        except Exception as error:
            found = outcome(error)
            yield "result", {"candidate": name, **found}
        else:
            yield from _results(case, facts, [found])


def _results(case: Case, facts: dict[str, dict[str, Any]], timed: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for times in timed:
        if isinstance(times, str):
            yield ("start", {"candidate": times}) if times else ("alive", {})
            continue
        for name, ms in times.items():
            rate = {} if name == COPY else {"tflops": case.flops / ms["median"] / 1e9}
            yield "result", {"candidate": name, "status": "ok", "ms": ms, **rate, **facts.get(name, {})}


def _interleaved(steps: dict[str, Step], seconds: float) -> Iterator[str | dict[str, Times]]:
    """Times of every step, each called in turns until it has had ``seconds`` and five turns.

    What disturbs the machine for a while disturbs all of them. Yields the name before the first call of each,
    now and then between rounds "" (a sign of life), and last the times.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    spent, turns = dict.fromkeys(steps, 0.0), dict.fromkeys(steps, 0)
    waiting, told = list(steps), time.perf_counter()
    while waiting:
        waiting = waiting[1:] + waiting[:1]  # nobody always comes after the same one
        for name in waiting:
            if not times[name]:
                yield name
            begun = time.perf_counter()
            now = begun
            while now - begun < TURN:
                start = time.perf_counter()
                steps[name]()
                now = time.perf_counter()
                times[name].append(1e3 * (now - start))
            spent[name] += now - begun
            turns[name] += 1
            if now > told + 0.5:
                told = now
                yield ""
        waiting = [
            name
            for name in waiting
            if turns[name] < ROUNDS or (spent[name] < seconds and len(times[name]) < MOST_ROUNDS)
        ]
    yield {name: summary(values) for name, values in times.items()}


def summary(milliseconds: list[float]) -> Times:
    low, middle, high = np.quantile(milliseconds, [0.2, 0.5, 0.8]).tolist()
    return {"median": middle, "p20": low, "p80": high, "repeats": len(milliseconds)}


def _on_gpu(step: Step, seconds: float) -> Times:
    """By CUDA events, after a warm-up, the L2 cache flushed before each run."""
    from triton.testing import do_bench

    first = _by_events(step)
    if first > 1e3 * seconds:  # do_bench would make eight calls or more
        return summary([_by_events(step) for _ in range(LONG_CALLS)])
    times = do_bench(step, warmup=max(25, 100 * seconds), rep=1000 * seconds, return_mode="all")
    torch.cuda.synchronize()
    return summary(times)


def _by_events(step: Step) -> float:
    """Milliseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
