"""Reads a PTX module with one kernel: registers, parameters, and blocks of instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from .formats import TYPES, UNSIGNED, PTXError

# Instructions that end a block: lanes may go different ways after them, or wait.
ENDS = {"bra", "brx", "ret", "exit", "bar", "barrier"}


@dataclass(frozen=True)
class Instruction:
    """One statement: ``@!guard opcode.suffixes operands``."""

    guard: str | None
    negated: bool
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    text: str
    scopes: tuple[int, ...]  # the braces around it, from the outside

    @property
    def dotted(self) -> str:
        return ".".join(self.opcode)


@dataclass
class Block:
    """Instructions that lanes execute together, and the one that ends them (None: the next block follows)."""

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None


def split(text: str) -> tuple[str, ...]:
    """Operands at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    last = text[start:].strip()
    return (*parts, last) if last else tuple(parts)


def elements(operand: str) -> tuple[str, ...]:
    """The parts of a vector ``{a, b}``, or the operand alone."""
    return split(operand[1:-1]) if operand.startswith("{") else (operand,)


class Program:
    """A kernel of a PTX module."""

    def __init__(self, text: str) -> None:
        self.text = text
        text = re.sub(r"/\*.*?\*/|//[^\n]*|^\s*\.(loc|file|section)\b[^\n]*$", "", text, flags=re.S | re.M)
        self.tables = self._constant_arrays(text)
        entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", text, re.S)
        if entry is None:
            raise PTXError("the module has no kernel")
        self.name = entry[1]
        self.parameters = [re.search(r"([\w$]+)(?:\[\d+\])?$", p)[1] for p in split(entry[2])]
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", entry[3])
        self.threads = int(threads[1]) if threads else None
        self.local_bytes = 0
        self.registers: dict[str, int] = {}  # name → number
        self.register_types: list[type] = []  # by number: unsigned, of the register's size, or bool
        self.code: list[tuple] = []  # actions of each block, and its end; made by ``decode``
        self._families: dict[str, str] = {}  # "%r" → "b32"
        self.labels: dict[str, int] = {}  # → block
        self.branch_targets: dict[str, tuple[str, ...]] = {}
        self.blocks = self._blocks(text[entry.end() :])

    @staticmethod
    def _constant_arrays(text: str) -> dict[str, np.ndarray]:
        pattern = r"\.(?:const|global)\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)\[\d*\]\s*=\s*\{([^}]*)\}"
        return {
            m[2]: np.array([int(x) & (2**64 - 1) for x in m[3].split(",")], np.uint64).astype(TYPES[m[1]])
            for m in re.finditer(pattern, text)
        }

    def _blocks(self, body: str) -> list[Block]:
        blocks = [Block()]
        for kind, content, scopes in self._statements(body):
            if kind == "label":
                if blocks[-1].instructions:
                    blocks.append(Block())
                self.labels[content] = len(blocks) - 1
                continue
            instruction = self._instruction(content, scopes)
            dotted = instruction.dotted
            if dotted.startswith("bar.warp"):  # lanes of a warp go on together here
                continue
            if dotted.startswith("wgmma.wait_group") and blocks[-1].instructions:
                blocks.append(Block())  # alone in its block, because it may be retried
            if instruction.opcode[0] in ENDS or dotted.startswith("wgmma.wait_group"):
                blocks[-1].end = instruction
                blocks.append(Block())
            else:
                blocks[-1].instructions.append(instruction)
        return blocks

    def _statements(self, body: str):
        """Yields ("label", name, scopes) and ("instruction", text, scopes); declarations are taken in."""
        scopes: list[int] = [0]
        names: dict[int, list[str]] = {0: []}  # declared in a scope's braces
        at = 0
        while scopes:
            at = re.compile(r"\s*").match(body, at).end()
            if body[at] == "{":
                scopes.append(len(names))
                names[scopes[-1]] = []
                at += 1
                continue
            if body[at] == "}":
                scopes.pop()
                at += 1
                continue
            if label := re.compile(r"([\w$]+):").match(body, at):
                at = label.end()
                targets = re.compile(r"\s*\.branchtargets([^;]*);").match(body, at)
                if targets:
                    self.branch_targets[label[1]] = split(targets[1])
                    at = targets.end()
                else:
                    yield "label", self._scoped(label[1], scopes[-1]), tuple(scopes)
                continue
            stop = body.index(";", at)
            statement, at = body[at:stop].strip(), stop + 1
            if not statement.startswith("."):
                for scope in reversed(scopes):
                    for name in names[scope]:
                        statement = re.sub(
                            rf"(?<![\w%$]){re.escape(name)}(?![\w$])", self._scoped(name, scope), statement
                        )
                yield "instruction", statement, tuple(scopes)
            elif array := re.match(r"\.local\s+\.align\s+\d+\s+\.b8\s+[\w$]+\[(\d+)\]", statement):
                self.local_bytes = int(array[1])
            elif family := re.match(r"\.reg\s+\.(\w+)\s+(%\w+)<\d+>", statement):
                self._families[family[2]] = family[1]
            elif single := re.match(r"\.reg\s+\.(\w+)\s+(.+)", statement):
                for name in split(single[2]):
                    names[scopes[-1]].append(name)
                    self._declare(self._scoped(name, scopes[-1]), single[1])

    @staticmethod
    def _scoped(name: str, scope: int) -> str:
        return f"{name}@{scope}" if scope else name

    @staticmethod
    def _instruction(text: str, scopes: tuple[int, ...]) -> Instruction:
        found = re.match(r"(?:@(!?)([%\w@$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if found is None:
            raise PTXError(f"cannot read: {text}")
        return Instruction(found[2], found[1] == "!", tuple(found[3].split(".")), split(found[4]), text, scopes)

    def _declare(self, name: str, kind: str) -> int:
        self.registers[name] = len(self.register_types)
        dtype = np.dtype(TYPES[kind])
        self.register_types.append(np.bool_ if kind == "pred" else UNSIGNED[dtype.itemsize])
        return self.registers[name]

    def register(self, name: str) -> int | None:
        """The number of a register; None where the name is not one."""
        if name in self.registers:
            return self.registers[name]
        family = re.match(r"(%[a-zA-Z]+)\d+$", name)
        if family and family[1] in self._families:
            return self._declare(name, self._families[family[1]])
        return None

    def target(self, name: str, scopes: tuple[int, ...]) -> int:
        """The block of a label, as seen from these scopes."""
        for scope in reversed(scopes):
            if self._scoped(name, scope) in self.labels:
                return self.labels[self._scoped(name, scope)]
        raise PTXError(f"there is no label {name}")
