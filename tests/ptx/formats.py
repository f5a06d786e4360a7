"""Number formats of PTX as numpy arrays."""

from __future__ import annotations

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
    "pred": np.bool_,
}  # fmt: skip
SMALLEST_NORMAL = np.float32(2.0**-126)


class PTXError(Exception):
    """The program does what PTX forbids, or what this interpreter does not know."""


def of_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def of_f16(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def of_tf32(bits: np.ndarray) -> np.ndarray:
    """What a matrix unit reads of a 32-bit number."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


FROM_HALF = {"bf16": of_bf16, "f16": of_f16}
TO_HALF = {"bf16": to_bf16, "f16": to_f16}


def halves(words: np.ndarray, kind: str) -> np.ndarray:
    """The two numbers of each word, the lower half first. (…) → (…, 2)"""
    return FROM_HALF[kind](np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 2))


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of the same sign, as ``.ftz`` says."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Addresses in shared memory under a swizzle of ``span`` bytes (0: none): 16-byte columns exchanged by row."""
    rows = max(span // 16, 1) - 1
    return address ^ (((address >> 7) & rows) << 4)
