"""Launch settings: fixed values, picked by target, dtype and sizes; the search for better ones lives in bench/."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

_CPU_PRODUCTS = torch.backends.mkldnn.matmul  # found once: each look goes through modules that fake attributes
_CUDA_PRODUCTS = torch.backends.cuda.matmul
MIN_WORKSPACE = 256 << 20  # bytes
MAX_D = 8192  # features that a program of the row kernels holds in registers


@dataclass(frozen=True, slots=True)
class Tile:
    """A tiled product: tiles of block_m × block_n, block_k of the summed dimension at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False  # tensor-map loads, where strides allow
    warp_specialize: bool = False
    group: int = 8  # tiles of rows that share the columns in the cache
    per_sm: int = 1  # programs of it that a multiprocessor is to hold


@dataclass(frozen=True, slots=True)
class Settings:
    similarity: Tile  # exponentiated similarity of one sweep
    ratios: Tile  # both kernels of two sweeps
    products: Tile  # gradient products
    library_products: bool  # gradient products by torch.mm (cuBLAS) and not by the kernel
    row_elements: int = 4096  # elements of one input that a program of the row kernels holds

    @property
    def guided(self) -> Tile:
        """Where a guide's product takes a second accumulator."""
        return replace(self.ratios, block_n=max(16, self.ratios.block_n // 2))


# bf16 and fp16 operands. Shared memory: 163 KiB on sm_80, 227 on sm_90 and sm_100, 99 on sm_120, 64 on gfx942.
_HALF = {
    "sm_80": Settings(Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 4), True),
    "sm_90": Settings(
        Tile(128, 256, 64, 8, 3, tma=True), Tile(128, 128, 64, 8, 3, tma=True), Tile(128, 128, 64, 8, 3), True
    ),
    "sm_100": Settings(
        Tile(128, 128, 64, 8, 4, tma=True), Tile(128, 64, 64, 8, 3, tma=True), Tile(128, 128, 64, 8, 3), True
    ),
    "sm_120": Settings(
        Tile(128, 128, 32, 8, 3, tma=True), Tile(128, 128, 32, 8, 2, tma=True), Tile(128, 128, 32, 8, 3), True
    ),
    "gfx942": Settings(Tile(128, 128, 64, 8, 2), Tile(128, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2), False),
    "interpreter": Settings(Tile(16, 32, 16, 4, 1), Tile(16, 16, 32, 4, 1), Tile(16, 32, 16, 4, 1), False, 256),
}
# fp32 operands: tf32 on the matrix units, or plain multiply-adds.
_FULL = {
    "tf32": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 8, 3), Tile(64, 128, 32, 8, 3)),
    "ieee": (Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2)),
}


def default_settings(target: str, dtype: torch.dtype, precision: str, rows: int, columns: int) -> Settings:
    """For rows × columns results of products in ``dtype``; precision: of fp32 products, "ieee" or "tf32"."""
    found = _HALF.get(target) or _HALF["sm_80"]
    if target == "interpreter":
        return found
    small = (
        rows * columns <= 1 << 20
    )  # few tiles: small ones keep more of the device at work, and one launch is less
    if dtype == torch.float32:
        if small:
            tile = Tile(32, 32, 32, 4, 2, per_sm=4)
            return Settings(tile, tile, tile, False)
        if target in ("sm_120", "gfx942") and precision == "tf32":  # little shared memory
            tiles = (Tile(64, 128, 32, 8, 2), Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2))
        else:
            tiles = _FULL[precision]
        return Settings(*tiles, found.library_products)
    if small:
        tile = Tile(64, 64, 64 if target != "sm_120" else 32, 4, 2, per_sm=4)
        return Settings(tile, tile, tile, False)
    return found


def fp32_products(device: torch.device) -> str:
    """How torch was told to multiply fp32 there: "ieee", or "tf32" for anything that rounds."""
    # Whichever of torch's three ways it was told; "none": no way, which is exact.
    told = (_CPU_PRODUCTS if device.type == "cpu" else _CUDA_PRODUCTS).fp32_precision
    return "ieee" if told in ("ieee", "none") else "tf32"


def cdiv(a: int, b: int) -> int:
    """How many blocks of b hold a."""
    return -(-a // b)


@functools.cache
def target_of(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{0 if major != 8 else minor}" if f"sm_{major}{minor}" not in _HALF else f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """As many programs a persistent kernel has, where a multiprocessor holds one."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def workspace_of(device: torch.device) -> int:
    """Bytes of the default workspace: a fortieth of the device's memory, 2 GiB of 80.

    Of all its memory and not of what is free, so that two runs have the same chunks, and the same bits.
    """
    return workspace_for(0 if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory)


def workspace_for(memory: int) -> int:
    """Bytes of the default workspace on a device with ``memory`` bytes."""
    return max(MIN_WORKSPACE, memory // 40)
