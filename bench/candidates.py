"""The implementations of this package and the standard ones in plain torch; ``load`` gives all candidates."""

from __future__ import annotations

import functools
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers  # noqa: F401 (registers the published packages)
from bench.cases import Batch, Case, Loss
from bench.registry import ALL_MODES, CANDIDATES, Candidate, Unsupported, candidate, first_line
from bench.standard import standard
from fused_infonce import gs_infonce, info_nce, losses


def load(also: str | None = None) -> dict[str, Candidate]:
    """Returns every candidate by name: ours, the standard ones, the peers, and those of the file ``also``."""
    before = dict(CANDIDATES)
    if also:
        runpy.run_path(str(Path(also)))
    ours_first = sorted(CANDIDATES, key=lambda name: (not name.startswith("ours"), name not in STANDARD))
    found = {name: CANDIDATES[name] for name in ours_first}
    CANDIDATES.clear()
    CANDIDATES.update(before)
    return found


# ------------------------------------------------------------------ ours


def _ours(
    case: Case, backend: str, noise: str = "sampled", reduction: str = "mean", workspace_bytes: int | None = None
) -> Loss:
    options: dict[str, Any] = {"backend": backend, "workspace_bytes": workspace_bytes}

    def infonce(batch: Batch) -> Tensor:
        given = isinstance(batch.noise, Tensor)
        value = gs_infonce(
            batch.q,
            batch.k,
            batch.negatives,
            temperature=case.temperature,
            num_noise=0 if given else batch.noise,
            noise=batch.noise if given and noise == "sampled" else noise,
            symmetric=case.mode == "symmetric",
            reduction=reduction,
            **options,
        )
        return value.mean()

    def expected(batch: Batch) -> Tensor:
        return infonce(replace(batch, noise=case.noise))

    if backend == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            info_nce(torch.eye(8, device=device), torch.eye(8, device=device), backend="triton")
        except Exception as error:
            raise Unsupported(first_line(error)) from None
    published = {
        "gte": functools.partial(losses.gte, temperature=case.temperature, **options),
        "matryoshka": losses.matryoshka(
            functools.partial(info_nce, temperature=case.temperature, **options), case.dims
        ),
    }
    if case.mode in published:
        return lambda batch: published[case.mode](batch.q, batch.k)
    return expected if noise == "expected" else infonce


for _name, _facts in {
    "ours-torch": {"backend": "torch"},
    "ours-triton": {"backend": "triton"},
    "ours-reference": {"backend": "reference"},  # float64 with the whole matrix
    "ours-two-sweeps": {"backend": "auto", "reduction": "none"},
    "ours-expected": {"backend": "auto", "noise": "expected"},
    "ours-256MiB": {"backend": "auto", "workspace_bytes": 256 << 20},  # a workspace that holds more of the matrix
}.items():
    _modes = {
        "ours-two-sweeps": ("one-way",),
        "ours-expected": ("one-way", "forward"),
        "ours-256MiB": ("symmetric",),
    }.get(_name, ALL_MODES)
    _expects = _facts.get("noise", "sampled")
    candidate(_name, modes=_modes, noise=True, negatives=True, expects=_expects)(
        functools.partial(_ours, **_facts)
    )


# ------------------------------------------------------------------ the standard implementations

STANDARD = ("naive", "naive-compile", "simcse-broadcast")


@candidate("naive", modes=ALL_MODES, noise=True, negatives=True)
def _naive(case: Case) -> Loss:
    return standard(case)


@candidate("naive-compile", modes=ALL_MODES, noise=True, negatives=True)
def _compiled(case: Case) -> Loss:
    torch.compiler.reset()
    return torch.compile(standard(case), dynamic=False)


@candidate("simcse-broadcast")
def _broadcast(case: Case) -> Loss:
    """The similarity of the reference SimCSE: every pair of rows in one tensor (N, N, D)."""

    def loss(batch: Batch) -> Tensor:
        logits = F.cosine_similarity(batch.q[:, None], batch.k[None], dim=-1) / case.temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return loss
