"""The loss as a module, with a temperature that can be learned."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .api import gs_infonce
from .arguments import check_choice, check_options
from .backends import Backend
from .distributed import STRATEGIES, Group, Strategy, resolve_group
from .options import Reduction

_VARIANTS = {
    "decoupled": False, "angular_margin": 0.0, "hardness": 0.0, "label_smoothing": 0.0, "filter_margin": None,
    "filter_threshold": None,
}  # fmt: skip


class GSInfoNCELoss(nn.Module):
    """:func:`gs_infonce` with its options kept; ``forward(anchors, positives, negatives=None, **tensors)``.

    Args:
        temperature: τ, or its first value where it is learned.
        learnable_temperature: hold log τ as a parameter of shape (1,). Each call first sets a parameter that an
            optimiser's step took out of ``temperature_range`` to the range's end (as CLIP's training loop does),
            so that it comes back with the first gradient that points inside.
        temperature_range: smallest and largest τ of a learned temperature. The smallest is also the promise
            (``min_temperature``) that lets the kernels take one pass with a device tensor.

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
        group: Group = "local",
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
        given: Any = temperature  # NumPy's numbers are floats, too
        if isinstance(given, bool) or not isinstance(given, numbers.Real):
            raise TypeError(f"temperature must be a float, not {type(given).__name__}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be a number > 0, not {temperature}")
        self.initial_temperature = float(temperature)
        self.temperature_range = _checked_range(temperature_range)
        low, high = self.temperature_range
        if not isinstance(learnable_temperature, bool):
            raise TypeError(f"learnable_temperature must be True or False, not {learnable_temperature!r}")
        if learnable_temperature and not low <= temperature <= high:
            raise ValueError(f"temperature {temperature} must lie in temperature_range {temperature_range}")
        check_options(
            num_noise=num_noise,
            noise_weight=noise_weight,
            noise=noise,
            hard_negative_weight=hard_negative_weight,
            symmetric=symmetric,
            reduction=reduction,
            backend=backend,
            workspace_bytes=workspace_bytes,
            decoupled=decoupled,
            angular_margin=angular_margin,
            hardness=hardness,
            label_smoothing=label_smoothing,
            filter_margin=filter_margin,
            filter_threshold=filter_threshold,
        )
        check_choice("strategy", strategy, STRATEGIES)
        # "world" may come before init_process_group; None is reported here, and not at each call.
        if group not in ("local", "world"):
            group = resolve_group(group) or "local"
        if group != "local" and backend == "reference":
            raise ValueError("backend='reference' takes one process's rows; use 'auto' or 'torch' with a group")
        self.log_temperature = nn.Parameter(torch.empty(1)) if learnable_temperature else None
        self.reset_parameters()
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

    def reset_parameters(self) -> None:
        """The first temperature again."""
        if self.log_temperature is not None:
            nn.init.constant_(self.log_temperature, math.log(self.initial_temperature))

    @property
    def temperature(self) -> float | Tensor:
        """τ as the loss uses it now: a float, or a 0-dim tensor with a graph to the parameter."""
        log_tau = self.log_temperature
        if log_tau is None:
            return self.initial_temperature
        inside: Tensor = _IntoRange.apply(log_tau, *self._log_range)  # type: ignore[no-untyped-call]
        return inside.exp().reshape(())

    @property
    def _log_range(self) -> tuple[float, float]:
        low, high = self.temperature_range
        return math.log(low), math.log(high)

    def _project(self) -> None:
        """The parameter into its range: one that stays outside would only come back after as many steps.

        Through ``data``: a graph that was made since the optimiser's step has seen the same value. An exported
        program has no optimiser, and its temperature is clamped all the same.
        """
        if self.log_temperature is not None and not torch.compiler.is_exporting():
            self.log_temperature.data.clamp_(*self._log_range)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Also takes a 0-dim ``log_temperature``, which FSDP could not shard."""
        key = prefix + "log_temperature"
        held = state_dict.get(key)
        if isinstance(held, Tensor) and held.ndim == 0:
            state_dict[key] = held.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

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
        self._project()
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


class _IntoRange(torch.autograd.Function):
    """Clamps; leaves out only the part of the gradient that would take the value further outside.

    The projection holds the parameter inside by itself, but for FSDP, which lets a forward change a copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward((x > high).to(x.dtype) - (x < low).to(x.dtype))
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (outside,) = ctx.saved_tensors
        return upstream.masked_fill(outside * upstream < 0, 0), None, None


def _checked_range(value: Any) -> tuple[float, float]:
    if not isinstance(value, Sequence) or len(value) != 2 or not all(isinstance(x, numbers.Real) for x in value):
        raise TypeError(f"temperature_range must be two numbers (low, high), not {value!r}")
    low, high = value
    if not 0 < low <= high < math.inf:
        raise ValueError(f"temperature_range must be (low, high) with 0 < low <= high, not {value}")
    return float(low), float(high)
