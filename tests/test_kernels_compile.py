"""Every kernel compiles for GPUs that are not here: nothing spills, all fits, matrix units are used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.fixture(scope="module")
def tables() -> dict[str, subprocess.CompletedProcess[str]]:
    """A process a target: one that interprets kernels cannot compile them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(target: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), target, "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(run, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target, tables, record_property):
    done = tables[target]
    table, _, found = done.stdout.rstrip().rpartition("\n")
    record_property("table", table)
    assert done.returncode == 0, table + done.stderr[-2000:]
    kernels = json.loads(found)
    names = {x["kernel"].split(",")[0] for x in kernels if x["dtype"] == "bf16"}
    source = "".join(file.read_text() for file in (SCRIPT.parents[1] / "kernels" / "infonce").glob("*.py"))
    assert names == {name.removesuffix("_kernel") for name in _kernel_names(source)}
    products = [x for x in kernels if x["kernel"].startswith(("exp_similarity", "ratios", "grad_products"))]
    assert {x["dtype"] for x in products if x["matrix"]} >= {"bf16", "fp16", "tf32"}


def _kernel_names(source: str) -> set[str]:
    """Functions whose launch is written somewhere."""
    return {line.split("[")[0].strip() for line in source.splitlines() if "_kernel[(" in line}
