"""Memory that is checked: a device's global memory, and what tensor maps say of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .formats import UNSIGNED, PTXError

GUARD = 512  # bytes between tensors, which nothing may touch


class GlobalMemory:
    """Copies of the tensors' storages, each between guards, at addresses of its own."""

    def __init__(self, storages: dict[int, np.ndarray]) -> None:
        """storages: bytes by the address on the host."""
        self._hosts = storages
        self._starts: dict[int, int] = {}
        at = GUARD
        for host, content in storages.items():
            self._starts[host] = at
            at += -(-len(content) // GUARD) * GUARD + GUARD
        self.bytes = np.zeros(at, np.uint8)
        for host, content in storages.items():
            self.bytes[self._starts[host] : self._starts[host] + len(content)] = content
        self.views = {size: self.bytes.view(dtype) for size, dtype in UNSIGNED.items()}
        self._low = np.array(list(self._starts.values()), np.int64)
        self._high = self._low + np.array([len(content) for content in storages.values()], np.int64)

    def address(self, host: int) -> int:
        """Where a host's pointer into one of the storages points here."""
        for start, content in self._hosts.items():
            if start <= host <= start + len(content):
                return self._starts[start] + host - start
        raise PTXError("a pointer that points into no tensor of this launch")

    def copy_back(self) -> None:
        for host, content in self._hosts.items():
            content[:] = self.bytes[self._starts[host] : self._starts[host] + len(content)]

    def check(self, address: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        """The addresses, 0 where the mask is off; an access of ``size`` bytes must lie in a tensor, aligned."""
        address = np.where(mask, address, 0)
        owner = np.searchsorted(self._low, address, side="right") - 1
        outside = (owner < 0) | (address + size > self._high[np.maximum(owner, 0)])
        if (outside & mask).any():
            lane = int(np.flatnonzero(outside & mask)[0])
            raise PTXError(f"global access outside of every tensor, lane {lane}, {size} bytes: {text}")
        if size & (size - 1) == 0 and (address[mask] % size).any():
            raise PTXError(f"misaligned global access of {size} bytes: {text}")
        return address


@dataclass(frozen=True)
class TensorMap:
    """A host tensor descriptor; sizes from the outermost dimension to the innermost."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements
    box: tuple[int, ...]
    element: int  # bytes
    swizzle: int  # bytes of the swizzle's span; 0: none

    def addresses(self, first: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Which elements of the box that begins at ``first`` lie in the tensor, and all elements' addresses."""
        index = np.indices(self.box).reshape(len(self.box), -1).astype(np.int64)
        index += np.array(first, np.int64)[:, None]
        inside = ((index >= 0) & (index < np.array(self.shape)[:, None])).all(0)
        return inside, self.address + (index * np.array(self.strides)[:, None]).sum(0) * self.element
