"""What each instruction does: its text becomes a function of the machine and of the lanes that execute it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .asynchronous import Shape, fragments, right_fragments
from .formats import FROM_HALF, TO_HALF, TYPES, UNSIGNED, PTXError, flush
from .machine import DESCRIPTORS, Machine
from .program import Block, Instruction, Program, elements, split

Action = Callable[[Machine, np.ndarray], None]
Source = Callable[[Machine], np.ndarray]
NOTHING = {"membar", "prefetch", "setmaxnreg", "griddepcontrol", "createpolicy", "pragma", "fence"}
WIDER = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}
ROUNDED = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
COMPARED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
LOGICAL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
APPROXIMATE = {
    "ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x), "rcp": lambda x: np.float32(1) / x,
}  # fmt: skip
BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def divided(a: np.ndarray, b: np.ndarray, remainder: bool) -> np.ndarray:
    """Towards zero, as PTX divides integers; what it gives for b = 0 is not specified."""
    a, b = np.asarray(a), np.where(np.asarray(b) == 0, np.ones_like(b), b)
    if a.dtype.kind == "u":
        return a % b if remainder else a // b
    wide = a.astype(np.int64), b.astype(np.int64)
    rest = np.fmod(*wide)
    return (rest if remainder else (wide[0] - rest) // wide[1]).astype(a.dtype)


def shifted(a: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """Counts beyond the width shift everything out."""
    a, count = np.asarray(a), np.asarray(count)
    width = 8 * a.dtype.itemsize
    by = np.minimum(count, width - 1).astype(a.dtype)
    result = np.left_shift(a, by) if left else np.right_shift(a, by)
    return result if a.dtype.kind == "i" and not left else np.where(count >= width, np.zeros_like(a), result)


def wide_product(a: np.ndarray, b: np.ndarray, wide: type) -> np.ndarray:
    return np.asarray(a).astype(wide) * np.asarray(b).astype(wide)


def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each of four bytes is one of the eight of a and b, or its sign repeated."""
    both = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    result = np.uint64(0)
    for k in range(4):
        choice = (np.asarray(selector).astype(np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
        byte = (both >> ((choice & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | (np.where(choice & np.uint64(8), sign, byte) << np.uint64(8 * k))
    return result.astype(np.uint32)


class Decoder:
    """Decodes the instructions of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program

    # ------------------------------------------------------------------ operands

    def source(self, operand: str, kind: type) -> Source:
        """The operand's value as an array over lanes, or one number, of this type."""
        dtype = np.dtype(kind)
        if operand.startswith("!"):
            inner = self.source(operand[1:], kind)
            return lambda machine: ~inner(machine)
        number = self.program.register(operand)
        if number is not None:
            own = np.dtype(self.program.register_types[number])
            if own == dtype:
                return lambda machine: machine.registers[number]
            if own.itemsize == dtype.itemsize:
                return lambda machine: machine.registers[number].view(dtype)
            narrow = UNSIGNED[dtype.itemsize]
            return lambda machine: machine.registers[number].astype(narrow).view(dtype)
        if operand.startswith("%"):
            return lambda machine: machine.special(operand).view(dtype)
        if operand in self.program.tables:
            host = self.program.tables[operand].ctypes.data
            return lambda machine: np.full(machine.lanes, machine.memory.address(host), np.uint64)
        if operand in self.program.parameters:
            place = DESCRIPTORS + (self.program.parameters.index(operand) << 32)
            return lambda machine: np.full(machine.lanes, place, np.uint64)
        value = self._constant(operand, dtype)
        return lambda machine: value

    @staticmethod
    def _constant(operand: str, dtype: np.dtype) -> np.ndarray:
        if operand == "global_smem" or operand.startswith("__local_depot"):  # spaces of their own begin at 0
            return np.zeros((), dtype)
        if dtype == np.bool_:
            return np.array(int(operand, 0) != 0)
        if operand[:2] in ("0f", "0d"):
            bits = np.array(int(operand[2:], 16), UNSIGNED[4 if operand[1] == "f" else 8])
            return (
                bits.view(dtype) if bits.dtype.itemsize == dtype.itemsize else bits.view(np.float64).astype(dtype)
            )
        value = int(operand.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.array(value, UNSIGNED[dtype.itemsize]).view(dtype)

    def full(self, operand: str, kind: type) -> Source:
        """The same, always an array over lanes."""
        inner = self.source(operand, kind)
        return lambda machine: np.broadcast_to(inner(machine), (machine.lanes,))

    def target(self, operand: str) -> Callable[[Machine, np.ndarray, np.ndarray], None]:
        """Writes values to a register, in the lanes of a mask."""
        if operand == "_":
            return lambda machine, value, mask: None
        number = self.program.register(operand)
        if number is None:
            raise PTXError(f"{operand} is not a register")
        own = np.dtype(self.program.register_types[number])

        def write(machine: Machine, value: np.ndarray, mask: np.ndarray) -> None:
            value = np.asarray(value)
            if value.dtype != own and own != np.bool_:
                if value.dtype.itemsize != own.itemsize:  # extended by the sign where there is one
                    value = value.astype(np.dtype(f"{'i' if value.dtype.kind == 'i' else 'u'}{own.itemsize}"))
                value = value.view(own)
            machine.registers[number] = np.where(mask, value, machine.registers[number])

        return write

    def address(self, operand: str) -> Source:
        """[base + offset] → int64 over lanes."""
        base, _, offset = operand[1:-1].partition("+")
        base, distance = base.strip(), int(offset or 0)
        number = self.program.register(base)
        narrow = number is not None and np.dtype(self.program.register_types[number]).itemsize == 4
        inner = self.full(base, np.uint32 if narrow else np.uint64)
        return lambda machine: inner(machine).astype(np.int64) + distance

    # ------------------------------------------------------------------ blocks

    def block(self, block: Block) -> tuple[list[Action], Callable]:
        return [self.action(x) for x in block.instructions], self.end(block.end)

    def action(self, instruction: Instruction) -> Action:
        root = instruction.opcode[0]
        if root in NOTHING:
            return lambda machine, mask: None
        make = getattr(self, f"_{root}", None)
        if make is None:
            raise PTXError(f"unknown instruction: {instruction.text}")
        action = make(instruction)
        if instruction.guard is None:
            return action
        guard = self.source(("!" if instruction.negated else "") + instruction.guard, np.bool_)

        def guarded(machine: Machine, mask: np.ndarray) -> None:
            mask = mask & guard(machine)
            if mask.any():
                action(machine, mask)

        return guarded

    def end(self, instruction: Instruction | None) -> Callable[[Machine, np.ndarray, int], None]:
        """Where lanes go after a block."""
        if instruction is None:
            last = len(self.program.blocks) - 1
            return lambda machine, mask, place: machine.go(mask, place + 1 if place < last else -1)
        root = instruction.opcode[0]
        if root in ("bra", "ret", "exit"):
            there = self.program.target(instruction.operands[0], instruction.scopes) if root == "bra" else -1
            if instruction.guard is None:
                return lambda machine, mask, place: machine.go(mask, there)
            guard = self.source(("!" if instruction.negated else "") + instruction.guard, np.bool_)
            return lambda machine, mask, place: machine.go(mask, np.where(guard(machine), there, place + 1))
        if instruction.guard is not None:
            raise PTXError(f"a guarded {instruction.text}")
        if root == "brx":
            names = self.program.branch_targets[instruction.operands[1]]
            targets = np.array([self.program.target(name, instruction.scopes) for name in names])
            index = self.full(instruction.operands[0], np.uint32)
            return lambda machine, mask, place: machine.go(
                mask, targets[np.minimum(index(machine), len(targets) - 1).astype(np.int64)]
            )
        if root == "wgmma":
            return self._wait_for_products(int(instruction.operands[0]))
        identity = self.full(instruction.operands[0], np.uint32)
        threads = int(instruction.operands[1]) if len(instruction.operands) > 1 else None
        waits = "arrive" not in instruction.opcode

        def barrier(machine: Machine, mask: np.ndarray, place: int) -> None:
            machine.go(mask, place + 1)
            machine.arrive(mask, identity(machine).astype(np.int64), threads, waits)

        return barrier

    @staticmethod
    def _wait_for_products(pending: int) -> Callable[[Machine, np.ndarray, int], None]:
        def wait(machine: Machine, mask: np.ndarray, place: int) -> None:
            go = machine.products.wait(mask, pending)
            machine.go(mask & go, place + 1)
            machine.stalled |= mask & ~go

        return wait

    # ------------------------------------------------------------------ arithmetic

    def _each(self, instruction: Instruction, function: Callable, *kinds: type) -> Action:
        """target = function(sources), of these types; the last one holds for all that follow."""
        target = self.target(instruction.operands[0])
        operands = instruction.operands[1:]
        kinds = kinds + kinds[-1:] * (len(operands) - len(kinds))
        sources = [self.source(x, kind) for x, kind in zip(operands, kinds, strict=True)]
        if "ftz" in instruction.opcode and kinds[0] == np.float32:
            exact = function

            def function(*values: np.ndarray) -> np.ndarray:
                result = exact(*(flush(x) if x.dtype == np.float32 else x for x in values))
                return flush(result) if result.dtype == np.float32 else result

        return lambda machine, mask: target(machine, function(*(x(machine) for x in sources)), mask)

    def _mov(self, i: Instruction) -> Action:
        total = TYPES[i.opcode[1]]
        target, source = i.operands
        if target.startswith("{"):
            parts = [self.target(x) for x in elements(target)]
            part = UNSIGNED[np.dtype(total).itemsize // len(parts)]
            whole = self.full(source, total)

            def unpack(machine: Machine, mask: np.ndarray) -> None:
                content = np.ascontiguousarray(whole(machine)).view(part).reshape(machine.lanes, len(parts))
                for k, write in enumerate(parts):
                    write(machine, content[:, k].copy(), mask)

            return unpack
        if source.startswith("{"):
            names = elements(source)
            part = UNSIGNED[np.dtype(total).itemsize // len(names)]
            sources, write = [self.full(x, part) for x in names], self.target(target)
            return lambda machine, mask: write(
                machine,
                np.stack([x(machine) for x in sources], 1).view(UNSIGNED[np.dtype(total).itemsize])[:, 0],
                mask,
            )
        return self._each(i, lambda x: x, total)

    def _cvta(self, i: Instruction) -> Action:
        return self._each(i, lambda x: x, np.uint64)

    def _add(self, i: Instruction) -> Action:
        return self._each(i, np.add, self._plain(i))

    def _sub(self, i: Instruction) -> Action:
        return self._each(i, np.subtract, self._plain(i))

    @staticmethod
    def _plain(i: Instruction) -> type:
        if "cc" in i.opcode or i.opcode[-1] not in TYPES:
            raise PTXError(f"unknown instruction: {i.text}")
        return TYPES[i.opcode[-1]]

    def _mul(self, i: Instruction) -> Action:
        kind, wide = self._plain(i), WIDER.get(i.opcode[-1])
        if i.opcode[1] == "wide":
            return self._each(i, lambda a, b: wide_product(a, b, wide), kind)
        if i.opcode[1] == "hi":
            if np.dtype(kind).itemsize != 4:
                raise PTXError(f"unknown instruction: {i.text}")
            return self._each(i, lambda a, b: (wide_product(a, b, wide) >> wide(32)).astype(kind), kind)
        return self._each(i, np.multiply, kind)

    def _mad(self, i: Instruction) -> Action:
        kind = TYPES[i.opcode[-1]]
        if i.opcode[1] == "wide":
            wide = WIDER[i.opcode[-1]]
            return self._each(i, lambda a, b, c: wide_product(a, b, wide) + c, kind, kind, wide)
        if i.opcode[1:3] != ("lo", "cc"):
            return self._each(i, lambda a, b, c: np.multiply(a, b) + c, kind)
        target, sources = self.target(i.operands[0]), [self.source(x, kind) for x in i.operands[1:]]

        def with_carry(machine: Machine, mask: np.ndarray) -> None:
            a, b, c = (np.asarray(x(machine)).astype(np.uint64) for x in sources)
            total = (a * b & np.uint64(2**32 - 1)) + c
            machine.carry = np.where(mask, total >> np.uint64(32), machine.carry)
            target(machine, total.astype(np.uint32), mask)

        return with_carry

    def _madc(self, i: Instruction) -> Action:
        if i.dotted != "madc.hi.u32":
            raise PTXError(f"unknown instruction: {i.text}")
        target, sources = self.target(i.operands[0]), [self.source(x, np.uint32) for x in i.operands[1:]]

        def high(machine: Machine, mask: np.ndarray) -> None:
            a, b, c = (np.asarray(x(machine)).astype(np.uint64) for x in sources)
            target(machine, ((a * b >> np.uint64(32)) + c + machine.carry).astype(np.uint32), mask)

        return high

    def _fma(self, i: Instruction) -> Action:
        if i.opcode[-1] != "f32" or i.opcode[-2] in TYPES:
            raise PTXError(f"unknown instruction: {i.text}")

        def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            return (np.asarray(a).astype(np.float64) * b + c).astype(np.float32)

        return self._each(i, fused, np.float32)

    def _div(self, i: Instruction) -> Action:
        kind = TYPES[i.opcode[-1]]
        if np.dtype(kind).kind == "f":
            return self._each(i, np.divide, kind)
        return self._each(i, lambda a, b: divided(a, b, remainder=False), kind)

    def _rem(self, i: Instruction) -> Action:
        return self._each(i, lambda a, b: divided(a, b, remainder=True), TYPES[i.opcode[-1]])

    def _min(self, i: Instruction) -> Action:
        return self._extreme(i, np.minimum, np.fmin)

    def _max(self, i: Instruction) -> Action:
        return self._extreme(i, np.maximum, np.fmax)

    def _extreme(self, i: Instruction, with_nan: Callable, without: Callable) -> Action:
        kind = TYPES[i.opcode[-1]]
        choose = without if np.dtype(kind).kind == "f" and "NaN" not in i.opcode else with_nan
        return self._each(i, lambda *values: functools.reduce(choose, values), kind)

    def _abs(self, i: Instruction) -> Action:
        return self._each(i, np.abs, TYPES[i.opcode[-1]])

    def _neg(self, i: Instruction) -> Action:
        return self._each(i, np.negative, TYPES[i.opcode[-1]])

    def _and(self, i: Instruction) -> Action:
        return self._each(i, BITS[i.opcode[0]], TYPES[i.opcode[-1]])

    _or = _xor = _and

    def _not(self, i: Instruction) -> Action:
        return self._each(i, np.invert, TYPES[i.opcode[-1]])

    def _shl(self, i: Instruction) -> Action:
        return self._each(i, lambda a, n: shifted(a, n, left=True), TYPES[i.opcode[-1]], np.uint32)

    def _shr(self, i: Instruction) -> Action:
        return self._each(i, lambda a, n: shifted(a, n, left=False), TYPES[i.opcode[-1]], np.uint32)

    def _shf(self, i: Instruction) -> Action:
        if i.opcode[2] != "wrap":
            raise PTXError(f"unknown instruction: {i.text}")

        def funnel(low: np.ndarray, high: np.ndarray, count: np.ndarray) -> np.ndarray:
            both = np.asarray(low).astype(np.uint64) | (np.asarray(high).astype(np.uint64) << np.uint64(32))
            by = (np.asarray(count) & np.uint32(31)).astype(np.uint64)
            return ((both << by) >> np.uint64(32) if i.opcode[1] == "l" else both >> by).astype(np.uint32)

        return self._each(i, funnel, np.uint32)

    def _bfe(self, i: Instruction) -> Action:
        kind, (first, count) = TYPES[i.opcode[-1]], (int(x) for x in i.operands[2:])
        width = 8 * np.dtype(kind).itemsize
        alone = replace(i, operands=i.operands[:2])
        return self._each(alone, lambda a: (a << kind(width - first - count)) >> kind(width - count), kind)

    def _prmt(self, i: Instruction) -> Action:
        return self._each(i, permuted, np.uint32)

    def _selp(self, i: Instruction) -> Action:
        kind = TYPES[i.opcode[-1]]
        return self._each(i, lambda a, b, choose: np.where(choose, a, b), kind, kind, np.bool_)

    def _setp(self, i: Instruction) -> Action:
        kind, name = TYPES[i.opcode[-1]], i.opcode[1]
        if np.dtype(kind).kind != "f":
            compare = COMPARED[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)]
        elif name in ("nan", "num"):
            compare = unordered if name == "nan" else lambda a, b: ~unordered(a, b)
        elif name.endswith("u"):
            ordered = COMPARED[name[:-1]]
            compare = lambda a, b: ordered(a, b) | unordered(a, b)  # noqa: E731
        else:
            ordered = COMPARED[name]
            compare = lambda a, b: ordered(a, b) & ~unordered(a, b)  # noqa: E731
        if len(i.operands) == 3:
            return self._each(i, compare, kind)
        combine = LOGICAL[i.opcode[2]]
        return self._each(i, lambda a, b, c: combine(compare(a, b), c), kind, kind, np.bool_)

    def _cvt(self, i: Instruction) -> Action:
        to, origin = i.opcode[-2:]
        if to in ("bf16x2", "f16x2"):
            half = TO_HALF[to[:-2]]
            pack = lambda a, b: (half(a).astype(np.uint32) << np.uint32(16)) | half(b)  # noqa: E731
            return self._each(i, pack, np.float32)
        if origin == "bf16":
            return self._each(i, FROM_HALF[origin], np.uint16)
        if to == "bf16":
            return self._each(i, TO_HALF[to], np.float32)
        if to == "tf32":
            return self._each(i, lambda x: (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000), np.uint32)
        kind, source = TYPES[to], TYPES[origin]
        rounded = next((ROUNDED[x] for x in i.opcode if x in ROUNDED), None)
        if np.dtype(source).kind == "f" and np.dtype(kind).kind != "f":
            info = np.iinfo(kind)
            clip = lambda x: np.clip(np.nan_to_num(rounded(x.astype(np.float64))), info.min, info.max)  # noqa: E731
            return self._each(i, lambda x: clip(x).astype(kind), source)
        if rounded is not None:
            return self._each(i, rounded, source)
        return self._each(i, lambda x: np.asarray(x).astype(kind), source)

    def _ex2(self, i: Instruction) -> Action:
        return self._each(i, APPROXIMATE[i.opcode[0]], TYPES[i.opcode[-1]])

    _lg2 = _sqrt = _rsqrt = _rcp = _sin = _cos = _tanh = _ex2

    # ------------------------------------------------------------------ memory

    def _ld(self, i: Instruction) -> Action:
        kind = TYPES[i.opcode[-1]]
        targets = [self.target(x) for x in elements(i.operands[0])]
        if i.opcode[1] == "param":
            number = self.program.parameters.index(i.operands[1][1:-1])

            def parameter(machine: Machine, mask: np.ndarray) -> None:
                bits = np.array(machine.arguments[number], np.uint64).astype(UNSIGNED[np.dtype(kind).itemsize])
                targets[0](machine, bits.view(kind), mask)

            return parameter
        space, address, size = self._space(i), self.address(i.operands[1]), np.dtype(kind).itemsize

        def load(machine: Machine, mask: np.ndarray) -> None:
            found = machine.load(space, address(machine), size, len(targets), mask, i.text)
            for write, value in zip(targets, found, strict=True):
                write(machine, value.view(kind), mask)

        return load

    def _st(self, i: Instruction) -> Action:
        size = np.dtype(TYPES[i.opcode[-1]]).itemsize
        sources = [self.full(x, UNSIGNED[size]) for x in elements(i.operands[1])]
        space, address = self._space(i), self.address(i.operands[0])
        return lambda machine, mask: machine.store(
            space, address(machine), size, [x(machine) for x in sources], mask, i.text
        )

    @staticmethod
    def _space(i: Instruction) -> str:
        for part in i.opcode:
            space = part.partition("::")[0]
            if space in ("global", "const", "shared", "local"):
                return space
        raise PTXError(f"an access to no state space: {i.text}")

    def _cp(self, i: Instruction) -> Action:
        name = i.dotted
        if name.startswith("cp.async.bulk.tensor"):
            return self._tma(i)
        if name.startswith("cp.async.bulk"):  # groups of stores, which take effect at once
            return lambda machine, mask: None
        if name.startswith("cp.async.commit_group"):
            return lambda machine, mask: machine.copies.commit(mask)
        if name.startswith("cp.async.wait_group"):
            pending = int(i.operands[0])
            return lambda machine, mask: machine.copies.wait(mask, pending)
        size = int(i.operands[2], 0)
        target, source = self.address(i.operands[0]), self.address(i.operands[1])
        count = self.full(i.operands[3] if len(i.operands) > 3 else i.operands[2], np.uint32)
        return lambda machine, mask: machine.copies.issue(
            target(machine), source(machine), size, count(machine), mask, i.text
        )

    def _tma(self, i: Instruction) -> Action:
        loads = "shared::cluster" in i.opcode or "shared::cta" in i.opcode[:6]
        loads = loads and any(x.startswith("mbarrier") for x in i.opcode)
        described = i.operands[1 if loads else 0]
        descriptor, coordinates = split(described[1:-1])
        maps = self.full(descriptor, np.uint64)
        first = [self.full(x, np.int32) for x in elements(coordinates)]
        local = self.address(i.operands[0 if loads else 1])
        if not loads:
            return lambda machine, mask: machine.transfers.store(
                local(machine), machine.tensor_maps(maps(machine), mask), [x(machine) for x in first], mask
            )
        barrier = self.address(i.operands[2])
        return lambda machine, mask: machine.transfers.load(
            local(machine),
            machine.tensor_maps(maps(machine), mask),
            [x(machine) for x in first],
            barrier(machine),
            mask,
        )

    def _mbarrier(self, i: Instruction) -> Action:
        operation = i.opcode[1]
        if operation in ("init", "inval"):
            address = self.address(i.operands[0])
            if operation == "inval":
                return lambda machine, mask: machine.transfers.invalidate(address(machine), mask)
            count = self.full(i.operands[1], np.uint32)
            return lambda machine, mask: machine.transfers.initialise(address(machine), count(machine), mask)
        if operation == "arrive":
            address = self.address(i.operands[1])
            expected = self.full(i.operands[2] if "expect_tx" in i.opcode else "0", np.uint32)
            return lambda machine, mask: machine.transfers.arrive(address(machine), 1, expected(machine), mask)
        if operation in ("try_wait", "test_wait") and "parity" in i.opcode:
            target, address = self.target(i.operands[0]), self.address(i.operands[1])
            parity = self.full(i.operands[2], np.uint32)
            return lambda machine, mask: target(
                machine, machine.transfers.test(address(machine), parity(machine), mask), mask
            )
        raise PTXError(f"unknown instruction: {i.text}")

    # ------------------------------------------------------------------ warps

    def _warp(self, i: Instruction, action: Action) -> Action:
        """An instruction that all lanes of a warp execute together."""

        def together(machine: Machine, mask: np.ndarray) -> None:
            machine.converged(mask, i.text)
            action(machine, mask)

        return together

    def _shfl(self, i: Instruction) -> Action:
        mode = i.opcode[2]
        if mode not in ("bfly", "idx") or i.operands[3] != "31":
            raise PTXError(f"unknown instruction: {i.text}")
        target = self.target(i.operands[0].partition("|")[0])
        value, other = self.full(i.operands[1], np.uint32), self.full(i.operands[2], np.uint32)

        def shuffle(machine: Machine, mask: np.ndarray) -> None:
            chosen = other(machine).reshape(-1, 32)
            lanes = np.arange(32, dtype=np.uint32) ^ chosen if mode == "bfly" else chosen % np.uint32(32)
            values = value(machine).reshape(-1, 32)
            target(machine, np.take_along_axis(values, lanes.astype(np.int64), 1).ravel(), mask)

        return self._warp(i, shuffle)

    def _elect(self, i: Instruction) -> Action:
        leader, elected = (self.target(x) for x in i.operands[0].split("|"))

        def elect(machine: Machine, mask: np.ndarray) -> None:
            chosen = machine.random.integers(0, 32, machine.warps) if machine.mode.order == "random" else 0
            lane = np.repeat(np.broadcast_to(chosen, (machine.warps,)), 32)
            leader(machine, lane.astype(np.uint32), mask)
            elected(machine, np.arange(machine.lanes) % 32 == lane, mask)

        return self._warp(i, elect)

    def _vote(self, i: Instruction) -> Action:
        target, predicate = self.target(i.operands[0]), self.full(i.operands[1], np.bool_)
        kind = i.opcode[2]

        def vote(machine: Machine, mask: np.ndarray) -> None:
            votes = predicate(machine).reshape(-1, 32)
            if kind == "ballot":
                result = (votes.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
            else:
                result = {"any": np.any, "all": np.all}[kind](votes, axis=1)
            target(machine, np.repeat(result, 32), mask)

        return self._warp(i, vote)

    # ------------------------------------------------------------------ matrices

    def _ldmatrix(self, i: Instruction) -> Action:
        targets, transposed = [self.target(x) for x in elements(i.operands[0])], "trans" in i.opcode
        address = self.address(i.operands[1])
        if "m8n8" not in i.opcode:
            raise PTXError(f"unknown instruction: {i.text}")
        row, pair = np.arange(32) // 4, 2 * (np.arange(32) % 4)

        def load(machine: Machine, mask: np.ndarray) -> None:
            first = address(machine).reshape(-1, 32)[:, np.arange(32) % (8 * len(targets))].ravel()
            content = machine.shared[machine.matrix_rows(first, mask, i.text)].view(np.uint16)  # (warps, 32, 8)
            for k, write in enumerate(targets):
                matrix = content[:, 8 * k : 8 * k + 8]
                matrix = matrix.transpose(0, 2, 1) if transposed else matrix
                low, high = (matrix[:, row, pair + half].astype(np.uint32) for half in range(2))
                write(machine, (low | high << np.uint32(16)).ravel(), mask)

        return self._warp(i, load)

    def _stmatrix(self, i: Instruction) -> Action:
        sources, transposed = [self.full(x, np.uint32) for x in elements(i.operands[1])], "trans" in i.opcode
        address = self.address(i.operands[0])
        row, pair = np.arange(32) // 4, 2 * (np.arange(32) % 4)

        def store(machine: Machine, mask: np.ndarray) -> None:
            places = machine.matrix_rows(address(machine), mask, i.text)
            for k, source in enumerate(sources):
                words = source(machine).reshape(-1, 32)
                matrix = np.zeros((machine.warps, 8, 8), np.uint16)
                for half in range(2):
                    part = (words >> np.uint32(16 * half)).astype(np.uint16)
                    if transposed:
                        matrix[:, pair + half, row] = part
                    else:
                        matrix[:, row, pair + half] = part
                for warp in machine.warps_of(mask):
                    machine.shared[places[warp, 8 * k : 8 * k + 8]] = matrix[warp].view(np.uint8)

        return self._warp(i, store)

    def _mma(self, i: Instruction) -> Action:
        kind, k = i.opcode[-3], int(next(x for x in i.opcode if x.startswith("m16n8k"))[6:])
        if (i.opcode[-4], i.opcode[-1]) != ("f32", "f32") or kind not in ("bf16", "f16", "tf32"):
            raise PTXError(f"unknown instruction: {i.text}")
        targets = [self.target(x) for x in elements(i.operands[0])]
        left, right = ([self.full(x, np.uint32) for x in elements(o)] for o in i.operands[1:3])
        added = [self.full(x, np.float32) for x in elements(i.operands[3])]
        row, column = np.arange(32) // 4, 2 * (np.arange(32) % 4)

        def multiply(machine: Machine, mask: np.ndarray) -> None:
            a, b = (np.stack([x(machine).reshape(-1, 32) for x in side]) for side in (left, right))
            product = np.matmul(fragments(a, kind, k), right_fragments(b, kind, k))
            results = [
                product[:, row + 8 * (n // 2), column + n % 2].ravel() + add(machine)
                for n, add in enumerate(added)
            ]
            for write, result in zip(targets, results, strict=True):
                write(machine, result, mask)

        return self._warp(i, multiply)

    def _wgmma(self, i: Instruction) -> Action:
        if i.opcode[1] == "fence":
            return lambda machine, mask: None
        if i.opcode[1] == "commit_group":
            return lambda machine, mask: machine.products.commit(mask)
        n, k = map(int, re.search(r"\.m64n(\d+)k(\d+)\.", i.dotted).groups())
        if i.opcode[-3] != "f32" or i.opcode[-1] not in ("bf16", "f16", "tf32"):
            raise PTXError(f"unknown instruction: {i.text}")
        accumulators = tuple(self.program.register(x) for x in elements(i.operands[0]))
        in_registers = i.operands[1].startswith("{")
        a = [self.full(x, np.uint32 if in_registers else np.uint64) for x in elements(i.operands[1])]
        b, scale = self.full(i.operands[2], np.uint64), self.full(i.operands[3], np.bool_)
        sign_a, sign_b, *transposed = (int(x) for x in i.operands[4:])
        transposed = [False] * (2 - len(transposed)) + [bool(x) for x in transposed]
        shape = Shape(n, k, i.opcode[-1], accumulators, sign_a * sign_b, in_registers, tuple(transposed), i.dotted)
        return self._warp(
            i,
            lambda machine, mask: machine.products.issue(
                shape, [x(machine) for x in a], b(machine), scale(machine), mask
            ),
        )


def decode(program: Program) -> Program:
    """Gives the program its code: a list of actions and an end for each block."""
    decoder = Decoder(program)
    program.code = [decoder.block(block) for block in program.blocks]
    return program
