"""Runs a program: blocks of threads as lanes of numpy arrays, warps in lockstep or in a random order.

A register is an array over all lanes of some blocks of threads. Every lane has its own place in the program, and a
scheduler chooses which lanes execute a block of instructions next: all that stand at the earliest block
("lockstep"), or one warp by chance and perhaps others at the same place ("random"), so that a barrier that is
missing shows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .asynchronous import Copies, Effects, Kind, Products, Transfers
from .formats import UNSIGNED, PTXError
from .memory import GlobalMemory, TensorMap
from .program import Program

Order = Literal["lockstep", "random"]
MOST_LANES = 2048  # at a time
DESCRIPTORS = 1 << 62  # addresses of tensor maps among the parameters


@dataclass(frozen=True)
class Mode:
    """How a run is scheduled."""

    effects: Kind
    order: Order = "lockstep"
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.effects} effects, {self.order} order" + (f", seed {self.seed}" if self.seed else "")


@dataclass(frozen=True)
class Launch:
    """A program, and what it is launched with."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple  # of the parameters: bits of a number, or a TensorMap

    def run(self, memory: GlobalMemory, mode: Mode, most_steps: int = 1_000_000) -> None:
        count = self.grid[0] * self.grid[1] * self.grid[2]
        together = max(1, MOST_LANES // self.threads)
        for first in range(0, count, together):
            blocks = np.arange(first, min(first + together, count))
            with np.errstate(all="ignore"):
                Machine(self, blocks, memory, mode).run(most_steps)


class Machine:
    """The state of some blocks of threads on their way through a program."""

    def __init__(self, launch: Launch, blocks: np.ndarray, memory: GlobalMemory, mode: Mode) -> None:
        self.program, self.memory, self.mode, self.grid = launch.program, memory, mode, launch.grid
        self.blocks, self.threads, self.arguments = blocks, launch.threads, launch.arguments
        self.lanes = len(blocks) * launch.threads
        self.warps = self.lanes // 32
        self.cta = np.repeat(np.arange(len(blocks)), launch.threads)
        self.shared_bytes = max(16, -(-launch.shared_bytes // 16) * 16)
        self.shared = np.full(len(blocks) * self.shared_bytes, 0xFF, np.uint8)  # NaN in every format
        self.local = np.zeros((self.lanes, max(1, self.program.local_bytes)), np.uint8)
        self.registers = [np.zeros(self.lanes, kind) for kind in self.program.register_types]
        self.carry = np.zeros(self.lanes, np.uint64)
        self.random = np.random.default_rng(mode.seed)
        self.effects = Effects(mode.effects, self.random)
        self.copies, self.transfers, self.products = Copies(self), Transfers(self), Products(self)
        self.place = np.zeros(self.lanes, np.int64)  # the block of instructions each lane is at; -1: it has ended
        self.barrier = np.full(self.lanes, -1, np.int64)  # the barrier that a lane waits at; -1: none
        self.stalled = np.zeros(self.lanes, bool)  # waiting for an asynchronous operation
        self._arrived: dict[tuple[int, int], int] = {}

    # ------------------------------------------------------------------ what instructions ask for

    def special(self, name: str) -> np.ndarray:
        register, _, axis = name[1:].partition(".")
        if axis in ("y", "z") and register in ("tid", "ntid", "ctaid"):
            return np.full(self.lanes, int(register == "ntid"), np.uint32)
        values = {
            "tid": np.tile(np.arange(self.threads), len(self.blocks)),
            "ntid": self.threads,
            "ctaid": self.blocks[self.cta],
            "nctaid": self.grid["xyz".index(axis or "x")],
            "laneid": np.arange(self.lanes) % 32,
            "warpid": np.arange(self.lanes) % self.threads // 32,
            "clusterid": 0,
            "cluster_ctarank": 0,
        }
        return np.broadcast_to(np.asarray(values[register], np.uint32), (self.lanes,))

    def warps_of(self, mask: np.ndarray) -> np.ndarray:
        return np.flatnonzero(mask.reshape(-1, 32).any(1))

    def converged(self, mask: np.ndarray, text: str) -> None:
        of_warps = mask.reshape(-1, 32)
        if (of_warps.any(1) != of_warps.all(1)).any():
            raise PTXError(f"only some lanes of a warp execute {text}")

    def check_shared(self, address: np.ndarray, size: int, mask: np.ndarray, text: str) -> np.ndarray:
        """Places in ``self.shared``; an access must lie in the block's allocation, aligned."""
        address = np.where(mask, address, 0)
        if (address < 0).any() or (address + size > self.shared_bytes).any():
            raise PTXError(f"shared access outside of {self.shared_bytes} bytes: {text}")
        if (address % size).any():
            raise PTXError(f"misaligned shared access of {size} bytes: {text}")
        return address + self.cta * self.shared_bytes

    def load(self, space: str, address: np.ndarray, size: int, count: int, mask, text: str) -> list[np.ndarray]:
        """``count`` numbers of ``size`` bytes from each address."""
        if space == "local":
            return list(self._local(address, size, count, mask, text).transpose(1, 0))
        places, view = self._view(space, address, size, count, mask, text)
        return [view[places + k] for k in range(count)]

    def store(self, space: str, address: np.ndarray, size: int, values: list[np.ndarray], mask, text: str) -> None:
        if space == "local":
            stored = self._local(address, size, len(values), mask, text)
            stored[mask] = np.stack(values, 1)[mask]
            rows, columns = self._local_places(address, size, len(values), mask)
            self.local[rows, columns] = np.ascontiguousarray(stored).view(np.uint8)
            return
        places, view = self._view(space, address, size, len(values), mask, text)
        for k, value in enumerate(values):
            view[places[mask] + k] = value[mask]

    def _view(self, space: str, address: np.ndarray, size: int, count: int, mask, text: str):
        if space == "shared":
            places = self.check_shared(address, size * count, mask, text)
            return places // size, self.shared.view(UNSIGNED[size])
        return self.memory.check(address, size * count, mask, text) // size, self.memory.views[size]

    def _local_places(self, address: np.ndarray, size: int, count: int, mask):
        columns = np.where(mask, address, 0)[:, None] + np.arange(size * count)
        return np.arange(self.lanes)[:, None], columns

    def _local(self, address: np.ndarray, size: int, count: int, mask, text: str) -> np.ndarray:
        rows, columns = self._local_places(address, size, count, mask)
        if columns.min() < 0 or columns.max() >= self.local.shape[1]:
            raise PTXError(f"local access outside: {text}")
        return np.ascontiguousarray(self.local[rows, columns]).view(UNSIGNED[size])

    def matrix_rows(self, address: np.ndarray, mask, text: str) -> np.ndarray:
        """Places of the 16-byte rows that lanes of a warp point at. (lanes,) → (warps, 32, 16)"""
        places = self.check_shared(address, 16, mask, text)
        return places.reshape(-1, 32)[..., None] + np.arange(16)

    def tensor_maps(self, address: np.ndarray, mask) -> dict[int, TensorMap]:
        return {lane: self.arguments[(int(address[lane]) - DESCRIPTORS) >> 32] for lane in np.flatnonzero(mask)}

    # ------------------------------------------------------------------ running

    def run(self, most_steps: int) -> None:
        code = self.program.code
        for _ in range(most_steps):
            self.transfers.step(must=False)
            able = (self.place >= 0) & (self.barrier < 0) & ~self.stalled
            if not able.any():
                if (self.place < 0).all():
                    self._check_end()
                    return
                if not self.transfers.step(must=True):
                    raise PTXError(f"{self.program.name} is deadlocked")
                continue
            place, mask = self._choose(able)
            instructions, end = code[place]
            for instruction in instructions:
                with located(self.program.name):
                    instruction(self, mask)
            end(self, mask, place)
        raise PTXError(f"{self.program.name} does not end")

    def _choose(self, able: np.ndarray) -> tuple[int, np.ndarray]:
        if self.mode.order == "lockstep":
            place = int(self.place[able].min())
            return place, able & (self.place == place)
        of_warps = np.where(able, self.place, np.iinfo(np.int64).max).reshape(-1, 32).min(1)
        warp = self.random.choice(np.flatnonzero(able.reshape(-1, 32).any(1)))
        chosen = (of_warps == of_warps[warp]) & (self.random.random(self.warps) < self.random.choice([0, 0.3, 1]))
        chosen[warp] = True
        return int(of_warps[warp]), able & (self.place == of_warps[warp]) & np.repeat(chosen, 32)

    def go(self, mask: np.ndarray, place) -> None:
        np.copyto(self.place, place, where=mask)

    def arrive(self, mask: np.ndarray, identity: np.ndarray, threads: int | None, waits: bool) -> None:
        """bar.sync, or with ``waits`` false bar.arrive: lanes are let go when all threads have arrived."""
        if waits:
            self.barrier[mask] = identity[mask]
        for cta in np.unique(self.cta[mask]):
            own = self.cta == cta
            for number in np.unique(identity[mask & own]):
                arrived = self._arrived.get((cta, number), 0) + int((mask & own & (identity == number)).sum())
                if arrived > (threads or self.threads):
                    raise PTXError(
                        f"{self.program.name}: more threads arrive at barrier {number} than it waits for"
                    )
                if arrived == (threads or self.threads):
                    self.barrier[own & (self.barrier == number)] = -1
                    arrived = 0
                self._arrived[cta, number] = arrived

    def _check_end(self) -> None:
        if any(self.products.queues.values()):
            raise PTXError(f"{self.program.name} ends before a product that it started")
        if self.transfers.pending:
            raise PTXError(f"{self.program.name} ends before a TMA copy that it started")


@contextlib.contextmanager
def located(name: str):
    """Says which kernel an error is of."""
    try:
        yield
    except PTXError as error:
        if str(error).startswith(name):
            raise
        raise PTXError(f"{name}: {error}") from error
