"""The results of a run: one JSON file per job, valid at every moment, with the machine it was measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.registry import Candidate
from fused_infonce.backends import multiplies_faster
from simcse.errors import UserError
from simcse.files import write_text

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
Document = dict[str, Any]


class Results:
    """Rows of a job on their way to ``folder/job.json``; the file is replaced after every case."""

    def __init__(self, job: str, folder: Path, **head: Any) -> None:
        self.path = folder / f"{job}.json"
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.document: Document = {"job": job, "started": started, **head, "complete": False, "rows": []}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> list[Row]:
        return self.document["rows"]  # type: ignore[no-any-return]

    def add(self, rows: list[Row]) -> None:
        self.rows.extend(rows)
        self.save()

    def close(self) -> None:
        began = datetime.fromisoformat(self.document["started"])
        self.document["minutes"] = (datetime.now(UTC) - began).total_seconds() / 60
        self.document["complete"] = True
        self.save()

    def save(self) -> None:
        head = {name: _short(value) for name, value in self.document.items() if name != "rows"}
        # One row per line, so that the difference between two runs is readable.
        rows = ",\n".join(json.dumps(_short(row), ensure_ascii=False) for row in self.rows)
        text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "rows": [\n{rows}\n]\n}}\n'
        write_text(self.path, text)


def _short(value: Any) -> Any:
    """Rounds numbers to five digits: more of them would be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {name: _short(x) for name, x in value.items()}
    return [_short(x) for x in value] if isinstance(value, list) else value


def read(folder: Path) -> dict[str, Document]:
    """Returns job → document of every result in a folder."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); remove it, or choose another folder") from None
        if isinstance(document, dict) and {"job", "rows"} <= document.keys():
            found[document["job"]] = document
    return found


# ------------------------------------------------------------------ where it was measured


def describe(device: str, candidates: Iterable[Candidate] = ()) -> dict[str, Any]:
    """Returns the machine, driver, versions and commit, for the head of a result."""
    packages = {"triton", "numpy", "transformers"}
    packages |= {c.package for c in candidates if c.package}
    versions = {"python": platform.python_version(), "torch": torch.__version__}  # its own number names the build
    for package in sorted(packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"machine": _cpu() | (_gpu() if device == "cuda" else {}), "versions": versions, "commit": _commit()}


def _cpu() -> dict[str, Any]:
    amx = ", AMX" if torch.cpu.get_capabilities().get("amx_bf16") else ""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability() + amx,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "half_products": multiplies_faster(torch.bfloat16, "cpu"),  # whether ours multiplies bf16 rows in bf16
    }


def _gpu() -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return {
        "gpu": facts.name,
        "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
        "compute_capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
        "driver, clock, power": _output(command),
    }


def _commit() -> str | None:
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    # The files that a run itself writes do not count as changes.
    paths = [".", ":!bench/results", ":!experiments/results", ":!README.md", ":!docs/study.md"]
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no", "--", *paths])
    return f"{commit} with changes" if commit and changed else commit


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _field(file: str, name: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)
