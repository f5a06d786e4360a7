"""Which cases are measured: ``quick`` in minutes, ``standard`` for the README, ``paper`` as far as memory goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from bench.cases import REGIMES, WAYS, Case, Way

SUITES = ("quick", "standard", "paper")
OURS_AND_NAIVE = ("ours-torch", "ours-triton", "naive")


@dataclass(frozen=True)
class Entry:
    """Some cases and who is measured on them: None is everyone."""

    cases: tuple[Case, ...]
    candidates: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()


def grid(
    Ns: Iterable[int],
    Ds: Iterable[int],
    dtypes: Iterable[str] = ("fp32", "bf16"),
    ways: Iterable[Way] = ("one-way",),
    noise: int = 0,
    negatives: int = 0,
) -> tuple[Case, ...]:
    """Cases by growing N, so that what has run out of memory is not tried at more; noise and negatives a row."""
    return tuple(
        Case(N, D, way, dtype, noise=noise * N, negatives=negatives * N)
        for D, way, dtype, N in product(Ds, ways, dtypes, Ns)
    )


def loss(suite: str, gpu: bool) -> Iterator[Entry]:
    slow = ("ours-reference", "naive-compile")
    if suite == "quick":
        yield Entry(grid([64], [384]), without=slow)
        # These two take N·N·D and N·N·N; at more rows it is the wait that is measured.
        yield Entry(grid([1024], [384]), without=(*slow, "simcse-broadcast", "pml-ntxent"))
        yield Entry(grid([512], [384], ["fp32"], ["symmetric", "forward"]), without=slow)
        yield Entry(grid([256], [384], ["fp32"], noise=3, negatives=1), without=slow)
    elif suite == "standard" and not gpu:
        yield Entry(grid([64, 256], [384, 768, 1024]), without=("ours-reference",))
        yield Entry(grid([1024, 4096], [768]), without=("ours-reference",))
        yield Entry(grid([1024], [128, 384, 1024, 4096]), without=slow)
        yield Entry(grid([2048], [768], ways=["symmetric", "forward"]), without=slow)
        yield Entry(grid([64, 1024], [768], noise=3), without=slow)
        yield Entry(grid([64, 1024], [768], negatives=1), without=slow)
        yield Entry(grid([2048, 4096, 8192, 16384], [256]), candidates=OURS_AND_NAIVE)
    elif suite == "standard":
        dtypes = ["fp32", "bf16", "fp16"]
        yield Entry(grid([256, 1024, 4096, 16384, 32768, 65536], [768], dtypes))
        yield Entry(grid([16384], [128, 384, 1024, 4096], ["bf16"]))
        yield Entry(grid([4096, 32768], [768], ["bf16"], ["symmetric", "forward"]))
        yield Entry(grid([4096, 32768], [768], ["bf16"], noise=3))
        yield Entry(grid([4096, 32768], [768], ["bf16"], negatives=1))
    else:
        Ns = [4**n for n in range(3, 11)]  # 64 … 1,048,576
        for D in (128, 384, 768, 1024, 4096):
            yield Entry(grid(Ns, [D], ["fp32", "bf16", "fp16"], WAYS))
            yield Entry(grid(Ns, [D], ["fp32", "bf16", "fp16"], noise=3))
            yield Entry(grid(Ns, [D], ["fp32", "bf16", "fp16"], negatives=1))


def memory(suite: str, gpu: bool) -> Iterator[Entry]:
    slow = ("ours-reference", "naive-compile", "ours-expected")
    if suite == "quick":
        yield Entry(grid([1024, 4096], [128], ["fp32"]), candidates=(*OURS_AND_NAIVE, "st-cached-mnrl"))
    elif suite == "standard" and not gpu:
        yield Entry(grid([1024, 4096, 16384, 65536], [256]), without=slow)
        yield Entry(grid([16384, 65536], [256], ways=["symmetric", "forward"]), candidates=OURS_AND_NAIVE)
    elif suite == "standard":
        yield Entry(grid([1024, 4096, 16384, 65536, 262144], [768], ["bf16"]))
        yield Entry(grid([16384, 65536], [768], ["bf16"], ["symmetric", "forward"]))
    else:
        yield Entry(grid([4**n for n in range(5, 11)], [128, 768, 4096], ["fp32", "bf16"], WAYS))


def accuracy(suite: str, gpu: bool) -> Iterator[Entry]:
    N = 128 if suite == "quick" else 1024
    ways: tuple[Way, ...] = ("one-way",) if suite == "quick" else ("one-way", "symmetric")
    dtypes = ["fp32", "bf16", "fp16"] if suite == "paper" or gpu else ["fp32", "bf16"]
    cases = tuple(Case(N, 768, way, dtype, regime=regime) for way, dtype, regime in product(ways, dtypes, REGIMES))
    yield Entry(cases, without=("ours-expected", "naive-compile"))


# How long each candidate is timed at each case, in seconds.
SECONDS = {"quick": 0.3, "standard": 3.0, "paper": 5.0}
# Batches, mini batches and steps of ``train``.
TRAIN = {
    "quick": {"batches": (32,), "mini_batch": 16, "steps": 2},
    "standard": {"batches": (64, 256, 1024), "mini_batch": 64, "steps": 6},
    "paper": {"batches": (64, 256, 1024, 4096, 16384, 65536), "mini_batch": 64, "steps": 10},
}
# N and D that ``tune`` searches at.
TUNE = {
    "quick": ((1024, 384),),
    "standard": ((1024, 384), (4096, 768), (16384, 256)),
    "paper": ((4096, 768), (32768, 768), (262144, 768), (32768, 128)),
}
