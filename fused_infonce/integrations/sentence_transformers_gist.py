"""sentence-transformers: GISTEmbedLoss and its cached form, with their constructors; ``losses.gistembed``.

Both classes inherit the library's: embedding, gradient caching, model card and trainer are its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from sentence_transformers.util import all_gather_with_grad, batch_to_device, get_rank
from torch import Tensor, nn

from ..losses import gistembed


class _Guided:
    temperature: float | Tensor
    margin_strategy: str
    margin: float
    contrast_anchors: bool
    contrast_positives: bool
    gather_across_devices: bool
    similarity_fct: Any

    def _guided_loss(self, embeddings: list[Tensor], guide: list[Tensor]) -> Tensor:
        """Anchors, positives and any number of hard negatives, (N, D) each, and the guide's."""
        if type(self.similarity_fct) is not nn.CosineSimilarity or self.similarity_fct.dim != -1:
            raise ValueError("similarity_fct must be nn.CosineSimilarity(dim=-1): rows are normalised in the loss")
        if self.gather_across_devices:
            embeddings = [embeddings[0], *map(_of_all_ranks, embeddings[1:])]
            guide = [guide[0], *map(_of_all_ranks, guide[1:])]
        anchors, positives, *negatives = embeddings
        scores = guide[:2] if not negatives else [*guide[:2], torch.cat(guide[2:])]
        return gistembed(
            anchors,
            positives,
            torch.cat(negatives) if negatives else None,
            guide=scores,
            temperature=self.temperature,
            margin=self.margin,
            margin_strategy=self.margin_strategy,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
        )


def _of_all_ranks(x: Tensor) -> Tensor:
    """Every rank's rows, this one's first."""
    everyone: Tensor = all_gather_with_grad(x)
    return everyone.roll(-get_rank() * len(x), 0)


class FusedGISTEmbedLoss(_Guided, GISTEmbedLoss):  # type: ignore[misc]
    """``GISTEmbedLoss`` without its matrices (N, N, D); constructor, attributes and value are the library's."""

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        features = list(sentence_features)
        guided = self._guide_features(features)  # before the model writes into the features
        embeddings = embed_columns(self.model, features)
        if len(embeddings) not in (2, 3):
            raise ValueError(f"Expected 2 or 3 columns (anchor, positive, negative), got {len(embeddings)}")
        with torch.no_grad():
            scores = embed_columns(self.guide, guided)
        return self._guided_loss(embeddings, scores)

    def _guide_features(self, features: list[dict[str, Tensor]]) -> list[Any]:
        """Copies, tokenized again where the guide has another vocabulary or is shorter."""
        if not self.must_retokenize:
            return [dict(column) for column in features]
        texts = [self.tokenizer.batch_decode(_token_ids(column), skip_special_tokens=True) for column in features]
        return [batch_to_device(self.guide.preprocess(column), self.guide.device) for column in texts]


def _token_ids(column: dict[str, Tensor]) -> Any:
    """Token ids of each text, also of texts that are flattened into one row."""
    if "cu_seq_lens_q" not in column:
        return column["input_ids"]
    ends = column["cu_seq_lens_q"].tolist()
    return [x.tolist() for x in column["input_ids"][0, : ends[-1]].tensor_split(ends[1:-1])]


class FusedCachedGISTEmbedLoss(_Guided, CachedGISTEmbedLoss):  # type: ignore[misc]
    """``CachedGISTEmbedLoss``: both encoders in mini batches, the loss in one call for the whole batch."""

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """reps: of each column its mini batches' embeddings; ``with_backward`` forms their gradients at once."""
        loss = self._guided_loss([torch.cat(x) for x in reps], [torch.cat(x) for x in reps_guided])
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss
