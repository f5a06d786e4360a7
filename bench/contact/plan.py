"""What first contact does, in order: steps of items, each a job of ``bench.worker``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from bench.cases import MODES, Case
from bench.contact.calls import CALLS

STEPS = {
    "versions": "GPU, driver, versions and commit; TFLOP/s of a product and GB/s of a copy",
    "compile": "every kernel of the other steps, in parallel processes",
    "correctness": "calls with many options, dtypes and sizes against float64",
    "products": "the bare products of the floor, by shape and kernel",
    "launchers": "every launcher and its variants alone",
    "calls": "whole calls against the floor, the naive loss and the compiled one; peak memory; kernels",
    "small": "small batches with and without a CUDA graph",
    "counters": "hardware counters of the main kernels, by ncu",
}
JOBS, LAUNCHERS = "bench.contact.jobs", "bench.contact.launchers:measure"
LIMIT = 120.0  # seconds without a sign of life
COMPILE_LIMIT = 300.0


@dataclass(frozen=True)
class Item:
    step: str
    name: str
    job: str  # a generator: module:name
    case: Case
    candidates: tuple[str, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)  # arguments of the generator
    needs_gpu: bool = False
    limit: float = LIMIT

    def spec(self, seconds: float) -> dict[str, Any]:
        """Returns the job as a worker takes it."""
        facts = {"job": self.job, "case": self.case.as_dict(), "candidates": list(self.candidates)}
        return {**facts, "seconds": seconds, "more": self.more}


@dataclass(frozen=True)
class Sizes:
    """Sizes and candidates; on a CPU the tiny ones, with which the command is tried."""

    main: Case
    dims: tuple[int, ...]  # further D of one-way calls
    small: tuple[int, ...]  # N
    most: tuple[int, int]  # N and D of the correctness calls
    ours: str
    others: tuple[str, ...]


SIZES = {
    "cuda": Sizes(
        Case(32768, 768, dtype="bf16"),
        (128, 256, 384, 1024),
        (64, 128, 256, 512, 1024),
        (1 << 20, 1024),
        "ours-triton",
        ("naive", "naive-compile"),
    ),
    "cpu": Sizes(Case(64, 32), (), (16,), (64, 32), "ours-torch", ("naive",)),
}


def items(device: str, steps: Iterable[str]) -> list[Item]:
    """Returns the items of these steps; what is to be compiled follows from the other steps."""
    sizes, chosen = SIZES[device], list(steps)
    rest = [item for step in chosen if step in _MAKERS for item in _MAKERS[step](sizes)]
    first = [item for item in rest if item.step == "versions"]
    warm = list(_compile(rest, sizes)) if "compile" in chosen else []
    return [*first, *warm, *(item for item in rest if item.step != "versions")]


def _versions(sizes: Sizes) -> Iterator[Item]:
    yield Item("versions", "versions", f"{JOBS}:versions", sizes.main)
    yield Item("versions", "ceilings", f"{JOBS}:ceilings", sizes.main)


def _correctness(sizes: Sizes) -> Iterator[Item]:
    N, D = sizes.most
    for name in CALLS:
        yield Item("correctness", name, f"{JOBS}:correct", Case(N, D), more={"call": name})
    case = Case(min(N, 1024), min(D, 768), dtype=sizes.main.dtype, noise=3 * min(N, 1024))
    yield Item("correctness", "sampled noise", f"{JOBS}:sampled", case, (sizes.ours,))


def _cases(sizes: Sizes) -> list[Case]:
    return [*(replace(sizes.main, mode=mode) for mode in MODES), *(replace(sizes.main, D=D) for D in sizes.dims)]


def _products(sizes: Sizes) -> Iterator[Item]:
    for case in _cases(sizes):
        yield Item("products", case.label, f"{JOBS}:products", case)


def _launchers(sizes: Sizes) -> Iterator[Item]:
    main = sizes.main
    with_noise = replace(main, noise=main.N // 4, negatives=main.N // 4)
    cold = replace(main, regime="retrieval", temperature=0.005)  # rows whose sums need a second sweep
    small = main.at(min(main.N // 2, 1024))
    for case in (*(replace(main, mode=mode) for mode in MODES), with_noise, cold, small):
        more = {"with_variants": case.mode != "forward" and case in _cases(sizes)}
        yield Item("launchers", case.label, LAUNCHERS, case, (sizes.ours,), more, needs_gpu=True)


def _calls(sizes: Sizes) -> Iterator[Item]:
    names = (sizes.ours, *sizes.others)
    for case in _cases(sizes):
        yield Item("calls", f"time, {case.label}", "bench.measure:loss", case, names)
    for mode in MODES:
        case = replace(sizes.main, mode=mode)
        yield Item("calls", f"kernels, {case.label}", f"{JOBS}:profile", case, (sizes.ours,))
        yield Item("calls", f"memory, {case.label}", "bench.measure:memory", case, names, needs_gpu=True)


def _small(sizes: Sizes) -> Iterator[Item]:
    for mode in ("one-way", "symmetric"):
        for N in sizes.small:
            case = replace(sizes.main, N=N, mode=mode)
            yield Item("small", case.label, f"{JOBS}:small", case, (sizes.ours, *sizes.others))


def _counters(sizes: Sizes) -> Iterator[Item]:
    job, more = "bench.contact.counters:counters", {"limit": LIMIT}
    yield Item("counters", sizes.main.label, job, sizes.main, (sizes.ours,), more, needs_gpu=True, limit=2 * LIMIT)


_MAKERS = {
    "versions": _versions,
    "correctness": _correctness,
    "products": _products,
    "launchers": _launchers,
    "calls": _calls,
    "small": _small,
    "counters": _counters,
}


def _compile(rest: list[Item], sizes: Sizes) -> Iterator[Item]:
    """Yields a call for each that other items will make and that compiles something."""
    seen = set()
    for item in rest:
        job, names = f"{JOBS}:warm", [name for name in item.candidates if name in (sizes.ours, "naive-compile")]
        wanted: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
            (f"{x}, {item.case.label}", (x,), {}) for x in names
        ]
        if item.job == LAUNCHERS:
            job = LAUNCHERS
            wanted = [(f"launchers, {item.name}", (sizes.ours,), {**item.more, "timed": False})]
        elif "call" in item.more:
            wanted = [(item.name, (), item.more)]
        for label, candidates, more in wanted:
            if label not in seen:
                seen.add(label)
                yield Item("compile", label, job, item.case, candidates, more, needs_gpu=True, limit=COMPILE_LIMIT)
