"""Counts how often each kernel is compiled for calls with many batch sizes, without compiling it.

    python tests/count_variants.py

A size that is known at compile time, or an address that is aligned for some sizes only, makes another variant of a
kernel, which a user waits for in the middle of a training. Exits with status 1 where a kernel has more than two,
those of small and of large batches.
"""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Executor, Future

from compile_calls import Call, Compiler
from fake_device import TARGETS
from triton import AsyncCompileMode

ROWS = (
    128,
    130,
    192,
    200,
    256,
    333,
    511,
    512,
    640,
    777,
    1000,
    1024,
    1100,
    1537,
    2048,
    3000,
    4096,
    5001,
    8192,
    10_000,
)
MOST = 2
KERNELS = {"ratios": 2}  # under one name: the maxima and sums, and the weighted tile


class NoCompiler(Executor):
    """Leaves every kernel uncompiled."""

    def submit(self, function, *args, **options) -> Future:
        future = Future()
        future.set_exception(RuntimeError("not compiled"))
        return future


def variants(compiler: Compiler, options: str) -> dict[str, dict[int, list[int]]]:
    """By kernel the batch sizes that launch each of its variants."""
    compiler.found = {}
    with AsyncCompileMode(NoCompiler(), ignore_errors=True):
        for rows in ROWS:
            compiler.current = Call(options, rows, 768, "bf16")
            compiler.current.run()
    found = defaultdict(dict)
    for key, entry in compiler.found.items():
        found[entry.name][key] = sorted({call.rows for call in entry.calls})
    return found


def main() -> int:
    compiler = Compiler()
    compiler.driver.target = next(target for target in TARGETS if target.name == "sm_90")
    problems = 0
    for options in ("info_nce", "symmetric", "no gradient"):
        for name, sizes in sorted(variants(compiler, options).items()):
            print(f"{options:12} {name:20} {len(sizes)} variants for {len(ROWS)} batch sizes")
            if len(sizes) > MOST * KERNELS.get(name, 1):
                problems += 1
                for rows in sizes.values():
                    print(f"    {', '.join(map(str, rows))}")
    return int(problems > 0)


if __name__ == "__main__":
    raise SystemExit(main())
