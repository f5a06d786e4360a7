"""Finds the fastest settings of this machine, and says where to put them.

A search is a list of settings and a function that makes a step to time from one of them. ``kernel_searches`` and
``tiles`` are the only places of the benchmarks that import internals of the package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from bench.cases import Case, make_batch, run_step
from bench.measure import Step, clock_for, summary
from bench.results import Results
from bench.suites import TUNE, dtypes_for
from fused_infonce import info_nce

ROUNDS = 5
WITHIN = 1.25  # of the best: a setting whose times all exceed it is left out of later rounds


@dataclass(frozen=True)
class Search:
    what: str
    where: str  # where the answer belongs
    settings: list[Any]
    step: Callable[[Any], Step]  # makes what is timed; a setting for which it raises is left out


def run(found: Results, suite: str, device: str, progress: Callable[[str], None]) -> Iterator[str]:
    """Yields a line of advice after each search."""
    for (N, D), dtype in product(TUNE[suite], dtypes_for(device)):
        case = Case(N, D, dtype=dtype)
        for one in searches(case, device):
            progress(f"{case.label}  {one.what}")
            ranked = search(one.settings, one.step, clock_for(device))
            found.add([{"search": one.what, "case": case.label, "setting": str(s), "ms": ms} for s, ms in ranked])
            best = f"put {one.what} = {ranked[0][0]} into {one.where}" if ranked else f"no {one.what} could be run"
            yield f"{case.label}: {best}"
    found.close()


def searches(case: Case, device: str) -> list[Search]:
    """Returns the searches of a case on this machine."""
    found = [workspace(case, device)]
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        found += kernel_searches(case, device, tiles())
    return found


def workspace(case: Case, device: str) -> Search:
    """Returns the search of ``workspace_bytes``: powers of 2 from 4 MiB to the whole matrix (at most 1 GiB)."""
    batch = make_batch(case, device)
    whole = 16 * case.N * case.N  # bytes: fp32 entries, and the scratch of elementwise passes
    sizes = [2**n for n in range(22, 31)]
    enough = next((i for i, size in enumerate(sizes) if size >= whole), len(sizes) - 1)

    def step(size: int) -> Step:
        def loss(batch: Any) -> torch.Tensor:
            return info_nce(batch.q, batch.k, temperature=case.temperature, workspace_bytes=size)

        return lambda: run_step(loss, batch, case, device)

    place = "workspace_bytes= of a call, or workspace_of in kernels/infonce/settings.py"
    return Search("workspace_bytes", place, sizes[: enough + 1], step)


def search(
    settings: list[Any], step: Callable[[Any], Step], clock: Callable[[Step], float], rounds: int = ROUNDS
) -> list[tuple[Any, dict[str, Any]]]:
    """Returns the settings with their times, the fastest first.

    ``clock`` gives the milliseconds of one call. The settings take turns; those far from the best are left out of
    the next round, and a setting that raises takes no part.
    """
    steps: list[tuple[Any, Step, list[float]]] = []
    for setting in settings:
        try:
            made = step(setting)
            made()  # compiles, and faults its memory in
        except Exception:
            continue
        steps.append((setting, made, []))
    for _ in range(rounds):
        for _, made, times in steps:
            times.append(clock(made))
        best = min((min(times) for _, _, times in steps), default=0.0)
        steps = [entry for entry in steps if min(entry[2]) <= WITHIN * best]
    ranked = [(setting, summary(times)) for setting, _, times in steps]
    return sorted(ranked, key=lambda entry: entry[1]["median"])


def kernel_searches(case: Case, device: str, candidates: list[Any]) -> list[Search]:
    """Returns searches of the three kernels that multiply, each timed by itself on a chunk of rows."""
    from fused_infonce.kernels import products, ratios, similarity
    from fused_infonce.kernels.common import Counts, Terms
    from fused_infonce.kernels.settings import default_settings, target_of

    N, D, dtype = case.N, case.D, case.product_dtype
    stored = torch.float32 if dtype == torch.float32 else torch.bfloat16
    C = min(N, max(1024, 2**28 // (N * stored.itemsize)))  # rows of a chunk in the default workspace

    def make(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device).to(of)

    q, k, keys, shift = make(C, D, of=dtype), make(N, D, of=dtype), make(N, D, of=stored), make(C, 1)
    E, anchors = make(C, N, of=stored), make(C, D, of=stored)
    acc_rows, acc, out = make(C, D), make(N, D), torch.empty(C, N, dtype=stored, device=device)
    special = Terms(), Counts(num_positives=N)
    both = (shift, make(N))
    target = target_of(torch.device(device))
    default = default_settings(target, dtype, "ieee" if dtype == torch.float32 else "tf32", C, N)

    def grad_products(setting: Any) -> Step:
        library = setting == "library"
        tile = default.products if library else setting
        return lambda: products.grad_products(E, keys, acc_rows, False, E, anchors, acc, True, tile, library)

    place = f"{{}} of {target!r} in kernels/infonce/settings.py"
    return [
        Search(
            "similarity",
            place.format("similarity"),
            candidates,
            lambda tile: lambda: similarity.exp_similarity(q, k, out, shift, 0, *special, tile),
        ),
        Search(
            "ratios",
            place.format("ratios"),
            candidates,
            lambda tile: lambda: ratios.ratio_sums(q, k, 0, 0, shift, both, *special, tile),
        ),
        Search("products", place.format("products, library_products"), ["library", *candidates], grad_products),
    ]


def tiles() -> list[Any]:
    """Returns tiles to try on this GPU; those that spill or do not fit drop out when they are tried."""
    from fused_infonce.kernels.settings import Tile

    has_tma = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    loads = [(False, False), *([(True, False), (True, True)] if has_tma else [])]  # tma, warp_specialize
    grid = product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), loads)
    return [
        Tile(m, n, k, warps, stages, tma=tma, warp_specialize=specialised)
        for m, n, k, warps, stages, (tma, specialised) in grid
        if m * n <= 4096 * warps
    ]
