"""The lower bounds that candidates are compared with: bare matrix products, and a copy of the inputs."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.cases import Batch, Case

FLOOR, COPY = "floor", "copy"
TILE_BYTES = {"cpu": (2**26, 2**28), "cuda": (2**28, 2**31, 2**33)}  # of the matrix held at once, tried in turn
GAP_BYTES = 64  # between the rows of a tile: rows a power of two long share few sets of a CPU's cache


def floor(case: Case, batch: Batch) -> Callable[[], object]:
    """Returns a step of the bare matrix products, of the same shapes and dtype, into memory allocated before.

    Their number is that of ``Case.flops``; in chunks of rows of the size that is fastest here.
    """
    matrix = case.N * (case.N + case.negatives + case.noise) * case.product_dtype.itemsize
    small, *larger = TILE_BYTES[batch.q.device.type]
    best = _products(case, batch, small)
    if matrix <= small:
        return best
    shortest = _seconds(best, batch.q.device)
    for tile_bytes in larger:
        try:
            products = _products(case, batch, tile_bytes)
            seconds = _seconds(products, batch.q.device)
        except (MemoryError, RuntimeError):  # not enough memory for a larger tile
            break
        if seconds < shortest:
            best, shortest = products, seconds
        if matrix <= tile_bytes:
            break
    return best


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Returns the time of the second of two calls."""
    start = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _products(case: Case, batch: Batch, tile_bytes: int) -> Callable[[], object]:
    dtype, device = case.product_dtype, batch.q.device
    own = [batch.k] if batch.negatives is None else [batch.k, batch.negatives]
    q, k = batch.q.detach().to(dtype), torch.cat([x.detach().to(dtype) for x in own])
    noise = torch.randn(case.noise, case.D, device=device).to(dtype)
    T = len(k) + len(noise)
    rows = min(len(q), max(min(1024, len(q)), tile_bytes // (T * dtype.itemsize)))
    tile = torch.empty(rows, T + GAP_BYTES // dtype.itemsize, dtype=dtype, device=device)
    dq, dk = torch.empty_like(q), torch.empty_like(k)

    def products() -> None:
        for start in range(0, len(q), rows):
            some = q[start : start + rows]
            e = tile[: len(some), : len(k)]
            torch.mm(some, k.T, out=e)
            if case.mode == "symmetric":
                torch.mm(some, k.T, out=e)
            if case.gradients:
                torch.mm(e, k, out=dq[start : start + rows])
                torch.mm(e.T, some, out=dk) if start == 0 else torch.addmm(dk, e.T, some, out=dk)
            if case.mode == "gte":
                for x, grad in ((q, dq), (k, dk)):  # symmetric matrices, whose gradient is one product
                    e = torch.mm(x[start : start + rows], x.T, out=tile[: len(some), : len(x)])
                    grad[start : start + rows].addmm_(e, x)
            if len(noise):
                other = tile[: len(some), len(k) : T]
                torch.mm(some, noise.T, out=other)
                if case.gradients:
                    dq[start : start + rows].addmm_(other, noise)

    return torch.no_grad()(products)


def copy(batch: Batch) -> Callable[[], object]:
    """Returns a step that reads the inputs and writes memory of the gradients' size once."""
    pairs = [(x.detach(), torch.empty_like(x, requires_grad=False)) for x in batch.leaves.values()]

    def copies() -> None:
        for x, out in pairs:
            out.copy_(x)

    return copies
