"""The loss under ``torch.compile``: a custom operator that the compiler sees as one piece, so no graph breaks.

One operator gives the loss and what its backward needs. One sweep: the gradients themselves, in fp32, which the
backward scales. Two sweeps: the losses of rows and columns, for a second operator to make gradients of. In eager
an ``autograd.Function`` does the same with a quarter of the overhead.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .arguments import Call, Traced, autocast_dtype, resolve
from .backends import Backend
from .function import as_a_kernel, gradients_of, losses_of, one_sweep_of, reduced
from .options import Reduction
from .smoothing import smoothing_term
from .sweep import Needs

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def compiled_loss(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    *,
    queue: Tensor | None,
    temperature: float | Tensor,
    min_temperature: float | None,
    num_noise: int,
    noise_weight: float,
    noise: Literal["sampled", "expected"] | Tensor,
    hard_negative_weight: float,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    symmetric: bool,
    reduction: Reduction,
    backend: Backend,
    workspace_bytes: int | None,
    decoupled: bool,
    angular_margin: float,
    hardness: float,
    label_smoothing: float,
    filter_margin: float | None,
    filter_threshold: float | None,
) -> Tensor:
    """What a compiler traces: tensors and plain values go in, nothing is decided that depends on a value."""
    given = isinstance(noise, Tensor)
    seed = None
    if not given and noise == "sampled" and num_noise:
        seed = torch.randint(0, 2**62, (1,), device=anchors.device)
    tau = temperature if isinstance(temperature, Tensor) else None
    inputs = (anchors, positives, negatives, queue, tau)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    results = torch.ops.fused_infonce.gs_infonce(
        *inputs,
        noise if given else None,
        ids,
        negative_ids,
        seed,
        0.0 if tau is not None else temperature,
        min_temperature,
        num_noise,
        noise_weight,
        "given" if given else noise,
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
        autocast_dtype(anchors.device.type),
        needs,
    )
    loss: Tensor = results[0]
    if not label_smoothing:
        return loss
    return loss + smoothing_term(
        inputs[:4],
        temperature,
        label_smoothing=label_smoothing,
        angular_margin=angular_margin,
        symmetric=symmetric,
        reduction=reduction,
        dtype=loss.dtype,
    )


def _call(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    queue: Tensor | None,
    tau: Tensor | None,
    noise_rows: Tensor | None,
    ids: Tensor | None,
    negative_ids: Tensor | None,
    seed: Tensor | None,
    temperature: float,
    min_temperature: float | None,
    num_noise: int,
    noise_weight: float,
    noise: str,
    hard_negative_weight: float,
    symmetric: bool,
    reduction: str,
    backend: str,
    workspace_bytes: int | None,
    decoupled: bool,
    angular_margin: float,
    hardness: float,
    label_smoothing: float,
    filter_margin: float | None,
    filter_threshold: float | None,
    product_dtype: torch.dtype | None,
    needs: list[bool],
) -> tuple[Call, Needs]:
    call = resolve(
        anchors,
        positives,
        negatives,
        queue=queue,
        temperature=temperature if tau is None else tau,
        min_temperature=min_temperature,
        num_noise=num_noise,
        noise_weight=noise_weight,
        noise=noise if noise_rows is None else noise_rows,
        generator=None,
        hard_negative_weight=hard_negative_weight,
        ids=ids,
        negative_ids=negative_ids,
        symmetric=symmetric,
        reduction=reduction,  # type: ignore[arg-type]
        backend=backend,  # type: ignore[arg-type]
        workspace_bytes=workspace_bytes,
        decoupled=decoupled,
        angular_margin=angular_margin,
        hardness=hardness,
        label_smoothing=label_smoothing,
        filter_margin=filter_margin,
        filter_threshold=filter_threshold,
        guide=None,
        traced=Traced(seed, product_dtype),
    )
    return call, Needs(*needs)


_SCHEMA = (
    "Tensor anchors, Tensor positives, Tensor? negatives, Tensor? queue, Tensor? tau, Tensor? noise_rows, "
    "Tensor? ids, Tensor? negative_ids, Tensor? seed, float temperature, float? min_temperature, int num_noise, "
    "float noise_weight, str noise, float hard_negative_weight, bool symmetric, str reduction, str backend, "
    "int? workspace_bytes, bool decoupled, float angular_margin, float hardness, float label_smoothing, "
    "float? filter_margin, float? filter_threshold, ScalarType? product_dtype, bool[] needs"
)
_TENSORS = 6  # a result and five more


def _padded(tensors: list[Tensor | None], like: Tensor) -> Results:
    """As many tensors as the operators return; what is missing is empty. None may share its memory."""
    present = [like.new_empty(0) if x is None else x if _is_whole(x) else x.clone() for x in tensors]
    padded = [*present, *(like.new_empty(0) for _ in range(_TENSORS - len(present)))]
    return tuple(padded)  # type: ignore[return-value]


def _is_whole(x: Tensor) -> bool:
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _forward(*args: Any) -> Results:
    call, needs = _call(*args)
    with as_a_kernel(call.inputs[0].device):
        if call.takes_one_sweep and any(args[-1]):
            losses, grads = one_sweep_of(call, needs)
            return _padded([reduced(losses, None, call.options), *grads], call.inputs[0])
        row_loss, column_loss = losses_of(call)
        loss = reduced(row_loss, column_loss, call.options)
        return _padded([loss, row_loss, column_loss], call.inputs[0])


def _forward_fake(*args: Any) -> Results:
    call, _ = _call(*args)
    N, dtype = call.options.counts.positives, torch.promote_types(call.dtype, torch.float32)
    like = call.inputs[0].new_empty((), dtype=dtype)
    loss = like.new_empty(N) if call.options.reduction == "none" else like.new_empty(())
    if call.takes_one_sweep and any(args[-1]):
        wanted = zip((*call.inputs, args[4]), args[-1], strict=True)
        grads = [like.new_empty(x.shape) if need and x is not None else None for x, need in wanted]
        return _padded([loss, *grads], call.inputs[0])
    columns = like.new_empty(N, 1) if call.options.symmetric else None
    return _padded([loss, like.new_empty(N, 1), columns], call.inputs[0])


def _backward_op(upstream: Tensor, row_loss: Tensor, column_loss: Tensor, *args: Any) -> Results:
    call, needs = _call(*args)
    with as_a_kernel(upstream.device):
        column = column_loss if call.options.symmetric else None
        return _padded(gradients_of(call, needs, row_loss, column, upstream), upstream)


def _backward_fake(upstream: Tensor, row_loss: Tensor, column_loss: Tensor, *args: Any) -> Results:
    wanted = zip(args[:5], args[-1], strict=True)
    return _padded([torch.empty_like(x) if need and x is not None else None for x, need in wanted], upstream)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.plain = inputs[9:]
    ctx.save_for_backward(*inputs[:9], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    inputs, kept = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    needs: list[bool] = ctx.plain[-1]
    if _call(*inputs, *ctx.plain)[0].takes_one_sweep and any(needs):
        grads = [
            (g * upstream).to(x.dtype).reshape(x.shape) if need else None
            for g, x, need in zip(kept, inputs[:5], needs, strict=True)
        ]
    else:
        found = torch.ops.fused_infonce.gs_infonce_backward(
            upstream.contiguous(), kept[0], kept[1], *inputs, *ctx.plain
        )
        grads = [g if need else None for g, need in zip(found[:5], needs, strict=True)]
    return *grads, *[None] * (4 + len(ctx.plain))


_RETURNS = ", ".join(["Tensor"] * _TENSORS)
_op = torch.library.custom_op(
    "fused_infonce::gs_infonce", _forward, mutates_args=(), schema=f"({_SCHEMA}) -> ({_RETURNS})"
)
_op.register_fake(_forward_fake)
_op.register_autograd(_backward, setup_context=_setup_context)
_backward_of = torch.library.custom_op(
    "fused_infonce::gs_infonce_backward",
    _backward_op,
    mutates_args=(),
    schema=f"(Tensor upstream, Tensor row_loss, Tensor column_loss, {_SCHEMA}) -> ({_RETURNS})",
)
_backward_of.register_fake(_backward_fake)
