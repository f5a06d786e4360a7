"""Peak memory of one loss, forward + backward, in a fresh process on a CPU: python -m bench.memory

"beyond" leaves out what scales with N·D alone: the gradients, their accumulators and the normalised rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

WAYS = ("ours", "symmetric", "forward", "usual")


def measure(way: str, N: int, D: int, autocast: bool = False) -> dict[str, float]:
    """MiB that one loss forward + backward adds to a fresh process: in all, and beyond what is unavoidable."""
    command = [sys.executable, "-m", "bench.memory", "--child", way, str(N), str(D), str(int(autocast))]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return dict(json.loads(out.stdout))


def child(way: str, N: int, D: int, autocast: bool) -> None:
    import torch

    from bench.cases import naive
    from fused_infonce import info_nce

    loss = {
        "ours": info_nce,
        "forward": info_nce,
        "symmetric": lambda q, k: info_nce(q, k, symmetric=True),
        "usual": naive,
    }[way]

    def run(q, k):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(q, k)
        if value.requires_grad:
            value.backward()

    needs = way != "forward"
    run(*(torch.randn(300, 300, requires_grad=needs) for _ in "qk"))  # loads the libraries
    q, k = (torch.randn(N, D, requires_grad=needs) for _ in "qk")
    before = _status("VmRSS")
    run(q, k)
    used = _status("VmHWM") - before
    # Alive at once at the least, in fp32: two accumulators beside the normalised rows, or beside two gradients.
    unavoidable = (4 if needs else 2) * N * D * 4
    print(json.dumps({"all": used / 2**20, "beyond": (used - unavoidable) / 2**20}))


def _status(field: str) -> int:
    """Bytes, of this process alone: ru_maxrss would begin with what the parent held when it forked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--n", type=int, nargs="+", default=[4096, 16384, 65536], help="anchors (default: %(default)s)"
    )
    parser.add_argument("--d", type=int, default=256, help="features (default: %(default)s)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, n, d, autocast = args.child
        child(way, int(n), int(d), autocast == "1")
        return
    print(f"{'way':10} {'products':9} {'N':>7} {'D':>5} {'MiB in all':>11} {'beyond':>8}")
    for n in args.n:
        for way in WAYS:
            if way == "usual" and n > 20_000:
                continue  # 4 bytes × N² several times over
            for autocast in (False, True):
                found = measure(way, n, args.d, autocast)
                name = "bf16" if autocast else "fp32"
                print(
                    f"{way:10} {name:9} {n:7} {args.d:5} {found['all']:11.0f} {found['beyond']:8.0f}", flush=True
                )


if __name__ == "__main__":
    main()
