"""The losses of embedding models' reports: which pairs their denominators contain.

s(x, y) is the cosine, sg(·) a value without gradient, and N the number of pairs of the batch. ``options`` are
those of :func:`fused_infonce.cosine_logsumexp` that say where it is computed: ``group``, ``strategy``,
``backend``, ``workspace_bytes``, ``min_temperature``. With a group the columns are those of all ranks, and each
rank returns the mean over its own anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import HardnessMode, Strategy
from ..distributed import Group
from ..functional import cosine_logsumexp, info_nce
from ..own_negatives import log_add, pair_cosines
from .ranks import Everyone, row_numbers
from .terms import contrast, own_negatives, reducible

Sums = Callable[..., Tensor]  # cosine_logsumexp with some of its options
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PartitionMode = Literal["joint", "per_direction"]
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")


@reducible
def gte(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.01,
    directions: Sequence[str] = DIRECTIONS,
    partition_mode: PartitionMode = "joint",
    hardness_mode: HardnessMode | None = None,
    hardness_strength: float = 0.0,
    **options: Any,
) -> Tensor:
    r"""The improved contrastive loss of GTE (Li et al. 2023, arXiv:2308.03281), by directions.

    .. math::
        Z_i = \sum_j e^{s(q_i, d_j)/\tau} + \sum_{j \ne i} e^{s(q_i, q_j)/\tau}
            + \sum_j e^{s(q_j, d_i)/\tau} + \sum_{j \ne i} e^{s(d_j, d_i)/\tau}

    and loss_i = −log(e^{s(q_i, d_i)/τ} / Z_i). Arguments and value are those of sentence-transformers'
    ``MultipleNegativesRankingLoss``: ``("query_to_doc", "doc_to_query")`` with ``partition_mode="per_direction"``
    is the symmetric loss of jina-embeddings-v2.

    Args:
        queries, documents: (N, D).
        negatives: (N, K, D) own hard negatives; documents of all queries in ``query_to_doc`` and ``doc_to_doc``.
        directions: which sums Z_i contains, of ``"query_to_doc"``, which must be among them, ``"query_to_query"``,
            ``"doc_to_query"`` and ``"doc_to_doc"``.
        partition_mode: ``"joint"``, one denominator; ``"per_direction"``, the mean of one loss per direction, of
            ``"query_to_doc"`` and ``"doc_to_query"`` only.
        hardness_mode: which documents in ``query_to_doc`` have weights e^{β sg(s)}: ``"in_batch_negatives"``, own
            ``"hard_negatives"`` or ``"all_negatives"``; None: none.
        hardness_strength: strength β >= 0 of the weights of ``hardness_mode``.

    Cost: four products of the similarity matrix for each direction.
    """
    check_gte(directions, partition_mode, hardness_mode, hardness_strength)
    own = row_numbers(queries, options)
    sums: Sums = partial(cosine_logsumexp, temperature=temperature, **options)
    pool, owners = _with_negatives(documents, negatives, own)
    make = {
        "query_to_doc": lambda: _queries_to_documents(
            queries, (pool, own, owners, negatives), sums, temperature, hardness_mode, hardness_strength
        ),
        "query_to_query": lambda: sums(queries, queries, exclude_diagonal=True),
        "doc_to_query": lambda: sums(documents, queries, exclude_diagonal=True),
        "doc_to_doc": lambda: sums(documents, pool, row_ids=own, column_ids=owners),
    }
    terms = [make[name]() for name in DIRECTIONS if name in directions]
    positive = pair_cosines(queries, documents)
    if partition_mode == "joint":
        return contrast(positive, temperature, *terms, count=1 + ("doc_to_query" in directions))
    return torch.stack([contrast(positive, temperature, term) for term in terms]).mean(0)


def check_gte(directions: Sequence[str], partition_mode: str, hardness_mode: str | None, strength: float) -> None:
    """ValueError for what sentence-transformers' constructor refuses."""
    unknown = sorted(set(directions) - set(DIRECTIONS))
    if unknown or "query_to_doc" not in directions:
        raise ValueError(f"directions must contain 'query_to_doc', and only {DIRECTIONS}, not {directions!r}")
    if partition_mode not in ("joint", "per_direction"):
        raise ValueError(f"partition_mode must be 'joint' or 'per_direction', not {partition_mode!r}")
    alone = sorted(set(directions) & {"query_to_query", "doc_to_doc"})
    if partition_mode == "per_direction" and alone:
        raise ValueError(
            f"partition_mode='per_direction' cannot be combined with {alone}, whose sums do not contain the "
            "positive; use partition_mode='joint'"
        )
    if hardness_mode not in HARDNESS_MODES:
        raise ValueError(f"hardness_mode must be one of {HARDNESS_MODES}, not {hardness_mode!r}")
    if not strength >= 0:
        raise ValueError(f"hardness_strength must be >= 0, not {strength}")


def _with_negatives(documents: Tensor, negatives: Tensor | None, own: Tensor) -> tuple[Tensor, Tensor]:
    """Documents and hard negatives below one another, (N + NK, D), and the queries that they belong to."""
    if negatives is None:
        return documents, own
    if negatives.ndim != 3 or len(negatives) != len(documents):
        raise ValueError(f"negatives must be (N, K, D), each query's own, not {tuple(negatives.shape)}")
    return torch.cat([documents, negatives.flatten(0, 1)]), torch.cat(
        [own, own.repeat_interleave(negatives.shape[1])]
    )


def _queries_to_documents(
    queries: Tensor,
    pool: tuple[Tensor, Tensor, Tensor, Tensor | None],  # documents, the queries' ids, the documents', negatives
    sums: Sums,
    temperature: float | Tensor,
    mode: str | None,
    strength: float,
) -> Tensor:
    documents, own, owners, negatives = pool
    if negatives is None or strength == 0 or mode in (None, "all_negatives"):
        strength = 0.0 if mode in (None, "hard_negatives") else strength
        return sums(queries, documents, exclude_diagonal=True, hardness=strength)
    in_batch, of_own = (strength, 0.0) if mode == "in_batch_negatives" else (0.0, strength)
    others = sums(queries, documents, row_ids=own, column_ids=owners, hardness=in_batch)
    return log_add(others, own_negatives(queries, negatives, temperature, hardness=of_own))


@reducible
def qwen3_embedding(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.02,
    margin: float | None = 0.1,
    doc_to_doc: bool = True,
    ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""The contrastive loss of Qwen3-Embedding (Zhang et al. 2025, arXiv:2506.05176).

    .. math::
        Z_i = e^{s(q_i, d_i)/\tau} + \sum_k m\, e^{s(q_i, d^-_{ik})/\tau} + \sum_{j \ne i} m\, e^{s(q_i, q_j)/\tau}
            + \sum_{j \ne i} m\, e^{s(d_i, d_j)/\tau} + \sum_{j \ne i} m\, e^{s(q_i, d_j)/\tau}

    and loss_i = −log(e^{s(q_i, d_i)/τ} / Z_i). The mask m is 0 for a pair whose own cosine exceeds
    s(q_i, d_i) + ``margin``, and for a document with the id of d_i.

    Args:
        queries, documents: (N, D). negatives: (N, K, D), own hard negatives, no columns of other queries.
        margin: how far a pair's cosine may exceed that of the positive; infinity, as None: no mask
            by cosine.
        doc_to_doc: whether Z_i contains the fourth sum, of documents among themselves.
        ids: (N,) of the documents: equal for equal texts.

    Cost: four products for each of the two or three sums over the batch.
    """
    positive = pair_cosines(queries, documents)
    limit = None if margin is None else positive.detach() + margin
    sums: Sums = partial(cosine_logsumexp, temperature=temperature, filter_threshold=limit, **options)
    same: dict[str, Any] = {"row_ids": ids, "column_ids": ids, "exclude_diagonal": True}
    terms = [sums(queries, documents, **same), sums(queries, queries, exclude_diagonal=True)]
    if doc_to_doc:
        terms.append(sums(documents, documents, **same))
    if negatives is not None:
        terms.append(own_negatives(queries, negatives, temperature, limit=limit))
    return contrast(positive, temperature, *terms)


@reducible
def gemini_embedding(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    query_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""The contrastive loss of Gemini Embedding (Lee et al. 2025, arXiv:2503.07891).

    .. math::
        Z_i = e^{s(q_i, d_i)/\tau} + \sum_k e^{s(q_i, d^-_{ik})/\tau}
            + \sum_{j \ne i} m_{ij}\, e^{s(q_i, d_j)/\tau}

    and loss_i = −log(e^{s(q_i, d_i)/τ} / Z_i); the mask m_ij is 0 where q_i = q_j or d_i = d_j, as in batches of
    classification data, where documents are labels.

    Args:
        queries, documents: (N, D). negatives: (N, K, D), own hard negatives, no columns of other queries.
        query_ids, document_ids: (N,), equal for equal texts; with both, a document is masked where either is.
    """
    given = [x for x in (query_ids, document_ids) if x is not None]
    ids = (given[0], given[1]) if len(given) == 2 else given[0] if given else None
    return _in_batch_and_own(queries, documents, negatives, temperature, ids, 0.0, options)


@reducible
def embedding_gemma(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.05,
    hardness: float = 5.0,
    ids: Tensor | None = None,
    **options: Any,
) -> Tensor:
    r"""The contrastive loss of EmbeddingGemma (Vera et al. 2025, arXiv:2509.20354).

    .. math::
        Z_i = e^{s(q_i, d_i)/\tau} + \sum_k e^{\alpha\, sg(s(q_i, d^-_{ik}))} e^{s(q_i, d^-_{ik})/\tau}
            + \sum_{j \ne i} e^{s(q_i, d_j)/\tau}

    and loss_i = −log(e^{s(q_i, d_i)/τ} / Z_i). The report adds a spread-out term and Matryoshka prefixes.

    Args:
        queries, documents: (N, D). negatives: (N, K, D), own hard negatives, no columns of other queries.
        hardness: strength α of the weights of own hard negatives.
        ids: (N,) of the documents; one with the id of d_i is not a negative of query i.
    """
    return _in_batch_and_own(queries, documents, negatives, temperature, ids, hardness, options)


def _in_batch_and_own(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None,
    temperature: float | Tensor,
    ids: Tensor | tuple[Tensor, Tensor] | None,
    hardness: float,  # of own hard negatives
    options: dict[str, Any],
) -> Tensor:
    """The loss over documents of other queries and own hard negatives, (N,)."""
    masks: dict[str, Any] = {"row_ids": ids, "column_ids": ids, "exclude_diagonal": True}
    terms = [cosine_logsumexp(queries, documents, temperature=temperature, **masks, **options)]
    if negatives is not None:
        terms.append(own_negatives(queries, negatives, temperature, hardness=hardness))
    return contrast(pair_cosines(queries, documents), temperature, *terms)


@reducible
def llave(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.02,
    hardness: float = 9.0,
    **options: Any,
) -> Tensor:
    r"""The hardness-weighted loss of LLaVE (Lan et al. 2025, arXiv:2503.04812, equation 5), also of triplets.

    .. math::
        Z_i = e^{s(q_i, d_i)/\tau} + \sum_k e^{s(q_i, d^-_{ik})/\tau}
            + \sum_{j} e^{\alpha\, sg(s(q_i, d_j))} e^{s(q_i, d_j)/\tau},\ d_j \text{ of other queries}

    and loss_i = −log(e^{s(q_i, d_i)/τ} / Z_i).

    Args:
        queries, documents: (N, D). negatives: (N, K, D), weighted as columns of other queries, not of their own.
        hardness: strength α of the weights of documents of other queries.
    """
    return gte(
        queries, documents, negatives, temperature=temperature, directions=("query_to_doc",),
        hardness_mode="in_batch_negatives", hardness_strength=hardness, reduction="none", **options,
    )  # fmt: skip


@reducible
def gistembed(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    guide: Sequence[Tensor],
    temperature: float | Tensor = 0.01,
    margin: float = 0.0,
    margin_strategy: str = "absolute",
    contrast_anchors: bool = True,
    contrast_positives: bool = True,
    **options: Any,
) -> Tensor:
    r"""GISTEmbed (Solatorio 2024, arXiv:2402.16829), with sentence-transformers' margins.

    .. math::
        Z_i = e^{s(a_i, p_i)/\tau} + \sum_{j \ne i} m\, e^{s(a_i, p_j)/\tau} + \sum_j m\, e^{s(a_i, n_j)/\tau}
            + \sum_j m\, e^{s(a_i, a_j)/\tau} + \sum_j m\, e^{s(p_i, p_j)/\tau}

    and loss_i = −log(e^{s(a_i, p_i)/τ} / Z_i). The mask m is 0 where the guide's cosine g of the same pair
    exceeds g_ii − ``margin``, or g_ii − |g_ii| ``margin`` with ``margin_strategy="relative"``, g_ii that of the
    anchor and its positive.

    Args:
        anchors: (N, D). positives: (T, D), T >= N; the first N belong to the anchors. negatives: (H, D).
        guide: the guide's embeddings of these inputs, in their order, (n, G) each.
        contrast_anchors, contrast_positives: whether Z_i contains the last two sums.

    With a group every rank holds the columns of all. Cost: four products and the guide's two for each of the one
    to three sums.
    """
    if margin_strategy not in ("absolute", "relative"):
        raise ValueError(f"margin_strategy must be 'absolute' or 'relative', not {margin_strategy!r}")
    guide_anchors, guide_positives, *_ = guide
    own, score = slice(0, len(anchors)), pair_cosines(guide_anchors, guide_positives[: len(anchors)])
    limit = (score - margin * (1 if margin_strategy == "absolute" else score.abs())).detach()
    sums: Sums = partial(_guided_sums, temperature=temperature, filter_threshold=limit, **options)
    columns = positives if negatives is None else torch.cat([positives, negatives])
    terms = [sums(anchors, columns, guide_anchors, torch.cat([*guide[1:]]), exclude_own=True)]
    if contrast_anchors:
        terms.append(sums(anchors, anchors, guide_anchors, guide_anchors))
    if contrast_positives:
        terms.append(sums(positives[own], positives, guide_positives[own], guide_positives))
    return contrast(pair_cosines(anchors, positives[own]), temperature, *terms)


def _guided_sums(
    rows: Tensor,
    columns: Tensor,
    guide_rows: Tensor,
    guide_columns: Tensor,
    *,
    exclude_own: bool = False,  # column i of this rank in row i's sum
    group: Group = "local",
    strategy: Strategy = "auto",
    **options: Any,
) -> Tensor:
    """Log-sum-exp over columns that a guide leaves; with a group the columns of all ranks are gathered."""
    if strategy == "ring":
        raise ValueError("strategy must be 'auto' or 'gather' with a guide, whose rows do not travel in a ring")
    ranks, ids = Everyone(columns, {"group": group}), dict[str, Any]()
    if exclude_own:
        numbers = row_numbers(columns, {"group": group})
        ids = {"row_ids": numbers[: len(rows)], "column_ids": ranks.gather(numbers)}
    guide = guide_rows, ranks.gather(guide_columns.detach())
    return cosine_logsumexp(rows, ranks.gather(columns), guide=guide, **ids, **options)


def focal(
    queries: Tensor,
    documents: Tensor,
    negatives: Tensor | None = None,
    *,
    gamma: float = 0.5,
    **options: Any,
) -> Tensor:
    r"""InfoNCE with the focal weight of KaLM-Embedding-V2 (Zhao et al. 2025, arXiv:2506.20923).

    (1 − p_i)^γ (−log p_i), p_i = e^{s(q_i, d_i)/τ} / Σ_j e^{s(q_i, d_j)/τ}, with the weight's gradient (Lin et
    al., ICCV 2017, arXiv:1708.02002).

    queries, documents: (N, D). negatives: (H, D), of all queries. gamma: exponent γ >= 0 of the weight. options:
    of :func:`fused_infonce.info_nce`.
    """
    return info_nce(queries, documents, negatives, focal_gamma=gamma, **options)
