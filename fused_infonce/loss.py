"""The loss as a module, with a temperature that can be learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .api import gs_infonce
from .backends import Backend
from .distributed import Strategy
from .options import Reduction

_VARIANTS = {
    "decoupled": False, "angular_margin": 0.0, "hardness": 0.0, "label_smoothing": 0.0, "filter_margin": None,
    "filter_threshold": None,
}  # fmt: skip


class GSInfoNCELoss(nn.Module):
    """:func:`gs_infonce` with its options kept; ``forward(anchors, positives, negatives=None, **tensors)``.

    Args:
        temperature: τ, or its first value where it is learned.
        learnable_temperature: hold log τ as a parameter (as CLIP does), clamped into ``temperature_range`` at each
            call; its lower end is also the promise (``min_temperature``) that lets a device tensor take one sweep.
            Where the clamp acts, the gradient of the temperature is 0.
        temperature_range: smallest and largest τ of a learned temperature.

    The other arguments are those of :func:`gs_infonce`; ``queue``, ``ids``, ``negative_ids``, ``generator``,
    ``guide`` and ``noise`` given as a tensor belong to a batch and go to ``forward``.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learnable_temperature: bool = False,
        temperature_range: tuple[float, float] = (0.015, 1.0),
        num_noise: int = 192,
        noise_weight: float = 1.0,
        noise: Literal["sampled", "expected"] = "sampled",
        hard_negative_weight: float = 0.0,
        symmetric: bool = False,
        reduction: Reduction = "mean",
        group: ProcessGroup | None = None,
        strategy: Strategy = "auto",
        backend: Backend = "auto",
        workspace_bytes: int | None = None,
        decoupled: bool = False,
        angular_margin: float = 0.0,
        hardness: float = 0.0,
        label_smoothing: float = 0.0,
        filter_margin: float | None = None,
        filter_threshold: float | None = None,
    ) -> None:
        super().__init__()
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise TypeError(f"temperature must be a float, not {type(temperature).__name__}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a number > 0, not {temperature}")
        low, high = temperature_range
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f"temperature_range must be (low, high) with 0 < low <= high, not {temperature_range}"
            )
        if learnable_temperature and not low <= temperature <= high:
            raise ValueError(f"temperature {temperature} must lie in temperature_range {temperature_range}")
        self.initial_temperature = temperature
        self.temperature_range = (low, high)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learnable_temperature else None
        self.num_noise = num_noise
        self.noise_weight = noise_weight
        self.noise = noise
        self.hard_negative_weight = hard_negative_weight
        self.symmetric = symmetric
        self.reduction: Reduction = reduction
        self.group = group
        self.strategy: Strategy = strategy
        self.backend: Backend = backend
        self.workspace_bytes = workspace_bytes
        self.decoupled = decoupled
        self.angular_margin = angular_margin
        self.hardness = hardness
        self.label_smoothing = label_smoothing
        self.filter_margin = filter_margin
        self.filter_threshold = filter_threshold

    @property
    def temperature(self) -> float | Tensor:
        """τ as the loss uses it now: a float, or a 0-dim tensor with a graph to the parameter."""
        if self.log_temperature is None:
            return self.initial_temperature
        low, high = self.temperature_range
        return self.log_temperature.clamp(math.log(low), math.log(high)).exp()

    def forward(
        self,
        anchors: Tensor,
        positives: Tensor,
        negatives: Tensor | None = None,
        *,
        queue: Tensor | None = None,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guide: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return gs_infonce(
            anchors,
            positives,
            negatives,
            queue=queue,
            temperature=self.temperature,
            # exp(log(low)) may round below low
            min_temperature=None if self.log_temperature is None else self.temperature_range[0] * (1 - 1e-5),
            num_noise=self.num_noise,
            noise_weight=self.noise_weight,
            noise=self.noise if noise is None else noise,
            generator=generator,
            hard_negative_weight=self.hard_negative_weight,
            ids=ids,
            negative_ids=negative_ids,
            symmetric=self.symmetric,
            reduction=self.reduction,
            group=self.group,
            strategy=self.strategy,
            backend=self.backend,
            workspace_bytes=self.workspace_bytes,
            decoupled=self.decoupled,
            angular_margin=self.angular_margin,
            hardness=self.hardness,
            label_smoothing=self.label_smoothing,
            filter_margin=self.filter_margin,
            filter_threshold=self.filter_threshold,
            guide=guide,
        )

    def extra_repr(self) -> str:
        parts = [f"temperature={self.initial_temperature}"]
        if self.log_temperature is not None:
            parts.append(f"learnable_temperature=True, temperature_range={self.temperature_range}")
        names = ("num_noise", "noise_weight", "noise", "hard_negative_weight", "symmetric", "reduction", "backend")
        parts += [f"{name}={getattr(self, name)!r}" for name in names]
        parts += [
            f"{name}={getattr(self, name)!r}" for name, off in _VARIANTS.items() if getattr(self, name) != off
        ]
        return ", ".join(parts)
