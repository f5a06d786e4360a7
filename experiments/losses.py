"""Measures errors of the published losses' gradients at the trained stage, beside those of dense implementations.

``python -m experiments.losses`` prints the table that docs/losses.md shows. Positives are at cosine 0.92 among
random negatives; the truth is the dense formula in float64. bf16 is autocast, with which encoders are trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fused_infonce import info_nce, losses
from fused_infonce.losses.reports import DIRECTIONS
from fused_infonce.testing import embeddings, half_precision_products
from simcse.errors import Parser, exit_cleanly

from . import dense_losses as dense

TAU, NEGATIVES, CLASSES = 0.05, 2, 8  # own hard negatives per query; classes of supervised losses
PREFIXES = (48, 64)
ALL = DIRECTIONS
HARD = {"directions": ("query_to_doc",), "hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}


@dataclass(frozen=True)
class Batch:
    """Rows of one dtype; ``leaves`` get gradients."""

    leaves: tuple[Tensor, ...]
    labels: Tensor  # (N,)
    teacher: tuple[Tensor, Tensor]
    weights: Tensor  # (N,)


Loss = Callable[[Batch], Tensor]


def _on(count: int, loss: Callable[..., Tensor], **options: object) -> Loss:
    """loss of the first ``count`` leaves."""
    return lambda batch: loss(*batch.leaves[:count], **options)


# name → ours, dense
CASES: dict[str, tuple[Loss, Loss]] = {
    "InfoNCE": (_on(2, info_nce, temperature=TAU), _on(2, dense.gte, tau=TAU, directions=("query_to_doc",))),
    "GTE": (_on(2, losses.gte, temperature=TAU), _on(2, dense.gte, tau=TAU, directions=ALL)),
    "Qwen3-Embedding": (_on(3, losses.qwen3_embedding, temperature=TAU), _on(3, dense.qwen3, tau=TAU)),
    "Gemini Embedding": (
        lambda b: losses.gemini_embedding(*b.leaves, document_ids=b.labels, temperature=TAU),
        lambda b: dense.gemini(*b.leaves, document_ids=b.labels, tau=TAU),
    ),
    "EmbeddingGemma": (_on(3, losses.embedding_gemma, temperature=TAU), _on(3, dense.embedding_gemma, tau=TAU)),
    "LLaVE": (_on(3, losses.llave, temperature=TAU), _on(3, dense.gte, tau=TAU, **HARD)),
    "KaLM (focal)": (_on(2, losses.focal, temperature=TAU), _on(2, dense.focal, tau=TAU)),
    "CLIP, weighted": (
        lambda b: losses.clip(*b.leaves[:2], weights=b.weights, temperature=TAU),
        lambda b: dense.clip(*b.leaves[:2], b.weights, tau=TAU),
    ),
    "debiased": (
        _on(2, losses.debiased, temperature=0.5, tau_plus=0.01),
        _on(2, dense.debiased, tau=0.5, tau_plus=0.01),
    ),
    "HCL": (_on(2, losses.hcl, temperature=0.5, tau_plus=0.01), _on(2, dense.hcl, tau=0.5, tau_plus=0.01)),
    "SupCon": (
        lambda b: losses.supcon(b.leaves[0], b.labels, temperature=0.1),
        lambda b: dense.supcon(b.leaves[0], b.labels, tau=0.1),
    ),
    "cross entropy": (
        lambda b: losses.cross_entropy(b.leaves[0], torch.arange(len(b.labels)), b.leaves[1], temperature=TAU),
        lambda b: dense.cross_entropy(b.leaves[0], torch.arange(len(b.labels)), b.leaves[1], tau=TAU),
    ),
    "soft labels": (
        lambda b: losses.soft_labels(*b.leaves[:2], *b.teacher, temperature=TAU),
        lambda b: dense.soft_labels(*b.leaves[:2], *b.teacher, tau=TAU, teacher_tau=0.05),
    ),
    "Matryoshka": (
        _on(2, losses.matryoshka(partial(info_nce, temperature=TAU), PREFIXES)),
        _on(2, dense.matryoshka, tau=TAU, dims=PREFIXES, weights=(1, 1)),
    ),
}


def batch(N: int, D: int, dtype: torch.dtype) -> Batch:
    q, d = embeddings("trained", N, D)
    negatives = torch.stack([embeddings("trained", N, D, seed=s)[0] for s in range(1, 1 + NEGATIVES)], 1)
    teacher = embeddings("middle", N, D, seed=9)
    leaves = tuple(x.to(dtype).requires_grad_() for x in (q, d, negatives))
    source = torch.Generator().manual_seed(0)
    weights = torch.rand(N, generator=source, dtype=torch.float64).to(dtype)
    return Batch(leaves, torch.arange(N) % CLASSES, (teacher[0].to(dtype), teacher[1].to(dtype)), weights)


def errors(name: str, N: int, D: int) -> dict[str, float]:
    """‖error‖/‖gradient‖, the largest over the inputs, of ours and of the dense loss in fp32 and in bf16."""
    ours, theirs = CASES[name]
    want = _gradients(theirs, batch(N, D, torch.float64), autocast=False)
    found = {}
    for label, loss in (("", ours), ("dense ", theirs)):
        for kind in ("fp32", "bf16"):
            with half_precision_products():
                got = _gradients(loss, batch(N, D, torch.float32), autocast=kind == "bf16")
            pairs = [(g.double(), w) for g, w in zip(got, want, strict=True) if w.norm() > 0]
            found[label + kind] = max(float((g - w).norm() / w.norm()) for g, w in pairs)
    return found


def _gradients(loss: Loss, given: Batch, autocast: bool) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(given)
    grads = torch.autograd.grad(value, given.leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, given.leaves, strict=True)]


def table(N: int, D: int) -> str:
    lines = ["| loss | fp32 | dense fp32 | bf16 | dense bf16 |", "|---|---|---|---|---|"]
    for name in CASES:
        found = errors(name, N, D)
        cells = [f"{found[key]:.1e}" for key in ("fp32", "dense fp32", "bf16", "dense bf16")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(prog="python -m experiments.losses", description=__doc__)
    parser.add_argument("--rows", type=int, default=512, metavar="N", help="pairs per batch")
    parser.add_argument("--features", type=int, default=256, metavar="D", help="features per row, at least 64")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with exit_cleanly(parser.prog):
        print(table(args.rows, args.features))


if __name__ == "__main__":
    main()
