"""sentence-transformers: MatryoshkaLoss around the fused losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss


class FusedMatryoshkaLoss(MatryoshkaLoss):  # type: ignore[misc]
    """``MatryoshkaLoss`` of a fused loss, whose memory does not grow with the square of the batch at any prefix.

    Constructor and value are the library's, which embeds once and calls the loss for every prefix. ``loss`` must
    be one of this package's, cached or not; another would form its matrices.
    """

    def __init__(
        self,
        model: Any,
        loss: Any,
        matryoshka_dims: Sequence[int],
        matryoshka_weights: Sequence[float] | Sequence[int] | None = None,
        n_dims_per_step: int = -1,
    ) -> None:
        if not type(loss).__module__.startswith(__package__):
            raise ValueError(
                "loss must be one of fused_infonce.integrations.sentence_transformers, not "
                f"{type(loss).__name__}; use the library's MatryoshkaLoss for it"
            )
        super().__init__(model, loss, matryoshka_dims, matryoshka_weights, n_dims_per_step)
