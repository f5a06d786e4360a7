"""The options of one call: its config, and the facts that its tensors and its group add; without a gradient."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .config import FIELDS, LossConfig
from .distributed import Counts, Exchange

NoiseKind = Literal["none", "sampled", "expected", "given"]

# The exponents that known offsets keep inside the range of fp32: design choice explained in docs/numerics.md.
_EXPONENT_TOP = 75.0
_EXPONENT_SPAN = 162.0


NO_ID = torch.iinfo(torch.int64).min  # of what has none, equal to no row's


@dataclass(slots=True, eq=False)
class Similar:
    """Column j does not count as a negative of row i where score_ij > min(score_ii + margin, threshold), of those
    given, or where score_ij > limit_i.
    """

    margin: float | None
    threshold: float | None
    guide: tuple[Tensor, Tensor] | None  # rows (N, G) and columns (T, G) whose cosines are the scores; None: s_ij
    limit: Tensor | None = None  # (N, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Options(LossConfig):
    """A config with the facts of one call; ``num_noise`` is M as it is used, 0 without noise.

    A call without positives (``cosine_logsumexp``) is the decoupled loss of rows whose positive has cosine 0 and
    is not a column: log R_i is then the logarithm of the sum itself.
    """

    counts: Counts  # N, H and Q of this rank
    noise_kind: NoiseKind
    log_noise_weight: float  # log λ
    own_log_weight: float  # hard_negative_weight where there are hard negatives
    ids: Tensor | None = None  # (N,), or (N, 2) of anchors and positives
    negative_ids: Tensor | None = None  # (H,)
    exclude_diagonal: bool = False  # without positives: whether row i leaves column i out
    similar: Similar | None = None  # which negatives are too similar to be negatives
    seed: Tensor | None = None  # (1,) of sampled noise; on the device where the kernels draw it
    exchange: Exchange | None = None  # with the other ranks of a group
    log_own: Tensor | None = None  # (N, 1) log O_i of the rows' own hard negatives, see ``own_negatives``
    log_weights: Tensor | None = None  # (T,) of the columns, without positives
    num_own: int = 0  # an upper bound of their number in a row

    def __post_init__(self) -> None:
        """The config was checked when it was made."""

    @staticmethod
    def of(
        config: LossConfig,
        num_noise: int,
        counts: Counts,
        noise_kind: NoiseKind,
        ids: Tensor | None,
        negative_ids: Tensor | None,
        similar: Similar | None,
        seed: Tensor | None,
        exclude_diagonal: bool = False,
    ) -> Options:
        """Returns the options of a call of one process."""
        plain: dict[str, Any] = {name: getattr(config, name) for name in FIELDS}
        plain["num_noise"] = 0 if noise_kind == "none" else num_noise
        return Options(
            **plain,
            counts=counts,
            noise_kind=noise_kind,
            log_noise_weight=0.0 if noise_kind == "none" else math.log(config.noise_weight),
            own_log_weight=config.hard_negative_weight if counts.negatives else 0.0,
            ids=ids,
            negative_ids=negative_ids,
            similar=similar,
            seed=seed,
            exclude_diagonal=exclude_diagonal,
        )

    @property
    def paired(self) -> bool:
        """Whether the first columns are the rows' positives."""
        return self.counts.unpaired == 0

    @property
    def column_ids(self) -> Tensor | None:
        """Ids of this rank's first columns: the positives', and the negatives' where those have any."""
        if self.ids is None or self.negative_ids is None:
            return self.ids
        if not self.paired:
            return self.negative_ids
        if self.ids.ndim == 1:
            return torch.cat([self.ids, self.negative_ids])
        no_anchor = torch.full_like(self.negative_ids, NO_ID)  # hard negatives have a document's id only
        return torch.cat([self.ids, torch.stack([no_anchor, self.negative_ids], 1)])

    @property
    def masked_diagonal(self) -> int:
        """The number of rows i that leave column i out."""
        return self.counts.rows if self.paired or self.exclude_diagonal else 0

    def total(self, name: Literal["rows", "positives", "negatives", "queue", "columns"]) -> int:
        """Rows of this call, on all ranks."""
        own: int = getattr(self.counts, name)
        return own if self.exchange is None else self.exchange.total(name)

    @functools.cached_property
    def gradient_factor(self) -> float:
        """A factor of the gradients of Σ_i loss_i: 1/N of a mean; and W, which DDP's averaging takes off again.

        Without positives it is 1: what a rank makes of its rows is its own loss, which DDP averages.
        """
        if not self.paired:
            return 1.0
        W = 1 if self.exchange is None else self.exchange.size
        return W / self.total("positives") if self.reduction == "mean" else float(W)

    @property
    def has_noise_columns(self) -> bool:
        return self.noise_kind in ("sampled", "given")

    @functools.cached_property
    def log_columns(self) -> float:
        """log of the number of terms in a row's denominator besides the positive's."""
        return math.log(max(1, self.total("columns") - 1 + self.num_noise + self.num_own))

    @functools.cached_property
    def exponent_range(self) -> tuple[float, float]:
        """Least and largest log-weight of an entry that is not masked."""
        noise = 0.0 if self.noise_kind == "none" else self.log_noise_weight
        own = self.hard_negative_weight if self.num_own else self.own_log_weight
        return min(0.0, noise, own), max(0.0, noise, own)

    def fits_known_offset(self, kappa: float) -> bool:
        """Whether fixed row offsets keep every term that matters inside the range of fp32 (design, "Range")."""
        low, high = self.exponent_range
        return 2 * (kappa + self.hardness) + self.log_columns + high - low <= _EXPONENT_SPAN

    @functools.cached_property
    def offset_margin(self) -> float:
        """o_i = max(0, κ + β − κ p_i + offset_margin) is the row offset of one pass, p_i of the positive."""
        return self.exponent_range[1] + self.log_columns - _EXPONENT_TOP
