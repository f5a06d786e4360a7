"""Operations that take effect later than they are issued: cp.async, TMA with mbarriers, and wgmma.

Each may take effect at any time between its issue and the wait for it. ``Effects`` chooses: at once, as late as is
allowed, at random, or so that copies overtake the products that were issued before them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from .formats import FROM_HALF, UNSIGNED, PTXError, halves, of_tf32, swizzled
from .memory import TensorMap

Kind = Literal["early", "late", "overtaking", "random"]


@dataclass
class Effects:
    """When asynchronous operations take effect."""

    kind: Kind
    random: np.random.Generator

    def at_once(self, what: Literal["copy", "product"]) -> bool:
        if self.kind == "random":
            return bool(self.random.random() < 0.5)
        return self.kind == "early" or (self.kind == "overtaking" and what == "copy")


class Copies:
    """cp.async of each warp: copies that are not yet in a group, and groups that are not yet waited for."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.open: list[list] = [[] for _ in range(machine.warps)]
        self.groups: list[deque] = [deque() for _ in range(machine.warps)]

    def issue(self, target, source, size: int, count, mask, text: str) -> None:
        machine = self.machine
        copied = mask & (count > 0)
        if (count[copied] != size).any():
            raise PTXError(f"a copy of a part of its size: {text}")
        source = machine.memory.check(source, size, copied, text)
        target = machine.check_shared(target, size, mask, text)
        for warp in machine.warps_of(mask):
            lanes = np.flatnonzero(mask[32 * warp : 32 * warp + 32]) + 32 * warp
            self.open[warp].append((target[lanes], source[lanes], copied[lanes], size))
            if machine.effects.at_once("copy"):
                self._copy(self.open[warp].pop())

    def _copy(self, copy) -> None:
        target, source, copied, size = copy
        content = self.machine.memory.bytes[source[:, None] + np.arange(size)]
        content[~copied] = 0
        self.machine.shared[target[:, None] + np.arange(size)] = content

    def commit(self, mask) -> None:
        for warp in self.machine.warps_of(mask):
            self.groups[warp].append(self.open[warp])
            self.open[warp] = []

    def wait(self, mask, pending: int) -> None:
        for warp in self.machine.warps_of(mask):
            while len(self.groups[warp]) > pending:
                for copy in self.groups[warp].popleft():
                    self._copy(copy)


@dataclass
class Barrier:
    """An mbarrier in shared memory."""

    count: int
    pending: int
    phase: int = 0
    bytes: int = 0  # of copies that are announced and have not arrived


class Transfers:
    """TMA loads and stores, and the mbarriers that loads signal."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.barriers: dict[tuple[int, int], Barrier] = {}  # by CTA and address
        self.pending: deque = deque()
        self.asked = np.full(machine.lanes, -1, np.int64)  # what each lane last asked in vain

    def barrier(self, cta: int, address: int) -> Barrier:
        if (cta, address) not in self.barriers:
            raise PTXError(f"{self.machine.program.name} uses an mbarrier that was not initialised")
        return self.barriers[cta, address]

    def initialise(self, address, count, mask) -> None:
        for lane in np.flatnonzero(mask):
            n = int(count[lane])
            self.barriers[self.machine.cta[lane], int(address[lane])] = Barrier(n, n)

    def invalidate(self, address, mask) -> None:
        for lane in np.flatnonzero(mask):
            self.barriers.pop((self.machine.cta[lane], int(address[lane])), None)

    def arrive(self, address, arrivals: int, expected, mask) -> None:
        """Some arrivals, and bytes that are expected beside them."""
        for lane in np.flatnonzero(mask):
            barrier = self.barrier(self.machine.cta[lane], int(address[lane]))
            barrier.bytes += int(expected[lane])
            barrier.pending -= arrivals
            if barrier.pending < 0:
                raise PTXError(f"{self.machine.program.name}: more arrivals at an mbarrier than its count")
            self._complete(barrier)

    def _complete(self, barrier: Barrier) -> None:
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.pending, barrier.phase = barrier.count, barrier.phase + 1
            self.machine.stalled[:] = False

    def test(self, address, parity, mask) -> np.ndarray:
        """Whether the phase of this parity is over.

        A lane that asks the same question twice in vain is stalled until something arrives: it waits in a loop.
        """
        done = np.zeros(len(mask), bool)
        for lane in np.flatnonzero(mask):
            barrier = self.barrier(self.machine.cta[lane], int(address[lane]))
            done[lane] = barrier.phase % 2 != int(parity[lane]) % 2
        question = 2 * address + parity % 2
        self.machine.stalled |= mask & ~done & (self.asked == question)
        self.asked = np.where(mask, np.where(done, -1, question), self.asked)
        return done

    def load(self, target, maps, first, barrier, mask) -> None:
        for lane in np.flatnonzero(mask):
            start = [int(x[lane]) for x in reversed(first)]
            self.pending.append((self.machine.cta[lane], int(target[lane]), maps[lane], start, int(barrier[lane])))
            if self.machine.effects.at_once("copy"):
                self._load(self.pending.pop())

    def step(self, must: bool) -> bool:
        """Lets the oldest load arrive, where that has to be or chance wants it; whether one did."""
        if self.pending and (
            must or (self.machine.effects.kind == "random" and self.machine.random.random() < 0.3)
        ):
            self._load(self.pending.popleft())
            return True
        return False

    def _places(self, cta: int, address: int, box: TensorMap, first: list[int]):
        inside, places = box.addresses(first)
        self.machine.memory.check(places, box.element, inside, "a TMA copy")
        local = swizzled(address + np.arange(len(places), dtype=np.int64) * box.element, box.swizzle)
        if address % 128 or local.min() < 0 or local.max() + box.element > self.machine.shared_bytes:
            raise PTXError("a TMA copy to misaligned shared memory, or outside of it")
        return inside, places // box.element, (local + cta * self.machine.shared_bytes) // box.element

    def _load(self, item) -> None:
        cta, address, box, first, barrier = item
        inside, places, local = self._places(cta, address, box, first)
        content = np.zeros(len(places), UNSIGNED[box.element])
        content[inside] = self.machine.memory.views[box.element][places[inside]]
        self.machine.shared.view(UNSIGNED[box.element])[local] = content
        signalled = self.barrier(cta, barrier)
        signalled.bytes -= len(places) * box.element
        self._complete(signalled)

    def store(self, source, maps, first, mask) -> None:
        """Takes effect at once."""
        for lane in np.flatnonzero(mask):
            box, start = maps[lane], [int(x[lane]) for x in reversed(first)]
            inside, places, local = self._places(self.machine.cta[lane], int(source[lane]), box, start)
            content = self.machine.shared.view(UNSIGNED[box.element])[local]
            self.machine.memory.views[box.element][places[inside]] = content[inside]


@dataclass(frozen=True)
class Shape:
    """A wgmma instruction: 64 × n × k, and where its operands are."""

    n: int
    k: int
    kind: str  # of the operands: bf16, f16 or tf32
    accumulators: tuple[int, ...]  # registers
    signs: int
    a_in_registers: bool
    transposed: tuple[bool, bool]
    text: str


@dataclass
class Product:
    """A wgmma that some warps of a warpgroup have issued; it is issued when the fourth warp has."""

    shape: Shape
    operands: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)  # by warp: a, b, scale


class Products:
    """wgmma: products that run beside the warps that issued them, in order within a warpgroup."""

    def __init__(self, machine) -> None:
        self.machine = machine
        self.queues: dict[int, deque[Product]] = defaultdict(deque)  # by warpgroup: those that are not done
        self.done: dict[int, int] = defaultdict(int)
        self.issued = [0] * machine.warps
        self.groups: list[deque] = [deque() for _ in range(machine.warps)]  # how many were issued by each commit

    def issue(self, shape: Shape, a: list[np.ndarray], b: np.ndarray, scale: np.ndarray, mask) -> None:
        ready = []
        for warp in self.machine.warps_of(mask):
            group, lanes = warp // 4, slice(32 * warp, 32 * warp + 32)
            queue, place = self.queues[group], self.issued[warp] - self.done[group]
            self.issued[warp] += 1
            if place == len(queue):
                queue.append(Product(shape))
            if queue[place].shape != shape:
                raise PTXError(f"warps of a warpgroup issue different products: {shape.text}")
            operands = {"a": np.stack([x[lanes] for x in a]), "b": b[lanes], "scale": scale[lanes]}
            if (operands["b"] != b[32 * warp]).any() or (not shape.a_in_registers and len(set(a[0][lanes])) > 1):
                raise PTXError(f"descriptors differ between the lanes of a warp: {shape.text}")
            queue[place].operands[warp] = operands
            if len(queue[place].operands) == 4:
                self.machine.stalled[:] = False
                if self.machine.effects.at_once("product"):
                    ready.append((group, self.issued[warp]))
        self._finish(ready)

    def commit(self, mask) -> None:
        for warp in self.machine.warps_of(mask):
            self.groups[warp].append(self.issued[warp])

    def wait(self, mask, pending: int) -> np.ndarray:
        """Which lanes may go on; those of the others wait until their whole warpgroup has issued the product."""
        go, ready = np.ones(len(mask), bool), []
        for warp in self.machine.warps_of(mask):
            groups, group = self.groups[warp], warp // 4
            if len(groups) <= pending:
                continue
            needed = groups[len(groups) - pending - 1]
            missing = needed - self.done[group]
            if missing > 0 and len(self.queues[group][missing - 1].operands) < 4:
                go[32 * warp : 32 * warp + 32] = False
                continue
            ready.append((group, needed))
            for _ in range(len(groups) - pending):
                groups.popleft()
        self._finish(ready)
        return go

    def _finish(self, ready: list[tuple[int, int]]) -> None:
        """Does the products up to these numbers, those of several warpgroups together where they are alike."""
        needed = dict(ready)
        while needed := {group: n for group, n in needed.items() if self.done[group] < n}:
            shape = self.queues[next(iter(needed))][0].shape
            alike = [group for group in needed if self.queues[group][0].shape is shape]
            self._multiply(shape, [self.queues[group].popleft() for group in alike])
            for group in alike:
                self.done[group] += 1

    def _multiply(self, shape: Shape, products: list[Product]) -> None:
        machine = self.machine
        operands = {warp: found for product in products for warp, found in sorted(product.operands.items())}
        warps = np.array(list(operands))
        cta, quarter = warps // (machine.threads // 32), warps % 4
        b = np.array([x["b"][0] for x in operands.values()])
        scale = np.array([x["scale"][0] for x in operands.values()])
        a = np.stack([x["a"] for x in operands.values()], 1)  # (registers or 1, warps, 32)
        columns = np.broadcast_to(np.arange(shape.n), (len(warps), shape.n))
        right = self._matrix(shape, b, cta, columns, shape.transposed[1])
        if shape.a_in_registers:
            left = fragments(a, shape.kind, shape.k)
        else:
            rows = 16 * quarter[:, None] + np.arange(16)
            left = self._matrix(shape, a[0, :, 0], cta, rows, shape.transposed[0])
        result = np.matmul(left, right.transpose(0, 2, 1)) * np.float32(shape.signs)
        row, column = np.arange(32) // 4, 2 * (np.arange(32) % 4)
        for number, register in enumerate(shape.accumulators):
            part = result[:, row + 8 * (number // 2 % 2), column + 8 * (number // 4) + number % 2]
            content = machine.registers[register].view(np.float32).reshape(-1, 32).copy()
            content[warps] = np.where(scale[:, None], content[warps] + part, part)
            machine.registers[register] = content.ravel().view(np.uint32)

    def _matrix(self, shape: Shape, descriptors, cta, rows, transposed: bool) -> np.ndarray:
        """Rows of the matrix in shared memory that each descriptor stands for. → (warps, rows, k), fp32

        A matrix that is not transposed lies along k, its rows in groups of eight with the stride offset between
        groups. A transposed one lies along its rows, in spans of the swizzle, the leading offset between spans.
        """
        size = 4 if shape.kind == "tf32" else 2

        def bits(first: int, count: int) -> np.ndarray:
            found = (descriptors.astype(np.uint64) >> np.uint64(first)) & np.uint64((1 << count) - 1)
            return found.astype(np.int64)[:, None, None]

        start, leading, stride = 16 * bits(0, 14), 16 * bits(16, 14), 16 * bits(32, 14)
        modes = set(bits(62, 2).ravel().tolist())
        if bits(49, 3).any() or len(modes) != 1:
            raise PTXError(f"descriptors with a base offset or of several swizzles: {shape.text}")
        span = {0: 0, 1: 128, 2: 64, 3: 32}[modes.pop()]
        i, k = rows[:, :, None].astype(np.int64), np.arange(shape.k, dtype=np.int64)
        if transposed:
            if span == 0:
                raise PTXError(f"a transposed matrix without a swizzle: {shape.text}")
            per = span // size
            places = start + i // per * leading + i % per * size + k // 8 * stride + k % 8 * span
        elif span:
            places = start + i // 8 * stride + i % 8 * span + k * size
        else:
            per = 16 // size
            places = start + i // 8 * stride + i % 8 * 16 + k // per * leading + k % per * size
        places = swizzled(places, span)
        if places.max() + size > self.machine.shared_bytes:
            raise PTXError(f"a product reads outside of shared memory: {shape.text}")
        content = self.machine.shared.view(UNSIGNED[size])[
            (places + (cta * self.machine.shared_bytes)[:, None, None]) // size
        ]
        return of_tf32(content) if shape.kind == "tf32" else FROM_HALF[shape.kind](content)


def fragments(registers: np.ndarray, kind: str, k: int) -> np.ndarray:
    """The left operand of a product, as registers hold it. (registers, warps, 32) → (warps, 16, k), fp32"""
    matrix = np.zeros((registers.shape[1], 16, k), np.float32)
    row, column = np.arange(32) // 4, np.arange(32) % 4
    for number, content in enumerate(registers):
        if kind == "tf32":
            matrix[:, row + 8 * (number % 2), column + 4 * (number // 2)] = of_tf32(content)
        else:
            pairs = halves(content, kind)
            for half in range(2):
                matrix[:, row + 8 * (number % 2), 2 * column + half + 8 * (number // 2)] = pairs[..., half]
    return matrix


def right_fragments(registers: np.ndarray, kind: str, k: int) -> np.ndarray:
    """The right operand of mma.sync. (registers, warps, 32) → (warps, k, 8), fp32"""
    matrix = np.zeros((registers.shape[1], k, 8), np.float32)
    column, row = np.arange(32) // 4, np.arange(32) % 4
    for number, content in enumerate(registers):
        if kind == "tf32":
            matrix[:, row + 4 * number, column] = of_tf32(content)
        else:
            pairs = halves(content, kind)
            for half in range(2):
                matrix[:, 2 * row + half + 8 * number, column] = pairs[..., half]
    return matrix
