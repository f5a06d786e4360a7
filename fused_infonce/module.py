"""The loss as a module, with a temperature that can be learned."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import FIELDS, LossConfig
from .distributed import Group, resolve_group
from .functional import gs_infonce

# A module's range of temperatures takes the place of the promise ``min_temperature``.
OPTIONS = {name: field for name, field in FIELDS.items() if name != "min_temperature"}


class GSInfoNCELoss(nn.Module):
    """:func:`gs_infonce` with its options kept; ``forward(anchors, positives, negatives=None, **tensors)``.

    Args:
        temperature: τ, or its first value where it is learned.
        learnable_temperature: hold log τ as a parameter of shape (1,). Each call first sets a parameter that an
            optimiser's step took out of ``temperature_range`` to the range's end (as CLIP's training loop does),
            so that it comes back with the first gradient that points inside.
        temperature_range: smallest and largest τ of a learned temperature. The smallest is also the promise
            (``min_temperature``) that lets the kernels take one pass with a device tensor.

    The other arguments are those of :func:`gs_infonce`; ``queue``, ``ids``, ``negative_ids``, ``negative_owners``,
    ``generator``, ``guide`` and ``noise`` given as a tensor belong to a batch and go to ``forward``.
    """

    def __init__(
        self,
        temperature: float = 0.05,
        *,
        learnable_temperature: bool = False,
        temperature_range: tuple[float, float] = (0.015, 1.0),
        group: Group = "local",
        **options: Any,
    ) -> None:
        super().__init__()
        self.temperature_range = _checked_range(temperature_range)
        self.initial_temperature = _checked_temperature(temperature)
        low, high = self.temperature_range
        if not isinstance(learnable_temperature, bool):
            raise TypeError(f"learnable_temperature must be True or False, not {learnable_temperature!r}")
        if learnable_temperature and not low <= temperature <= high:
            raise ValueError(f"temperature {temperature} must lie in temperature_range {temperature_range}")
        for name in options:
            if name not in OPTIONS:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        self.config = _checked_config(options)
        # "world" may come before init_process_group; None is reported here, and not at each call.
        if group not in ("local", "world"):
            group = resolve_group(group) or "local"
        if group != "local" and self.config.backend == "reference":
            raise ValueError("backend='reference' takes one process's rows; use 'auto' or 'torch' with a group")
        self.group = group
        self.log_temperature = nn.Parameter(torch.empty(1)) if learnable_temperature else None
        self.reset_parameters()

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

    def project(self) -> None:
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
        negative_owners: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        guide: Sequence[Tensor] | None = None,
    ) -> Tensor:
        self.project()
        options = {name: getattr(self.config, name) for name in OPTIONS}
        if noise is not None:
            options["noise"] = noise
        if self.log_temperature is not None:  # exp(log(low)) may round below low
            options["min_temperature"] = self.temperature_range[0] * (1 - 1e-5)
        return gs_infonce(
            anchors,
            positives,
            negatives,
            queue=queue,
            temperature=self.temperature,
            generator=generator,
            ids=ids,
            negative_ids=negative_ids,
            negative_owners=negative_owners,
            group=self.group,
            guide=guide,
            **options,
        )

    def extra_repr(self) -> str:
        parts = [f"temperature={self.initial_temperature}"]
        if self.log_temperature is not None:
            parts.append(f"learnable_temperature=True, temperature_range={self.temperature_range}")
        for name, field in OPTIONS.items():
            value = getattr(self.config, name)
            if value != field.default:
                parts.append(f"{name}={value!r}")
        return ", ".join(parts)


def _option(name: str) -> property:
    """Makes the attribute of an option: reading and assigning it go to the module's config, which is checked."""

    def assign(self: GSInfoNCELoss, value: Any) -> None:
        self.config = _checked_config({**vars(self.config), name: value})

    return property(lambda self: getattr(self.config, name), assign, doc=FIELDS[name].metadata["meaning"])


def _signature() -> inspect.Signature:
    """Makes the constructor's signature: its own arguments, and the options in the place of ``**options``."""
    own = inspect.signature(GSInfoNCELoss.__init__)
    parameters = [p for p in own.parameters.values() if p.kind != inspect.Parameter.VAR_KEYWORD]
    for name, field in OPTIONS.items():
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=field.default, annotation=field.type))
    return own.replace(parameters=parameters)


GSInfoNCELoss.__init__.__signature__ = _signature()  # type: ignore[attr-defined]
for _name in OPTIONS:
    setattr(GSInfoNCELoss, _name, _option(_name))


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


def _checked_temperature(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"temperature must be a float, not {type(value).__name__}")
    number = float(value)
    if not 0 < number < math.inf:
        raise ValueError(f"temperature must be a number > 0, not {value}")
    return number


def _checked_config(options: dict[str, Any]) -> LossConfig:
    if isinstance(options.get("noise"), Tensor):
        raise TypeError(
            "noise must be one of 'sampled', 'expected'; vectors belong to a batch: give them to forward"
        )
    return LossConfig(**options)
