"""A device that is not there: Triton compiles for it and loads kernels on it; a subclass says what a launch does.

Only a process whose kernels are compiled, and not interpreted, can use it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fused_infonce.kernels
from fused_infonce.kernels import settings


@dataclass(frozen=True)
class Target:
    """A GPU as far as compiling for it goes."""

    name: str
    gpu: GPUTarget
    shared_memory: int  # bytes that a program may use
    multiprocessors: int  # of a GPU of this kind
    matrix_instruction: str  # a pattern in the assembly
    small_matrix_instruction: str = r"mma\.sync"  # of tiles with fewer than 64 rows


TARGETS = [
    Target("sm_80", GPUTarget("cuda", 80, 32), 166912, 108, r"mma\.sync"),
    Target("sm_90", GPUTarget("cuda", 90, 32), 232448, 132, r"wgmma\.mma_async"),
    Target("sm_100", GPUTarget("cuda", 100, 32), 232448, 148, r"tcgen05\.mma"),
    Target("sm_120", GPUTarget("cuda", 120, 32), 101376, 170, r"mma\.sync"),
    Target("gfx942", GPUTarget("hip", "gfx942", 64), 65536, 304, r"v_mfma", r"v_mfma"),
]


class FakeDriver:
    """Takes the place of the driver of a GPU."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = self

    def get_current_device(self) -> int:
        return TARGETS.index(self.target)  # Triton keeps kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": TARGETS[device].shared_memory}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, Any, int, int, int]:
        """Returns a module, a function, registers, spilled words of 4 bytes, and the most threads of a program."""
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Returns a function that launches the kernel."""
        return lambda *arguments: None


def passed_arguments(signature: Iterable[Any], values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yields type and value of what a compiled kernel takes: tuples are taken apart, constants left out."""
    for kind, value in zip(signature, values, strict=True):
        if isinstance(kind, tuple):
            yield from passed_arguments(kind, value)
        elif kind != "constexpr":
            yield kind, value


def install(fake: FakeDriver, library_product: Callable[[Tensor, Tensor, Tensor, bool], None]) -> None:
    """Lets tensors of the CPU pass for tensors of the device; to be called before a kernel is imported.

    library_product: stands for products by cuBLAS, of which a CPU has none with an output of another dtype.
    """
    driver.set_active(fake)
    settings.target_of = lambda device: fake.target.name
    settings.multiprocessors = lambda device: fake.target.multiprocessors
    for module in pkgutil.iter_modules(fused_infonce.kernels.__path__, "fused_infonce.kernels."):
        importlib.import_module(module.name)
    fused_infonce.kernels.products._library_product = library_product
    # Now that the kernels are made, this does no more than let the package take tensors of the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


def compile_only(note: Callable[[JITFunction, Any, tuple[int, ...], dict[str, Any]], None]) -> None:
    """Lets launches compile a kernel and not run it.

    note: is called with the function, the kernel, the grid, and the arguments by name, constants among them.
    Inside ``triton.AsyncCompileMode`` the kernel is a promise of one.
    """
    launch = JITFunction.run

    def compiled(function: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        kernel = launch(function, *args, grid=grid, warmup=True, **kwargs)
        note(function, kernel, grid, dict(zip(function.arg_names, args, strict=False)) | kwargs)

    JITFunction.run = compiled
