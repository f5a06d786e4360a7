"""The ways to compute the loss that are compared, and the bare products that none can do without.

A candidate is a function of a case that returns the loss, a function of a batch. Another file of them, with the
same decorator, is measured beside these: ``python -m bench loss --also my_losses.py``.
"""

from __future__ import annotations

import functools
import math
import runpy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import TEMPERATURE, Batch, Case, Loss, Result, Way, exact, naive
from fused_infonce import gs_infonce, info_nce


class Unsupported(Exception):  # noqa: N818 (no error: a result)
    """A candidate cannot do a case; the message is the reason."""


@dataclass(frozen=True)
class Candidate:
    name: str
    make: Callable[[Case], Loss]  # Unsupported or ImportError: why not here
    ways: tuple[Way, ...] = ("one-way", "forward")
    noise: bool = False
    negatives: bool = False
    package: str | None = None  # of PyPI, whose version is recorded
    expects: str = "sampled"  # noise in closed form: "expected"
    loss: str = "InfoNCE"  # another loss has no gate: its time is for scale only

    def loss_for(self, case: Case) -> Loss:
        """Unsupported where it cannot do the case: not installed, not importable, not made for it."""
        if case.way not in self.ways:
            raise Unsupported(f"not {case.way}")
        if case.noise and not self.noise:
            raise Unsupported("no noise")
        if case.negatives and not self.negatives:
            raise Unsupported("no hard negatives")
        if self.expects == "expected" and not case.noise:
            raise Unsupported("without noise it is ours-torch or ours-triton")
        try:
            return self.make(case)
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and not self.version():
                raise Unsupported("not installed") from None
            raise Unsupported(f"does not import: {first_line(error)}") from None

    def version(self) -> str | None:
        if self.package is None:
            return None
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def answer(self, batch: Batch, case: Case) -> Result:
        """What it should give for the batch, float64."""
        noise = batch.noise if isinstance(batch.noise, Tensor) else None
        expected = None
        if self.expects == "expected":
            from scipy.special import hyp0f1

            kappa = 1 / TEMPERATURE
            expected = math.log(case.noise) + math.log(hyp0f1(case.D / 2, kappa * kappa / 4))
            noise = None
        return exact(
            batch.q,
            batch.k,
            TEMPERATURE,
            negatives=batch.negatives,
            noise=noise,
            expected=expected,
            symmetric=case.way == "symmetric",
        )


CANDIDATES: dict[str, Candidate] = {}


def candidate(name: str, **facts: object) -> Callable[[Callable[[Case], Loss]], Callable[[Case], Loss]]:
    """Registers ``make``, a function of a case, under a name; ``facts`` are the fields of Candidate."""

    def register(make: Callable[[Case], Loss]) -> Callable[[Case], Loss]:
        CANDIDATES[name] = Candidate(name, make, **facts)  # type: ignore[arg-type]
        return make

    return register


def load(also: str | None = None) -> dict[str, Candidate]:
    """Every candidate: ours, the usual ways, the peers, and those of the file ``also``."""
    import bench.peers  # noqa: F401 (registers them)

    before = dict(CANDIDATES)
    if also:
        runpy.run_path(str(Path(also)))
    found = dict(CANDIDATES)
    CANDIDATES.clear()
    CANDIDATES.update(before)
    return found


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# ------------------------------------------------------------------ ours

EVERY: tuple[Way, ...] = ("one-way", "symmetric", "forward")


def _ours(case: Case, backend: str, noise: str = "sampled", reduction: str = "mean") -> Loss:
    def loss(batch: Batch) -> Tensor:
        given = isinstance(batch.noise, Tensor)
        value = gs_infonce(
            batch.q,
            batch.k,
            batch.negatives,
            temperature=TEMPERATURE,
            num_noise=0 if given else batch.noise,
            noise=batch.noise if given and noise == "sampled" else noise,
            symmetric=case.way == "symmetric",
            reduction=reduction,
            backend=backend,
        )
        return value.mean()

    def expected(batch: Batch) -> Tensor:
        return loss(replace(batch, noise=case.noise))

    if backend == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            info_nce(torch.eye(8, device=device), torch.eye(8, device=device), backend="triton")
        except Exception as error:
            raise Unsupported(first_line(error)) from None
    return expected if noise == "expected" else loss


for _name, _facts in {
    "ours-torch": {"backend": "torch"},
    "ours-triton": {"backend": "triton"},
    "ours-reference": {"backend": "reference"},  # float64 with the whole matrix
    "ours-two-sweeps": {"backend": "auto", "reduction": "none"},
    "ours-expected": {"backend": "auto", "noise": "expected"},
}.items():
    CANDIDATES[_name] = Candidate(
        _name,
        functools.partial(_ours, **_facts),
        ways=("one-way",) if _name == "ours-two-sweeps" else EVERY,
        noise=True,
        negatives=True,
        expects=_facts.get("noise", "sampled"),
    )


# ------------------------------------------------------------------ the usual ways


@candidate("naive", ways=EVERY, noise=True, negatives=True)
def _naive(case: Case) -> Loss:
    if case.way == "symmetric":

        def both(batch: Batch) -> Tensor:
            logits = F.normalize(batch.q, dim=1) @ F.normalize(batch.k, dim=1).T / TEMPERATURE
            labels = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

        return both
    if not case.noise and not case.negatives:
        return lambda batch: naive(batch.q, batch.k)

    def with_more_columns(batch: Batch) -> Tensor:
        q, k = F.normalize(batch.q, dim=1), batch.k
        if batch.negatives is not None:
            k = torch.cat([k, batch.negatives])
        cosines = q @ F.normalize(k, dim=1).T
        noise = batch.noise
        if isinstance(noise, int) and noise:
            noise = torch.randn(noise, q.shape[1], device=q.device)
        if isinstance(noise, Tensor):  # a product of its own, for noise has no gradient
            cosines = torch.cat([cosines, q @ F.normalize(noise, dim=1).T], 1)
        return F.cross_entropy(cosines / TEMPERATURE, torch.arange(len(q), device=q.device))

    return with_more_columns


@candidate("naive-compile", ways=EVERY, noise=True, negatives=True)
def _compiled(case: Case) -> Loss:
    torch.compiler.reset()
    return torch.compile(_naive(case), dynamic=False)


@candidate("simcse-broadcast")
def _broadcast(case: Case) -> Loss:
    """The similarity of the reference SimCSE: every pair of rows in one tensor (N, N, D)."""

    def loss(batch: Batch) -> Tensor:
        logits = F.cosine_similarity(batch.q[:, None], batch.k[None], dim=-1) / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return loss


# ------------------------------------------------------------------ the floor

FLOOR, COPY = "floor", "copy"
FLOOR_TILES = {"cpu": (2**26, 2**28), "cuda": (2**28, 2**31, 2**33)}  # bytes of the matrix held at a time
GAP = 64  # bytes between a tile's rows: rows a power of two long meet in few sets of a CPU's cache


def floor(case: Case, batch: Batch) -> Callable[[], object]:
    """The matrix products alone, same shapes and dtype, in memory that is there: three one-way, four symmetric,
    one forward; in chunks of rows, of the size that is the fastest here.
    """
    matrix = case.N * (case.N + case.negatives + case.noise) * case.product_dtype.itemsize
    small, *larger = FLOOR_TILES[batch.q.device.type]
    best = _products(case, batch, small)
    if matrix <= small:
        return best
    shortest = _seconds(best, batch.q.device)
    for bytes_held in larger:
        try:
            products = _products(case, batch, bytes_held)
            seconds = _seconds(products, batch.q.device)
        except (MemoryError, RuntimeError):  # not enough memory for a larger tile
            break
        if seconds < shortest:
            best, shortest = products, seconds
        if matrix <= bytes_held:
            break
    return best


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """The time of one call, the second."""
    begun = 0.0
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _products(case: Case, batch: Batch, bytes_held: int) -> Callable[[], object]:
    dtype, device = case.product_dtype, batch.q.device
    own = [batch.k] if batch.negatives is None else [batch.k, batch.negatives]
    q, k = batch.q.detach().to(dtype), torch.cat([x.detach().to(dtype) for x in own])
    noise = torch.randn(case.noise, case.D, device=device).to(dtype)
    T = len(k) + len(noise)
    rows = min(len(q), max(min(1024, len(q)), bytes_held // (T * dtype.itemsize)))
    tile = torch.empty(rows, T + GAP // dtype.itemsize, dtype=dtype, device=device)
    dq, dk = torch.empty_like(q), torch.empty_like(k)

    def products() -> None:
        for start in range(0, len(q), rows):
            some = q[start : start + rows]
            e = tile[: len(some), : len(k)]
            torch.mm(some, k.T, out=e)
            if case.way == "symmetric":
                torch.mm(some, k.T, out=e)
            if case.gradients:
                torch.mm(e, k, out=dq[start : start + rows])
                torch.mm(e.T, some, out=dk) if start == 0 else torch.addmm(dk, e.T, some, out=dk)
            if len(noise):
                other = tile[: len(some), len(k) : T]
                torch.mm(some, noise.T, out=other)
                if case.gradients:
                    dq[start : start + rows].addmm_(other, noise)

    return torch.no_grad()(products)


def copy(batch: Batch) -> Callable[[], object]:
    """The inputs read and memory of the gradients written, once: what memory alone costs."""
    pairs = [(x.detach(), torch.empty_like(x, requires_grad=False)) for x in batch.leaves.values()]

    def copies() -> None:
        for x, out in pairs:
            out.copy_(x)

    return copies
