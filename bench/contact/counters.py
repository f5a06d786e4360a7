"""Hardware counters of the main kernels, by Nsight Compute (``ncu``), where it is on the path and may count.

python -m bench.contact.counters CASE CANDIDATE     one step of a candidate on a case (JSON): what ncu watches
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

from bench.cases import Case, make_batch, run_step
from bench.measure import Event
from bench.registry import Candidate, Unsupported
from bench.results import ROOT

KERNELS = "regex:exp_similarity|grad_products|ratios"
LAUNCHES = 2  # of these kernels that are counted
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
NO_PRIVILEGE = "ERR_NVGPUCTRPERM"


def counters(
    case: Case, candidates: list[Candidate], device: str, seconds: float, limit: float
) -> Iterator[Event]:
    """Yields the metrics of each counted kernel; ``limit``: seconds after which ncu is given up."""
    tool = shutil.which("ncu")
    if tool is None:
        raise Unsupported("ncu is not on the path")
    command = [tool, "--csv", "--page", "details", "--kernel-name", KERNELS, "--launch-count", str(LAUNCHES)]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += [sys.executable, "-m", "bench.contact.counters", json.dumps(case.as_dict()), candidates[0].name]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit)
    said = done.stdout + done.stderr
    if NO_PRIVILEGE in said:
        raise Unsupported(f"ncu may not count here without a privilege ({NO_PRIVILEGE})")
    found = metrics(done.stdout)
    if not found:
        raise RuntimeError(f"ncu gave no counters; it said: {' '.join(said.split())[-300:]}")
    for kernel, values in found.items():
        yield "result", {"status": "ok", "candidate": kernel, "metrics": values}


def metrics(text: str) -> dict[str, dict[str, str]]:
    """Returns kernel → metric → value with its unit, from ncu's output, whose table follows other lines."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name"):
            of_kernel = found.setdefault(f"{row['Kernel Name']} #{row['ID']}", {})
            of_kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


def main(case: str, name: str) -> None:
    from bench.candidates import load

    made = Case(**json.loads(case))
    device = "cuda" if name == "ours-triton" else "cpu"
    run_step(load()[name].loss_for(made), make_batch(made, device), made, device)


if __name__ == "__main__":
    main(*sys.argv[1:3])
