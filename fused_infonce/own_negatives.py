"""Hard negatives that only their own anchor sees: N·K cosines from unrounded rows, and a log-sum-exp of each row.

They are no columns of the matrix of logits. Their sum O_i = Σ_k e^{(κ + β) s_ik + w} joins row i's denominator as one
number more, R_i + O_i e^{−κ p_i} (``Options.log_own``), which every path over the logits adds as it adds the
expectation of noise. What is here is plain torch, so that autograd carries the gradient from O_i on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .geometry import unit_rows
from .options import Similar
from .variants import similarity_limit


def pair_cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Cosines of row i and its own rows, in fp32 (fp64 for fp64) from unrounded rows; differentiable.

    rows: (N, D); others: (N, D) → (N,), or (N, K, D) → (N, K). A zero row has cosine 0 and gradient 0.
    """
    if others.ndim not in (2, 3) or others.shape[0] != rows.shape[0] or others.shape[-1] != rows.shape[-1]:
        raise ValueError(
            f"own rows must have shape {tuple(rows.shape)} or (N, K, D) with the same N and D, one block for each "
            f"anchor, not {tuple(others.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(rows.dtype, others.dtype), torch.float32)
    with torch.autocast(rows.device.type, enabled=False):
        q, x = unit_rows(rows, dtype), unit_rows(others.flatten(0, -2), dtype).view(others.shape)
        return (q * x).sum(-1) if others.ndim == 2 else (q[:, None] * x).sum(-1)


def log_add(*terms: Tensor) -> Tensor:
    """log Σ_t e^(L_i^(t)) of terms (N,); −∞, with gradient 0, where all of them are."""
    stacked = torch.stack(terms)
    empty = (stacked == -math.inf).all(0)
    return stacked.masked_fill(empty, 0).logsumexp(0).masked_fill(empty, -math.inf)


def scalar(temperature: float | Tensor) -> float | Tensor:
    """A tensor of one element without dimensions, so that it leaves shapes and dtypes as they are."""
    return temperature.reshape(()) if isinstance(temperature, Tensor) else temperature


@dataclass(slots=True, eq=False)
class OwnNegatives:
    """The own hard negatives of a call."""

    rows: Tensor  # (N, K, D), K of each anchor; or (H, D) with the owners
    owners: Tensor | None = None  # (H,) the anchor that each belongs to
    ids: Tensor | None = None  # (N, K) or (H,)
    guide: Tensor | None = None  # another model's rows, (N, K, G) or (H, G)

    def flat_ids(self, ids: Any) -> Any:
        """Ids given as (N, K) below one another, as ``checks.check_both_ids`` takes them."""
        if self.owners is None and isinstance(ids, Tensor):
            if ids.shape != self.rows.shape[:2]:
                raise ValueError(
                    f"negative_ids must have shape {tuple(self.rows.shape[:2])}, one id for each of the "
                    f"negatives, not {tuple(ids.shape)}"
                )
            return ids.flatten()
        return ids

    def shaped(self, ids: Tensor | None) -> Tensor | None:
        """The ids (NK,) or (H,) beside the cosines."""
        return None if ids is None else ids.view(self.rows.shape[:-1])

    def taken_from(self, guide: Any) -> Any:
        """Takes the own negatives' rows, the third, out of a guide; the others are returned."""
        if not isinstance(guide, Sequence) or len(guide) < 3:
            return guide
        rows = guide[2]
        if not isinstance(rows, Tensor) or rows.shape[:-1] != self.rows.shape[:-1]:
            raise ValueError(
                f"guide[2] must have shape {(*self.rows.shape[:-1], 'features')}, a row for each of the negatives, "
                f"not {tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__}"
            )
        self.guide = rows.detach()
        return [*guide[:2], *guide[3:]]

    @property
    def most(self) -> int:
        """An upper bound of their number in a row."""
        return self.rows.shape[1] if self.owners is None else self.rows.shape[0]

    def beside(self, x: Tensor) -> Tensor:
        """What belongs to anchors, (N, …), beside their negatives: (N, 1, …), or (H, …)."""
        return x[:, None] if self.owners is None else x[self.owners]

    def cosines(self, anchors: Tensor, rows: Tensor) -> Tensor:
        """Of anchors (N, D) and rows as ``rows`` or ``guide``: (N, K), or (H,)."""
        return pair_cosines(anchors if self.owners is None else anchors[self.owners], rows)

    def log_sum(
        self,
        anchors: Tensor,  # (N, D)
        temperature: float | Tensor,
        *,
        hardness: float = 0.0,
        log_weight: float = 0.0,
        ids: Tensor | None = None,  # (N,) compared with the negatives' own
        limit: Tensor | None = None,  # (N,) scores above which a negative is left out
        guide: Tensor | None = None,  # (N, G) the anchors' in the guide, whose cosines are the scores; None: s_ik
    ) -> Tensor:
        """log O_i, (N,): of (1/τ + β) s_ik + w, β without gradient; −∞, with gradient 0, where none is left."""
        s = self.cosines(anchors, self.rows)
        z = s / scalar(temperature) + (hardness * s.detach() + log_weight)
        left_out = torch.zeros_like(s, dtype=torch.bool)
        if ids is not None and self.ids is not None:
            left_out = self.ids == self.beside(ids)
        if limit is not None:
            scores = s if guide is None or self.guide is None else self.cosines(guide, self.guide)
            left_out = left_out | (scores > self.beside(limit))
        z = z.masked_fill(left_out, -math.inf) + 0 * s.detach()  # NaN stays NaN
        return log_add(*z.unbind(1)) if self.owners is None else _by_owner(z, self.owners, len(anchors))


def _by_owner(z: Tensor, owners: Tensor, N: int) -> Tensor:
    """Log-sum-exp of the entries z (H,) of each owner, (N,). Accumulating ``index_put`` is deterministic."""
    least = torch.full((N,), -math.inf, dtype=z.dtype, device=z.device)
    top = least.scatter_reduce(0, owners, z.detach(), "amax").clamp(min=torch.finfo(z.dtype).min)
    sums = torch.zeros_like(top).index_put((owners,), torch.exp(z - top[owners]), accumulate=True)
    empty = sums == 0
    return top + sums.masked_fill(empty, 1).log().masked_fill(empty, -math.inf)


def positives_limit(
    anchors: Tensor, positives: Tensor, similar: Similar | None
) -> tuple[Tensor | None, Tensor | None]:
    """The scores (N,) above which a filter leaves a negative out, and a guide's rows of the anchors (N, G)."""
    if similar is None:
        return None, None
    if similar.guide is None:
        return similarity_limit(pair_cosines(anchors.detach(), positives.detach()), similar), None
    rows, columns = similar.guide
    return similarity_limit(pair_cosines(rows, columns[: len(rows)]), similar), rows
