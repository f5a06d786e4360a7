"""Where and with what a run was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.candidates import Candidate

ROOT = Path(__file__).parents[1]


def describe(device: str, candidates: dict[str, Candidate]) -> dict[str, Any]:
    """Machine, driver, versions and commit, for the head of a result."""
    packages = {"triton", "numpy", "transformers"}
    packages |= {c.package for c in candidates.values() if c.package}
    versions = {"python": platform.python_version(), "torch": torch.__version__}  # its own number has the build
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
    # What a run itself writes is no change.
    paths = [".", ":!bench/results", ":!README.md"]
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
