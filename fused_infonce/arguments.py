"""Arguments checked and resolved into one call: every error a user can make is found here, before any work."""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from . import noise as noise_source
from .backends import Backend, choose_backend
from .distributed import STRATEGIES, Counts, Exchange, Facts, Strategy, agree, choose_strategy
from .options import NoiseKind, Options, Reduction, Similar

_SAME = (  # on every rank of a group
    "noise_weight", "hard_negative_weight", "symmetric", "reduction", "decoupled", "angular_margin", "hardness",
    "label_smoothing", "filter_margin", "filter_threshold",
)  # fmt: skip
_COLUMNS = ("positives", "negatives", "queue")
_SMOOTHING_IS_ALONE = (
    "label_smoothing cannot be combined with ids or a filter: it spreads the label over every column, "
    "masked ones too; leave one of them out"
)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True, eq=False)
class Call:
    """What a backend is given."""

    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # anchors, positives, negatives, queue
    noise_rows: Tensor | None  # (M, D), where the caller gave them
    temperature: float | Tensor
    kappa_bound: float | None  # an upper bound of 1/τ that the host knows without waiting for a device
    options: Options
    dtype: torch.dtype  # of the inputs, promoted
    product_dtype: torch.dtype  # of the matrix products
    backend: Literal["triton", "torch", "reference"]

    @property
    def takes_one_pass(self) -> bool:
        """Whether one upstream gradient serves all rows of one direction, and offsets keep them in range.

        torch's tiles hold whole rows, whose maxima are offsets at any temperature; elsewhere the offsets must be
        known before the pass.
        """
        options, bound = self.options, self.kappa_bound
        if options.exchange is not None and options.exchange.strategy == "ring":
            return False
        if options.reduction == "none" or options.symmetric:
            return False
        return self.backend == "torch" or (bound is not None and options.fits_known_offset(bound))


@dataclass(slots=True, eq=False)
class Traced:
    """What is settled when a call is traced by a compiler, and not when it runs."""

    seed: Tensor | None  # (1,) of sampled noise
    autocast_dtype: torch.dtype | None


def resolve(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    *,
    queue: Tensor | None,
    temperature: float | Tensor,
    min_temperature: float | None,
    num_noise: int,
    noise_weight: float,
    noise: str | Tensor,
    generator: torch.Generator | None,
    hard_negative_weight: float,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    symmetric: bool,
    reduction: Reduction,
    backend: Backend,
    workspace_bytes: int | None,
    decoupled: bool = False,
    angular_margin: float = 0.0,
    hardness: float = 0.0,
    label_smoothing: float = 0.0,
    filter_margin: float | None = None,
    filter_threshold: float | None = None,
    guide: Sequence[Tensor] | None = None,
    strategy: Strategy = "auto",
    traced: Traced | None = None,
    host_seed: bool = False,
) -> Call:
    """The arguments of gs_infonce as a Call of one process; ValueError or TypeError name what is wrong."""
    check_choice("strategy", strategy, STRATEGIES)
    tensors = _check_inputs(anchors, positives, negatives, queue)
    N = anchors.shape[0]
    H = 0 if negatives is None else negatives.shape[0]
    noise_rows = _check_given(noise, anchors) if isinstance(noise, Tensor) else None
    temperature = _check_temperature(temperature, min_temperature, anchors.device)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, not {type(generator).__name__}")
    values = (
        Counts(N, H, 0 if queue is None else queue.shape[0]),
        None if noise_rows is not None else noise,
        num_noise if noise_rows is None else noise_rows.shape[0],
        noise_weight,
        hard_negative_weight,
        symmetric,
        reduction,
        backend,
        workspace_bytes,
        decoupled,
        angular_margin,
        hardness,
        label_smoothing,
        filter_margin,
        filter_threshold,
    )
    try:
        options = _options(*values)
    except TypeError:  # also where there is no hash of a value
        options = _options.__wrapped__(*values)
    ids, negative_ids = _check_both_ids(ids, negative_ids, None if negatives is None else H, N, anchors.device)
    similar = options.similar
    if guide is not None:
        similar = replace(similar or Similar(0.0, None, None), guide=_check_guide(guide, tensors))
    if options.label_smoothing and (ids is not None or similar is not None):
        raise ValueError(_SMOOTHING_IS_ALONE)
    if traced is None and backend != "reference":
        _check_transforms([*tensors, temperature, noise, ids, negative_ids, *(guide or ())])

    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = dtype if x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    chosen = choose_backend(backend, anchors.device, dtype, anchors.shape[1])
    seed = None
    if options.noise == "sampled" and traced is not None:
        seed = traced.seed
    elif options.noise == "sampled" and chosen == "triton" and not host_seed:
        seed = noise_source.draw_device_seed(generator, anchors.device)
    elif options.noise == "sampled":
        seed = noise_source.draw_seed(generator)
    if seed is not None or ids is not None or similar is not None:
        options = replace(
            options,
            seed=seed,
            ids=ids,
            negative_ids=negative_ids,
            similar=similar,
        )
    if options.noise != "given":
        noise_rows = None
    product_dtype = dtype
    autocast = autocast_dtype(anchors.device.type) if traced is None else traced.autocast_dtype
    if dtype != torch.float64 and autocast is not None:
        product_dtype = autocast
    bound = None if chosen == "reference" else _kappa_bound(temperature, min_temperature)
    inputs = (anchors, positives, negatives, queue)
    return Call(inputs, noise_rows, temperature, bound, options, dtype, product_dtype, chosen)


@functools.lru_cache(maxsize=64, typed=True)  # they seldom change, and small batches feel the checks
def _options(
    counts: Counts,
    noise: Any,  # None: given vectors
    num_noise: Any,
    noise_weight: Any,
    hard_negative_weight: Any,
    symmetric: Any,
    reduction: Any,
    backend: Any,
    workspace_bytes: Any,
    decoupled: Any,
    angular_margin: Any,
    hardness: Any,
    label_smoothing: Any,
    filter_margin: Any,
    filter_threshold: Any,
) -> Options:
    """All that is neither a tensor nor drawn, checked."""
    noise_weight = finite("noise_weight", noise_weight)
    if noise_weight < 0:
        raise ValueError(f"noise_weight must be >= 0, not {noise_weight}")
    kind: NoiseKind = "given"
    if noise is not None:
        check_choice("noise", noise, ("sampled", "expected"), "or a tensor (M, D)")
        kind = noise
        num_noise = _integer("num_noise", num_noise)
        if num_noise < 0:
            raise ValueError(f"num_noise must be >= 0, not {num_noise}")
    if num_noise == 0 or noise_weight == 0:
        kind, num_noise = "none", 0
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    check_choice("backend", backend, ("auto", "triton", "torch", "reference"))
    if not isinstance(symmetric, bool):
        raise TypeError(f"symmetric must be True or False, not {symmetric!r}")
    if workspace_bytes is not None:
        workspace_bytes = _integer("workspace_bytes", workspace_bytes)
        if workspace_bytes <= 0:
            raise ValueError(
                f"workspace_bytes must be a positive number of bytes or None, not {workspace_bytes!r}"
            )
    N, H, _ = counts
    own = finite("hard_negative_weight", hard_negative_weight)
    if own and H % N:
        raise ValueError(
            f"negatives: {H} rows came, but with hard_negative_weight they must be a multiple of the {N} anchors, "
            "row hN + i belonging to anchor i"
        )
    if not isinstance(decoupled, bool):
        raise TypeError(f"decoupled must be True or False, not {decoupled!r}")
    angular_margin = finite("angular_margin", angular_margin)
    if not 0 <= angular_margin < math.pi:
        raise ValueError(f"angular_margin must be an angle in radians, 0 <= m < pi, not {angular_margin}")
    hardness = finite("hardness", hardness)
    if hardness < 0:
        raise ValueError(f"hardness must be >= 0, not {hardness}")
    label_smoothing = finite("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be a share, 0 <= e < 1, not {label_smoothing}")
    filter_margin = None if filter_margin is None else finite("filter_margin", filter_margin)
    filter_threshold = None if filter_threshold is None else finite("filter_threshold", filter_threshold)
    filters = filter_margin is not None or filter_threshold is not None
    if label_smoothing and filters:
        raise ValueError(_SMOOTHING_IS_ALONE)
    return Options(
        counts=counts,
        noise=kind,
        num_noise=num_noise,
        log_noise_weight=math.log(noise_weight) if kind != "none" else 0.0,
        own_log_weight=own if H else 0.0,
        ids=None,
        negative_ids=None,
        symmetric=symmetric,
        reduction=reduction,
        seed=None,
        workspace_bytes=workspace_bytes,
        decoupled=decoupled,
        angular_margin=angular_margin,
        hardness=hardness,
        label_smoothing=label_smoothing,
        similar=Similar(filter_margin, filter_threshold, None) if filters else None,
    )


def check_options(**options: Any) -> None:
    """The errors of all options that do not depend on a batch; ``options`` as :func:`resolve` takes them."""
    if isinstance(options["noise"], Tensor):
        raise TypeError(
            "noise must be one of 'sampled', 'expected'; vectors belong to a batch: give them to forward"
        )
    _options.__wrapped__(Counts(1, 0, 0), **options)


def resolve_among(
    group: ProcessGroup, strategy: Strategy, *inputs: Any, temperature: float | Tensor, **options: Any
) -> Call:
    """The same with a process group: what every rank has to agree on is agreed on, and the seed is rank 0's."""
    try:
        call = resolve(*inputs, temperature=temperature, strategy=strategy, host_seed=True, **options)
        if call.backend == "reference":
            raise ValueError("backend='reference' knows one process only; use 'auto' or 'torch' with a group")
        if options["guide"] is not None:
            raise ValueError("guide knows one process only; leave it out with a group, or filter without a guide")
    except Exception as error:  # whatever it is, the others must not wait for this rank
        with contextlib.suppress(ValueError):  # the others' message
            agree(group, Facts({}, Counts(0, 0, 0), error=f"{type(error).__name__}: {error}"))
        raise
    needs = _needs(call)
    seed = call.options.seed
    facts = Facts(
        {
            "the number of features": call.inputs[0].shape[1],
            "the dtype": call.dtype,
            "the dtype of products (autocast)": call.product_dtype,
            "the device type": call.inputs[0].device.type,
            "the backend": call.backend,
            "temperature": _known(temperature),
            "noise": call.options.noise,
            "num_noise": call.options.num_noise,
            **{name: options[name] for name in _SAME},
            "min_temperature": str(options["min_temperature"]),
            "whether ids are given": options["ids"] is not None,
            "whether negative_ids are given": (
                None if call.inputs[2] is None else options["negative_ids"] is not None
            ),
            "strategy": strategy,
            **{f"whether {name} need a gradient": need for name, need in needs.items()},
            "whether anything needs a gradient": any(needs.values()),
        },
        call.options.counts,
        None if seed is None else int(seed),
    )
    everyone = agree(group, facts)
    counts = [other.counts for other in everyone]
    columns = sum(other.columns for other in counts)
    chosen: Literal["gather", "ring"] = "gather"  # a ring of one would send to itself
    if len(everyone) > 1:
        chosen = choose_strategy(strategy, columns, call.inputs[0].shape[1], call.product_dtype.itemsize)
    wants = {name for other in everyone for name in _COLUMNS if other.same[f"whether {name} need a gradient"]}
    masks_negatives = any(other.same["whether negative_ids are given"] for other in everyone)
    call.options = replace(
        call.options,
        exchange=Exchange(group, counts, frozenset(wants), chosen, masks_negatives),
        own_log_weight=options["hard_negative_weight"] if any(other.negatives for other in counts) else 0.0,
        seed=None if seed is None else torch.tensor([everyone[0].seed]).to(_seed_device(call), non_blocking=True),
    )
    return call


def _seed_device(call: Call) -> torch.device:
    """Kernels read a seed on their device, torch's generators one on the host."""
    return call.inputs[0].device if call.backend == "triton" else torch.device("cpu")


def _needs(call: Call) -> dict[str, bool | None]:
    """Which gradients this rank asks for; None: it has not got that input."""
    on, tau = torch.is_grad_enabled(), call.temperature
    tensors = zip(("anchors", *_COLUMNS), call.inputs, strict=True)
    asked = {name: None if x is None else on and x.requires_grad for name, x in tensors}
    return {**asked, "temperature": on and isinstance(tau, Tensor) and tau.requires_grad}


def _known(temperature: float | Tensor) -> str:
    """The value, where the host knows it without waiting."""
    if isinstance(temperature, Tensor) and temperature.device.type != "cpu":
        return "a tensor on a device"
    return str(float(temperature.detach() if isinstance(temperature, Tensor) else temperature))


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of products where autocast is on."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _kappa_bound(temperature: float | Tensor, min_temperature: float | None) -> float | None:
    if isinstance(temperature, Tensor):
        if temperature.device.type != "cpu":
            return None if min_temperature is None else 1 / float(min_temperature)
        temperature = temperature.item()
    return 1 / temperature if temperature > 0 else None


def _check_inputs(*inputs: Tensor | None) -> list[Tensor]:
    names = ("anchors", "positives", "negatives", "queue")
    present = [(name, x) for name, x in zip(names, inputs, strict=True) if x is not None or name in names[:2]]
    for name, x in present:
        check_matrix(name, x)
    anchors, positives = present[0][1], present[1][1]
    assert anchors is not None
    assert positives is not None
    if anchors.shape[0] != positives.shape[0]:
        raise ValueError(
            f"positives must have one row for each of the {anchors.shape[0]} anchors, not {positives.shape[0]}; "
            "further columns go to negatives or queue"
        )
    for name, x in present[1:]:
        assert x is not None
        if x.shape[1] != anchors.shape[1]:
            raise ValueError(f"{name} must have the anchors' {anchors.shape[1]} features, not {x.shape[1]}")
        _check_device(name, x, anchors.device)
    if anchors.device.type == "meta":
        raise ValueError("anchors is on meta, where tensors have no values; move it to another device")
    return [x for _, x in present if x is not None]


def check_matrix(name: str, x: Any) -> None:
    """TypeError or ValueError where it is not a matrix of floating-point numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {x.dtype}; convert it first")
    _check_dense(name, x)
    if x.ndim != 2 or 0 in x.shape:
        remedy = ""
        if x.ndim == 3 and name == "negatives":
            remedy = "; for K of each anchor, (N, K, features), give negatives.transpose(0, 1).flatten(0, 1)"
        raise ValueError(
            f"{name} must be a matrix (rows, features) with at least one of each, not {_shape(x)}{remedy}"
        )


def _check_given(noise: Tensor, anchors: Tensor) -> Tensor:
    _check_dense("noise", noise)
    if noise.ndim != 2 or noise.shape[1] != anchors.shape[1]:
        raise ValueError(f"noise must be a matrix (M, {anchors.shape[1]}) like the anchors, not {_shape(noise)}")
    if not noise.is_floating_point():
        raise TypeError(f"noise must hold floating-point vectors, not {noise.dtype}")
    _check_device("noise", noise, anchors.device)
    return noise.detach()


def _check_temperature(temperature: Any, min_temperature: Any, device: torch.device) -> float | Tensor:
    """The temperature, a Python float if it is a number."""
    if min_temperature is not None and not finite("min_temperature", min_temperature) > 0:
        raise ValueError(f"min_temperature must be > 0 or None, not {min_temperature}")
    if isinstance(temperature, Tensor):
        _check_dense("temperature", temperature)
        if temperature.numel() != 1 or temperature.ndim > 1 or not temperature.is_floating_point():
            raise ValueError(
                "temperature must be a float or a floating-point tensor of one element, "
                f"not {temperature.dtype} {_shape(temperature)}"
            )
        if temperature.device.type != "cpu":
            _check_device("temperature", temperature, device)
        return temperature
    number = finite("temperature", temperature)
    if not number > 0:
        raise ValueError(f"temperature must be > 0, not {temperature}")
    return number


def _check_both_ids(
    ids: Any, negative_ids: Any, H: int | None, N: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Both as int64, contiguous; H: None without negatives."""
    _check_ids("ids", ids, N, device)
    _check_ids("negative_ids", negative_ids, H or 0, device)
    if ids is None or negative_ids is None or H is None:
        if negative_ids is not None:
            raise ValueError("negative_ids needs both ids and negatives: it is compared with the anchors' ids")
        return None if ids is None else ids.long().contiguous(), None
    if torch.uint64 in (ids.dtype, negative_ids.dtype) and ids.dtype.is_signed != negative_ids.dtype.is_signed:
        raise TypeError(
            f"ids is {ids.dtype} and negative_ids is {negative_ids.dtype}, which no integer dtype holds both of; "
            "convert them to int64"
        )
    return ids.long().contiguous(), negative_ids.long().contiguous()


def _check_ids(name: str, ids: Any, count: int, device: torch.device) -> None:
    if ids is None:
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be an integer tensor ({count},), not {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor ({count},), not {ids.dtype}")
    _check_dense(name, ids)
    if ids.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), one id a row, not {_shape(ids)}")
    _check_device(name, ids, device)


def _check_transforms(given: Iterable[Any]) -> None:
    """NotImplementedError where a derivative or a batch dimension would be lost."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    remedy = (
        "only reverse mode is supported, by loss.backward() or torch.autograd.grad, without a second derivative; "
        "backend='reference' (float64, the whole matrix) supports the others"
    )
    if torch._C._are_functorch_transforms_active():
        differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if differentiated or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            raise NotImplementedError(
                "gs_infonce does not support torch.func's transforms (grad, vjp, jvp, jacrev, jacfwd, hessian, "
                f"vmap): {remedy}"
            )
    elif any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        raise NotImplementedError(f"gs_infonce does not support forward-mode differentiation: {remedy}")


def _check_guide(guide: Any, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    wanted = f"guide must be one matrix for each of the {len(tensors)} inputs, in their order"
    if isinstance(guide, Tensor) or not isinstance(guide, Sequence):
        raise TypeError(f"{wanted}, not {type(guide).__name__}")
    if len(guide) != len(tensors):
        raise ValueError(f"{wanted}, not {len(guide)}")
    for i, (x, rows) in enumerate(zip(guide, tensors, strict=True)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"guide[{i}] must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}"
            )
        _check_dense(f"guide[{i}]", x)
        if x.ndim != 2 or x.shape[0] != rows.shape[0] or x.shape[1:] != guide[0].shape[1:]:
            raise ValueError(
                f"guide[{i}] must be a matrix of {rows.shape[0]} rows and guide[0]'s features, not {_shape(x)}"
            )
        _check_device(f"guide[{i}]", x, tensors[0].device)
    rows, *columns = (x.detach() for x in guide)
    return rows, torch.cat(columns)


def check_choice(name: str, value: Any, choices: tuple[str, ...], others: str = "") -> None:
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {expected}{' ' + others if others else ''}, not {value!r}")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, but the anchors are on {device}; move it there")


def _check_dense(name: str, x: Tensor) -> None:
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not a nested one; torch.cat its parts, or pad them")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not one of layout {x.layout}; call its to_dense()")


def finite(name: str, value: Any) -> float:
    """A number of Python's or NumPy's as a float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    return float(value)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    return int(value)


def _shape(x: Tensor) -> str:
    return f"a tensor of shape {tuple(x.shape)}"
