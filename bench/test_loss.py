"""``pytest bench``: the same losses under pytest-benchmark, to compare two commits with.

    pytest bench --benchmark-save before     # then change something
    pytest bench --benchmark-compare

``-k`` picks: ``pytest bench -k "ours-torch and N1024"``.
"""

from __future__ import annotations

import pytest
import torch

from bench.candidates import load
from bench.cases import make_batch, run_step
from bench.gate import Gate
from bench.registry import Unsupported
from bench.suites import loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [case for entry in loss("quick", DEVICE) for case in entry.cases]
SLOW = ("simcse-broadcast", "pml-ntxent", "naive-compile", "ours-reference")
CANDIDATES = {name: found for name, found in load().items() if name not in SLOW}


@pytest.fixture(params=CASES, ids=lambda case: case.label.replace("=", "").replace(" ", "-"))
def case(request):
    return request.param


@pytest.fixture(params=CANDIDATES)
def candidate(request):
    return CANDIDATES[request.param]


def test_loss(benchmark, case, candidate):
    try:
        made = candidate.loss_for(case)
    except Unsupported as reason:
        pytest.skip(str(reason))
    Gate(case, DEVICE).check(candidate, made)
    batch = make_batch(case, DEVICE)

    def step():
        run_step(made, batch, case, DEVICE)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.label
    benchmark(step)
