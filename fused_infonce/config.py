"""The options of the loss that are plain values: each is one field with its type, default, check and meaning.

The operator's schema, the module's arguments, the trainer's flags and what ranks must agree on are made from these
fields. Tensors, and ``temperature``, which may be one, are arguments of a call and not options.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_type_hints

Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "torch", "reference"]
Strategy = Literal["auto", "gather", "ring"]
Noise = Literal["sampled", "expected"]
HardnessMode = Literal["all_negatives", "in_batch_negatives", "hard_negatives"]

Check = Callable[[str, Any], Any]  # (name, value) → the value as it is stored; raises TypeError or ValueError


def finite(name: str, value: Any) -> float:
    """Returns a finite number of any kind (NumPy's too) as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return float(value)


def number(valid: Callable[[float], bool], expected: str) -> Check:
    """Makes the check of a finite number that ``valid`` accepts; ``expected`` completes "<name> must be"."""

    def check(name: str, value: Any) -> float:
        x = finite(name, value)
        if not valid(x):
            raise ValueError(f"{name} must be {expected}, not {value}")
        return x

    return check


def integer(least: int, expected: str) -> Check:
    """Makes the check of an integer that is at least ``least``; ``expected`` completes "<name> must be"."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if int(value) < least:
            raise ValueError(f"{name} must be {expected}, not {value}")
        return int(value)

    return check


def switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def choice(*choices: str, also: str = "") -> Check:
    """Makes the check of one of several strings; ``also`` names what else the public function accepts."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            expected = ", ".join(map(repr, choices)) + (f" {also}" if also else "")
            raise ValueError(f"{name} must be one of {expected}, not {value!r}")
        return value

    return check


def or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def option(default: Any, check: Check, meaning: str, *, agreed: bool = True, changes_loss: bool = True) -> Any:
    """Makes a field of :class:`LossConfig`.

    agreed: whether all ranks of a group must give the same value. changes_loss: False for an option that only
    changes where or how the loss is computed.
    """
    metadata = {"check": check, "meaning": meaning, "agreed": agreed, "changes_loss": changes_loss}
    return dataclasses.field(default=default, metadata=metadata)


non_negative = number(lambda x: x >= 0, ">= 0")


@dataclass(frozen=True)
class LossConfig:
    """The checked options of a loss. ValueError or TypeError name the option and what it must be."""

    min_temperature: float | None = option(
        None,
        or_none(number(lambda x: x > 0, "> 0 or None")),
        "A promise that a temperature on a device never falls below this value.",
        changes_loss=False,
    )
    num_noise: int = option(
        192, integer(0, ">= 0"), "Number of Gaussian noise vectors that serve as further negatives (GS-InfoNCE)."
    )
    noise_weight: float = option(1.0, non_negative, "Weight λ of the noise in the denominator; 0 is InfoNCE.")
    noise: Noise = option(
        "sampled",
        choice("sampled", "expected", also="or a tensor (M, D)"),
        "'sampled' draws new noise vectors at every step; 'expected' uses the expectation of their sum, a "
        "constant per row that costs nothing.",
    )
    hard_negative_weight: float = option(
        0.0, finite, "Natural logarithm of the weight of an anchor's own hard negatives in its denominator."
    )
    symmetric: bool = option(
        False, switch, "Use the mean of both directions, anchors to positives and back (CLIP)."
    )
    reduction: Reduction = option("mean", choice("mean", "sum", "none"), "Reduction over the anchors.")
    strategy: Strategy = option(
        "auto",
        choice("auto", "gather", "ring"),
        "How processes share columns: 'gather' holds all at once, 'ring' passes them on in less memory; the "
        "result is the same.",
        changes_loss=False,
    )
    backend: Backend = option(
        "auto",
        choice("auto", "triton", "torch", "reference"),
        "Implementation of the loss; 'auto' uses the Triton kernels where they run, else torch.",
        agreed=False,
        changes_loss=False,
    )
    workspace_bytes: int | None = option(
        None,
        or_none(integer(1, "a positive number of bytes or None")),
        "Memory for tiles of the similarity matrix, in bytes. Default: 64 MiB on CPUs, 256 MiB or more on GPUs.",
        agreed=False,
        changes_loss=False,
    )
    decoupled: bool = option(
        False, switch, "Leave the positive out of the denominator (decoupled contrastive learning)."
    )
    angular_margin: float = option(
        0.0,
        number(lambda x: 0 <= x < math.pi, "an angle in radians, 0 <= m < pi"),
        "Angle in radians that is added to the angle between an anchor and its positive (ArcCon).",
    )
    hardness: float = option(
        0.0, non_negative, "Strength β of the weights e^(β cosine) of the negatives, which carry no gradient."
    )
    hardness_mode: HardnessMode = option(
        "all_negatives",
        choice("all_negatives", "in_batch_negatives", "hard_negatives"),
        "Which negatives hardness weighs: all, the columns that anchors share, or own hard negatives.",
    )
    label_smoothing: float = option(
        0.0,
        number(lambda x: 0 <= x < 1, "a share, 0 <= e < 1"),
        "Share of the label that is spread evenly over all columns.",
    )
    filter_margin: float | None = option(
        None, or_none(finite), "Columns more similar than the positive by this margin are not used as negatives."
    )
    filter_threshold: float | None = option(
        None, or_none(finite), "Columns whose cosine exceeds this threshold are not used as negatives."
    )
    focal_gamma: float = option(
        0.0, non_negative, "Exponent γ of the focal weight (1 − p)^γ of a row, p its positive's probability."
    )

    def __post_init__(self) -> None:
        for name, check in _CHECKS:
            object.__setattr__(self, name, check(name, getattr(self, name)))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.label_smoothing and self.filters:
            raise ValueError(SMOOTHING_IS_ALONE)
        if self.focal_gamma and (self.decoupled or self.label_smoothing):
            raise ValueError("focal_gamma cannot be combined with decoupled or label_smoothing; leave one out")

    @property
    def column_hardness(self) -> float:
        """β of the columns that anchors share."""
        return 0.0 if self.hardness_mode == "hard_negatives" else self.hardness

    @property
    def own_hardness(self) -> float:
        """β of own hard negatives."""
        return 0.0 if self.hardness_mode == "in_batch_negatives" else self.hardness

    @property
    def filters(self) -> bool:
        return self.filter_margin is not None or self.filter_threshold is not None


SMOOTHING_IS_ALONE = (
    "label_smoothing cannot be combined with ids or a filter: it spreads the label over every column, "
    "masked ones too; leave one of them out"
)
FIELDS = {field.name: field for field in dataclasses.fields(LossConfig)}
TYPES: Mapping[str, Any] = get_type_hints(LossConfig)
NOISE_OPTIONS = ("num_noise", "noise_weight", "noise")
MUST_AGREE_ACROSS_RANKS = tuple(name for name, field in FIELDS.items() if field.metadata["agreed"])
_CHECKS = [(name, cast(Check, field.metadata["check"])) for name, field in FIELDS.items()]


@functools.lru_cache(maxsize=64, typed=True)
def _cached(**options: Any) -> LossConfig:
    return LossConfig(**options)


def make_config(options: Mapping[str, Any]) -> LossConfig:
    """Returns the config of these options. A training loop passes the same at each step, and looking them up takes
    2 µs where checking them takes 38 (timeit, one core of a busy machine): a tenth of a small batch's step.
    """
    try:
        return _cached(**options)
    except TypeError:  # an option of the wrong type, perhaps one without a hash
        return LossConfig(**options)
