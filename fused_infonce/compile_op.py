"""The loss under ``torch.compile``: a custom operator that the compiler sees as one piece, so no graph breaks.

One operator gives the loss and what its backward needs: for a mean or sum of one direction the gradients
themselves, in fp32, which the backward scales; else the losses of rows and columns, for a second operator to make
gradients of. Which it is depends on no value and no size, so that one graph serves all of them: the way over the
matrix is chosen where the operator runs. In eager an ``autograd.Function`` does the same with a quarter of the
overhead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor

from .autograd import (
    NO_SECOND_DERIVATIVE,
    gradients_of,
    loss_and_gradients_of,
    losses_of,
    reduced,
)
from .config import FIELDS, TYPES
from .kernel_context import as_a_kernel
from .options import Similar
from .own_negatives import OwnNegatives
from .resolve import (
    WITHOUT_POSITIVES,
    Call,
    Traced,
    autocast_dtype,
    own_log_sums,
    own_of,
    resolve,
    resolve_without_positives,
)
from .smoothing import smoothing_term
from .tiled.operands import NeedsGrad

Ids = Tensor | tuple[Tensor, Tensor] | None
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _schema_type(annotation: Any) -> str:
    """Returns an option's type in the operator's schema, where a float that comes in a tensor instead is None."""
    kinds = get_args(annotation) if get_origin(annotation) is not Literal else (str,)
    optional = "?" if type(None) in kinds else ""
    (kind,) = [x for x in kinds or (annotation,) if x is not type(None)]
    return {float: "float?", int: "SymInt" + optional, bool: "bool", str: "str"}[kind]


# The operator's arguments, in this order: tensors, numbers, and the options that are not numbers.
_TENSORS = (
    "anchors", "positives", "negatives", "queue", "tau", "own_log_sums", "noise_rows", "ids", "negative_ids",
    "seed", "limits", "log_weights", "guide_rows", "guide_columns",
)  # fmt: skip
_DIFFERENTIABLE = 6  # the first of them
_SCHEMA_TYPES = {name: _schema_type(annotation) for name, annotation in TYPES.items()}
_NUMBERS = ("temperature", *(name for name, kind in _SCHEMA_TYPES.items() if kind == "float?"))
_PLAIN = {name: kind for name, kind in _SCHEMA_TYPES.items() if kind != "float?"}


def compiled_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    *,
    queue: Tensor | None,
    temperature: float | Tensor,
    noise: str | Tensor,
    ids: Ids,
    negative_ids: Tensor | None,
    negative_owners: Tensor | None,
    **options: Any,  # the other arguments of gs_infonce
) -> Tensor:
    """The loss as a compiler traces it: nothing here is decided that depends on a value."""
    noise_rows = noise if isinstance(noise, Tensor) else None
    seed = None
    if not isinstance(noise, Tensor) and noise == "sampled" and options["num_noise"]:
        seed = torch.randint(0, 2**62, (1,), device=anchors.device)
    tau = temperature if isinstance(temperature, Tensor) else None
    options["temperature"] = None if tau is not None else temperature
    options["noise"] = noise if noise_rows is None else "sampled"
    ids, log_sums = _one_tensor(ids), None
    negatives, own = own_of(anchors, negatives, negative_owners)
    if own is not None:
        log_sums = _own_log_sums(own, anchors, positives, temperature, ids, negative_ids, options)
        negative_ids = None
        options["num_own"] = own.most
    inputs = (anchors, positives, negatives, queue, tau, log_sums)
    loss = _traced((*inputs, noise_rows, ids, negative_ids, seed, None, None, None, None), options)
    if not options["label_smoothing"]:
        return loss
    return loss + smoothing_term(
        inputs[:4],
        temperature,
        label_smoothing=options["label_smoothing"],
        angular_margin=options["angular_margin"],
        symmetric=options["symmetric"],
        reduction=options["reduction"],
        dtype=loss.dtype,
    )


def _own_log_sums(
    own: OwnNegatives,
    anchors: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    if negative_ids is not None and ids is None:
        raise ValueError("negative_ids needs both ids and negatives: it is compared with the anchors' ids")
    own.ids = own.shaped(own.flat_ids(negative_ids))
    margin, threshold = options["filter_margin"], options["filter_threshold"]
    similar = None if margin is None and threshold is None else Similar(margin, threshold, None)
    plain = {name: options[name] for name in ("hardness", "hardness_mode", "hard_negative_weight")}
    return own_log_sums(own, anchors, positives, temperature, ids, similar, **plain)


def compiled_logsumexp(
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float | Tensor,
    row_ids: Ids,
    column_ids: Ids,
    log_weights: Tensor | None,
    filter_threshold: float | Tensor | None,
    guide: Sequence[Tensor] | None,
    **options: Any,  # the other arguments of cosine_logsumexp
) -> Tensor:
    """The log-sum-exp as a compiler traces it: the loss's operator, without positives."""
    tau = temperature if isinstance(temperature, Tensor) else None
    limits = filter_threshold if isinstance(filter_threshold, Tensor) else None
    given = {
        "temperature": None if tau is not None else temperature,
        "filter_threshold": None if limits is not None else filter_threshold,
        **WITHOUT_POSITIVES,
    }
    defaults = {name: field.default for name, field in FIELDS.items()}
    ids = _one_tensor(row_ids), _one_tensor(column_ids)
    inputs = (rows, None, columns, None, tau, None)
    tensors = (*inputs, None, *ids, None, limits, log_weights, *(guide or (None, None)))
    return _traced(tensors, {**defaults, **options, **given})


def _one_tensor(ids: Ids) -> Tensor | None:
    """A pair of ids as (N, 2)."""
    return torch.stack([x.long() for x in ids], 1) if isinstance(ids, (tuple, list)) else ids


def _traced(tensors: tuple[Tensor | None, ...], options: dict[str, Any]) -> Tensor:
    anchors = tensors[0]
    assert anchors is not None
    loss: Tensor = _operator(
        tensors,
        tuple([options[name] for name in _NUMBERS]),
        tuple([options[name] for name in _PLAIN]),
        options.get("exclude_diagonal", False),
        options.get("num_own", 0),
        autocast_dtype(anchors.device.type),
        [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors[:_DIFFERENTIABLE]],
    )
    return loss


_SCHEMA = ", ".join(
    [
        "Tensor anchors",
        *(f"Tensor? {name}" for name in (*_TENSORS[1:], "varying")),
        "str names_of_varying",
        *(f"float? {name}" for name in _NUMBERS),
        *(f"{kind} {name}" for name, kind in _PLAIN.items()),
        "bool exclude_diagonal, SymInt num_own, ScalarType? product_dtype, bool[] needs",
    ]
)
_RESULTS = 1 + _DIFFERENTIABLE  # the loss and as many more
_LAST = 4  # arguments after the options


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]
def _operator(
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float | None, ...],
    plain: tuple[Any, ...],
    exclude_diagonal: bool,
    num_own: int,
    product_dtype: torch.dtype | None,
    needs: list[bool],
) -> Tensor:
    """The operator's loss.

    A number that was seen to change from call to call is a symbol here, and would be a constant of the graph as an
    argument of the operator: it goes in as an element of a tensor on the CPU.
    """
    changing: dict[str, Any] = {
        name: x for name, x in zip(_NUMBERS, numbers, strict=True) if isinstance(x, torch.SymFloat)
    }
    varying = None
    if changing:
        one = torch.ones((), dtype=torch.float64, device="cpu")
        varying = torch.stack([one * x for x in changing.values()])
    fixed = [None if isinstance(x, torch.SymFloat) else x for x in numbers]
    results = torch.ops.fused_infonce.gs_infonce(
        *tensors, varying, ",".join(changing), *fixed, *plain, exclude_diagonal, num_own, product_dtype, needs
    )
    loss: Tensor = results[0]
    return loss


def _call(*args: Any) -> tuple[Call, NeedsGrad]:
    """The operator's arguments as a call."""
    tensors, (varying, changing) = args[: len(_TENSORS)], args[len(_TENSORS) : len(_TENSORS) + 2]
    given = dict(zip(_TENSORS, tensors, strict=True))
    values = args[len(_TENSORS) + 2 :]
    options: dict[str, Any] = dict(zip((*_NUMBERS, *_PLAIN), values[:-_LAST], strict=True))
    if varying is not None:
        options |= zip(changing.split(","), varying.tolist(), strict=True)
    if given["tau"] is not None:
        options["temperature"] = given["tau"]
    if given["noise_rows"] is not None:
        options["noise"] = given["noise_rows"]
    if given["positives"] is None:
        return _call_without_positives(given, options, *values[-_LAST:])
    call = resolve(
        *tensors[:3],
        queue=given["queue"],
        ids=given["ids"],
        negative_ids=given["negative_ids"],
        negative_owners=None,
        generator=None,
        guide=None,
        traced=Traced(given["seed"], values[-2], given["own_log_sums"], values[-3]),
        **options,
    )
    return call, NeedsGrad(*values[-1])


def _call_without_positives(
    given: dict[str, Any],
    options: dict[str, Any],
    exclude_diagonal: bool,
    num_own: int,
    autocast: torch.dtype | None,
    needs: list[bool],
) -> tuple[Call, NeedsGrad]:
    if given["limits"] is not None:
        options["filter_threshold"] = given["limits"]
    guide = None if given["guide_rows"] is None else (given["guide_rows"], given["guide_columns"])
    call = resolve_without_positives(
        given["anchors"],
        given["negatives"],
        row_ids=given["ids"],
        column_ids=given["negative_ids"],
        exclude_diagonal=exclude_diagonal,
        log_weights=given["log_weights"],
        guide=guide,
        traced=Traced(None, autocast),
        **options,
    )
    return call, NeedsGrad(*needs)


def _plain_options(args: tuple[Any, ...]) -> dict[str, Any]:
    """The options among the operator's arguments that are not numbers."""
    return dict(zip(_PLAIN, args[-_LAST - len(_PLAIN) : -_LAST], strict=True))


def _keeps_gradients(args: tuple[Any, ...]) -> bool:
    """Whether the forward forms gradients: where one upstream number scales all, and symmetric's are not kept."""
    plain = _plain_options(args)
    return plain["reduction"] != "none" and not plain["symmetric"] and any(args[-1])


def _padded(tensors: list[Tensor | None], like: Tensor) -> Results:
    """As many tensors as the operators return; what is missing is empty. None may share its memory."""
    present = [like.new_empty(0) if x is None else x if _is_whole(x) else _copy(x) for x in tensors]
    padded = [*present, *(like.new_empty(0) for _ in range(_RESULTS - len(present)))]
    return tuple(padded)  # type: ignore[return-value]


def _is_whole(x: Tensor) -> bool:
    return x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _forward(*args: Any) -> Results:
    call, needs = _call(*args)
    with as_a_kernel(call.inputs[0].device):
        if _keeps_gradients(args):
            loss, grads = loss_and_gradients_of(call, needs)
            return _padded([loss, *grads], call.inputs[0])
        row_loss, column_loss = losses_of(call)
        loss = reduced(row_loss, column_loss, call.options)
        return _padded([loss, row_loss, column_loss], call.inputs[0])


def _forward_fake(*args: Any) -> Results:
    inputs, needs = args[:_DIFFERENTIABLE], args[-1]
    dtype = torch.float32
    for x in (*inputs[:4], inputs[5]):
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    anchors = inputs[0]
    N, like = anchors.shape[0], anchors.new_empty((), dtype=dtype)
    if _keeps_gradients(args):
        grads = [like.new_empty(x.shape) if need else None for x, need in zip(inputs, needs, strict=True)]
        return _padded([like, *grads], anchors)
    plain = _plain_options(args)
    loss = like.new_empty(N) if plain["reduction"] == "none" else like
    return _padded([loss, like.new_empty(N, 1), like.new_empty(N, 1) if plain["symmetric"] else None], anchors)


def _backward_op(upstream: Tensor, kept: list[Tensor], *args: Any) -> Results:
    with as_a_kernel(upstream.device):
        if _keeps_gradients(args):
            grads = [
                (g * upstream).to(x) if need else None
                for g, x, need in zip(kept, args[:_DIFFERENTIABLE], args[-1], strict=True)
            ]
            return _padded(grads, upstream)
        call, needs = _call(*args)
        row_loss, column_loss = kept[0], kept[1] if call.options.symmetric else None
        return _padded(gradients_of(call, needs, row_loss, column_loss, upstream), upstream)


def _backward_fake(upstream: Tensor, kept: list[Tensor], *args: Any) -> Results:
    wanted = zip(args[:_DIFFERENTIABLE], args[-1], strict=True)
    return _padded([x.new_empty(x.shape) if need else None for x, need in wanted], upstream)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    tensors = inputs[: len(_TENSORS) + 1]
    ctx.plain = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    tensors, kept = saved[: len(_TENSORS) + 1], list(saved[len(_TENSORS) + 1 :])
    needs: list[bool] = ctx.plain[-1]
    found = torch.ops.fused_infonce.gs_infonce_backward(upstream.contiguous(), kept, *tensors, *ctx.plain)
    grads = [g if need else None for g, need in zip(found[:_DIFFERENTIABLE], needs, strict=True)]
    return *grads, *[None] * (len(tensors) - _DIFFERENTIABLE + len(ctx.plain))


def _no_second_derivative(ctx: Any, *_: Tensor) -> Any:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


_RETURNS = ", ".join(["Tensor"] * _RESULTS)
_op = torch.library.custom_op(
    "fused_infonce::gs_infonce", _forward, mutates_args=(), schema=f"({_SCHEMA}) -> ({_RETURNS})"
)
_op.register_fake(_forward_fake)
_op.register_autograd(_backward, setup_context=_setup_context)
_backward_of = torch.library.custom_op(
    "fused_infonce::gs_infonce_backward",
    _backward_op,
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor[] kept, {_SCHEMA}) -> ({_RETURNS})",
)
_backward_of.register_fake(_backward_fake)
_backward_of.register_autograd(_no_second_derivative)  # which has the inputs as arguments, as it must have
