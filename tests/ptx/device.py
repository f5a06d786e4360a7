"""A device whose kernels are executed from their PTX, on CPU tensors; it can keep what was launched."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fake_device import TARGETS, FakeDriver, install, passed_arguments
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor

from .instructions import decode
from .machine import Launch, Mode
from .memory import GlobalMemory, TensorMap
from .program import Program

SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes, by the number that Triton gives a tensor map


@dataclass
class Recorded:
    """A launch, the content of its tensors before, and after it as a right kernel left it."""

    launch: Launch
    storages: list[tuple[int, np.ndarray]]  # addresses on the host and bytes, those of constant arrays among them
    after: list[np.ndarray]

    def replay(self, program: Program, mode: Mode) -> list[np.ndarray]:
        """The content of the tensors after a launch of another version of the program."""
        storages = [(host, content.copy()) for host, content in self.storages]
        memory = GlobalMemory(dict(storages))
        launch = Launch(
            program, self.launch.grid, self.launch.threads, self.launch.shared_bytes, self.launch.arguments
        )
        launch.run(memory, mode, most_steps=20_000)
        memory.copy_back()
        return [content for _, content in storages]


class PTXDriver(FakeDriver):
    """Executes launches; ``mode`` says how."""

    def __init__(self, architecture: str) -> None:
        super().__init__(next(target for target in TARGETS if target.name == architecture))
        self.mode = Mode("early")
        self.launches: list[Recorded] | None = None  # where they are kept, if they are
        self.executed: set[str] = set()  # names of kernels
        self._cache = tempfile.TemporaryDirectory()
        os.environ["TRITON_CACHE_DIR"] = self._cache.name  # of kernels whose binary is not one
        CUDABackend.make_cubin = lambda backend, source, *_: source.encode()  # ptxas is not needed
        install(self, library_product)

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, Program, int, int, int]:
        return 1, decode(Program(binary.decode())), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, program: Program, *rest: Any) -> None:
            values = rest[4:]  # after packed metadata, launch metadata and hooks
            passed = list(passed_arguments(source.signature.values(), values))
            self._launch(program, (x, y, z), passed, metadata)

        return launch

    def _launch(self, program: Program, grid: tuple[int, int, int], passed: list, metadata: Any) -> None:
        storages = {table.ctypes.data: table.view(np.uint8) for table in program.tables.values()}
        for _, value in passed:
            if isinstance(value, (Tensor, TensorDescriptor)):
                tensor = value if isinstance(value, Tensor) else value.base
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                    storages[storage.data_ptr()] = content
        memory = GlobalMemory(storages)
        arguments = lower(passed, list(getattr(metadata, "tensordesc_meta", None) or ()), memory)
        missing = len(program.parameters) - len(arguments)  # pointers to scratch memory, which no kernel here uses
        if not 0 <= missing <= 2 or getattr(metadata, "global_scratch_size", 0):
            raise NotImplementedError(
                f"{program.name} has {len(program.parameters)} parameters, not {len(arguments)}"
            )
        threads = program.threads or 32 * metadata.num_warps
        launch = Launch(program, grid, threads, metadata.shared, (*arguments, *[0] * missing))
        before = (
            [(host, content.copy()) for host, content in storages.items()] if self.launches is not None else []
        )
        launch.run(memory, self.mode)
        memory.copy_back()
        self.executed.add(program.name)
        if self.launches is not None:
            self.launches.append(Recorded(launch, before, [content.copy() for content in storages.values()]))


def lower(passed: list, maps: list[dict], memory: GlobalMemory) -> list[int | TensorMap]:
    """Arguments as the parameters of PTX: addresses, the bits of numbers, and what descriptors consist of."""
    arguments: list[int | TensorMap] = []
    for kind, value in passed:
        if isinstance(value, TensorDescriptor):
            base, of_map = value.base, maps.pop(0)
            arguments.append(
                TensorMap(
                    memory.address(base.data_ptr()), tuple(value.shape), tuple(value.strides),
                    tuple(of_map["block_size"]), of_map["elem_size"], SWIZZLES[of_map["swizzle"]],
                )
            )  # fmt: skip
            arguments += [int(n) for n in (*value.shape, *value.strides)]
        elif isinstance(value, Tensor):
            arguments.append(memory.address(value.data_ptr()) if value.numel() else 0)
        elif kind == "fp32":
            arguments.append(int(np.float32(value).view(np.uint32)))
        else:
            arguments.append(int(value) & (2**64 - 1))
    return arguments


def library_product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Stands for a product of cuBLAS."""
    product = a.float() @ b.float()
    out.copy_(out + product if add else product)
