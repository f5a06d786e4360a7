"""Time of forward + backward against bare matrix products and the usual way, on the CPU: python -m bench.speed

All candidates of a row are timed in turn, again and again, and each figure is the median; times in milliseconds.
"bare" is three matrix products of the same shapes and dtype, which no exact way can do without.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from bench.cases import naive
from fused_infonce import info_nce


def interleaved(candidates: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, timed in turn for about ``seconds`` (at least five rounds)."""
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(values) for name, values in times.items()}


def candidates(N: int, D: int, autocast: bool, compiled: bool) -> dict[str, Callable[[], object]]:
    q, k = torch.randn(N, D, requires_grad=True), torch.randn(N, D, requires_grad=True)
    dtype = torch.bfloat16 if autocast else torch.float32
    a, b = q.detach().to(dtype), k.detach().to(dtype)

    def bare() -> None:
        e = torch.mm(a, b.T)
        torch.mm(e, b)
        torch.mm(e.T, a)

    def step(loss: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def run() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                value = loss(q, k)
            return torch.autograd.grad(value, (q, k))

        return run

    found: dict[str, Callable[[], object]] = {"bare": bare, "ours": step(info_nce), "eager": step(naive)}
    if compiled:
        found["compiled"] = step(torch.compile(naive))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 64, 256], help="anchors (default: %(default)s)")
    parser.add_argument(
        "--d", type=int, nargs="+", help="features (default: 768 from 1024 anchors on, else 384, 768 and 1024)"
    )
    parser.add_argument("--seconds", type=float, default=10, help="a row (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile of the usual way out")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"{'products':9} {'N':>6} {'D':>5} {'bare':>8} {'ours':>8} {'eager':>8} {'compiled':>9}   ours against")
    for n in args.n:
        for d in args.d or ([768] if n >= 1024 else [384, 768, 1024]):
            for autocast in (False, True):
                torch.compiler.reset()
                ways = candidates(n, d, autocast, compiled=not args.no_compile)
                found = interleaved(ways, args.seconds)
                times = " ".join(f"{found.get(name, float('nan')):8.2f}" for name in ("bare", "ours", "eager"))
                ratios = ", ".join(
                    f"{found['ours'] / v:.2f}× {name}" for name, v in found.items() if name != "ours"
                )
                products = "bf16" if autocast else "fp32"
                last = found.get("compiled", float("nan"))
                print(f"{products:9} {n:6} {d:5} {times} {last:9.2f}   {ratios}", flush=True)


if __name__ == "__main__":
    main()
