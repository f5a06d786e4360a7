"""Memory beyond inputs, gradients and normalised rows keeps to the workspace, whatever N is."""

from __future__ import annotations

import sys

import pytest

from bench.memory import measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process as Linux reports it")


@pytest.mark.parametrize("way", ["ours", "symmetric", "forward"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_64_mib_by_default(way, autocast):
    assert measure(way, 16384, 64, autocast)["beyond"] <= 64


def test_the_same_at_65536():
    assert measure("ours", 65536, 16, True)["beyond"] <= 64


def test_the_usual_way_is_measured_as_what_it_is():
    """The measurement sees an N×N matrix where there is one."""
    assert measure("usual", 8192, 64)["beyond"] > 2 * 8192 * 8192 * 4 / 2**20
