"""Memory beyond inputs, gradients and normalised rows keeps to the workspace, whatever N is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fused_infonce.testing import has_bf16_instructions

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process as Linux reports it")

STEP = """
import sys
import torch
from fused_infonce import gs_infonce
from fused_infonce.testing import added_memory, naive

N, D, noise = map(int, sys.argv[1:4])
mode, dtype, which = sys.argv[4:]
gradients = mode != "forward"


def step(N, D, noise):
    rows = [torch.randn(N, D, requires_grad=gradients) for _ in "qk"]

    def run():
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            options = {"num_noise": noise, "symmetric": mode == "symmetric", "backend": "torch"}
            loss = naive(*rows) if which == "naive" else gs_infonce(*rows, **options)
        if gradients:
            loss.backward()

    return run


step(512, 256, noise * 512 // N)()  # loads every library that the call needs
print(added_memory(step(N, D, noise), "cpu"))
"""


def beyond(
    N: int, D: int, mode: str = "one-way", dtype: str = "fp32", noise: int = 0, which: str = "ours"
) -> float:
    """MiB in a fresh process, whose peak is that of the step."""
    command = [sys.executable, "-c", STEP, *map(str, (N, D, noise, mode, dtype, which))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # At least these are alive at once: gradients and their accumulators, both fp32; or normalised rows.
    itemsize = 8 if mode != "forward" else {"fp32": 4, "bf16": 2}[dtype]
    return (int(done.stdout) - 2 * N * D * itemsize) / 2**20


@pytest.mark.parametrize("mode", ["one-way", "symmetric", "forward"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_64_mib_by_default(mode, dtype):
    N = 16384 if dtype == "fp32" or has_bf16_instructions() else 4096  # emulated it takes minutes
    assert beyond(N, 64, mode, dtype) <= 64


def test_the_kept_products_of_a_symmetric_loss_take_their_part_of_it():
    """All N² of them lie in the workspace; its gradients exist twice at the end, as those of one direction do."""
    assert beyond(2300, 64, "symmetric") <= 64


@pytest.mark.parametrize("noise", [0, 4096])
def test_wide_rows_take_their_part_of_it(noise):
    """The weighted anchors of a chunk, and blocks of noise, are as wide as the rows."""
    assert beyond(2508, 4096, noise=noise) <= 64


def test_the_same_at_65536():
    """In bf16 where the CPU has it: emulated it takes minutes."""
    assert beyond(65536, 16, dtype="bf16" if has_bf16_instructions() else "fp32") <= 64


def test_the_standard_implementation_is_measured_as_what_it_is():
    """The measurement sees an N×N matrix where there is one."""
    assert beyond(8192, 64, which="naive") > 2 * 8192 * 8192 * 4 / 2**20
