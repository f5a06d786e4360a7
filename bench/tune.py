"""Which settings are the fastest on this machine, and where to put them.

A search is a list of settings and a function that makes the step to time from one. The workspace is the first;
others join it in ``searches``.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
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
    found = [workspace(case, device)]
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        found += kernels(case, device, tiles())
    return found


def tiles() -> list[Any]:
    """Tiles of products that this GPU may like; those that spill or do not fit drop out when they are tried."""
    from fused_infonce.kernels.settings import Tile

    has_tma = torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)
    loads = [(False, False), *([(True, False), (True, True)] if has_tma else [])]  # tma, warp_specialize
    grid = product((64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), loads)
    return [
        Tile(m, n, k, warps, stages, tma=tma, warp_specialize=specialised)
        for m, n, k, warps, stages, (tma, specialised) in grid
        if m * n <= 4096 * warps
    ]


def kernels(case: Case, device: str, candidates: list[Any]) -> list[Search]:
    """Settings of the three kernels that multiply, each timed alone on a chunk of rows as the sweep makes it."""
    from fused_infonce.kernels import products, ratios, similarity
    from fused_infonce.kernels.common import NOTHING_SPECIAL
    from fused_infonce.kernels.settings import default_settings, target_of

    N, D, dtype = case.N, case.D, case.product_dtype
    stored = torch.float32 if dtype == torch.float32 else torch.bfloat16
    C = min(N, max(1024, 2**28 // (N * stored.itemsize)))  # rows of a chunk in the default workspace

    def make(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, device=device).to(of)

    q, k, keys, shift = make(C, D, of=dtype), make(N, D, of=dtype), make(N, D, of=stored), make(C, 1)
    E, anchors = make(C, N, of=stored), make(C, D + similarity.PAD, of=stored)
    acc_rows, acc, out = make(C, D), make(N, D + similarity.PAD), torch.empty(C, N, dtype=stored, device=device)
    special = NOTHING_SPECIAL | {"num_positives": N, "HAS_POSITIVES": True}
    both = (shift, make(N))
    target = target_of(torch.device(device))
    default = default_settings(target, dtype, "ieee" if dtype == torch.float32 else "tf32", C, N)

    def grad_products(setting: Any) -> Step:
        library = setting == "library"
        tile = default.products if library else setting
        side = (acc[:, :D], acc[:, D])
        return lambda: products.grad_products(E, keys, acc_rows, False, E, anchors, *side, True, tile, library)

    place = f"{{}} of {target!r} in kernels/infonce/settings.py"
    return [
        Search(
            "similarity",
            place.format("similarity"),
            candidates,
            lambda tile: lambda: similarity.exp_similarity(q, k, out, shift, 0, special, tile),
        ),
        Search(
            "ratios",
            place.format("ratios"),
            candidates,
            lambda tile: lambda: ratios.ratio_sums(q, k, 0, 0, shift, both, special, tile),
        ),
        Search("products", place.format("products, library_products"), ["library", *candidates], grad_products),
    ]


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

    place = "CPU_WORKSPACE_BYTES in fused_infonce/tiled/torch_memory.py, or workspace_bytes= of a call"
    if device == "cuda" and importlib.util.find_spec("triton"):
        place = "DEFAULT_WORKSPACE in fused_infonce/tiled/triton_backend.py, or workspace_bytes= of a call"
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
