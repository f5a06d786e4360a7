"""A loss of several prefixes of the same embeddings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

_EMBEDDINGS = ("negatives", "queue")  # keywords whose tensors are embeddings of the model, too


def matryoshka(
    loss: Callable[..., Tensor], dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., Tensor]:
    r"""The weighted sum of a loss over prefixes of the embeddings (Kusupati et al. 2022, arXiv:2205.13147).

    .. math:: \sum_m w_m\, \ell(q_{:, 1..d_m}, k_{:, 1..d_m}, \ldots)

    Each prefix is normalised by itself. ``matryoshka(info_nce, (64, 256, 768))(anchors, positives, ids=ids)``
    calls the loss with its own arguments; those given by position, ``negatives`` and ``queue`` are embeddings and
    are cut, whatever else is given by keyword (a guide's or a teacher's embeddings, ids) is not.

    Args:
        loss: any function of embeddings (…, D): ``info_nce``, ``gs_infonce``, a loss of ``fused_infonce.losses``.
        dims: the prefixes' lengths d_m, 1 <= d_m <= D. weights: w_m; None: 1.

    Cost: the calls of the prefixes; their products are Σ_m d_m / D of one full call's, 2.25 for (64, 128, 256,
    512, 768). Memory: one workspace, and what each call keeps for its backward, O(N·Σ_m d_m).
    """
    weights = [1.0] * len(dims) if weights is None else weights
    if not dims or any(not isinstance(dim, int) or dim < 1 for dim in dims):
        raise ValueError(f"dims must be positive integers, at least one, not {dims!r}")
    if len(weights) != len(dims):
        raise ValueError(f"weights must have one number for each of the {len(dims)} dims, not {len(weights)}")

    @functools.wraps(loss)
    def nested(*embeddings: Tensor | None, **options: Any) -> Tensor:
        given = [x for x in (*embeddings, *(options.get(name) for name in _EMBEDDINGS)) if x is not None]
        if max(dims) > given[0].shape[-1]:
            raise ValueError(
                f"dims must be at most the embeddings' {given[0].shape[-1]} features, not {max(dims)}"
            )
        total: Any = 0
        for dim, weight in zip(dims, weights, strict=True):
            cut = [None if x is None else x[..., :dim] for x in embeddings]
            named = {name: options[name][..., :dim] for name in _EMBEDDINGS if options.get(name) is not None}
            total = total + weight * loss(*cut, **{**options, **named})
        return total  # type: ignore[no-any-return]

    return nested
