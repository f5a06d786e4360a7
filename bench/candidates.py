"""The implementations of this package and the standard ones in plain torch; ``load`` gives all candidates."""

from __future__ import annotations

import functools
import runpy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import peers  # noqa: F401 (registers the published packages)
from bench.cases import Batch, Case, Loss
from bench.registry import ALL_MODES, CANDIDATES, Candidate, Unsupported, candidate, first_line
from fused_infonce import gs_infonce, info_nce


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
    def loss(batch: Batch) -> Tensor:
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
            backend=backend,
            workspace_bytes=workspace_bytes,
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
    "ours-256MiB": {"backend": "auto", "workspace_bytes": 256 << 20},  # a workspace that holds more of the matrix
}.items():
    _modes = {"ours-two-sweeps": ("one-way",), "ours-256MiB": ("symmetric",)}.get(_name, ALL_MODES)
    _expects = _facts.get("noise", "sampled")
    candidate(_name, modes=_modes, noise=True, negatives=True, expects=_expects)(
        functools.partial(_ours, **_facts)
    )


# ------------------------------------------------------------------ the standard implementations

STANDARD = ("naive", "naive-compile", "simcse-broadcast")


@candidate("naive", modes=ALL_MODES, noise=True, negatives=True)
def _naive(case: Case) -> Loss:
    if case.mode == "symmetric":

        def both(batch: Batch) -> Tensor:
            logits = F.normalize(batch.q, dim=1) @ F.normalize(batch.k, dim=1).T / case.temperature
            labels = torch.arange(len(logits), device=logits.device)
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

        return both

    def one_way(batch: Batch) -> Tensor:
        q, k = F.normalize(batch.q, dim=1), batch.k
        if batch.negatives is not None:
            k = torch.cat([k, batch.negatives])
        cosines = q @ F.normalize(k, dim=1).T
        noise = batch.noise
        if isinstance(noise, int) and noise:
            noise = torch.randn(noise, q.shape[1], device=q.device)
        if isinstance(noise, Tensor):  # a separate product, because noise has no gradient
            cosines = torch.cat([cosines, q @ F.normalize(noise, dim=1).T], 1)
        return F.cross_entropy(cosines / case.temperature, torch.arange(len(q), device=q.device))

    return one_way


@candidate("naive-compile", modes=ALL_MODES, noise=True, negatives=True)
def _compiled(case: Case) -> Loss:
    torch.compiler.reset()
    return torch.compile(_naive(case), dynamic=False)


@candidate("simcse-broadcast")
def _broadcast(case: Case) -> Loss:
    """The similarity of the reference SimCSE: every pair of rows in one tensor (N, N, D)."""

    def loss(batch: Batch) -> Tensor:
        logits = F.cosine_similarity(batch.q[:, None], batch.k[None], dim=-1) / case.temperature
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

    return loss
