"""What is measured: sizes, inputs as training gives them, the exact answer, and how far an answer is from it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

REGIMES = ("trained", "middle", "random", "cone")
Way = Literal["one-way", "symmetric", "forward"]
WAYS: tuple[Way, ...] = ("one-way", "symmetric", "forward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPERATURE = 0.05
BLOCK = 16384  # rows that are drawn at a time


@dataclass(frozen=True)
class Case:
    """One problem. Rows are fp32; with bf16 and fp16 the loss runs under autocast, as ``--bf16`` trains."""

    N: int
    D: int
    way: Way = "one-way"  # "forward" is one-way without gradients
    dtype: str = "fp32"  # of the matrix products
    noise: int = 0  # M random directions
    negatives: int = 0  # H hard negatives
    regime: str = "middle"

    @property
    def gradients(self) -> bool:
        return self.way != "forward"

    @property
    def product_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> int:
        """Of the products that no exact way can do without: what the floor computes."""
        own, fixed = self.N + self.negatives, self.noise  # columns with a gradient, and without
        products = {"one-way": 3 * own + 2 * fixed, "symmetric": 4 * own, "forward": own + fixed}[self.way]
        return 2 * self.N * self.D * products

    @property
    def label(self) -> str:
        extra = f" M={self.noise}" * bool(self.noise) + f" H={self.negatives}" * bool(self.negatives)
        return f"{self.dtype} {self.way} N={self.N} D={self.D}{extra}"

    def at(self, N: int) -> Case:
        """The same problem with N anchors, noise and hard negatives in proportion."""
        return replace(self, N=N, noise=self.noise * N // self.N, negatives=self.negatives * N // self.N)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(eq=False)
class Batch:
    """A case's tensors: leaves whose ``.grad`` a step fills."""

    q: Tensor  # (N, D)
    k: Tensor  # (N, D)
    negatives: Tensor | None  # (H, D)
    noise: int | Tensor  # how many directions to sample, or the directions (M, D)

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {"dq": self.q, "dk": self.k, "dnegatives": self.negatives}
        return {name: x for name, x in found.items() if x is not None}


Loss = Callable[[Batch], Tensor]
Result = dict[str, Tensor]  # loss, dq, dk; of one-way exact answers dtau, dtau_rows; dnegatives where there are


def regime(
    name: str, N: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Anchors and positives, (N, D), as an encoder gives them at a stage of training.

    trained: positives at cosine 0.92 among random negatives (at τ = 0.05 and N = 4096 a loss of 5e-5);
    middle: at 0.5; random: unrelated; cone: every cosine about 0.98, an encoder before contrastive training.
    """
    kind = {"generator": torch.Generator(device).manual_seed(seed), "dtype": dtype, "device": device}
    q, z = (F.normalize(torch.randn(N, D, **kind)) for _ in "qz")
    if name == "cone":
        kind["generator"] = torch.Generator(device).manual_seed(2**32)  # one cone, whatever the seed
        u = F.normalize(torch.randn(1, D, **kind))
        spread = (1 / 0.98 - 1) ** 0.5
        return u + spread * q, u + spread * F.normalize(0.8 * q + 0.6 * z)
    cosine = {"trained": 0.92, "middle": 0.5, "random": 0.0}[name]
    return q, cosine * q + (1 - cosine**2) ** 0.5 * z


def make_batch(case: Case, device: str, given_noise: bool = False) -> Batch:
    """The case's tensors; ``given_noise``: the directions themselves, to compare answers with."""
    if case.N <= BLOCK:
        q, k = (x.float().to(device) for x in regime(case.regime, case.N, case.D))
    else:  # where they are needed, block by block: on the host and in float64 it would take longer than the case
        blocks = range(0, case.N, BLOCK)
        kind = {"dtype": torch.float32, "device": device}
        parts = [regime(case.regime, min(BLOCK, case.N - b), case.D, b, **kind) for b in blocks]
        q, k = (torch.cat([part[side] for part in parts]) for side in (0, 1))
    generator = torch.Generator().manual_seed(1)
    negatives = torch.randn(case.negatives, case.D, generator=generator) if case.negatives else None
    noise: int | Tensor = case.noise
    if given_noise and case.noise:
        noise = torch.randn(case.noise, case.D, generator=generator).to(device)
    batch = Batch(q, k, None if negatives is None else negatives.to(device), noise)
    for x in batch.leaves.values():
        x.requires_grad_(case.gradients)
    return batch


def autocast(case: Case, device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, case.product_dtype, enabled=case.dtype != "fp32")


def run_step(loss: Loss, batch: Batch, case: Case, device: str) -> Tensor:
    """What is timed: the loss, and with gradients its backward into fresh ``.grad``. → the loss, detached"""
    for x in batch.leaves.values():
        x.grad = None
    with torch.set_grad_enabled(case.gradients), autocast(case, device):
        value = loss(batch)
    if value.requires_grad:
        value.backward()
    return value.detach()


def result_of(loss: Loss, batch: Batch, case: Case, device: str) -> Result:
    """What a candidate answers; ValueError where it leaves a gradient out."""
    found = {"loss": run_step(loss, batch, case, device)}
    if case.gradients:
        for name, x in batch.leaves.items():
            if x.grad is None:
                raise ValueError(f"gives no {name}")
            found[name], x.grad = x.grad, None
    return found


def naive(anchors: Tensor, positives: Tensor, temperature: float | Tensor = TEMPERATURE) -> Tensor:
    """The usual way: normalise, one matrix of logits, cross entropy."""
    logits = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(anchors), device=anchors.device))


def exact(
    anchors: Tensor,
    positives: Tensor,
    temperature: float,
    *,
    negatives: Tensor | None = None,
    noise: Tensor | None = None,
    expected: float | None = None,
    symmetric: bool = False,
) -> Result:
    """Loss and gradients of the mean by the formulas, in float64, a chunk of rows at a time.

    ``expected``: the logarithm of a constant Σ_m e^(κ cos) of every row's denominator.
    ``dtau_rows``: each row's share of N·dτ.
    """
    if symmetric:
        ahead, back = exact(anchors, positives, temperature), exact(positives, anchors, temperature)
        pairs = (("loss", "loss"), ("dq", "dk"), ("dk", "dq"), ("dtau", "dtau"), ("dtau_rows", "dtau_rows"))
        return {a: (ahead[a] + back[b]) / 2 for a, b in pairs}
    parts = [x.detach().double() for x in (positives, negatives, noise) if x is not None]
    q, columns = anchors.detach().double(), torch.cat(parts)
    norm_q, norm_c = q.norm(dim=1, keepdim=True), columns.norm(dim=1, keepdim=True)
    q, columns = q / norm_q, columns / norm_c  # (N, D), (T, D)
    N, kappa = len(q), 1 / temperature
    cosines = (q * columns[:N]).sum(1, keepdim=True)  # s_ii
    losses, dq, dtau_rows = q.new_empty(N), torch.empty_like(q), q.new_empty(N)
    dc = torch.zeros_like(columns)
    step = max(1, 2**24 // len(columns))
    for start in range(0, N, step):
        rows = slice(start, min(N, start + step))
        difference = q[rows] @ columns.T - cosines[rows]  # s_ij − s_ii, (C, T)
        z = kappa * difference
        z.diagonal(start).fill_(-torch.inf)
        top = z.amax(1, keepdim=True).clamp(min=0)
        ratios = (z - top).exp()
        total = ratios.sum(1, keepdim=True)
        if expected is not None:
            total += (expected - kappa * cosines[rows] - top).exp()
        denominator = (-top).exp() + total
        p = ratios / denominator  # r_ij/(1 + R_i)
        losses[rows] = torch.where(top > 0, top + denominator.log(), total.log1p())[:, 0]
        dtau_rows[rows] = -kappa * kappa * (p * difference).sum(1)
        share = total / denominator  # every negative's, the constant's too
        dq[rows] = kappa / N * (p @ columns - share * columns[rows])
        dc += kappa / N * (p.T @ q[rows])
        dc[rows] -= kappa / N * share * q[rows]
    dq = (dq - q * (q * dq).sum(1, keepdim=True)) / norm_q
    dc = (dc - columns * (columns * dc).sum(1, keepdim=True)) / norm_c
    found = {"loss": losses.mean(), "dq": dq, "dk": dc[:N], "dtau": dtau_rows.mean(), "dtau_rows": dtau_rows}
    if negatives is not None:
        found["dnegatives"] = dc[N : N + len(negatives)]
    return found


def differentiated(
    loss: Callable[..., Tensor], anchors: Tensor, positives: Tensor, temperature: float, autocast: bool = False
) -> Result:
    """What ``loss`` gives for the same inputs, the temperature's gradient too."""
    q, k = anchors.clone().requires_grad_(), positives.clone().requires_grad_()
    tau = torch.tensor(temperature, dtype=q.dtype if q.dtype == torch.float64 else torch.float32).requires_grad_()
    with torch.autocast(q.device.type, torch.bfloat16, enabled=autocast):
        value = loss(q, k, temperature=tau)
    dq, dk, dtau = torch.autograd.grad(value, (q, k, tau))
    return {"loss": value.detach(), "dq": dq, "dk": dk, "dtau": dtau}


def errors(got: Result, want: Result, temperature: float) -> dict[str, float]:
    """‖error‖/‖exact‖ of what was got; dτ against the mean |dτ_i|.

    Exact values below 1e-12 count as 0: the error is absolute then, dτ's in units of κ² (that of dκ, a cosine).
    """
    result = {}
    for name in got:
        scale = want["dtau_rows"].abs().mean() if name == "dtau" else want[name].norm()
        error = (got[name].double() - want[name]).norm()
        if scale < 1e-12:
            scale = 1 / temperature**2 if name == "dtau" else 1
        result[name] = float(error / scale)
    return result
