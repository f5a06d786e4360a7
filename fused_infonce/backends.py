"""Which backend a call runs on, and why."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import platform
from typing import Literal

import torch

from .config import Backend

log = logging.getLogger("fused_infonce")

MAX_TRITON_D = 8192
_MIN_CAPABILITY = (8, 0)
_logged: set[str] = set()


def choose_backend(
    backend: Backend, device: torch.device, dtype: torch.dtype, D: int
) -> Literal["triton", "torch", "reference"]:
    """``"auto"`` resolved: the kernels where they run, else torch.

    ValueError: the kernels were asked for and cannot run; it says what is missing.
    """
    if backend == "torch" or backend == "reference":
        return backend
    if backend == "auto" and device.type == "cpu":  # whatever there is of Triton: its interpreter is for tests
        _log_once("backend 'torch' for cpu tensors: the Triton kernels need tensors on a GPU")
        return "torch"
    missing = _missing_for_triton(device, dtype, D)
    if backend == "triton":
        if missing is not None:
            raise ValueError(f"backend='triton' cannot run this call: {missing}; use backend='auto' or 'torch'")
        return "triton"
    chosen: Literal["triton", "torch"] = "triton" if missing is None else "torch"
    reason = f"backend '{chosen}' for {device.type} tensors"
    if chosen == "torch":
        reason += f": {missing}"
    _log_once(reason)
    return chosen


def _log_once(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        log.info(reason)


@functools.cache  # looking for a package asks the file system, which takes as long as a small loss
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _missing_for_triton(device: torch.device, dtype: torch.dtype, D: int) -> str | None:
    if not _has_triton():
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return "the Triton kernels need tensors on a GPU, these are on the CPU"
    if device.type not in ("cuda", "cpu"):
        return f"the Triton kernels run on CUDA and ROCm GPUs, these tensors are on {device}"
    if device.type == "cuda" and not torch.version.hip:
        capability = _capability(device)
        if capability < _MIN_CAPABILITY:
            return f"the Triton kernels need compute capability 8.0 or newer, {device} has {capability}"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if D > MAX_TRITON_D:
        return f"the Triton kernels take at most {MAX_TRITON_D} features, not {D}"
    return None


@functools.cache
def multiplies_faster(dtype: torch.dtype, device_type: str) -> bool:
    """Whether products of bf16 or fp16 matrices take less time than those of fp32.

    On x86 CPUs this depends on the instructions. Time of the three products of N = 2048, D = 768 as a multiple of
    fp32's (torch 2.13, two cores): bf16 0.23 with AVX512-BF16 on AMD Zen 5 and 1.7 on Intel without AMX; fp16 1.05
    with AVX512-FP16, and above 70 without it.
    """
    if device_type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if torch.cpu._is_amx_tile_supported():
        return True
    fast_avx512 = torch.cpu._is_avx512_bf16_supported() and _cpu_vendor() == "AuthenticAMD"
    return dtype == torch.bfloat16 and fast_avx512


def _cpu_vendor() -> str:
    """The processor's vendor as Linux names it; empty elsewhere."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return ""
