"""Memory beyond inputs, gradients and normalised rows keeps to the workspace, whatever N is."""

from __future__ import annotations

import sys

import pytest

from bench.cases import WAYS, Case
from bench.suites import dtypes_for
from bench.worker import alone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process as Linux reports it")


def beyond(case: Case, candidate: str = "ours-torch") -> float:
    return alone("memory", case, candidate)["mib"]["beyond"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_64_mib_by_default(way, dtype):
    N = 16384 if dtype in dtypes_for("cpu") else 4096  # emulated it takes minutes
    assert beyond(Case(N, 64, way, dtype)) <= 64


@pytest.mark.parametrize("noise", [0, 4096])
def test_wide_rows_take_their_part_of_it(noise):
    """The weighted anchors of a chunk, and blocks of noise, are as wide as the rows."""
    assert beyond(Case(2508, 4096, noise=noise)) <= 64


def test_the_same_at_65536():
    """In bf16 where the CPU has it: emulated it takes minutes."""
    assert beyond(Case(65536, 16, dtype=dtypes_for("cpu")[-1])) <= 64


def test_the_usual_way_is_measured_as_what_it_is():
    """The measurement sees an N×N matrix where there is one."""
    assert beyond(Case(8192, 64), "naive") > 2 * 8192 * 8192 * 4 / 2**20
