"""Published packages as candidates, each called as its documentation recommends.

Cross entropy over a linear layer (torch, Liger, Cut Cross-Entropy, quack) is InfoNCE where the layer's weight is
the normalised positives and the target is the row's index; normalisation and temperature are plain torch and part
of the timing. What a package cannot compute, or not on this machine, is recorded as a reason, not raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Batch, Case, Loss
from bench.registry import ALL_MODES, Unsupported, candidate

NO_MASK = 2.0  # a margin that no difference of two cosines exceeds
UNSCALED = {"stable": False}  # memeff's default, True, scales the gradients by another factor
CACHED_ROWS = 1024  # rows of a mini batch: its documentation says that larger ones are faster


def _unit(batch: Batch, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q̂/τ and k̂ in the dtype of the products, and the targets."""
    q = (F.normalize(batch.q, dim=1) / case.temperature).to(case.product_dtype)
    k = F.normalize(batch.k, dim=1).to(case.product_dtype)
    return q, k, torch.arange(len(q), device=q.device)


@candidate("st-mnrl", modes=ALL_MODES, negatives=True, package="sentence-transformers")
def _mnrl(case: Case) -> Loss:
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    model = _Given(case.D)
    loss = MultipleNegativesRankingLoss(model, scale=1 / case.temperature, **_directions(case))
    if case.mode == "matryoshka":
        loss = MatryoshkaLoss(model, loss, case.dims)
    return _outside_autocast(lambda batch: loss([{"rows": x} for x in _columns(batch)], None))


@candidate("st-cached-mnrl", modes=ALL_MODES, negatives=True, package="sentence-transformers")
def _cached_mnrl(case: Case) -> Loss:
    from sentence_transformers.sentence_transformer import losses

    model, rows = _Given(case.D), min(case.N, CACHED_ROWS)
    loss = losses.CachedMultipleNegativesRankingLoss(
        model, scale=1 / case.temperature, mini_batch_size=rows, **_directions(case)
    )
    if case.mode == "matryoshka":
        losses.MatryoshkaLoss(model, loss, case.dims)  # changes calculate_loss

    # Its training step also calls backward for each mini batch and adds the gradients up in the embeddings.
    def run(batch: Batch) -> Tensor:
        return loss.calculate_loss([[x] for x in _columns(batch)], with_backward=case.gradients)

    return _outside_autocast(run)


class _Given(torch.nn.Sequential):
    """A model for sentence-transformers' losses whose embeddings are its input."""

    def __init__(self, features: int) -> None:
        super().__init__(torch.nn.Identity())
        self.features = features

    def get_embedding_dimension(self) -> int:
        return self.features

    def forward(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": columns["rows"]}


def _directions(case: Case) -> dict[str, Any]:
    if case.mode == "gte":
        return {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
    if case.mode == "symmetric":
        return {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return {}


def _outside_autocast(loss: Loss) -> Loss:
    """Calls the loss as sentence-transformers' trainer does under ``bf16=True``: only the encoder is autocast."""

    def run(batch: Batch) -> Tensor:
        with torch.autocast(batch.q.device.type, enabled=False):
            return loss(batch)

    return run


def _columns(batch: Batch) -> list[Tensor]:
    return [batch.q, batch.k] if batch.negatives is None else [batch.q, batch.k, batch.negatives]


@candidate("open-clip", modes=("symmetric",), package="open-clip-torch")
def _open_clip(case: Case) -> Loss:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda batch: loss(F.normalize(batch.q, dim=1), F.normalize(batch.k, dim=1), 1 / case.temperature)


@candidate("pml-ntxent", package="pytorch-metric-learning")
def _ntxent(case: Case) -> Loss:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    loss = SelfSupervisedLoss(NTXentLoss(temperature=case.temperature), symmetric=False)
    # Under autocast it sums exponentials in bf16, and the result is wrong.
    return _outside_autocast(lambda batch: loss(batch.q, batch.k))


@candidate("info-nce-pytorch", package="info-nce-pytorch")
def _info_nce_pytorch(case: Case) -> Loss:
    from info_nce import info_nce

    return lambda batch: info_nce(batch.q, batch.k, temperature=case.temperature)


@candidate("torch-linear-ce")
def _torch_linear_cross_entropy(case: Case) -> Loss:
    """torch's chunked cross entropy over a linear layer, which does not store the matrix of logits."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unsupported("needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return _outside_autocast(lambda batch: F.linear_cross_entropy(*_unit(batch, case), options=options))


@candidate("liger", package="liger-kernel", cuda=True)
def _liger(case: Case) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)

    def run(batch: Batch) -> Tensor:
        q, k, targets = _unit(batch, case)
        return loss(k, q, targets)

    return run


def _cut_cross_entropy(case: Case, **options: object) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    if case.dtype == "fp32" and case.gradients:
        raise Unsupported("gradients in bf16 and fp16 only")

    def run(batch: Batch) -> Tensor:
        return linear_cross_entropy(*_unit(batch, case), **options)

    return run


@candidate("cce", package="cut-cross-entropy", cuda=True)
def _cce(case: Case) -> Loss:
    """With its default filter, which leaves small gradients out."""
    return _cut_cross_entropy(case)


@candidate("cce-exact", package="cut-cross-entropy", cuda=True)
def _cce_exact(case: Case) -> Loss:
    return _cut_cross_entropy(case, filter_eps=None)


@candidate(
    "quack", modes=("one-way",), package="quack-kernels", cuda=True
)  # its forward always computes the gradients
def _quack(case: Case) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if case.dtype == "fp32":
        raise Unsupported("bf16 and fp16 only")
    if case.N % 8 or case.D % 8:
        raise Unsupported("N and D must be multiples of 8")
    return lambda batch: chunked_linear_cross_entropy(*_unit(batch, case))


@candidate("inf-cl", package="inf-cl", cuda=True)
def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_inf_loss

    head = min(256, case.D & -case.D)  # its kernels need the largest power of 2 that divides D
    if head < 16:
        raise Unsupported("D must be a multiple of 16")

    def run(batch: Batch) -> Tensor:
        q, k = F.normalize(batch.q, dim=1), F.normalize(batch.k, dim=1)
        with torch.autocast(q.device.type, enabled=False):  # its kernels take fp32 rows and multiply in tf32
            return cal_inf_loss(q.float() / case.temperature, k.float(), head_dim=head)

    return run


@candidate("memeff", modes=("symmetric",), package="memeff", cuda=True)
def _memeff(case: Case) -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    return _in_dtype(MemoryEfficientCLIPLoss(temperature=case.temperature, **UNSCALED), case)


@candidate("memeff-qwen3", modes=("one-way",), package="memeff", cuda=True)
def _memeff_qwen3(case: Case) -> Loss:
    """Qwen3-Embedding's loss, InfoNCE once its margin masks nothing and both extra terms are off, its default."""
    from memeff import MemoryEfficientQwen3Loss

    return _in_dtype(MemoryEfficientQwen3Loss(temperature=case.temperature, margin=NO_MASK, **UNSCALED), case)


@candidate("memeff-matryoshka", modes=("matryoshka",), package="memeff", cuda=True)
def _memeff_matryoshka(case: Case) -> Loss:
    """The same loss summed over prefixes, in one pass."""
    from memeff import MemoryEfficientMatryoshkaQwen3Loss

    if any(dim % 64 for dim in case.dims):
        raise Unsupported("the prefixes must be multiples of 64")  # features that its kernels take at once
    options = {"temperature": case.temperature, "margin": NO_MASK, **UNSCALED}
    return _in_dtype(MemoryEfficientMatryoshkaQwen3Loss(case.dims, **options), case)


def _in_dtype(loss: Callable[[Tensor, Tensor], Tensor], case: Case) -> Loss:
    return lambda batch: loss(batch.q.to(case.product_dtype), batch.k.to(case.product_dtype))


@candidate("siglip-kernel", modes=("symmetric",), package="siglip-kernel", cuda=True, loss="sigmoid")
def _siglip(case: Case) -> Loss:
    from siglip_kernel import fused_siglip_loss

    scale = torch.tensor(10.0, device="cuda").log()
    bias = torch.tensor(-10.0, device="cuda")

    def run(batch: Batch) -> Tensor:
        q, k = (F.normalize(x, dim=1).to(case.product_dtype) for x in (batch.q, batch.k))
        return fused_siglip_loss(q, k, scale, bias)

    return run
