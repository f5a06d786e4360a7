"""Calls of the loss that touch every kernel and every way through them, compared with the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.cases import DTYPES, TEMPERATURE
from bench.gate import Wrong
from fused_infonce import gs_infonce
from fused_infonce.testing import Result, embeddings, relative_errors

# Largest relative errors, those of tests/test_kernels.py: fp32 grows with 1/τ, half precision rounds the result.
BOUNDS = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 4e-3}
GRADIENT_SCALE = {"fp16": 2.0**14}  # as a gradient scaler does; without it gradients are subnormal
GUIDE_FEATURES = 32


@dataclass(frozen=True)
class Call:
    """A call of ``gs_infonce`` with rows in ``dtype``; counts of further columns are per anchor."""

    N: int
    D: int = 768
    dtype: str = "bf16"
    options: dict[str, Any] = field(default_factory=dict)
    negatives: int = 0
    noise: int = 0
    ids: bool = False
    guide: bool = False
    learned: bool = False  # the temperature is a tensor with a gradient
    regime: str = "middle"

    @property
    def temperature(self) -> float:
        return float(self.options.get("temperature", TEMPERATURE))

    @property
    def bound(self) -> float:
        return BOUNDS[self.dtype] * (max(1, TEMPERATURE / self.temperature) if self.dtype == "fp32" else 1)

    def at_most(self, N: int, D: int) -> Call:
        return replace(self, N=min(N, self.N), D=min(D, self.D))


MANY_CHUNKS = {"workspace_bytes": 16 << 20}  # some 1000 rows of 8209 columns in bf16

CALLS = {
    "one-way, fp32": Call(1000, dtype="fp32"),
    "one-way, bf16": Call(1024),
    "one-way, fp16": Call(1024, dtype="fp16"),
    "symmetric": Call(1024, options={"symmetric": True}),
    "symmetric, fp32, ragged": Call(1023, 200, "fp32", {"symmetric": True}),
    "a loss for each row": Call(1000, options={"reduction": "none"}),
    "hard negatives": Call(512, options={"hard_negative_weight": 1.0}, negatives=1),
    "ids": Call(1000, ids=True),
    "filter by a guide": Call(1000, options={"filter_threshold": 0.2}, guide=True),
    "given noise": Call(512, noise=3),
    "learned temperature": Call(1024, options={"symmetric": True}, learned=True),
    "small temperature": Call(1000, dtype="fp32", options={"temperature": 0.005}, regime="random"),
    "two rows": Call(2, 3, "fp32"),
    "one tile": Call(64, 64),
    "many chunks": Call(8209, options=MANY_CHUNKS),
    "many chunks, symmetric": Call(8209, options={"symmetric": True, **MANY_CHUNKS}),
}


def results(call: Call, device: str, backend: str) -> tuple[Result, Result]:
    """Returns loss and gradients of a backend, and those of the float64 reference from the same rows."""
    leaves, options, upstream = _build(call, device)

    def run(leaves: dict[str, Tensor], backend: str, **more: Any) -> Result:
        wanted = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        rows = [wanted[name] for name in ("dq", "dk", "dnegatives") if name in wanted]
        tau = {"temperature": wanted["dtau"]} if call.learned else {}
        loss = gs_infonce(*rows, backend=backend, **{**options, **more, **tau})
        scale = GRADIENT_SCALE.get(call.dtype, 1.0)
        weights = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
        grads = torch.autograd.grad(loss, list(wanted.values()), weights * scale)
        grads = [grad.double() / scale for grad in grads]
        return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}

    doubles: dict[str, Any] = {name: x.double() for name, x in options.items() if isinstance(x, Tensor)
                               and x.is_floating_point()}  # fmt: skip
    if call.guide:
        doubles["guide"] = [x.double() for x in options["guide"]]
    want = run({name: x.double() for name, x in leaves.items()}, "reference", **doubles)
    if call.learned:  # what dτ is compared with, where it is small beside its terms
        want["dtau_rows"] = want["dtau"]
    return run(leaves, backend), want


def check(call: Call, device: str, backend: str) -> dict[str, float]:
    """Returns the relative errors; raises Wrong where one is beyond the bound, or not a number."""
    found = relative_errors(*results(call, device, backend), call.temperature)
    if not all(error <= call.bound for error in found.values()):
        raise Wrong(found)
    return found


def _build(call: Call, device: str) -> tuple[dict[str, Tensor], dict[str, Any], Tensor | None]:
    """Returns the rows that get gradients, under the gradients' names; the options; and weights of the losses."""
    generator = torch.Generator().manual_seed(2)
    dtype = DTYPES[call.dtype]

    def random(n: int, width: int = call.D) -> Tensor:
        return torch.randn(n, width, generator=generator).to(device, dtype)

    q, k = (x.to(device, dtype) for x in embeddings(call.regime, call.N, call.D))
    leaves = {"dq": q, "dk": k}
    if call.negatives:
        leaves["dnegatives"] = random(call.negatives * call.N)
    if call.learned:
        leaves["dtau"] = torch.tensor(call.temperature, device=device)
    options: dict[str, Any] = {"num_noise": 0, **call.options}
    if call.noise:
        options["noise"] = random(call.noise * call.N)
    if call.ids:
        options["ids"] = torch.arange(call.N, device=device) // 2
    if call.guide:
        options["guide"] = [random(call.N, GUIDE_FEATURES) for _ in leaves]
    upstream = None
    if options.get("reduction") == "none":
        upstream = 1 + torch.randn(call.N, generator=generator).to(device)
    return leaves, options, upstream
