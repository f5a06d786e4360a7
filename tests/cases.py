"""The option sets of the loss, once: each suite runs its implementation on all of them.

``test_options`` compares the torch backend with the reference on every case, ``test_kernels`` the Triton kernels,
``test_compiled`` the operator under torch.compile with eager, ``test_distributed`` two ranks with one process, and
``test_gpu`` asks what only a GPU can show. A new option of the loss needs a case here, which
``test_options.py::test_every_option_has_a_case`` checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from helpers import loss_and_grads, rows
from torch import Tensor

M, Q, G = 19, 11, 7  # given noise vectors, rows of a queue, features of a guide


@dataclass(frozen=True)
class LossCase:
    """Arguments of ``gs_infonce``; those that are tensors are made by ``build``, for any number of rows."""

    options: dict[str, Any] = field(default_factory=dict)  # noise="given" stands for a tensor
    negatives: int = 0  # hard negatives per anchor
    queue: bool = False
    ids: bool | Literal["pair"] = False  # with hard negatives also negative_ids
    guide: bool = False
    own: Literal[False, "equal", "uneven"] = False  # own hard negatives, K of each anchor, or with owners

    def given(self, **options: Any) -> LossCase:
        return replace(self, options={**self.options, **options})

    @property
    def sampled(self) -> bool:
        """Whether noise is drawn at each call: the reference draws other bits."""
        return "num_noise" in self.options and self.options.get("noise", "sampled") == "sampled"


def build(
    case: LossCase, N: int, D: int, dtype: torch.dtype = torch.float64, device: Any = "cpu"
) -> tuple[list[Tensor], dict[str, Any], Tensor | None]:
    """Returns the inputs, the options, and the upstream gradient of ``reduction="none"``."""

    def made(n: int, seed: int, width: int = D) -> Tensor:
        return rows(n, width, seed=seed, dtype=dtype).to(device)

    H = case.negatives * N
    inputs = [made(n, seed) for seed, n in enumerate((N, N, H), 1) if n]
    options = {"num_noise": 0, **case.options}
    if case.own == "equal":
        inputs[2] = inputs[2].view(N, case.negatives, D)
    elif case.own == "uneven":
        options["negative_owners"] = uneven_owners(H, N).to(device)
    if options.get("noise") == "given":
        options["noise"] = made(M, 5)
    if case.queue:
        options["queue"] = made(Q, 4)
    if case.ids:
        options["ids"] = torch.arange(N, device=device) // 2
        if case.ids == "pair":
            options["ids"] = torch.arange(N, device=device) % 4, options["ids"]
        if H:
            options["negative_ids"] = torch.arange(H, device=device) % (N // 2 + 2)
            if case.own == "equal":
                options["negative_ids"] = options["negative_ids"].view(N, case.negatives)
    if case.guide:
        columns = [*inputs, *([options["queue"]] if case.queue else [])]
        options["guide"] = [
            made(x[..., 0].numel(), 20 + i, G).view(*x.shape[:-1], G) for i, x in enumerate(columns)
        ]
    if options.get("reduction") != "none":
        return inputs, options, None
    # Of both signs, but not with mean 0: dτ, a sum over rows, would be a small difference of large terms.
    return inputs, options, 1 + rows(N, seed=6, dtype=dtype).to(device)


def uneven_owners(H: int, N: int) -> Tensor:
    """An owner for each of H negatives; some of the N anchors own several, some none."""
    return torch.arange(H).square() % N


def both(
    case: LossCase,
    backend: str,
    N: int,
    D: int,
    dtype: torch.dtype,
    *,
    workspace_bytes: int,
    temperature: float | None = None,
    device: Any = "cpu",
    exact: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns loss and every gradient of a backend and of the reference.

    A tiny workspace makes many tiles of few rows. With ``exact`` the reference gets the inputs in float64, so that
    its results are not rounded to their dtype.
    """
    inputs, options, upstream = build(case, N, D, dtype, device)
    tau = temperature or options.get("temperature", 0.05)
    options["temperature"] = torch.tensor(tau, dtype=torch.float64)
    ours = loss_and_grads(inputs, upstream, backend=backend, workspace_bytes=workspace_bytes, **options)
    if exact:
        inputs, upstream = [x.double() for x in inputs], None if upstream is None else upstream.double()
        options = {name: _double(x) for name, x in options.items()}
    return ours, loss_and_grads(inputs, upstream, backend="reference", **options)


def _double(x: Any) -> Any:
    if isinstance(x, list):
        return [_double(y) for y in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


GIVEN = {"noise": "given", "noise_weight": 0.7}
EXPECTED = {"noise": "expected", "num_noise": 50, "noise_weight": 0.7}
NOISE = {"none": {}, "given": {"noise": "given"}, "expected": {"noise": "expected", "num_noise": 192}}
COLD, COLDER = {"temperature": 0.02}, {"temperature": 0.002}  # rows need an offset; and two sweeps

# The neighbours of InfoNCE, to combine with every other option.
VARIANTS = {
    "decoupled": LossCase({"decoupled": True}),
    "margin": LossCase({"angular_margin": 0.3}),
    "hardness": LossCase({"hardness": 4.0}),
    "filter": LossCase({"filter_margin": 0.05, "filter_threshold": 0.3}),
    "guide": LossCase({"filter_threshold": 0.7}, guide=True),
    "smoothing": LossCase({"label_smoothing": 0.1}),
    "focal": LossCase({"focal_gamma": 2.0}),
    "all": LossCase({"decoupled": True, "angular_margin": 0.2, "hardness": 3.0, "filter_margin": 0.1}),
    "smoothed margin": LossCase(
        {"angular_margin": 0.2, "label_smoothing": 0.1, "decoupled": True, "hardness": 2.0}
    ),
}
_both_ways = {"symmetric": True}
_more = {"negatives": 2, "queue": True}
_harder = {"angular_margin": 0.3, "hardness": 3.0}

# Every option alone and in the combinations that take another path.
CASES = {
    "info_nce": LossCase(),
    "sum": LossCase({"reduction": "sum"}),
    "none": LossCase({"reduction": "none"}),
    "symmetric": LossCase(_both_ways),
    "symmetric, none": LossCase({**_both_ways, "reduction": "none"}),
    "offset": LossCase(COLD),
    "two sweeps": LossCase(COLDER, **_more),
    "warm": LossCase({"temperature": 10.0}, **_more),
    "negatives": LossCase(**_more),
    "weights": LossCase({"hard_negative_weight": 1.3}, **_more),
    "weights, symmetric": LossCase({**_both_ways, "hard_negative_weight": 1.3}, **_more),
    "ids": LossCase(ids=True),
    "ids, sum": LossCase({"reduction": "sum"}, ids=True),
    "ids, negatives": LossCase(ids=True, **_more),
    "pairs of ids": LossCase(ids="pair"),
    "pairs of ids, negatives": LossCase({"reduction": "none"}, ids="pair", **_more),
    "pairs of ids, symmetric": LossCase(_both_ways, ids="pair", **_more),
    "ids, symmetric": LossCase(_both_ways, ids=True, **_more),
    "noise": LossCase(GIVEN),
    "noise, negatives": LossCase(GIVEN, **_more),
    "noise, symmetric": LossCase({**GIVEN, **_both_ways, "hard_negative_weight": 1.3}, **_more),
    "noise, symmetric, none": LossCase({**GIVEN, **_both_ways, "reduction": "none"}),
    "sampled": LossCase({"num_noise": 30}),
    "sampled, symmetric": LossCase({"num_noise": 30, **_both_ways}),
    "expected": LossCase(EXPECTED),
    "expected, offset": LossCase({**EXPECTED, **COLD}),
    "expected, symmetric": LossCase({**EXPECTED, **_both_ways}),
    **{name: case for name, case in VARIANTS.items() if name != "guide"},
    "focal, symmetric": LossCase({**_both_ways, "focal_gamma": 0.5}, **_more),
    "focal, symmetric, none": LossCase({**GIVEN, **_both_ways, "focal_gamma": 2.0, "reduction": "none"}),
    "focal, noise, offset": LossCase({**GIVEN, **COLD, "focal_gamma": 2.0}, **_more),
    "focal, expected": LossCase({**EXPECTED, "focal_gamma": 1.0}),
    "focal, expected, symmetric": LossCase({**EXPECTED, **_both_ways, "focal_gamma": 1.0}),
    "focal, margin, hardness": LossCase({**_harder, "focal_gamma": 2.0}, ids=True, **_more),
    "focal, two sweeps": LossCase({**COLDER, "focal_gamma": 2.0, "reduction": "sum"}),
    "decoupled, noise": LossCase({**GIVEN, "decoupled": True}, **_more),
    "decoupled, two sweeps": LossCase({**COLDER, **_both_ways, "decoupled": True}),
    "margin, hardness": LossCase(_harder, **_more),
    "margin, expected, symmetric": LossCase({**_harder, **_both_ways, "noise": "expected", "num_noise": 192}),
    "filter, weights": LossCase(
        {"filter_margin": 0.05, "filter_threshold": 0.3, "hard_negative_weight": 1.3}, **_more
    ),
    "filter, symmetric": LossCase({"filter_margin": 0.05, "filter_threshold": 0.4, **_both_ways}),
    "filter, decoupled": LossCase({"filter_margin": 0.05, "decoupled": True, **_both_ways}),
    "guide": LossCase(guide=True, **_more),
    "guide, symmetric": LossCase(_both_ways, guide=True),
    "own negatives": LossCase(negatives=3, own="equal"),
    "own negatives, uneven": LossCase(queue=True, negatives=2, own="uneven"),
    "own negatives, weights, sum": LossCase(
        {"hard_negative_weight": 1.3, "reduction": "sum"}, ids=True, negatives=3, own="equal"
    ),
    "own negatives, ids, none": LossCase({"reduction": "none"}, ids="pair", negatives=2, own="uneven"),
    "own negatives, hardness": LossCase(
        {"hardness": 4.0, "hardness_mode": "hard_negatives"}, negatives=2, own="uneven"
    ),
    "in-batch hardness, own negatives": LossCase(
        {"hardness": 4.0, "hardness_mode": "in_batch_negatives"}, negatives=2, own="equal"
    ),
    "in-batch hardness": LossCase({"hardness": 4.0, "hardness_mode": "in_batch_negatives"}, **_more),
    "own negatives, symmetric": LossCase({**_both_ways, "hardness": 2.0}, queue=True, negatives=2, own="equal"),
    "own negatives, noise, symmetric": LossCase({**GIVEN, **_both_ways}, negatives=2, own="uneven"),
    "own negatives, expected": LossCase(EXPECTED, negatives=2, own="equal"),
    "own negatives, expected, symmetric, none": LossCase(
        {**EXPECTED, **_both_ways, "reduction": "none"}, negatives=2, own="uneven"
    ),
    "own negatives, offset": LossCase(COLD, negatives=2, own="equal"),
    "own negatives, two sweeps": LossCase(COLDER, negatives=2, own="equal"),
    "own negatives, focal, margin": LossCase(
        {"focal_gamma": 2.0, "angular_margin": 0.3}, negatives=2, own="uneven"
    ),
    "own negatives, decoupled": LossCase({"decoupled": True}, ids=True, negatives=2, own="equal"),
    "own negatives, filter": LossCase(
        {"filter_margin": 0.05, "filter_threshold": 0.3}, negatives=3, own="equal"
    ),
    "own negatives, guide": LossCase({"filter_threshold": 0.7}, guide=True, negatives=3, own="uneven"),
    "own negatives of equal numbers, guide": LossCase(guide=True, queue=True, negatives=2, own="equal"),
    "smoothing, negatives": LossCase({"label_smoothing": 0.1}, **_more),
    "smoothing, none": LossCase({"label_smoothing": 0.1, "reduction": "none"}),
}
COMPARABLE = [name for name, case in CASES.items() if not case.sampled]  # with the reference
