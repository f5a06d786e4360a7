"""Executes calls of the public API from their kernels' PTX, without a GPU, and compares with the float64 formula.

    python tests/run_ptx.py [--architectures sm_80 sm_90] [--calls everyday|all] [--faults N]

Every asynchronous operation (cp.async, TMA, wgmma) takes effect at once, as late as its wait allows, so that
copies overtake products, or at random with warps in a random order; each must give the same loss and gradients.
Accesses outside of the tensors, misaligned ones, diverged warps and deadlocks are errors. With --faults each
kernel's PTX is broken in one place at a time (a barrier, a wait or a mask is removed), and the faults that are
noticed are counted.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ptx.device import PTXDriver, Recorded
from ptx.formats import PTXError
from ptx.instructions import decode
from ptx.machine import Mode
from ptx.program import Program
from torch import Tensor

ARCHITECTURES = ("sm_80", "sm_90")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIMITS = {"fp32": 3e-5, "bf16": 1.5e-2, "fp16": 1.5e-2}  # ‖x − exact‖ / ‖exact‖ of the loss and of each gradient
LARGE = 1 << 12  # rows and columns from which the tiles of large batches are taken
QUICK = [Mode("early"), Mode("late"), Mode("overtaking")]
CHANCE = Mode("random", "random", seed=1)


@dataclass(frozen=True)
class Call:
    """A call of the public API."""

    name: str
    N: int
    D: int
    dtype: str = "bf16"
    large: bool = False  # with the tiles of large batches
    negatives: int = 0
    queue: int = 0
    noise: int = 0  # rows of given noise
    guide: int = 0  # features of a guide
    ids: bool = False
    everyday: bool = True
    chance: bool = False  # in a random order too, which takes ten times as long
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.name}, N = {self.N}, D = {self.D}, {self.dtype}{', large tiles' if self.large else ''}"


def calls() -> Iterator[Call]:
    """Each kernel with the features that change its code."""
    yield Call("plain", 64, 64, chance=True)
    yield Call("several steps", 192, 64)
    yield Call("ragged", 45, 33, "fp16", negatives=90, ids=True, options={"hard_negative_weight": 0.7})
    yield Call("steps", 140, 200, large=True)
    yield Call("symmetric", 70, 48, large=True, chance=True, options={"symmetric": True})
    yield Call(
        "none", 40, 64, "fp16", queue=30, options={"reduction": "none", "symmetric": True, "filter_margin": 0.05}
    )
    yield Call("fp32", 50, 48, "fp32", noise=20, options={"decoupled": True, "hardness": 2.0})
    yield Call("small temperature", 40, 33, "fp32", options={"temperature": 0.002})
    yield Call("guide", 130, 64, "fp16", large=True, guide=24, options={"filter_margin": 0.05})
    for dtype in DTYPES:
        for large in (False, True):
            common = {"dtype": dtype, "large": large, "everyday": False, "chance": True}
            yield Call("plain", 130, 64, **common)
            yield Call("ragged", 133, 45, **common)
            yield Call("one row", 1, 16, noise=8, **common)
            yield Call("expected noise", 50, 32, **common, options={"noise": "expected", "num_noise": 40})
            yield Call("negatives", 70, 48, negatives=70, **common, options={"hard_negative_weight": 1.0})
            yield Call("ids", 40, 48, negatives=80, queue=20, noise=20, ids=True, **common)
            yield Call("symmetric", 140, 192, noise=20, **common, options={"symmetric": True})
            yield Call("symmetric, ids", 70, 64, ids=True, **common, options={"symmetric": True})
            yield Call("reduction none", 70, 48, **common, options={"reduction": "none"})
            yield Call("small temperature", 70, 48, **common, options={"temperature": 0.002})
            yield Call("decoupled", 70, 48, **common, options={"decoupled": True, "hardness": 2.0})
            yield Call("margin", 70, 48, **common, options={"angular_margin": 0.2, "label_smoothing": 0.1})
            yield Call("filter", 70, 64, **common, options={"filter_margin": 0.05, "symmetric": True})
            yield Call("guide", 70, 64, guide=24, **common, options={"filter_margin": 0.05})
            yield Call("guide, symmetric", 70, 64, guide=24, **common, options={"symmetric": True})
            yield Call("chunks", 140, 32, noise=10, **common, options={"workspace_bytes": 60_000})


class Bench:
    """Calls on a device that executes PTX, and what they should give."""

    def __init__(self, architecture: str) -> None:
        self.driver = PTXDriver(architecture)
        self._large = False
        from fused_infonce.kernels import settings

        small = settings.default_settings

        def chosen(target: str, dtype: torch.dtype, precision: str, rows: int, columns: int) -> settings.Settings:
            return small(target, dtype, precision, *((LARGE, LARGE) if self._large else (rows, columns)))

        settings.default_settings = chosen
        from fused_infonce import autograd

        autograd.SMALL_PRODUCT = 0  # so that products of half precision are

    def run(self, call: Call, backend: str) -> list[Tensor]:
        """The loss and the gradients of its inputs, float64."""
        from fused_infonce import gs_infonce

        self._large = call.large
        exact = backend == "reference"
        generator = torch.Generator().manual_seed(1)

        def rows(n: int, D: int = call.D, near: Tensor | None = None) -> Tensor:
            x = torch.randn(n, D, generator=generator, dtype=torch.float64)
            x = (x if near is None else near.double() + 2 * x).to(DTYPES[call.dtype])
            return x.double() if exact else x

        anchors = rows(call.N)
        inputs = [anchors, rows(call.N, near=anchors)]
        options = {"num_noise": 0} | call.options
        if call.negatives:
            inputs.append(rows(call.negatives))
        if call.queue:
            options["queue"] = rows(call.queue)
        if call.noise:
            options["noise"] = rows(call.noise)
        if call.guide:
            options["guide"] = [rows(len(x), call.guide) for x in inputs]
        if call.ids:
            options["ids"] = torch.arange(call.N) // 2
        leaves = [x.detach().requires_grad_() for x in inputs]
        positional = list(leaves)
        if call.queue:
            options["queue"] = options["queue"].requires_grad_()
            leaves.append(options["queue"])
        loss = gs_infonce(*positional, backend=backend, **options)
        upstream = torch.ones_like(loss) if loss.ndim == 0 else torch.linspace(0.5, 1.5, call.N, dtype=loss.dtype)
        scale = 64.0 if call.dtype == "fp16" else 1.0  # gradients above the smallest numbers of fp16
        gradients = torch.autograd.grad((loss * upstream).sum() * scale, leaves)
        return [loss.detach().double(), *(x.double() / scale for x in gradients)]

    def problem(self, call: Call, mode: Mode) -> str | None:
        """What is wrong with a call in this mode."""
        self.driver.mode = mode
        try:
            got = self.run(call, "triton")
        except PTXError as error:
            return str(error)
        wrong = [
            float((a - b).norm() / b.norm().clamp_min(1e-30))
            for a, b in zip(got, self.run(call, "reference"), strict=True)
        ]
        worst = float(np.max(wrong))  # NaN counts
        return None if worst <= LIMITS[call.dtype] else f"an error of {worst:.1e}"


# Faults: what is broken, a pattern of the line, and what stands there instead (None: the line is gone).
FAULTS = {
    "a barrier is missing": (r"(?:bar|barrier)\.sync\s.*", None),
    "copies are not waited for": (r"cp\.async\.wait_group\s.*", None),
    "a copy too few is waited for": (r"(cp\.async\.wait_group)\s+(\d+);", "{} {};"),
    "products are not waited for": (r"wgmma\.wait_group\S*\s.*", None),
    "a product too few is waited for": (r"(wgmma\.wait_group\S*)\s+(\d+);", "{} {};"),
    "an mbarrier is not waited for": (r"@!complete bra\.uni waitLoop;", None),
    "a load has no mask": (r"@!?%p\d+ (ld\.global.*)", "{}"),
    "a store has no mask": (r"@!?%p\d+ (st\.global.*)", "{}"),
    "a shared address is 16 bytes off": (r"((?:add|xor|or)\.[bs]32\s+%r\d+, %r\d+), (\d+);", "{}, {};"),
}  # fmt: skip


def broken_versions(text: str, most: int) -> Iterator[tuple[str, str, str]]:
    """Yields a kind of fault, the line, and the PTX with it: ``most`` of each kind."""
    lines = text.split("\n")
    choice = random.Random(0)
    for kind, (pattern, replacement) in FAULTS.items():
        found = [(n, m) for n, line in enumerate(lines) if (m := re.fullmatch(pattern, line.strip()))]
        for n, match in choice.sample(found, min(most, len(found))):
            parts = list(match.groups())
            if replacement is not None and parts[-1].isdigit():  # a number is the last part
                parts[-1] = str(int(parts[-1]) ^ 16 if "shared address" in kind else int(parts[-1]) + 1)
            line = "" if replacement is None else replacement.format(*parts)
            yield kind, lines[n].strip(), "\n".join([*lines[:n], line, *lines[n + 1 :]])


def notices(recorded: Recorded, program: Program) -> bool:
    """Whether the kernel fails, or leaves another result, in any mode."""
    for mode in (*QUICK, CHANCE, Mode("late", "random", seed=2), Mode("early", "random", seed=3)):
        try:
            after = recorded.replay(program, mode)
        except PTXError:
            return True
        if any((a != b).any() for a, b in zip(after, recorded.after, strict=True)):
            return True
    return False


# Rows and features that fill no tile, so that masks matter; several aligned steps, so that waits do; and TMA.
FAULTY_CALLS = (Call("ragged", 77, 136), Call("aligned", 192, 192), Call("aligned", 128, 256, large=True))


def break_kernels(architecture: str, most: int) -> list[str]:
    """Breaks each kernel in ``most`` places for each kind of fault; says if few are noticed.

    Not every fault shows: the last wait of a loop may wait for nothing, a barrier may be one too many, and a mask
    may hide what is multiplied by 0. So each kind has to be noticed somewhere, and half of all faults.
    """
    bench, seen = Bench(architecture), set()
    counts = defaultdict(lambda: [0, 0])  # by kind of fault: tried, noticed
    for call in FAULTY_CALLS:
        if call.large and architecture == "sm_80":  # which has no TMA
            continue
        bench.driver.mode, bench.driver.launches = Mode("early"), []
        bench.run(call, "triton")
        launches, bench.driver.launches = bench.driver.launches, None
        for recorded in launches:
            program = recorded.launch.program
            if program.text in seen:
                continue
            seen.add(program.text)
            if notices(recorded, program):
                raise AssertionError(f"{program.name} differs from mode to mode without a fault")
            for kind, line, text in broken_versions(program.text, most):
                noticed = notices(recorded, decode(Program(text)))
                counts[kind][0] += 1
                counts[kind][1] += noticed
                if not noticed:
                    print(f"{architecture} not noticed: {program.name}: {kind}: {line}")
    for kind, (tried, noticed) in counts.items():
        print(f"{architecture} {kind}: {noticed} of {tried} noticed", flush=True)
    tried, noticed = (sum(x) for x in zip(*counts.values(), strict=True))
    print(f"{architecture} faults: {noticed} of {tried} noticed")
    problems = [f"{architecture}: it is never noticed that {kind}" for kind, (_, n) in counts.items() if n == 0]
    return problems + ([f"{architecture}: {noticed} of {tried} faults noticed"] if 2 * noticed < tried else [])


def check_noise(bench: Bench) -> str | None:
    """Sampled noise of a seed is the same on every device; the reference has noise of its own."""
    from fused_infonce.kernels import noise

    found = torch.empty(2, 4)
    noise.sample_noise(torch.tensor([1]), 0, None, found, None)
    known = torch.tensor([[0.2309, 0.9145, -0.2936, -0.1554], [-0.0162, 0.1388, 0.8443, 0.5174]])
    return None if (found - known).abs().max() < 1e-4 else f"noise is {found.tolist()}"


def execute(architecture: str, everyday: bool, only: str) -> list[str]:
    """Problems of an architecture's calls, in every mode; prints a line per call."""
    bench = Bench(architecture)
    problems = []
    if problem := check_noise(bench):
        problems.append(f"{architecture} noise: {problem}")
    for call in calls():
        if (everyday and not call.everyday) or only not in str(call):
            continue
        start = time.monotonic()
        found = []
        for mode in (*QUICK, *([CHANCE] if call.chance else [])):
            if problem := bench.problem(call, mode):
                found.append(f"{architecture} {call}: {mode}: {problem}")
        print(
            f"{architecture} {call}: {'wrong' if found else 'right'} ({time.monotonic() - start:.1f} s)",
            flush=True,
        )
        problems += found
    print(f"{architecture} kernels executed: {', '.join(sorted(bench.driver.executed))}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument(
        "--calls", choices=("everyday", "all"), default="all", help="everyday: those of the test suite"
    )
    parser.add_argument("--only", default="", help="calls whose description contains this text")
    parser.add_argument(
        "--faults", type=int, metavar="N", help="break each kernel in N places for each kind of fault"
    )
    args = parser.parse_args()
    if len(args.architectures) > 1:  # Triton compiles for one device per process here
        rest = [x for x in sys.argv[1:] if x not in ("--architectures", *ARCHITECTURES)]
        commands = [[sys.executable, __file__, *rest, "--architectures", x] for x in args.architectures]
        return max(process.wait() for process in [subprocess.Popen(command) for command in commands])
    architecture = args.architectures[0]
    if args.faults:
        problems = break_kernels(architecture, args.faults)
    else:
        problems = execute(architecture, args.calls == "everyday", args.only)
    for problem in problems:
        print(f"problem: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
