"""Reads what nvdisasm prints of a kernel: blocks of instructions, loops, and what a tile of products takes."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import triton

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+ )?(?P<name>[\w.]+)(?P<rest>.*?);")
PRODUCTS = ("HGMMA", "HMMA", "QGMMA")


def nvidia_tool(name: str, binary: bytes, *options: str) -> str:
    """What a tool of CUDA that comes with Triton says of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        done = subprocess.run([str(tool), *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def nvidia_resources(binary: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of the stack, where spilled registers lie."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", nvidia_tool("cuobjdump", binary, "-res-usage"))
    return int(found[1]), int(found[2])


def disassembled(binary: bytes) -> str:
    return nvidia_tool("nvdisasm", binary, "-c")


@dataclass
class Block:
    """Instructions without a label or a jump between them."""

    names: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)  # blocks that may follow, by number


def blocks(assembly: str) -> list[Block]:
    """The kernel's blocks, in the order of their addresses."""
    found, labels, jumps = [Block()], {}, {}
    ends = False  # whether the last instruction ended its block
    for line in assembly.splitlines():
        label = re.match(r"(\.L\w+):", line)
        instruction = INSTRUCTION.match(line)
        if (label and found[-1].names) or (instruction and ends):
            found.append(Block())
        if label:
            labels[label[1]] = len(found) - 1
        if label or instruction:  # other lines name functions, which nothing falls through to
            ends = False
        if instruction:
            block, name = len(found) - 1, instruction["name"]
            found[-1].names.append(name)
            ends = name.split(".")[0] in ("BRA", "EXIT")
            if name.startswith("BRA"):
                jumps[block] = re.search(r"\((\.L\w+)\)", instruction["rest"])[1]
            # A jump without a condition goes nowhere else; some have a second predicate among their operands.
            falls_through = not ends or instruction["guard"] or re.match(r"\S* *U?!?P\d", instruction["rest"])
            found[block].next = [block + 1] if falls_through else []
    for block, label in jumps.items():
        found[block].next.append(labels[label])
    for block in found:
        block.next = [n for n in block.next if n < len(found)]
    return found


def loops(found: list[Block]) -> list[tuple[int, int]]:
    """First and last block of each loop."""
    return [(n, at) for at, block in enumerate(found) for n in block.next if n <= at]


def uses_stack_in_inner_loop(assembly: str) -> bool:
    """Whether an instruction of a loop without further loops inside stores to the stack or loads from it."""
    found = blocks(assembly)
    every = loops(found)
    inner = [(a, b) for a, b in every if not any((a, b) != (c, d) and a <= c and d <= b for c, d in every)]
    names = [name for a, b in inner for block in found[a : b + 1] for name in block.names]
    return any(name.startswith(("STL", "LDL")) for name in names)


def way(found: list[Block], start: int, ends: set[int]) -> list[int]:
    """The blocks after ``start``, up to and with one of ``ends``, on the way with the fewest instructions."""
    ways = [(0, n, [n]) for n in found[start].next]
    heapq.heapify(ways)
    seen = set()
    while ways:
        length, n, blocks_so_far = heapq.heappop(ways)
        if n in ends:
            return blocks_so_far
        if n not in seen:
            seen.add(n)
            for following in found[n].next:
                heapq.heappush(ways, (length + len(found[n].names), following, [*blocks_so_far, following]))
    raise ValueError(f"no way leads from block {start} to {sorted(ends)}")


def names_of(found: list[Block], numbers: Iterable[int]) -> list[str]:
    return [name for n in numbers for name in found[n].names]


def has_products(block: Block) -> bool:
    return any(name.startswith(PRODUCTS) for name in block.names)


def epilogue(assembly: str) -> list[str]:
    """Instructions of a persistent kernel from the last product of a tile to the next tile, on the shortest way.

    The shortest way is that of tiles without special entries: masks stand behind branches.
    """
    found = blocks(assembly)
    products = max(n for n, block in enumerate(found) if has_products(block))
    head = min(first for first, last in loops(found) if first <= products <= last)
    return names_of(found, way(found, products, {head})[:-1])


def instructions(assembly: str) -> tuple[list[str], list[str]]:
    """Instructions of a warp for one step of a tile's products, and for all else of the tile, on the shortest way.

    A tile is a turn of the loop around that of the products or, without one, a whole program. A kernel without
    products has no steps, and each of its instructions counts once.
    """
    found = blocks(assembly)
    counted = []
    for products in (n for n, block in enumerate(found) if has_products(block)):
        try:
            step = way(found, products, {products})
        except ValueError:  # not in a loop
            continue
        heads = {first for first, last in loops(found) if first <= products <= last and first not in step}
        start = min(heads, default=0)
        ends = {start} if heads else {n for n, block in enumerate(found) if not block.next}
        whole = [start, *way(found, start, {products}), *way(found, products, ends)]
        rest = [n for n in (whole[:-1] if heads else whole) if n not in step]
        counted.append((names_of(found, step), names_of(found, rest)))
    if counted:
        return min(counted, key=lambda both: len(both[0]) + len(both[1]))
    if any(has_products(block) for block in found):
        raise ValueError("the products are in no loop")
    return [], names_of(found, reachable(found))


def reachable(found: list[Block]) -> list[int]:
    """The blocks that follow from the first one; functions that are called are not among them."""
    seen, waiting = set(), [0]
    while waiting:
        n = waiting.pop()
        if n not in seen:
            seen.add(n)
            waiting += found[n].next
    return sorted(seen)
