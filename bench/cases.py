"""What is measured: sizes, the tensors of a case, and one step of a loss on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fused_infonce.testing import REGIMES, Result, embeddings

Mode = Literal["one-way", "symmetric", "forward", "gte", "matryoshka"]
MODES: tuple[Mode, ...] = ("one-way", "symmetric", "forward")  # of InfoNCE
PUBLISHED: tuple[Mode, ...] = ("gte", "matryoshka")  # losses of embedding reports
PREFIXES = (64, 128, 256, 512)  # of Matryoshka, beside the whole row
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEMPERATURE = 0.05  # of every regime but "retrieval"
BLOCK = 16384  # rows that are drawn at once


@dataclass(frozen=True)
class Case:
    """One problem. Rows are fp32; with bf16 and fp16 the loss runs under autocast, as ``--bf16`` trains."""

    N: int
    D: int
    mode: Mode = "one-way"  # "forward" is one-way without gradients; PUBLISHED are other losses
    dtype: str = "fp32"  # of the matrix products
    noise: int = 0  # M random directions
    negatives: int = 0  # H hard negatives
    regime: str = "middle"  # the stage of training that the rows come from
    temperature: float = 0.0  # 0: that of the regime

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", self.temperature or REGIMES[self.regime])

    @property
    def gradients(self) -> bool:
        return self.mode != "forward"

    @property
    def product_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> int:
        """Operations of the products that every exact implementation needs: what the floor computes.

        GTE needs three matrices, and four products for their gradients, because two of them are symmetric;
        Matryoshka needs InfoNCE's three, because a prefix's product is a partial sum of the whole row's.
        """
        own, fixed = self.N + self.negatives, self.noise  # columns with a gradient, and without
        products = {
            "one-way": 3 * own + 2 * fixed,
            "symmetric": 4 * own,
            "forward": own + fixed,
            "gte": 7 * own,
            "matryoshka": 3 * own,
        }[self.mode]
        return 2 * self.N * self.D * products

    @property
    def dims(self) -> tuple[int, ...]:
        """The prefixes of Matryoshka."""
        return (*(dim for dim in PREFIXES if dim < self.D), self.D)

    @property
    def label(self) -> str:
        extra = f" M={self.noise}" * bool(self.noise) + f" H={self.negatives}" * bool(self.negatives)
        extra += f" {self.regime}" * (self.regime != "middle")
        extra += f" τ={self.temperature:g}" * (self.temperature != REGIMES[self.regime])
        return f"{self.dtype} {self.mode} N={self.N} D={self.D}{extra}"

    def at(self, N: int) -> Case:
        """The same problem with N anchors, noise and hard negatives in proportion."""
        return replace(self, N=N, noise=self.noise * N // self.N, negatives=self.negatives * N // self.N)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(eq=False)
class Batch:
    """The tensors of a case: leaves whose ``.grad`` a step fills."""

    q: Tensor  # (N, D)
    k: Tensor  # (N, D)
    negatives: Tensor | None  # (H, D)
    noise: int | Tensor  # the number of directions to sample, or the directions (M, D)

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {"dq": self.q, "dk": self.k, "dnegatives": self.negatives}
        return {name: x for name, x in found.items() if x is not None}


Loss = Callable[[Batch], Tensor]


def make_batch(case: Case, device: str, given_noise: bool = False) -> Batch:
    """Draws the tensors of a case; with ``given_noise`` also the directions, so that answers can be compared."""
    if case.N <= BLOCK:
        q, k = (x.float().to(device) for x in embeddings(case.regime, case.N, case.D))
    else:  # on the device, in blocks: in float64 on the host drawing would take longer than the case
        blocks = range(0, case.N, BLOCK)
        kind = {"dtype": torch.float32, "device": device}
        parts = [embeddings(case.regime, min(BLOCK, case.N - b), case.D, b, **kind) for b in blocks]
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
    """Runs what is timed: the loss, and its backward into fresh ``.grad``. Returns the loss, detached."""
    for x in batch.leaves.values():
        x.grad = None
    with torch.set_grad_enabled(case.gradients), autocast(case, device):
        value = loss(batch)
    if value.requires_grad:
        value.backward()
    return value.detach()


def result_of(loss: Loss, batch: Batch, case: Case, device: str) -> Result:
    """Returns a candidate's loss and gradients; raises ValueError where it leaves a gradient out."""
    found = {"loss": run_step(loss, batch, case, device)}
    if case.gradients:
        for name, x in batch.leaves.items():
            if x.grad is None:
                raise ValueError(f"gives no {name}")
            found[name], x.grad = x.grad, None
    return found
