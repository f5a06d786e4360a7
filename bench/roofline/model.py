"""The time of launches that counting predicts: the limits of a GPU, and a launch's time between them.

Everything here is a prediction. A launch takes the longest of what its limits allow:

    memory        bytes, each tensor once, at the memory's rate
    products      FLOPs of whole tiles at the rate of the matrix units
    instructions  of all warps, at four a clock and multiprocessor
    exponentials  at sixteen a clock and multiprocessor
    L2            operands of every tile at the cache's rate

A multiprocessor that holds one program does a tile's products and what follows them one after the other: their
times are added, and with them the time until the first products start. With two or more programs they overlap. A
launch takes as many rounds of tiles as the multiprocessor with the most tiles has. A call takes the sum of its
launches, with a gap after each. The latency of a dependent chain of instructions is not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fused_infonce.tiled.chunks import TILE_FEATURES, TILE_ROWS, waves

# Shares of the data sheets' rates that are reached. One H200: products of cuBLAS in bf16 780 of 989 TFLOP/s,
# copies 4.3 of 4.8 TB/s. Assumed of the other GPUs.
LIBRARY_SHARE = 780 / 989
MEMORY_SHARE = 4.3 / 4.8
KERNEL_SHARE = 0.9 * LIBRARY_SHARE  # the main loop of a Triton product: published figures are 86 to 90 % of cuBLAS
ISSUE = 4  # instructions of a warp that a multiprocessor issues in a clock (CUDA programming guide)
EXPONENTIALS = 16  # per clock and multiprocessor (CUDA programming guide, table of arithmetic instructions)
L2_BYTES = 5120  # per clock, of the whole GPU: the A100's by NVIDIA's description of it; assumed of the others
FILL = 1000  # clocks from the start of a tile to its first product: copies and barriers; assumed
GAP = 2.5e-6  # seconds between two launches that depend on each other; assumed
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor (CUDA programming guide)
RESERVED_SHARED = 1024  # bytes of shared memory that each program takes beside its own
WARP = 32


@dataclass(frozen=True)
class GPU:
    """Figures of NVIDIA's data sheets, of the modules with SXM sockets."""

    name: str
    target: str
    multiprocessors: int
    product_rate: float  # FLOP/s of dense products in bf16 or fp16
    flops_per_clock: int  # of one multiprocessor
    memory: int  # bytes
    memory_rate: float  # bytes/s
    shared: int  # bytes of a multiprocessor's shared memory

    @property
    def clock(self) -> float:
        """Of the data sheet's product rate, 1/s."""
        return self.product_rate / (self.multiprocessors * self.flops_per_clock)


GPUS = {
    "a100": GPU("A100 80 GB", "sm_80", 108, 312e12, 2048, 80 << 30, 2.04e12, 164 << 10),
    "h100": GPU("H100", "sm_90", 132, 989e12, 4096, 80 << 30, 3.35e12, 228 << 10),
    "h200": GPU("H200", "sm_90", 132, 989e12, 4096, 141 << 30, 4.8e12, 228 << 10),
}


@dataclass
class Phase:
    """The launches of one kind in a call. ``instructions``: of all warps; None: those of cuBLAS or torch."""

    phase: str
    launches: int = 0
    flops: int = 0
    bytes: int = 0
    instructions: int | None = None
    per_tile: str = ""  # instructions of a warp: steps × instructions of a step + others
    limit: str = ""  # of the launch that takes the longest
    predicted_ms: float = 0.0


def phases(launches: Iterable[dict[str, Any]], gpu: GPU) -> list[Phase]:
    """Returns the phases of a call, in the order of their first launches."""
    found: dict[str, Phase] = {}
    longest: dict[str, float] = {}
    for launch in launches:
        phase = found.setdefault(launch["phase"], Phase(launch["phase"]))
        spent, limit = seconds(launch, gpu)
        phase.launches += 1
        phase.flops += launch["flops"]
        phase.bytes += launch["bytes"]
        phase.predicted_ms += 1e3 * (spent + GAP)
        if "tiles" in launch:
            phase.instructions = (phase.instructions or 0) + instructions(launch)
            steps = launch["tiles"][0][1]
            phase.per_tile = f"{steps} × {launch['step']} + {launch['rest']}" if steps else str(launch["rest"])
        if spent > longest.get(phase.phase, -1.0):
            phase.limit, longest[phase.phase] = limit, spent
    return list(found.values())


def instructions(launch: dict[str, Any]) -> int:
    """Of all warps of a kernel."""
    a_warp = sum(tiles * (steps * launch["step"] + launch["rest"]) for tiles, steps in launch["tiles"])
    return a_warp * launch["warps"]


def seconds(launch: dict[str, Any], gpu: GPU) -> tuple[float, str]:
    """Returns the predicted seconds of a launch without the gap before it, and what limits it."""
    memory = launch["bytes"] / (gpu.memory_rate * MEMORY_SHARE)
    if "library" in launch:
        work = library_seconds(launch["library"], gpu), "products"
    elif "tiles" not in launch:
        work = 0.0, "memory"
    elif launch["block"] is None:
        work = instructions(launch) / (ISSUE * gpu.multiprocessors * gpu.clock), "instructions"
    else:
        work = tiled_seconds(launch, gpu)
    return max((memory, "memory"), work)


def library_seconds(shape: dict[str, int], gpu: GPU) -> float:
    """Of a product of cuBLAS, (M, K) · (K, D), in tiles of 128 × 256; the last round leaves some units idle."""
    M, K, D = shape["M"], shape["K"], shape["D"]
    flops = 2 * TILE_ROWS * TILE_FEATURES * K * waves(M, D, gpu.multiprocessors)
    return flops * gpu.multiprocessors / (gpu.product_rate * LIBRARY_SHARE)


def tiled_seconds(launch: dict[str, Any], gpu: GPU) -> tuple[float, str]:
    """Of a kernel that multiplies tiles, and the limits of its products and of the rest of its tiles."""
    m, n, k = launch["block"]
    warps, together = launch["warps"], resident(launch, gpu)
    step = {
        "products": 2 * m * n * k / (gpu.flops_per_clock * KERNEL_SHARE),
        "instructions": launch["step"] * warps / ISSUE,
        "L2": (m + n) * k * 2 * gpu.multiprocessors / L2_BYTES,
    }
    rest = {
        "instructions": launch["rest"] * warps / ISSUE,
        "exponentials": launch["exponentials"] * warps * WARP / EXPONENTIALS,
    }
    clocks, limits = 0.0, [max(step, key=step.__getitem__), max(rest, key=rest.__getitem__)]
    count = sum(tiles for tiles, _ in launch["tiles"])
    rounds = math.ceil(count / gpu.multiprocessors) / count
    for tiles, steps in launch["tiles"]:
        if together == 1:
            tile = steps * max(step.values()) + max(rest.values()) + FILL
        else:
            both = {name: steps * step.get(name, 0.0) + rest.get(name, 0.0) for name in step | rest}
            limits = [max(both, key=both.__getitem__)]
            tile = both[limits[0]]
        clocks += rounds * tiles * tile
    return clocks / gpu.clock, ", then ".join(limits)


def resident(launch: dict[str, Any], gpu: GPU) -> int:
    """Programs that a multiprocessor holds: those launched, as shared memory, registers and threads allow."""
    threads = launch["warps"] * WARP
    return max(1, min(
        math.ceil(launch["programs"] / gpu.multiprocessors),
        gpu.shared // (launch["shared"] + RESERVED_SHARED),
        REGISTERS // (launch["registers"] * threads),
        THREADS // threads,
    ))  # fmt: skip


def floor_ms(flops: int, N: int, M: int, D: int, gpu: GPU) -> float:
    """Of the bare products of cuBLAS with ``flops`` in all: each at its rate, or at that of its bytes in bf16."""
    product = 2 * N * M * D
    moved = 2 * (N * M + N * D + M * D)
    return 1e3 * flops / product * max(
        product / (gpu.product_rate * LIBRARY_SHARE), moved / (gpu.memory_rate * MEMORY_SHARE)
    )  # fmt: skip


def assumptions(gpu: GPU) -> dict[str, Any]:
    """Returns the figures that the predictions rest on."""
    shares = {"library_share": LIBRARY_SHARE, "kernel_share": KERNEL_SHARE, "memory_share": MEMORY_SHARE}
    clocks = {"issue": ISSUE, "exponentials": EXPONENTIALS, "l2_bytes": L2_BYTES, "fill": FILL}
    return {**asdict(gpu), "clock": gpu.clock, **shares, **clocks, "gap": GAP}
