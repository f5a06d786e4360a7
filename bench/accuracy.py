"""Errors of loss and gradients against float64, ours and the usual way's: python -m bench.accuracy"""

from __future__ import annotations

import argparse

import torch

from bench.cases import REGIMES, differentiated, errors, exact, naive, regime
from fused_infonce import info_nce


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("--n", type=int, default=1024, help="anchors (default: %(default)s)")
    parser.add_argument("--d", type=int, default=768, help="features (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.05, help="τ (default: %(default)s)")
    args = parser.parse_args()
    print(f"N = {args.n}, D = {args.d}, temperature = {args.temperature}; torch {torch.__version__}")
    print(
        f"{'products':9} {'regime':8} {'loss':8} {'way':6} "
        + "".join(f"{n:>9}" for n in ("loss", "dq", "dk", "dtau"))
    )
    for autocast in (False, True):
        for name in REGIMES:
            q, k = (x.float() for x in regime(name, args.n, args.d))
            want = exact(q, k, args.temperature)
            for way, loss in (("ours", info_nce), ("usual", naive)):
                found = errors(differentiated(loss, q, k, args.temperature, autocast), want, args.temperature)
                figures = "".join(f"{found[n]:9.1e}" for n in ("loss", "dq", "dk", "dtau"))
                print(f"{'bf16' if autocast else 'fp32':9} {name:8} {float(want['loss']):8.1e} {way:6} {figures}")


if __name__ == "__main__":
    main()
