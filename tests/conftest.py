"""Uninitialised memory is NaN in every test; without a GPU, Triton's kernels run in its interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms want it on a GPU

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is read
    try:
        import interpreter
    except ImportError:  # no Triton on this platform: its tests are skipped
        pass
    else:
        interpreter.patch()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was[0])
    torch.utils.deterministic.fill_uninitialized_memory = was[1]


@pytest.fixture(autouse=True)
def _half_precision_products():
    """bf16 and fp16 inputs are multiplied as such on every CPU, so that all machines test the same operations."""
    from fused_infonce.testing import half_precision_products

    with half_precision_products():
        yield


def pytest_terminal_summary(terminalreporter):
    """Tables that tests recorded, whichever process they ran in."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties:
            if name == "table":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def simcse_data() -> Path:
    """The folder of real data that SIMCSE_DATA names."""
    folder = os.environ.get("SIMCSE_DATA")
    if not folder:
        pytest.skip("SIMCSE_DATA is not set: no real data here")
    return Path(folder)
