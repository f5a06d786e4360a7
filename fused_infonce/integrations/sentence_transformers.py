"""sentence-transformers: MultipleNegativesRankingLoss and its cached form, with their constructors; GISTEmbedLoss
and MatryoshkaLoss are in files of their own and importable from here.

    loss = −1/N Σ_i log( e^{s(q_i, d_i)/τ} / Σ_j e^{s(q_i, d_j)/τ} ),  τ = 1/scale, s the cosine

over the documents of the whole batch, hard negatives included (Henderson et al., 2017; van den Oord et al., 2018).
Both classes inherit the library's: embedding, gradient caching, model card and trainer are its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim
from torch import Tensor

from ..config import FIELDS
from ..distributed import Group
from ..functional import gs_infonce
from ..losses.reports import check_gte, gte
from .sentence_transformers_gist import FusedCachedGISTEmbedLoss, FusedGISTEmbedLoss
from .sentence_transformers_matryoshka import FusedMatryoshkaLoss

__all__ = [
    "FusedCachedGISTEmbedLoss",
    "FusedCachedMultipleNegativesRankingLoss",
    "FusedGISTEmbedLoss",
    "FusedMatryoshkaLoss",
    "FusedMultipleNegativesRankingLoss",
]

# Options of ``gs_infonce`` that the library's arguments do not decide, with their defaults.
_DECIDED = ("symmetric", "hardness", "hardness_mode", "reduction", "strategy", "min_temperature")
_OPTIONS = {name: field.default for name, field in FIELDS.items() if name not in _DECIDED} | {"num_noise": 0}

# The options that every combination of directions takes; the others ask for one call of gs_infonce.
_ANYWHERE = ("backend", "workspace_bytes")


class _Fused:
    """What both classes compute once everything is embedded, and the arguments that are ours.

    Attributes stay assignable, as the library's are: they are read, and checked, at every call.
    """

    scale: float | Tensor
    similarity_fct: Callable[..., Any]
    gather_across_devices: bool
    directions: tuple[str, ...]
    partition_mode: str
    hardness_mode: str | None
    hardness_strength: float
    mask_duplicates: bool

    def _set_up(self, mask_duplicates: bool, options: dict[str, Any]) -> None:
        for name in options:
            if name not in _OPTIONS:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self.mask_duplicates = mask_duplicates
        for name, default in _OPTIONS.items():
            setattr(self, name, options.get(name, default))
        self._ids: tuple[Tensor, Tensor | None] | None = None
        self._check()

    def _check(self) -> None:
        """ValueError for attributes that this loss cannot host, or that the library's constructor refuses."""
        if self.similarity_fct is not cos_sim:
            name = getattr(self.similarity_fct, "__name__", self.similarity_fct)
            raise ValueError(f"similarity_fct must be cos_sim, not {name}: rows are normalised in the loss")
        if not isinstance(self.scale, Tensor) and not self.scale > 0:
            raise ValueError(f"scale must be > 0, not {self.scale}")
        check_gte(self.directions, self.partition_mode, self.hardness_mode, self.hardness_strength)

    @property
    def _hardness(self) -> float:
        return self.hardness_strength if self.hardness_mode is not None else 0.0

    def _note_ids(self, sentence_features: list[dict[str, Tensor]]) -> None:
        """One id for each text of the documents, where duplicates are masked."""
        self._ids = None
        if self.mask_duplicates:
            ids = [_text_ids(features) for features in sentence_features[1:]]
            self._ids = ids[0], torch.cat(ids[1:]) if len(ids) > 1 else None

    def _loss(self, queries: Tensor, documents: list[Tensor]) -> Tensor:
        """(N, D), [(N, D), …], the positives first"""
        self._check()
        directions = set(self.directions)
        symmetric = self.partition_mode == "per_direction" and "doc_to_query" in directions
        weighs_all = not self._hardness or self.hardness_mode == "all_negatives" or len(documents) == 1
        group: Group = "world" if self.gather_across_devices and _ranks() > 1 else "local"
        if (directions != {"query_to_doc"} and not (symmetric and not self._hardness)) or not weighs_all:
            return self._several_terms(queries, documents, group)
        ids, negative_ids = self._ids or (None, None)
        hardness = 0.0 if len(documents) == 1 and self.hardness_mode == "hard_negatives" else self._hardness
        return gs_infonce(
            queries,
            documents[0],
            torch.cat(documents[1:]) if documents[1:] else None,
            temperature=1 / self.scale,
            ids=ids,
            negative_ids=negative_ids,
            symmetric=symmetric,
            hardness=hardness,
            group=group,
            **{name: getattr(self, name) for name in _OPTIONS},
        )

    def _several_terms(self, queries: Tensor, documents: list[Tensor], group: Group) -> Tensor:
        """Denominators of several sums, or with hardness of some negatives."""
        given = {name: getattr(self, name) for name in ("mask_duplicates", *_OPTIONS) if name not in _ANYWHERE}
        for name, value in given.items():
            if isinstance(value, Tensor) or value != _OPTIONS.get(name, False):
                raise ValueError(
                    f"{name} cannot be combined with directions={self.directions!r}, "
                    f"partition_mode={self.partition_mode!r} and hardness_mode={self.hardness_mode!r}, whose "
                    "denominators are summed from several calls; leave it out, or use directions=('query_to_doc',)"
                )
        return gte(
            queries,
            documents[0],
            torch.stack(documents[1:], 1) if documents[1:] else None,
            temperature=1 / self.scale,
            directions=self.directions,
            partition_mode=self.partition_mode,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            group=group,
            **{name: getattr(self, name) for name in _ANYWHERE},
        )

    def _own_config(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("mask_duplicates", *_OPTIONS)}
        return {name: value for name, value in ours.items() if not isinstance(value, Tensor)}


class FusedMultipleNegativesRankingLoss(_Fused, MultipleNegativesRankingLoss):  # type: ignore[misc]
    """``MultipleNegativesRankingLoss`` without the matrix of scores, exact for trained models.

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength: the library's, in every combination (``fused_infonce.losses.gte``).
            ``similarity_fct`` must be ``cos_sim``.
        mask_duplicates: a document with the same tokens as an anchor's positive is no negative of it.
        the other options of ``gs_infonce``, with its defaults, but for ``num_noise``: noise is off by default.
            ``symmetric`` and ``hardness`` follow from ``directions`` and ``hardness_strength``. They and
            ``mask_duplicates`` need ``directions=("query_to_doc",)``, with ``"doc_to_query"`` if
            ``partition_mode="per_direction"``, and hardness of all negatives or of none.

    With ``gather_across_devices`` every rank returns the mean over all ranks, where the library returns its own
    rows' (as here, where the denominator has several terms); the gradients after DistributedDataParallel's
    averaging are the same.

    Raises:
        ValueError: an argument that this loss cannot host, also one assigned later, at the call; the message
            names it and the remedy.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        mask_duplicates: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength,
        )  # fmt: skip
        self._set_up(mask_duplicates, options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        sentence_features = list(sentence_features)
        self._note_ids(sentence_features)
        loss: Tensor = super().forward(sentence_features, labels)
        return loss

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """[(N, D) queries, (N, D) positives, (N, D) hard negatives, …] → 0-dim, nats"""
        if len(embeddings) < 2:
            raise ValueError(
                f"sentence_features must have at least 2 columns (query, document), not {len(embeddings)}"
            )
        return self._loss(embeddings[0], embeddings[1:])

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), **self._own_config()}


class FusedCachedMultipleNegativesRankingLoss(_Fused, CachedMultipleNegativesRankingLoss):  # type: ignore[misc]
    """``CachedMultipleNegativesRankingLoss``: the encoder in mini batches, the loss in one fused call.

    Arguments as in the library and in ``FusedMultipleNegativesRankingLoss``. The loss itself needs no mini
    batches; ``mini_batch_size`` is what the encoder holds at a time.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        show_progress_bar: bool = False,
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        *,
        mask_duplicates: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model, scale, similarity_fct, mini_batch_size, mini_batch_num_tokens, gather_across_devices,
            directions, partition_mode, show_progress_bar, hardness_mode, hardness_strength,
        )  # fmt: skip
        self._set_up(mask_duplicates, options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        sentence_features = list(sentence_features)
        self._note_ids(sentence_features)
        loss: Tensor = super().forward(sentence_features, labels)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """reps: of each column its mini batches' embeddings; ``with_backward`` forms their gradients at once."""
        queries, *documents = (torch.cat(parts) for parts in reps)
        loss = self._loss(queries, documents)
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        return {**super().get_config_dict(), **self._own_config()}


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _show_options(loss: type) -> None:
    """Gives a constructor a signature with the options of the loss in the place of ``**options``."""
    own = inspect.signature(loss.__init__)  # type: ignore[misc]
    parameters = [p for p in own.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    for name, default in _OPTIONS.items():
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=default, annotation=FIELDS[name].type))
    loss.__init__.__signature__ = own.replace(parameters=parameters)  # type: ignore[misc]


for _loss_class in (FusedMultipleNegativesRankingLoss, FusedCachedMultipleNegativesRankingLoss):
    _show_options(_loss_class)


def _text_ids(features: dict[str, Tensor]) -> Tensor:
    """A hash of each row's tokens, wherever its padding lies. → (N,) int64

    63 bits: two of a million texts share one with probability 1e-7.
    """
    if "input_ids" not in features or "attention_mask" not in features:
        raise ValueError(
            f"mask_duplicates needs padded token ids (input_ids, attention_mask), not {sorted(features)}"
        )
    mask = features["attention_mask"].long()
    place = (mask.cumsum(1) - 1).clamp(min=0)
    factors = torch.randint(1, 2**62, (mask.shape[1],), generator=torch.Generator().manual_seed(0))
    factors = factors.to(mask.device, non_blocking=True)
    return ((features["input_ids"].long() + 1) * factors[place] * mask).sum(1)
