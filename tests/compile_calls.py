"""Compiles, without a GPU, every kernel that calls of the public API launch, and checks what the kernels need.

    python tests/compile_calls.py [--targets sm_90 …] [--calls everyday|all]

The calls go through Triton's own just-in-time path: a fake driver names the target, and takes the place of the
device where a compiled kernel is loaded. The command prints what the kernels use and exits with status 1 where a
kernel does not compile, spills registers, needs more shared memory than the target has, multiplies without the
target's matrix instructions, or has too few buffers for products that run asynchronously. It runs in a process of
its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import disassembly
import torch
import triton
from cases import CASES, LossCase
from fake_device import TARGETS, FakeDriver, Target, compile_only, install
from torch import Tensor
from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

from fused_infonce import cosine_logsumexp, gs_infonce

# Bytes of the stack: four registers. To stay at 128 registers, ptxas stores a few values before the loop over
# features and loads them after it, which costs next to nothing. Inside an inner loop nothing may spill.
SPILL_LIMIT = 16
# What a tile costs a warp beside its products, in the kernel that most tiles of large batches go through:
# instructions, comparisons and selections among them, registers.
EPILOGUE_LIMITS = {"exp_similarity": (600, 10, 200)}
EVERYDAY_ROWS = (1, 63, 64, 512, 1000, 1024, 4096, 32768)
EVERYDAY_DIM = 768
RAGGED = ((1, 1), (2, 3), (63, 33), (1025, 200), (2500, 1023), (8192, 64), (300, 8192))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32, "tf32": torch.float32}


def amd_resources(binary: bytes) -> tuple[int, int]:
    """Vector registers per thread, and bytes of those spilled; scalar registers spill into vector registers."""

    def count(name: bytes) -> int:
        at = binary.index(b"." + name) + len(name) + 1  # an entry of a MessagePack map, in a note of the ELF file
        size = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(binary[at], 0)
        return int.from_bytes(binary[at + 1 : at + 1 + size], "big") if size else binary[at]

    return count(b"vgpr_count"), 4 * count(b"vgpr_spill_count")


@dataclass(frozen=True)
class Call:
    """A call of the public API, forward and backward."""

    options: str  # a name in OPTIONS
    rows: int
    dim: int
    dtype: str  # a name in DTYPES

    def __str__(self) -> str:
        return f"{self.options}, N = {self.rows}, D = {self.dim}, {self.dtype}"

    @property
    def has_plain_tiles(self) -> bool:
        """Whether most of its tiles are large and have no mask."""
        return self.options == "info_nce" and self.rows >= 4096 and self.dtype == "bf16"

    def run(self) -> None:
        case, frozen = OPTIONS[self.options]
        N, D, dtype = self.rows, self.dim, DTYPES[self.dtype]
        torch.backends.mkldnn.matmul.fp32_precision = "tf32" if self.dtype == "tf32" else "ieee"

        def make(n: int, name: str = "", features: int = D) -> Tensor:  # of zeros: memory that nobody touches
            return torch.zeros(n, features, dtype=dtype, requires_grad=bool(name) and name not in frozen)

        options = {"num_noise": 0, **case.options}
        inputs = [make(N, "anchors"), make(N, "positives")]
        if case.negatives:
            inputs.append(make(case.negatives * N, "negatives"))
        if case.queue:
            options["queue"] = make(QUEUE, "queue")
        if options.get("noise") == "given":
            options["noise"] = make(100)
        if options.get("temperature") == "learned":
            options["temperature"] = torch.tensor(0.05, requires_grad=True)
        if case.ids:
            options["ids"] = torch.arange(N)
            if case.negatives:
                options["negative_ids"] = torch.arange(case.negatives * N)
        if case.guide:
            lengths = [len(x) for x in (*inputs, *([options["queue"]] if case.queue else []))]
            options["guide"] = [make(n, features=384) for n in lengths]
        if self.options == WEIGHTS_OF_COLUMNS:
            loss = cosine_logsumexp(*inputs, log_weights=torch.zeros(N), backend="triton")
        else:
            loss = gs_infonce(*inputs, backend="triton", **options)
        if loss.requires_grad:
            loss.sum().backward()


QUEUE = 128  # rows
WEIGHTS_OF_COLUMNS = "log-sum-exp, weights of columns"
EVERYTHING = LossCase(
    {"symmetric": True, "reduction": "none", "hard_negative_weight": 1.0, "filter_margin": 0.05},
    negatives=1, queue=True, ids=True,
)  # fmt: skip
# Every option set of the tests, and what else changes the code of a kernel: which inputs need no gradient, a
# temperature that does, every mask at once, and chunks of rows.
# Own hard negatives launch no kernel: they are a constant of the rows, as expected noise is.
OPTIONS: dict[str, tuple[LossCase, tuple[str, ...]]] = {
    n: (case, ()) for n, case in CASES.items() if not case.own
} | {
    "no gradient": (LossCase(), ("anchors", "positives")),
    "frozen positives": (LossCase(), ("positives",)),
    "frozen anchors": (LossCase(), ("anchors",)),
    "frozen queue": (LossCase(queue=True, ids=True), ("queue",)),
    "learned temperature": (LossCase({"temperature": "learned"}), ()),
    "learned temperature, symmetric": (LossCase({"temperature": "learned", "symmetric": True}), ()),
    "offset, weights": (LossCase({"temperature": 0.02, "hard_negative_weight": 2.0}, negatives=1), ()),
    "two sweeps, ids": (LossCase({"temperature": 0.002, "hard_negative_weight": 1.0}, negatives=1, ids=True), ()),
    "everything": (EVERYTHING, ()),
    "everything, guide": (replace(EVERYTHING, guide=True), ()),
    "guide, symmetric, none": (LossCase({"symmetric": True, "reduction": "none"}, guide=True), ()),
    WEIGHTS_OF_COLUMNS: (LossCase(), ()),
    "small workspace": (LossCase({"workspace_bytes": 1 << 20, "num_noise": 192}), ()),
    "small workspace, symmetric": (LossCase({"workspace_bytes": 1 << 20, "symmetric": True}), ()),
}


def everyday_calls() -> Iterator[Call]:
    for rows in EVERYDAY_ROWS:
        for options in OPTIONS:
            yield Call(options, rows, EVERYDAY_DIM, "bf16")
    for rows in (512, 1024, 2048):
        for dtype in ("fp16", "ieee", "tf32"):
            yield Call("info_nce", rows, EVERYDAY_DIM, dtype)


def all_calls() -> Iterator[Call]:
    for rows, dim in (*((rows, EVERYDAY_DIM) for rows in EVERYDAY_ROWS), *RAGGED):
        for dtype in DTYPES:
            for options in OPTIONS:
                yield Call(options, rows, dim, dtype)


@dataclass
class Compiled:
    """A kernel, the calls that launch it, and what is wrong with it."""

    name: str
    kernel: object  # Triton's promise of a compiled kernel
    calls: list[Call] = field(default_factory=list)
    registers: int = 0
    spilled_bytes: int = 0
    shared_memory: int = 0
    epilogue: tuple[int, int] | None = (
        None  # instructions after a tile's products, comparisons and selections of them
    )
    problems: list[str] = field(default_factory=list)


class InspectingDriver(FakeDriver):
    """Says what a kernel needs when it is loaded."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        resources = amd_resources if TARGETS[device].gpu.backend == "hip" else disassembly.nvidia_resources
        registers, spilled_bytes = resources(binary)
        return 1, 1, registers, spilled_bytes // 4, 1024


class Compiler:
    """Compiles what calls launch, on all cores. There is one per process, made before any kernel is imported."""

    def __init__(self) -> None:
        self.driver = InspectingDriver(TARGETS[0])
        install(self.driver, check_shapes)
        self.current: Call | None = None
        self.found: dict[int, Compiled] = {}
        compile_only(self.note)

    def note(self, function: JITFunction, kernel: object, grid: tuple[int, ...], arguments: dict) -> None:
        if not 0 < grid[0] < 1 << 31:
            raise ValueError(f"{function.__name__} is launched with {grid[0]} programs")
        entry = self.found.setdefault(id(kernel), Compiled(function.__name__.removesuffix("_kernel"), kernel))
        entry.calls.append(self.current)

    def compile(self, target: Target, calls: list[Call]) -> tuple[list[Compiled], list[str]]:
        """The kernels of these calls, and what failed before there was a kernel."""
        self.driver.target, self.found, failed = target, {}, []
        with ThreadPoolExecutor(os.cpu_count()) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for self.current in calls:
                try:
                    self.current.run()
                except Exception as error:
                    failed.append(f"{self.current}: {type(error).__name__}: {error}")
        for entry in self.found.values():
            inspect(entry, target)
        return list(self.found.values()), failed


def check_shapes(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Stands for a product of cuBLAS."""
    if (a.shape[0], b.shape[1], a.shape[1]) != (*out.shape, b.shape[0]):
        raise ValueError(f"a product of {tuple(a.shape)} and {tuple(b.shape)} is not {tuple(out.shape)}")


def inspect(entry: Compiled, target: Target) -> None:
    """Loads the kernel as a launch would, and looks at what it needs."""
    try:
        kernel = entry.kernel.result()
        entry.shared_memory = kernel.metadata.shared
        kernel.run  # noqa: B018 (loads the kernel, and raises where that needs more than the device has)
    except Exception as error:
        entry.problems.append(f"{type(error).__name__}: {error}")
        return
    on_amd = target.gpu.backend == "hip"
    assembly = kernel.asm["amdgcn" if on_amd else "ptx"]
    entry.registers, entry.spilled_bytes = kernel.n_regs, 4 * kernel.n_spills
    if (
        not on_amd
    ):  # the stack may also hold arrays of the program, such as those of the cosine's argument reduction
        arrays = re.findall(r"\.local .*\[(\d+)\];", assembly)
        entry.spilled_bytes = max(0, entry.spilled_bytes - sum(-(-int(size) // 8) * 8 for size in arrays))
    if entry.spilled_bytes > (0 if on_amd else SPILL_LIMIT):
        entry.problems.append(f"spills {entry.spilled_bytes} bytes")
    elif entry.spilled_bytes > 0 and disassembly.uses_stack_in_inner_loop(disassembly.disassembled(kernel.kernel)):
        entry.problems.append(f"spills {entry.spilled_bytes} bytes inside a loop")
    if target.name == "sm_90" and any(call.has_plain_tiles for call in entry.calls):
        entry.problems += wide_epilogue(entry, disassembly.disassembled(kernel.kernel))
    for product, pending, buffers in buffers_of_pending_products(kernel.asm.get("ttgir", "")):
        if len(set(buffers)) > 1 or min(buffers) <= pending:
            entry.problems.append(
                f"has {buffers} buffers for the operands of {product}, {pending} of which are pending"
            )
    pattern = matrix_instruction(kernel.src, target)
    if pattern is not None and not re.search(pattern, assembly):
        entry.problems.append(f"has no {pattern}")


def wide_epilogue(entry: Compiled, assembly: str) -> Iterator[str]:
    """Says where a kernel needs more than ``EPILOGUE_LIMITS``."""
    if entry.name in EPILOGUE_LIMITS:
        path = disassembly.epilogue(assembly)
        found = len(path), sum(name.startswith(("ISETP", "FSEL")) for name in path), entry.registers
        entry.epilogue = found[:2]
        for what, number, most in zip(
            ("instructions after its products", "comparisons and selections there", "registers"),
            found, EPILOGUE_LIMITS[entry.name], strict=True,
        ):  # fmt: skip
            if number > most:
                yield f"has {number} {what}, more than {most}"


def buffers_of_pending_products(ttgir: str) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Yields products that run on beside the next copies: result, how many may run, and buffers of each operand.

    An operand in shared memory goes back, through views, to an allocation of as many tiles as there are buffers. A
    copy must not overwrite a tile that a product still reads. Operands in registers are left out.
    """
    lines = ttgir.splitlines()

    def definition(name: str, before: int) -> tuple[str, int]:
        """The value's definition: the last one above, for regions beside each other use the same names."""
        for at in range(before - 1, -1, -1):
            if found := re.match(rf"\s*{re.escape(name)}(?::\d+)? = (.*)", lines[at]):
                return found[1], at
        return "", 0

    def buffers(name: str, before: int) -> int | None:
        text, at = definition(name, before)
        if view := re.match(r"ttg\.memdesc_\w+ (%\w+)", text):
            return buffers(view[1], at)
        if memory := re.match(r"ttg\.local_alloc .*!ttg\.memdesc<([\dx]+)x\w+,", text):
            shape = memory[1].split("x")
            return int(shape[0]) if len(shape) > 2 else 1
        return None

    for at, line in enumerate(lines):
        wait = re.search(r"ttng\.warp_group_dot_wait (%\w+).*\{pendings = (\d+)", line)
        if wait and int(wait[2]) > 0:
            text, place = definition(wait[1], at)
            operands = re.match(r"ttng\.warp_group_dot (%\w+), (%\w+),", text).groups()
            counts = [buffers(operand, place) for operand in operands]
            yield wait[1], int(wait[2]), tuple(x for x in counts if x is not None)


def matrix_instruction(source: object, target: Target) -> str | None:
    """A pattern of the instruction that the kernel's products should be made of; None where there are no such."""
    names = source.fn.arg_names
    if "PRECISION" not in names:
        return None
    constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    if constants["PRECISION"] == "ieee" and "fp32" in source.signature[names[0]]:
        return None
    rows = constants.get("BLOCK_N", constants.get("BLOCK_M"))
    return target.matrix_instruction if rows >= 64 else target.small_matrix_instruction


def table(found: list[Compiled], target: Target) -> list[str]:
    """The most that the variants of each kernel use, a line per kernel."""
    kernels = defaultdict(list)
    for entry in found:
        kernels[entry.name].append(entry)
    return [
        f"{target.name:7} {name:20} {len(entries):8} {max(x.registers for x in entries):9} "
        f"{max(x.spilled_bytes for x in entries):7} {max(x.shared_memory for x in entries):13}"
        for name, entries in sorted(kernels.items())
    ]


def compile_for(compiler: Compiler, target: Target, calls: list[Call]) -> tuple[list[str], list[str]]:
    """A table of resources and the problems found, a line each."""
    start = time.monotonic()
    found, problems = compiler.compile(target, calls)
    for entry in found:
        problems += [f"{entry.name} ({entry.calls[0]}; {len(entry.calls)} launches): {x}" for x in entry.problems]
    lines = table(found, target)
    for name, (count, masks) in {entry.name: entry.epilogue for entry in found if entry.epilogue}.items():
        lines.append(f"{target.name:7} {name}: {count} instructions after a tile's products, {masks} of masks")
    lines.append(f"{target.name:7} {len(found)} kernels in {time.monotonic() - start:.0f} s")
    return lines, [f"{target.name} {problem}" for problem in problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [target.name for target in TARGETS]
    parser.add_argument("--targets", nargs="+", choices=names, default=names, help="GPUs to compile for")
    parser.add_argument(
        "--calls", choices=("everyday", "all"), default="all", help="everyday: those that the test suite compiles"
    )
    args = parser.parse_args()
    calls = list(everyday_calls() if args.calls == "everyday" else all_calls())
    compiler, problems = Compiler(), []
    print(f"triton {triton.__version__}, {len(calls)} calls; the most that any variant of a kernel uses:")
    print(f"{'target':7} {'kernel':20} variants registers spilled shared memory", flush=True)
    for target in (x for x in TARGETS if x.name in args.targets):
        lines, more = compile_for(compiler, target, calls)
        print("\n".join(lines), flush=True)
        problems += more
    for problem in problems:
        print(f"problem: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
