"""What a call of the loss asks for, checked and resolved: the part of it that carries no gradient."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .distributed import Counts, Exchange

Reduction = Literal["mean", "sum", "none"]
NoiseKind = Literal["none", "sampled", "expected", "given"]

# The exponents that known offsets keep inside the range of fp32: design choice explained in docs/numerics.md.
_EXPONENT_TOP = 75.0
_EXPONENT_SPAN = 162.0


@dataclass(slots=True, eq=False)
class Similar:
    """Column j is no negative of row i where score_ij > min(score_ii + margin, threshold), of those given."""

    margin: float | None
    threshold: float | None
    guide: tuple[Tensor, Tensor] | None  # rows (N, G) and columns (T, G) whose cosines are the scores; None: s_ij


@dataclass(frozen=True, eq=False)
class Options:
    counts: Counts  # N, H and Q of this rank
    noise: NoiseKind
    num_noise: int  # M
    log_noise_weight: float  # log λ
    own_log_weight: float  # hard_negative_weight
    ids: Tensor | None  # (N,)
    negative_ids: Tensor | None  # (H,)
    symmetric: bool
    reduction: Reduction
    seed: Tensor | None  # (1,) of sampled noise; on the device where the kernels draw it
    workspace_bytes: int | None
    decoupled: bool = False  # the positive is not in the denominator
    angular_margin: float = 0.0  # m, radians: the positive's cosine is cos(θ_ii + m)
    hardness: float = 0.0  # β: weights e^(β s_ij) of the negatives, of which there is no derivative
    label_smoothing: float = 0.0  # ε
    similar: Similar | None = None  # which negatives are too similar to be negatives
    exchange: Exchange | None = None  # with the other ranks of a group

    def total(self, name: Literal["positives", "negatives", "queue", "columns"]) -> int:
        """Rows of this call, on all ranks."""
        own: int = getattr(self.counts, name)
        return own if self.exchange is None else self.exchange.total(name)

    @functools.cached_property
    def gradient_factor(self) -> float:
        """A factor of the gradients of Σ_i loss_i: 1/N of a mean; and W, which DDP's averaging takes off again."""
        W = 1 if self.exchange is None else self.exchange.size
        return W / self.total("positives") if self.reduction == "mean" else float(W)

    @property
    def has_noise_columns(self) -> bool:
        return self.noise in ("sampled", "given")

    @functools.cached_property
    def log_columns(self) -> float:
        """log of the number of terms in a row's denominator besides the positive's."""
        M = 0 if self.noise == "none" else self.num_noise
        return math.log(max(1, self.total("columns") - 1 + M))

    @functools.cached_property
    def _biases(self) -> tuple[float, float]:
        noise = 0.0 if self.noise == "none" else self.log_noise_weight
        own = self.own_log_weight
        return min(0.0, noise, own), max(0.0, noise, own)

    def fits_known_offset(self, kappa: float) -> bool:
        """Whether fixed row offsets keep every term that matters inside the range of fp32 (design, "Range")."""
        low, high = self._biases
        return 2 * (kappa + self.hardness) + self.log_columns + high - low <= _EXPONENT_SPAN

    @functools.cached_property
    def offset_margin(self) -> float:
        """o_i = max(0, κ + β − κ p_i + offset_margin) is the row offset of one pass, p_i of the positive."""
        return self._biases[1] + self.log_columns - _EXPONENT_TOP
