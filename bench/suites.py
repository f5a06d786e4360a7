"""Which cases are measured: ``quick`` in minutes, ``standard`` for the README, ``paper`` as far as memory goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bench.cases import MODES, PUBLISHED, Case, Mode
from bench.train import TrainCase
from fused_infonce.testing import REGIMES, has_bf16_instructions

SUITES = ("quick", "standard", "paper")
OURS_AND_NAIVE = ("ours-torch", "ours-triton", "naive")
SMALL_TEMPERATURES = (1e-3, 2e-3, 5e-3, 0.01, 0.05)  # CLIP, E5 and BGE train at 0.01
LEAN = (*OURS_AND_NAIVE, "st-mnrl", "st-cached-mnrl", "torch-linear-ce")
PEERS_OF_PUBLISHED = (*OURS_AND_NAIVE, "st-mnrl", "st-cached-mnrl", "memeff-matryoshka")
SYMMETRIC = (*OURS_AND_NAIVE, "ours-256MiB", "open-clip", "st-mnrl")


@dataclass(frozen=True)
class Entry:
    """Some cases and the candidates that are measured on them; None means all."""

    cases: tuple[Any, ...]  # Case, or TrainCase
    candidates: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()


def dtypes_for(device: str) -> tuple[str, ...]:
    """Returns the dtypes that this machine multiplies without emulation."""
    if device == "cuda":
        return ("fp32", "bf16", "fp16")
    return ("fp32", "bf16") if has_bf16_instructions() else ("fp32",)


def grid(
    Ns: Iterable[int],
    Ds: Iterable[int],
    dtypes: Iterable[str],
    modes: Iterable[Mode] = ("one-way",),
    noise: int = 0,
    negatives: int = 0,
    regimes: Iterable[str] = ("middle",),
    temperatures: Iterable[float] = (0.0,),
) -> tuple[Case, ...]:
    """Returns cases by growing N, so that a candidate that ran out of memory is not tried at larger ones.

    ``noise`` and ``negatives`` are numbers per anchor.
    """
    return tuple(
        Case(N, D, mode, dtype, noise * N, negatives * N, regime, temperature)
        for D, mode, dtype, regime, temperature, N in product(Ds, modes, dtypes, regimes, temperatures, Ns)
    )


def loss(suite: str, device: str) -> Iterator[Entry]:
    slow = ("ours-reference", "naive-compile")
    cubic = ("simcse-broadcast", "pml-ntxent")  # N·N·D and N·N·N elements: minutes per call at many rows
    dtypes = dtypes_for(device)
    if suite == "quick":
        yield Entry(grid([64], [384], dtypes), without=slow)
        slow += cubic
        yield Entry(grid([1024], [384], dtypes), without=slow)
        yield Entry(grid([512], [384], dtypes[:1], ["symmetric", "forward", *PUBLISHED]), without=slow)
        yield Entry(grid([256], [384], dtypes[:1], noise=3, negatives=1), without=slow)
        yield Entry(grid([512], [384], dtypes[:1], regimes=["retrieval"]), without=slow)
        small = grid([512], [384], dtypes[:1], regimes=["random"], temperatures=SMALL_TEMPERATURES[::3])
        yield Entry(small, candidates=OURS_AND_NAIVE)
    elif suite == "standard" and device == "cpu":
        yield Entry(grid([64, 256], [768], dtypes), without=("ours-reference",))
        yield Entry(grid([1024, 4096], [768], dtypes), without=("ours-reference", *cubic))
        slow += cubic
        yield Entry(grid([64, 256], [384, 1024], dtypes), without=slow)
        yield Entry(grid([1024], [128, 384, 1024, 4096], dtypes), without=slow)
        yield Entry(grid([2048], [768], dtypes, ["symmetric", "forward"]), without=slow)
        yield Entry(grid([64, 1024], [768], dtypes, noise=3), without=slow)
        yield Entry(grid([64, 1024], [768], dtypes, negatives=1), without=slow)
        yield Entry(grid([1024, 4096], [768], dtypes, regimes=["retrieval"]), without=slow)
        yield Entry(grid([256, 2048], [768], dtypes, PUBLISHED), without=slow)
        yield Entry(grid([4096], [768], dtypes, ["symmetric"]), candidates=SYMMETRIC)
        small = grid([4096], [384], dtypes, regimes=["random"], temperatures=SMALL_TEMPERATURES)
        yield Entry(small, candidates=OURS_AND_NAIVE)
        yield Entry(grid([2048, 4096, 8192, 16384], [256], dtypes), candidates=OURS_AND_NAIVE)
    elif suite == "standard":
        yield Entry(grid([64, 256, 1024, 4096, 32768, 65536], [768], ["bf16"]))
        yield Entry(grid([32768], [64, 128, 256, 384, 1024], ["bf16"]))
        yield Entry(grid([32768], [768], ["bf16"], ["symmetric", "forward", *PUBLISHED]))
        yield Entry(grid([4096], [768], ["fp32", "fp16"]))
        yield Entry(grid([4096], [768], ["bf16"], noise=3))
        yield Entry(grid([4096], [768], ["bf16"], negatives=1))
        yield Entry(grid([4096, 32768], [768], ["bf16"], regimes=["retrieval"]))
        small = grid([4096, 32768], [384], ["bf16"], regimes=["random"], temperatures=SMALL_TEMPERATURES)
        yield Entry(small, candidates=OURS_AND_NAIVE)
        yield Entry(grid([2048, 8192, 16384], [768], ["bf16"]), candidates=OURS_AND_NAIVE)
        yield Entry(grid([1048576], [768], ["bf16"]), candidates=("ours-triton",))
    else:
        Ns = [4**n for n in range(3, 11)]  # 64 … 1,048,576
        for D in (128, 384, 768, 1024, 4096):
            yield Entry(grid(Ns, [D], dtypes, (*MODES, *PUBLISHED)))
            yield Entry(grid(Ns, [D], dtypes, noise=3))
            yield Entry(grid(Ns, [D], dtypes, negatives=1))
            yield Entry(grid(Ns, [D], dtypes, regimes=["retrieval"]))


def memory(suite: str, device: str) -> Iterator[Entry]:
    slow = ("ours-reference", "naive-compile", "ours-expected")
    dtypes = dtypes_for(device)
    if suite == "quick":
        yield Entry(grid([1024, 4096], [128], dtypes[:1]), candidates=OURS_AND_NAIVE)
    elif suite == "standard" and device == "cpu":
        yield Entry(grid([1024, 4096, 16384], [256], dtypes[:1]), without=slow)
        yield Entry(grid([65536], [256], dtypes[:1]), candidates=LEAN)
        yield Entry(grid([1024, 4096, 16384, 65536], [256], dtypes[1:]), candidates=LEAN)
        yield Entry(grid([16384], [256], dtypes, ["symmetric", "forward"]), candidates=OURS_AND_NAIVE)
        yield Entry(grid([1024, 4096], [256], dtypes[:1], PUBLISHED), candidates=PEERS_OF_PUBLISHED)
    elif suite == "standard":
        yield Entry(grid([1024, 4096, 16384, 65536, 131072], [768], ["bf16"]))
        yield Entry(grid([65536, 131072], [768], ["bf16"], ["symmetric", "forward"]), candidates=OURS_AND_NAIVE)
        yield Entry(grid([16384, 65536], [768], ["bf16"], PUBLISHED), candidates=PEERS_OF_PUBLISHED)
        yield Entry(grid([1048576], [768], ["bf16"]), candidates=("ours-triton",))
    else:
        yield Entry(grid([4**n for n in range(5, 11)], [128, 768, 4096], dtypes, (*MODES, *PUBLISHED)))


def accuracy(suite: str, device: str) -> Iterator[Entry]:
    """Includes bf16 on every machine: emulation gives the same digits."""
    N = 256 if suite == "quick" else 512  # small enough for the candidates that store N·N·D or N·N·N elements
    modes: tuple[Mode, ...] = ("one-way",) if suite == "quick" else ("one-way", "symmetric", *PUBLISHED)
    dtypes = dict.fromkeys([*dtypes_for(device), "bf16"])
    yield Entry(grid([N], [768], dtypes, modes, regimes=REGIMES), without=("ours-expected", "naive-compile"))


def train(suite: str, device: str) -> Iterator[Entry]:
    """Leaves fp16 out, which needs a loss scaler."""
    batches, case = {
        "quick": ((32,), TrainCase(32, steps=1)),
        "standard": ((64, 512, 1024), TrainCase(64, steps=1))
        if device == "cpu"
        else ((64, 1024, 4096, 16384), TrainCase(64, steps=10)),
        "paper": ((64, 256, 1024, 4096, 16384, 65536), TrainCase(64, steps=10)),
    }[suite]
    dtypes = [name for name in dtypes_for(device) if name != "fp16"]
    yield Entry(tuple(replace(case, N=N, dtype=dtype) for dtype in dtypes for N in batches))


# Seconds that each candidate is timed for at each case.
SECONDS = {"quick": 0.3, "standard": 0.5, "paper": 5.0}
# (N, D) that ``tune`` searches at.
TUNE = {
    "quick": ((1024, 384),),
    "standard": ((1024, 384), (4096, 768), (16384, 256)),
    "paper": ((4096, 768), (32768, 768), (262144, 768), (32768, 128)),
}
