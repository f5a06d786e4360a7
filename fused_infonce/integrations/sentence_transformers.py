"""sentence-transformers: MultipleNegativesRankingLoss and its cached form, with their constructors.

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

# Options of ``gs_infonce`` that the library's arguments do not decide, with their defaults.
_DECIDED = ("symmetric", "hardness", "reduction", "strategy", "min_temperature")
_OPTIONS = {name: field.default for name, field in FIELDS.items() if name not in _DECIDED} | {"num_noise": 0}

# partition_mode → the sets of directions whose columns all belong to the query
_DIRECTIONS = {
    "joint": [{"query_to_doc"}, {"query_to_doc", "query_to_query"}],
    "per_direction": [{"query_to_doc"}, {"query_to_doc", "doc_to_query"}],
}


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
        mode, directions = self.partition_mode, set(self.directions)
        if mode not in ("joint", "per_direction"):
            raise ValueError(f"partition_mode must be 'joint' or 'per_direction', not {mode!r}")
        if directions not in _DIRECTIONS[mode]:
            raise ValueError(
                f"directions={self.directions!r} with partition_mode={mode!r} cannot be hosted: every column has "
                "to belong to the query; take ('query_to_doc',), ('query_to_doc', 'query_to_query') with "
                "partition_mode='joint', ('query_to_doc', 'doc_to_query') with partition_mode='per_direction', or "
                "the library's loss"
            )
        if self.hardness_mode not in (None, "in_batch_negatives", "hard_negatives", "all_negatives"):
            raise ValueError(
                "hardness_mode must be None, 'in_batch_negatives', 'hard_negatives' or 'all_negatives', not "
                f"{self.hardness_mode!r}"
            )
        if not self.hardness_strength >= 0:
            raise ValueError(f"hardness_strength must be >= 0, not {self.hardness_strength}")
        if self._hardness and (self.hardness_mode == "hard_negatives" or directions != {"query_to_doc"}):
            raise ValueError(
                f"hardness_mode={self.hardness_mode!r} with directions={self.directions} cannot be hosted: all "
                "negatives of one direction are weighted, or none; take hardness_mode='all_negatives' (of pairs "
                "'in_batch_negatives' too) with directions=('query_to_doc',), or the library's loss"
            )

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
        N = len(queries)
        negatives = documents[1:]
        if negatives and self._hardness and self.hardness_mode == "in_batch_negatives":
            raise ValueError(
                "hardness_mode='in_batch_negatives' with columns of hard negatives leaves a query's own "
                "unweighted, which the sweep cannot; take 'all_negatives', or the library's loss"
            )
        ids, negative_ids = self._ids or (None, None)
        if "query_to_query" in self.directions:
            # Each query against the others: masked for itself by an id of its own.
            own = torch.arange(N, device=queries.device)
            if ids is not None:
                raise ValueError("mask_duplicates: it cannot be combined with the direction 'query_to_query'")
            ids = own
            negative_ids = torch.cat([own.new_full((sum(map(len, negatives)),), -1), own])
            negatives = [*negatives, queries]
        group: Group = "local"
        if (
            self.gather_across_devices
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        ):
            group = "world"
            if "query_to_query" in self.directions and ids is not None and negative_ids is not None:
                step = dist.get_rank() << 40  # ids that differ from rank to rank
                ids, negative_ids = ids + step, torch.where(negative_ids < 0, negative_ids, negative_ids + step)
        return gs_infonce(
            queries,
            documents[0],
            torch.cat(negatives) if negatives else None,
            temperature=1 / self.scale,
            ids=ids,
            negative_ids=negative_ids,
            symmetric="doc_to_query" in self.directions,
            hardness=self._hardness,
            group=group,
            **{name: getattr(self, name) for name in _OPTIONS},
        )

    def _own_config(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("mask_duplicates", *_OPTIONS)}
        return {name: value for name, value in ours.items() if not isinstance(value, Tensor)}


class FusedMultipleNegativesRankingLoss(_Fused, MultipleNegativesRankingLoss):  # type: ignore[misc]
    """``MultipleNegativesRankingLoss`` without the matrix of scores, exact for trained models.

    Args:
        model, scale, similarity_fct, gather_across_devices, directions, partition_mode, hardness_mode,
            hardness_strength: the library's. ``similarity_fct`` must be ``cos_sim``. Of ``directions`` it takes
            ``("query_to_doc",)``, that with ``"query_to_query"``, and ``("query_to_doc", "doc_to_query")`` with
            ``partition_mode="per_direction"``. Hardness in the first of these: ``"all_negatives"``, and of pairs
            ``"in_batch_negatives"``.
        mask_duplicates: a document with the same tokens as an anchor's positive is no negative of it.
        the other options of ``gs_infonce``, with its defaults, but for ``num_noise``: noise is off by default.
            ``symmetric`` and ``hardness`` follow from ``directions`` and ``hardness_strength``.

    With ``gather_across_devices`` every rank returns the mean over all ranks, where the library returns its own
    rows'; the gradients after DistributedDataParallel's averaging are the same.

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
