"""Which settings are the fastest on this machine, and where to put them.

A search is a list of settings and a function that makes the step to time from one. The workspace is the first;
others join it in ``searches``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import TEMPERATURE, Case, make_batch, run_step
from bench.timing import Step, summary
from fused_infonce import info_nce

ROUNDS = 5
WITHIN = 1.25  # a setting that was never within this factor of the best is left out of later rounds


@dataclass(frozen=True)
class Search:
    what: str
    where: str  # the place in the source that takes the answer
    settings: list[Any]
    step: Callable[[Any], Step]  # what is timed for a setting; whatever it raises leaves the setting out


def searches(case: Case, device: str) -> list[Search]:
    """What can be set, for a case on this machine."""
    return [workspace(case, device)]


def workspace(case: Case, device: str) -> Search:
    """``workspace_bytes``, from 4 MiB in powers of 2 to what holds the whole matrix (at most 1 GiB)."""
    batch = make_batch(case, device)
    whole = 16 * case.N * case.N  # a tile of 4 bytes an entry, and the scratch of elementwise passes
    sizes = [2**n for n in range(22, 31)]
    enough = next((i for i, size in enumerate(sizes) if size >= whole), len(sizes) - 1)

    def step(size: int) -> Step:
        def loss(batch: Any) -> torch.Tensor:
            return info_nce(batch.q, batch.k, temperature=TEMPERATURE, workspace_bytes=size)

        return lambda: run_step(loss, batch, case, device)

    place = "DEFAULT_WORKSPACE in fused_infonce/torch_ops.py, or workspace_bytes= of a call"
    return Search("workspace_bytes", place, sizes[: enough + 1], step)


def search(
    settings: list[Any], step: Callable[[Any], Step], clock: Callable[[Step], float], rounds: int = ROUNDS
) -> Iterator[tuple[int, list[tuple[Any, dict[str, Any]]]]]:
    """After each round the settings with their times, the fastest first; ``clock``: milliseconds of one call.

    All settings are measured in turn; what is far from the best is left out of the next round. A setting that
    raises does not take part.
    """
    steps: list[tuple[Any, Step, list[float]]] = []
    for setting in settings:
        try:
            made = step(setting)
            made()  # compiles, and faults its memory in
        except Exception:
            continue
        steps.append((setting, made, []))
    for turn in range(1, rounds + 1):
        for _, made, times in steps:
            times.append(clock(made))
        best = min((min(times) for _, _, times in steps), default=0.0)
        steps = [entry for entry in steps if min(entry[2]) <= WITHIN * best]
        ranked = [(setting, summary(times)) for setting, _, times in steps]
        yield turn, sorted(ranked, key=lambda entry: entry[1]["median"])


def clock_for(device: str) -> Callable[[Step], float]:
    """Milliseconds of one call: the wall's on a CPU, by CUDA events with a flushed L2 cache on a GPU."""
    if device == "cpu":

        def wall(step: Step) -> float:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)

        return wall
    from triton.testing import do_bench

    return lambda step: float(do_bench(step, warmup=25, rep=100, return_mode="median"))
