"""Reads what nvdisasm prints of a kernel: blocks of instructions, loops, and what follows a tile's products."""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass, field

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+ )?(?P<name>[\w.]+)(?P<rest>.*?);")
PRODUCTS = ("HGMMA", "HMMA", "QGMMA")


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


def epilogue(assembly: str) -> list[str]:
    """Instructions of a persistent kernel from the last product of a tile to the next tile, on the shortest way.

    The shortest way is that of tiles without special entries: masks stand behind branches.
    """
    found = blocks(assembly)
    products = max(n for n, block in enumerate(found) if any(name.startswith(PRODUCTS) for name in block.names))
    head = min(first for first, last in loops(found) if first <= products <= last)
    ways = [(0, n, [n]) for n in found[products].next]
    heapq.heapify(ways)
    seen = {products}
    while ways:
        length, n, way = heapq.heappop(ways)
        if n == head:
            return [name for block in way[:-1] for name in found[block].names]
        if n not in seen:
            seen.add(n)
            for following in found[n].next:
                heapq.heappush(ways, (length + len(found[n].names), following, [*way, following]))
    raise ValueError("no way leads from the products to the next tile")
