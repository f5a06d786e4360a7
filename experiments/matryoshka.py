"""Matryoshka in one sweep, a prototype on torch: ``python -m experiments.matryoshka``.

InfoNCE of several prefixes of the same rows. One call per prefix multiplies 3 Σ_m d_m features; one sweep
multiplies 3 D: raw products accumulate over blocks of features, every prefix's end scales them by its norms and
exponentiates, and the gradient of a feature block is one product with the sum of the tiles of the prefixes that
contain it. The passes over the tiles, some ten per prefix, remain. The command compares the two in float64, and
then their times with those of ``losses.matryoshka`` and of the bare products of both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_infonce import info_nce, losses

DIMS = (64, 128, 256, 512, 768)
TAU = 0.05
TILE = 1 << 20  # entries of one tile; a chunk of rows holds one for each prefix, and two more


def one_sweep(
    q: Tensor,
    k: Tensor,
    dims: Sequence[int] = DIMS,
    tau: float = TAU,
    product_dtype: torch.dtype | None = None,
    tile: int = TILE,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over the prefixes of mean InfoNCE, and its gradients, (N, D) each; at κ = 1/τ of at most 40."""
    N, kappa = len(q), 1 / tau
    blocks = [slice(a, b) for a, b in pairwise((0, *dims))]
    low = [(q[:, b].to(product_dtype or q.dtype), k[:, b].to(product_dtype or q.dtype)) for b in blocks]
    inverse_q = [1 / torch.linalg.vector_norm(q[:, :d], dim=1) for d in dims]  # (N,) each
    inverse_k = [1 / torch.linalg.vector_norm(k[:, :d], dim=1) for d in dims]
    positive = [  # the positives' exact cosines, (N,) each
        (q[:, :d] * k[:, :d]).sum(1) * a * b for d, a, b in zip(dims, inverse_q, inverse_k, strict=True)
    ]
    dq, dk, loss = torch.zeros_like(q), torch.zeros_like(k), q.new_zeros(())
    radial_q = torch.zeros(len(dims), N, dtype=q.dtype)  # Σ_j of the tile's entry times its cosine
    radial_k = torch.zeros_like(radial_q)
    step = max(1, tile // N)
    tiles = [q.new_empty(step, N) for _ in dims]
    raw, scaled = q.new_empty(step, N), q.new_empty(step, N)
    for first in range(0, N, step):
        rows = slice(first, min(N, first + step))
        n = rows.stop - first
        P, S = raw[:n], scaled[:n]
        for m, (a, b) in enumerate(low):
            if product_dtype is None:
                torch.addmm(P, a[rows], b.T, beta=int(m > 0), out=P)
            else:
                product = a[rows] @ b.T
                P.add_(product) if m else P.copy_(product)
            r, s, E = inverse_q[m][rows, None], positive[m][rows, None], tiles[m][:n]
            torch.mul(P, inverse_k[m], out=S)
            torch.mul(S, kappa * r, out=E)
            E.sub_(kappa * s)
            E.diagonal(first).fill_(-torch.inf)
            E.exp_()
            total = E.sum(1)
            loss += total.log1p().sum() / N
            alpha = kappa / N / (1 + total)
            share = alpha * total
            weight = (alpha[:, None] * r)[:, 0]
            S.mul_(E)
            radial_q[m, rows] = weight * S.sum(1) - share * s[:, 0]
            radial_k[m].addmv_(S.T, weight)
            radial_k[m, rows] -= share * s[:, 0]
            E.mul_(weight[:, None])
            own = share * r[:, 0]  # −the positive's entry; its column's norm follows with the others'
            E.diagonal(first).copy_(-own)
        G = S.zero_()  # dloss/draw products of all prefixes that contain the block
        for m in reversed(range(len(dims))):
            G.addcmul_(tiles[m][:n], inverse_k[m])
            g, b = G.to(product_dtype or q.dtype), blocks[m]
            dq[rows, b] = (g @ low[m][1]).to(q.dtype)
            dk[:, b] += g.T @ low[m][0][rows]
    for m, d in enumerate(dims):
        dq[:, :d].addcmul_(q[:, :d], (radial_q[m] * inverse_q[m] ** 2)[:, None], value=-1)
        dk[:, :d].addcmul_(k[:, :d], (radial_k[m] * inverse_k[m] ** 2)[:, None], value=-1)
    return loss, dq, dk


def calls(q: Tensor, k: Tensor, product_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``losses.matryoshka(info_nce)``: one call for each prefix."""
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    with torch.autocast("cpu", torch.bfloat16, enabled=product_dtype is not None):
        loss = losses.matryoshka(info_nce, DIMS)(*leaves, temperature=TAU, backend="torch")
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def bare(q: Tensor, k: Tensor, dims: Sequence[int], dtype: torch.dtype | None) -> None:
    """The three products of one InfoNCE for each of ``dims`` features, in chunks of rows, and nothing else."""
    step = max(1, TILE // len(q))
    for d in dims:
        a, b = (x[:, :d].to(dtype or x.dtype).contiguous() for x in (q, k))
        for rows in range(0, len(q), step):
            tile = a[rows : rows + step] @ b.T
            tile @ b
            tile.T @ a[rows : rows + step]


def dense(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    loss: Tensor = sum(  # type: ignore[assignment]
        F.cross_entropy(F.normalize(a[:, :d]) @ F.normalize(b[:, :d]).T / TAU, torch.arange(len(q)))
        for d in DIMS
        for a, b in [leaves]
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x.double() - y.double()).norm() / y.double().norm()) for x, y in zip(a, b, strict=True))


def inputs(N: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    q, z = (torch.randn(N, DIMS[-1], generator=source, dtype=dtype) for _ in "qz")
    return q, 0.5 * q + z


def seconds(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians; the candidates take turns."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    q, k = inputs(300, torch.float64)
    print(f"float64, N = 300: {difference(one_sweep(q, k), calls(q, k)):.1e} from one call per prefix")
    print("| N | dtype | one call per prefix | one sweep | bare products, per prefix | bare products, one sweep |")
    print("|---|---|---|---|---|---|")
    for N in args.sizes:
        q, k = inputs(N)
        for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            steps: dict[str, Callable[[], object]] = {
                "calls": partial(calls, q, k, dtype),
                "sweep": partial(one_sweep, q, k, product_dtype=dtype),
                "bare calls": partial(bare, q, k, DIMS, dtype),
                "bare sweep": partial(bare, q, k, DIMS[-1:], dtype),
            }
            found = seconds(steps, args.repeats)
            print(
                f"| {N:,} | {name} | " + " | ".join(f"{1e3 * t:.0f} ms" for t in found.values()) + " |", flush=True
            )


if __name__ == "__main__":
    main()
