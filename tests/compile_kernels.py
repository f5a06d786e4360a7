"""Compiles what the launchers launch, for GPUs that are not here: python tests/compile_kernels.py [target …]

Prints a table of resources, a line a kernel and dtype; exits 1 where something spills, does not fit, or lacks the
target's matrix instructions. Runs in a process of its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_infonce.kernels import common, noise, normalise, products, ratios, settings, similarity

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}
MATRIX_INSTRUCTION = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
    "sm_120": r"mma\.sync",
    "gfx942": r"v_mfma",
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
D = 768
PARKED = 8  # bytes: one register stored and loaded once, as triton 3.6's ptxas does with 40 of 128 in use


@dataclass
class Resources:
    target: str
    dtype: str
    kernel: str
    registers: int
    spills: int
    shared: int
    matrix: bool
    problems: list[str]


def compile_launch(function: JITFunction, target: str, args: tuple, kwargs: dict) -> tuple[object, dict]:
    """The kernel as this launch would have it compiled on the target."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        name, value = parameter.name, values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            shape = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{NAMES[value.base.dtype]}[{shape}]>"
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if special and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options), options


def resources(kernel, target: str) -> tuple[int, int, str]:
    """Registers, bytes spilled and the assembly."""
    if target == "gfx942":
        text = kernel.asm["amdgcn"]

        def count(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        return count("vgpr_count"), count("vgpr_spill_count"), text  # scalar registers spill into vector ones
    from triton.backends.nvidia.compiler import get_ptxas

    ptx = kernel.asm["ptx"]
    architecture = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [get_ptxas(TARGETS[target].arch).path, "-v", f"--gpu-name={architecture}", str(source), "-o"]
        said = subprocess.run(
            [*command, str(Path(folder) / "kernel.cubin")], capture_output=True, text=True
        ).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return int(re.search(r"Used (\d+) registers", said)[1]), int(spilled[1]) + int(spilled[2]), ptx


def launches(target: str, dtype: str):
    """Every launcher once, with the target's settings: (suffix of the kernel's name, call)."""
    precision = dtype if dtype == "tf32" else "ieee"

    def chosen(C: int, T: int) -> settings.Settings:
        return settings.default_settings(target, DTYPES[dtype], precision, C, T)

    yield from product_launches(dtype, 8192, 32768, chosen(8192, 32768), "")
    if dtype in ("bf16", "ieee"):  # small batches have tiles of their own
        yield from product_launches(dtype, 512, 512, chosen(512, 512), ", small")
    if dtype == "bf16":  # the other kernels take rows of every dtype alike
        yield from row_launches(chosen(8192, 32768).row_elements, D)
        for suffix, launch in row_launches(chosen(8192, 32768).row_elements, settings.MAX_D):
            yield f"{suffix}, D = {settings.MAX_D}", launch


def make(*shape: int, of: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def product_launches(dtype: str, C: int, T: int, chosen: settings.Settings, suffix: str):
    operand = DTYPES[dtype]
    gradient = torch.bfloat16 if dtype in ("bf16", "fp16") else torch.float32
    q, k, column = make(C, D, of=operand), make(T, D, of=operand), make(C, 1)
    plain = common.NOTHING_SPECIAL | {"num_positives": C, "HAS_POSITIVES": True}
    every = plain | {
        "row_ids": make(C, of=torch.int64), "column_ids": make(T, of=torch.int64), "num_ids": T, "own_bias": 1.5,
        "num_negatives": C, "HAS_OWN": True, "HAS_IDS": True, "limits": column, "HAS_LIMITS": True,
    }  # fmt: skip
    guided = plain | {
        "limits": column, "guide_rows": q, "guide_columns": k, "guide_features": D, "stride_guide_n": D,
        "stride_guide_t": D, "HAS_LIMITS": True, "HAS_GUIDE": True,
    }  # fmt: skip
    E, both = make(C, T, of=gradient), (column, make(T))
    yield suffix, partial(similarity.exp_similarity, q, k, E, column, 0, plain, chosen.similarity)
    yield (
        f", every option{suffix}",
        partial(similarity.exp_similarity, q, k, E, column, 0, every, chosen.similarity),
    )
    yield f", guide{suffix}", partial(similarity.exp_similarity, q, k, E, column, 0, guided, chosen.guided)
    yield f", sums{suffix}", partial(ratios.ratio_sums, q, k, 0, 0, column, both, plain, chosen.ratios)
    weighted, limits = (column, (*both, make(T))), make(T)
    for name, special, tile in (("tile", every, chosen.ratios), ("tile, guide", guided, chosen.guided)):
        yield (
            f", {name}{suffix}",
            partial(ratios.weighted_ratios, q, k, E, 0, 0, column, *weighted, special, tile, limits),
        )
    keys, anchors = make(T, D, of=gradient), make(C, D + similarity.PAD, of=gradient)
    columns = (E, anchors, make(T, D), make(T), True)
    yield suffix, partial(products.grad_products, E, keys, make(C, D), True, *columns, chosen.products, False)


def row_launches(elements: int, D: int, C: int = 8192):
    x, bf16, fp16 = make(C, D), make(C, D, of=torch.bfloat16), make(C, D, of=torch.float16)
    column, center, vectors = make(C, 1), make(D), tuple(make(C, 1) for _ in range(5))
    outputs = (bf16, make(C, D, of=torch.bfloat16), fp16, vectors, center, make(D), True)
    yield "", partial(normalise.normalise_pairs, x, make(C, D), 28.85, *outputs, elements)
    yield "", partial(normalise.normalise_rows, x, center, bf16, fp16, column, elements)
    side = {"acc": make(C, D), "share": column, "sums": column, "center": center, "factor": column}
    yield "", partial(normalise.normalise_backward, x, column, side, x, column, side, make(1), 0.5, elements)
    yield "", partial(noise.sample_noise, make(1, of=torch.int64), 0, center, bf16, None)
    anchors = make(C, D + similarity.PAD, of=torch.bfloat16)
    closed = (column, column, column, column, vectors[:4], 0, x, column, center, anchors)
    for decoupled, suffix in ((False, ""), (True, ", decoupled")):
        yield suffix, partial(similarity.close_rows, make(C, 128), *closed, decoupled)
    yield "", partial(similarity.centered_anchors, x, column, center, 0, bf16)


def measure(target: str, dtype: str) -> list[Resources]:
    found = []
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    common_programs = {module: module.num_programs for module in (similarity, ratios, normalise)}
    run = JITFunction.run
    for suffix, launch in launches(target, dtype):

        def record(function, *args, grid, warmup, suffix=suffix, **kwargs):
            kernel, _ = compile_launch(function, target, args, kwargs)
            registers, spills, text = resources(kernel, target)
            matrix = re.search(MATRIX_INSTRUCTION[target], text) is not None
            shared = kernel.metadata.shared
            problems = []
            if spills > (0 if TARGETS[target].backend == "hip" else PARKED):  # there a count of registers
                problems.append(f"{spills} bytes spilled")
            if shared > SHARED_LIMIT[target]:
                problems.append(f"{shared} bytes of shared memory, {SHARED_LIMIT[target]} are there")
            is_product = function.__name__ in ("exp_similarity_kernel", "ratios_kernel", "grad_products_kernel")
            if is_product and dtype != "ieee" and not matrix:
                problems.append(f"no {MATRIX_INSTRUCTION[target]}")
            name = function.__name__.removesuffix("_kernel") + suffix
            found.append(Resources(target, dtype, name, registers, spills, shared, matrix, problems))

        JITFunction.run = record
        try:
            for module in common_programs:
                module.num_programs = lambda device: 132
            launch()
        finally:
            JITFunction.run = run
            for module, original in common_programs.items():
                module.num_programs = original
    return found


def main() -> int:
    targets = [x for x in sys.argv[1:] if x != "--json"] or list(TARGETS)
    found = [line for target in targets for dtype in DTYPES for line in measure(target, dtype)]
    print(f"triton {triton.__version__}, D = {D}")
    print(f"{'target':7} {'dtype':5} {'kernel':36} {'registers':>9} {'spills':>6} {'shared':>7} matrix  problems")
    for x in found:
        print(
            f"{x.target:7} {x.dtype:5} {x.kernel:36} {x.registers:9} {x.spills:6} {x.shared:7} "
            f"{'yes' if x.matrix else '-':6}  {'; '.join(x.problems)}"
        )
    if "--json" in sys.argv:
        print(json.dumps([asdict(x) for x in found]))
    return int(any(x.problems for x in found))


if __name__ == "__main__":
    assert common.__doc__
    raise SystemExit(main())
