"""What runs on the device during a step, by ``torch.profiler``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # operation → place of the first factor
Row = dict[str, Any]


def by_kernel(step: Callable[[], object], device: str) -> list[Row]:
    """Returns name, calls and microseconds of every kernel, the longest first; on a CPU of every operation."""
    found: dict[str, Row] = {}
    for event in _events(step, device):
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device != (device == "cuda"):
            continue
        spent = event.time_range.elapsed_us() if on_device else event.self_cpu_time_total
        row = found.setdefault(event.name, {"kernel": event.name, "calls": 0, "us": 0.0})
        row["calls"] += 1
        row["us"] += spent
    return sorted(found.values(), key=lambda row: -row["us"])


def by_product(step: Callable[[], object], device: str) -> list[Row]:
    """Returns shapes, kernels, calls, microseconds and TFLOP/s of every kind of matrix product in a step."""
    found: dict[tuple[str, str], Row] = {}
    for event in _events(step, device):
        if event.name not in PRODUCTS:
            continue
        first = PRODUCTS[event.name]
        (M, K), (_, N) = event.input_shapes[first : first + 2]
        product, name = (
            f"({M},{K}) × ({K},{N})",
            " + ".join(dict.fromkeys(kernel.name for kernel in event.kernels)),
        )
        row = {"product": product, "kernel": name, "calls": 0, "us": 0.0, "flops": 0}
        row = found.setdefault((product, name), row)
        row["calls"] += 1
        row["us"] += event.cpu_time_total if device == "cpu" else sum(x.duration for x in event.kernels)
        row["flops"] += 2 * M * K * N
    for row in found.values():
        flops = row.pop("flops")
        row["tflops"] = flops / row["us"] / 1e6 if row["us"] else None
    return sorted(found.values(), key=lambda row: -row["us"])


def _events(step: Callable[[], object], device: str) -> Any:
    """Runs a step twice, the second time under the profiler."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    step()
    with profile(activities=activities, record_shapes=True) as found:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return found.events()
