"""What a call of the loss launches on a GPU that is not here, and what its compiled kernels consist of.

    python -m bench.roofline.launches GPU CASE …     cases as JSON; prints a list of launches for each, as JSON

The call goes through the public API and Triton's just-in-time path, on the fake device of ``tests/``, so that
chunks, tiles, variants of kernels and products of cuBLAS are those of a real call. Its tensors are zeros in memory
that nobody touches. It runs in a process of its own, which can do nothing else afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import disassembly  # of tests/, as the next ones
import torch
from fake_device import TARGETS, FakeDriver, compile_only, install
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton import AsyncCompileMode

from bench.cases import Batch, Case, run_step
from bench.contact.launchers import Launch, replaced
from bench.roofline.model import GPUS
from fused_infonce import gs_infonce
from fused_infonce.kernels import settings
from fused_infonce.kernels.settings import cdiv

NO_WORK = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.detach")  # operations that launch nothing
Facts = dict[str, Any]


class Recorder(TorchDispatchMode):
    """Notes launches in their order: of kernels, of cuBLAS, and of torch's own operations between launchers.

    Phases have the names that ``bench.contact.launchers`` gives to launchers; torch's operations are one phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Facts] = []
        self.kernels: list[tuple[Facts, Any]] = []  # and Triton's promise of a kernel
        self.current: Launch | None = None

    def launcher(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a launcher that notes what is launched inside; see ``bench.contact.launchers.replaced``."""
        names = function.__code__.co_varnames

        def launch(*args: Any, **kwargs: Any) -> Any:
            if self.current is not None:
                return function(*args, **kwargs)
            self.current = Launch(name, function, dict(zip(names, args, strict=False)) | kwargs)
            try:
                return function(*args, **kwargs)
            finally:
                self.current = None

        return launch

    def kernel(self, function: Any, kernel: Any, grid: tuple[int, ...], arguments: Facts) -> None:
        assert self.current is not None
        facts = {"phase": self.current.name, "flops": self.current.flops, "programs": grid[0]}
        facts |= {"bytes": kernel_bytes(arguments), **tiles(arguments, grid[0])}
        self.launches.append(facts)
        self.kernels.append((facts, kernel))

    def library(self, a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
        """Notes a product of cuBLAS, (M, K) · (K, D)."""
        assert self.current is not None
        (M, K), D = a.shape, b.shape[1]
        moved = sum(x.numel() * x.element_size() for x in (a, b, out, *([out] if add else [])))
        shape = {"M": M, "K": K, "D": D}
        self.launches.append(
            {"phase": self.current.name, "flops": 2 * M * K * D, "bytes": moved, "library": shape}
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(x.alias_info is not None and not x.alias_info.is_write for x in returns)
        if self.current is None and not view and not str(func).startswith(NO_WORK):
            made = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else ()
            given = [*args, *(kwargs or {}).values(), *made]
            moved = sum(x.numel() * x.element_size() for x in given if isinstance(x, Tensor))
            self.launches.append({"phase": "torch", "flops": 0, "bytes": moved, "operation": str(func)})
        return result


def tiles(arguments: Facts, programs: int) -> Facts:
    """Returns the block of a tile (rows, columns, summed) and [tiles, steps of the sum] of each kind of tile.

    The kernels of rows have no products: a tile is the rows that a program holds.
    """
    found = arguments
    if "BLOCK_K" in found:
        block, row_tiles = (found["BLOCK_M"], found["BLOCK_D"], found["BLOCK_K"]), found["row_tiles"]
        steps = (cdiv(found["T"], block[2]), cdiv(found["C"], block[2]))
        return {"block": block, "tiles": [[row_tiles, steps[0]], [programs - row_tiles, steps[1]]]}
    if "BLOCK_T" in found:
        block = (found["BLOCK_N"], found["BLOCK_T"], found["BLOCK_D"])
        count = cdiv(found["N"], block[0]) * cdiv(found["T"], block[1])
        return {"block": block, "tiles": [[count, cdiv(found["D"], block[2])]]}
    return {"block": None, "tiles": [[cdiv(_rows(found), found["BLOCK_N"]), 0]]}


def kernel_bytes(arguments: Facts) -> int:
    """Returns the bytes of a kernel's tensors, each once, and of those that are added to twice.

    Kernels of rows that are launched for a part of the rows read and write that part of a tensor.
    """
    memory: dict[Any, int] = {}
    rows = _rows(arguments) if "BLOCK_T" not in arguments and "BLOCK_K" not in arguments else None
    for name, x in _tensors("", arguments):
        whole = x.numel() * x.element_size()
        part = whole if rows is None or x.ndim < 2 or len(x) <= rows else whole * rows // len(x)
        twice = arguments.get("ADD_ROWS" if name == "acc_rows" else "ADD_COLUMNS") and name.startswith("acc_")
        memory[x.data_ptr(), x.shape] = part * (2 if twice else 1)
    return sum(memory.values())


def _rows(arguments: Facts) -> int:
    return arguments["C"] if "C" in arguments else arguments["N"]


def _tensors(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "base"):  # a descriptor
        yield name, value.base
    elif isinstance(value, (dict, tuple, list)):
        for key, x in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(f"{name}.{key}".lstrip("."), x)


def code(kernel: Any) -> Facts:
    """Returns what a warp executes for a tile, and what a program occupies."""
    step, rest = disassembly.instructions(disassembly.disassembled(kernel.kernel))
    registers, _ = disassembly.nvidia_resources(kernel.kernel)
    found = {"kernel": kernel.metadata.name, "step": len(step), "rest": len(rest), "registers": registers}
    found |= {"exponentials": sum(name.startswith("MUFU.EX2") for name in rest)}
    return found | {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}


def zero_batch(case: Case) -> Batch:
    def rows(n: int) -> Tensor:
        return torch.zeros(n, case.D, requires_grad=case.gradients)

    return Batch(rows(case.N), rows(case.N), rows(case.negatives) if case.negatives else None, 0)


def main(gpu: str, *cases: str) -> None:
    device = GPUS[gpu]
    recorder: Recorder
    settings.workspace_of = lambda _: settings.workspace_for(device.memory)
    install(
        FakeDriver(next(target for target in TARGETS if target.name == device.target)),
        lambda *product: recorder.library(*product),
    )
    compile_only(lambda *launch: recorder.kernel(*launch))
    found, compiled = [], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool):
        for text in cases:
            case, recorder = Case(**json.loads(text)), Recorder()

            def loss(batch: Batch, case: Case = case) -> Tensor:
                options: Facts = {"num_noise": 0, "symmetric": case.mode == "symmetric", "backend": "triton"}
                return gs_infonce(batch.q, batch.k, batch.negatives, temperature=case.temperature, **options)

            batch = zero_batch(case)
            with replaced(recorder.launcher), recorder:
                run_step(loss, batch, case, "cpu")
            found.append(recorder)
    for one in found:
        for facts, promise in one.kernels:
            if id(promise) not in compiled:
                compiled[id(promise)] = code(promise.result())
            facts |= compiled[id(promise)]
    print(json.dumps([one.launches for one in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
