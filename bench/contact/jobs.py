"""The measurements of first contact, generators of events for ``bench.worker``, as those of ``bench.measure``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench import results
from bench.cases import Case, Loss, make_batch, run_step
from bench.contact import kernels
from bench.contact.calls import CALLS, check
from bench.floor import FLOOR, floor
from bench.gate import Gate
from bench.measure import Event, Facts, Step, clock_for, each
from bench.registry import Candidate, first_line

MATRIX = {"cuda": 8192, "cpu": 1024}  # rows of the square product that gives the ceiling
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
WALL_SECONDS = 0.2  # of calls one after the other, for the time of the host
WARM_UP = 3  # calls before a graph is captured
BACKENDS = {"cuda": "triton", "cpu": "torch"}


def versions(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Yields the machine, the driver, versions and the commit."""
    facts = results.describe(device)
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        names = ("multi_processor_count", "L2_cache_size", "shared_memory_per_block_optin")
        facts["machine"] |= {name: getattr(gpu, name, None) for name in names}
        facts["machine"]["free_memory_gib"] = round(torch.cuda.mem_get_info()[0] / 2**30, 1)
    yield "result", {"status": "ok", **facts}


def ceilings(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Yields TFLOP/s of a square product, in bf16 on a GPU, and GB/s of a copy (read and written)."""
    clock, size = clock_for(device), MATRIX[device]
    a, b = (torch.randn(size, size, device=device, dtype=case.product_dtype) for _ in "ab")
    out = torch.empty_like(a)
    ms = clock(lambda: torch.mm(a, b, out=out))
    of = f"{case.dtype} product of {size} × {size} matrices"
    yield "result", {"status": "ok", "candidate": of, "ms": ms, "tflops": 2 * size**3 / ms / 1e9}
    x = torch.empty(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    ms = clock(lambda: y.copy_(x))
    of = f"copy of {len(x) >> 20} MiB"
    yield "result", {"status": "ok", "candidate": of, "ms": ms, "gb_s": 2 * len(x) / ms / 1e6}


def warm(
    case: Case, candidates: list[Candidate], device: str, seconds: float, call: str | None = None
) -> Iterator[Event]:
    """Makes a call once, so that its kernels are compiled and stored in the caches of Triton and torch.

    Yields the seconds of the first and of the second call.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the jobs themselves run beside each other
    yield "alive", {}
    if call is None:
        loss, batch = candidates[0].loss_for(case), make_batch(case, device)

        def step() -> object:
            return run_step(loss, batch, case, device)
    else:

        def step() -> object:
            return _check(call, case, device)

    spent = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        _wait(device)
        spent.append(time.perf_counter() - start)
        yield "alive", {}
    yield "result", {"status": "ok", "seconds": spent}


def correct(case: Case, candidates: list[Candidate], device: str, seconds: float, call: str) -> Iterator[Event]:
    """Yields the errors of one call against float64, and their bound."""
    yield "result", {"status": "ok", "errors": _check(call, case, device), "bound": _capped(call, case).bound}


def _capped(call: str, case: Case) -> Any:
    return CALLS[call].at_most(case.N, case.D)


def _check(call: str, case: Case, device: str) -> dict[str, float]:
    return check(_capped(call, case), device, BACKENDS[device])


def sampled(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Yields the errors with given noise, once the gate has also compared the loss with noise of its own."""
    found = Gate(case, device).check(candidates[0], candidates[0].loss_for(case))
    yield "result", {"status": "ok", **found}


def products(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Yields the floor's time, and its products by shape and kernel."""
    step = floor(case, make_batch(case, device))
    ms = clock_for(device)(step)
    yield "result", {"status": "ok", "candidate": FLOOR, "ms": ms, "tflops": case.flops / ms / 1e9}
    for row in kernels.by_product(step, device):
        yield "result", {"status": "ok", "candidate": row.pop("product"), **row}


def profile(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Yields every kernel of a whole call, its calls and microseconds."""
    loss, batch = candidates[0].loss_for(case), make_batch(case, device)
    for row in kernels.by_kernel(lambda: run_step(loss, batch, case, device), device):
        yield "result", {"status": "ok", "candidate": row.pop("kernel"), **row}


def small(case: Case, candidates: list[Candidate], device: str, seconds: float) -> Iterator[Event]:
    """Yields, of each candidate that passes the gate, a call's milliseconds.

    ``wall``: of calls one after the other, the host's work included; ``device``: by CUDA events; ``graph``: of a
    captured graph. The last two need a GPU.
    """
    gate, batch = Gate(case, device), make_batch(case, device)

    def work(candidate: Candidate) -> Facts:
        loss: Loss = candidate.loss_for(case)
        checked = gate.check(candidate, loss)

        def step() -> object:
            return run_step(loss, batch, case, device)

        found: Facts = {"ms": {"wall": wall(step, device)}, **checked}
        if device == "cuda":
            found["ms"]["device"] = clock_for(device)(step)
            try:
                found["ms"]["graph"] = wall(captured(step), device)
            except Exception as error:  # what cannot be captured has a time without a graph
                found["reason"] = f"no graph: {first_line(error)}"
        return found

    yield from each(candidates, work)


def wall(step: Step, device: str) -> float:
    """Returns the milliseconds of one of many calls that do not wait for each other."""
    for _ in range(WARM_UP):
        step()
    _wait(device)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < WALL_SECONDS:
        step()
        calls += 1
    _wait(device)
    return 1e3 * (time.perf_counter() - start) / calls


def captured(step: Step) -> Callable[[], object]:
    """Returns a step that replays a CUDA graph of this one."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
