"""The autograd function: which way over the matrix is taken, what is kept for the backward, what comes back."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from .arguments import Call
from .operands import Accumulator, Precision, Scale
from .options import Options
from .sweep import Gradients, Needs, Sweep, Tape, finish
from .torch_ops import TorchOps

# Multiply-adds up to which products run in fp32, also for bf16 and fp16 inputs and under autocast: few errors
# cancel in so few terms, and the time is that of the calls around them.
SMALL_PRODUCT = 1 << 25
NOTHING_ASKED = Needs(False, False, False, False, False)


def fused_loss(call: Call) -> Tensor:
    """Losses of the rows (N,), or their sum or mean (0-dim), in nats; differentiable once."""
    wanted = (*call.inputs, call.temperature)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in wanted):
        return _FusedInfoNCE.apply(*wanted, call)  # type: ignore[no-any-return, no-untyped-call]
    with as_a_kernel(call.inputs[0].device):
        return loss_of(call)


def loss_of(call: Call) -> Tensor:
    """The loss without gradients: one product."""
    sweep = sweep_of(call)
    if call.takes_one_sweep:  # no maxima to look for
        return reduced(_one_sweep(sweep, NOTHING_ASKED, call)[0], None, call.options)
    return reduced(*losses_of(sweep), call.options)


def _one_sweep(sweep: Sweep, needs: Needs, call: Call) -> tuple[Tensor, Tape, Tensor | None, Accumulator | None]:
    """Losses in nats, (N, 1), and what ``finish`` makes gradients of."""
    losses, tape, acc_rows, acc_columns = sweep.one_sweep(needs, call.kappa_bound or math.nan)
    nothing = _nan_of_columns(sweep)
    return losses if nothing is None else losses + nothing, tape, acc_rows, acc_columns


def sweep_of(call: Call, ops: TorchOps | None = None) -> Sweep:
    """The call's operands, normalised, on its backend."""
    ops = ops or _ops(call)
    return Sweep(ops, call.options, _kappa(call.temperature, ops.precision.sums), call.inputs, call.noise_rows)


def _ops(call: Call) -> TorchOps:
    anchors, options, dtype = call.inputs[0], call.options, call.product_dtype
    rows, columns = options.total("positives"), options.total("columns")
    if rows * columns * anchors.shape[1] <= SMALL_PRODUCT:
        dtype = dtype if dtype == torch.float64 else torch.float32
    precision, workspace_bytes = Precision.of(dtype, anchors.device), options.workspace_bytes
    if call.backend == "triton":
        from .triton_ops import TritonOps  # here, for Triton need not be installed

        return cast(TorchOps, TritonOps(precision, anchors.device, workspace_bytes, anchors.shape[0], columns))
    return TorchOps(precision, anchors.device, workspace_bytes)


class _FusedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, positives, negatives, queue, temperature, call: Call) -> Tensor:  # type: ignore[no-untyped-def]
        inputs = (anchors, positives, negatives, queue)
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        ctx.ops, ctx.options = _ops(call), _with_tensors(call.options)
        ctx.temperature, tau = (None, temperature) if isinstance(temperature, Tensor) else (temperature, None)
        with as_a_kernel(anchors.device):
            sweep = sweep_of(call, ctx.ops)
            # All that the backward reads goes through save_for_backward: it is freed with the graph, and autograd
            # raises an error where a tensor of the caller's was changed in place in between.
            if call.takes_one_sweep:
                row_loss, ctx.tape, acc_rows, acc = _one_sweep(sweep, ctx.needs, call)
                ctx.tape.units.detach()
                acc_columns = (None, None) if acc is None else (acc.grad, acc.sums)
                ctx.save_for_backward(*inputs, tau, acc_rows, *acc_columns)
                column_loss = None
            else:
                row_loss, column_loss = losses_of(sweep)
                ctx.tape = None
                given = call.noise_rows, *_tensors_of(call.options)
                ctx.save_for_backward(*inputs, tau, row_loss, column_loss, *given)
            ctx.ops.release()
            return reduced(row_loss, column_loss, call.options)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[no-untyped-def]
        functorch = torch._C._functorch
        if functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream):
            raise NotImplementedError(
                "gs_infonce has no batched backward (is_grads_batched=True, vectorize=True, torch.func.vmap): "
                "take one gradient at a time"
            )
        saved = ctx.saved_tensors
        inputs, tau, kept = saved[:4], saved[4], saved[5:]
        ops, options = ctx.ops, ctx.options
        temperature = ctx.temperature if tau is None else tau
        with as_a_kernel(upstream.device):
            kappa = _kappa(temperature, ops.precision.sums)
            if ctx.tape is not None:
                acc_rows, grad, sums = kept
                acc_columns = None if grad is None else Accumulator(grad, sums)
                units = ctx.tape.units.attach([x for x in inputs if x is not None])
                scale = _scale(upstream, options)
                out = finish(ops, options, ctx.tape, acc_rows, acc_columns, ctx.needs, kappa, scale)
                units.detach()
            else:
                row_loss, column_loss, noise_rows, *given = kept
                sweep = Sweep(ops, _with_tensors(options, *given), kappa, inputs, noise_rows)
                out = _two_sweep_gradients(sweep, ctx.needs, row_loss, column_loss, upstream)
            ops.release()
            grads = [*out.inputs, _of_temperature(out.kappa, kappa, temperature)]
        if torch.is_grad_enabled():
            present = [g for g in grads if g is not None]
            sources = [x for x in (upstream, *saved[:5]) if x is not None]
            marked = iter(_FirstDerivativeOnly.apply(len(sources), *sources, *present))  # type: ignore[no-untyped-call]
            grads = [None if g is None else next(marked) for g in grads]
        return *grads, None


def _tensors_of(options: Options) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The caller's tensors among the options: ids, negative_ids and both sides of a guide."""
    guide = None if options.similar is None else options.similar.guide
    return options.ids, options.negative_ids, *(guide or (None, None))


def _with_tensors(
    options: Options,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    guide_rows: Tensor | None = None,
    guide_columns: Tensor | None = None,
) -> Options:
    """The options with these in the place of their own; themselves where neither has any."""
    given = (ids, negative_ids, guide_rows, guide_columns)
    if all(x is None for x in (*given, *_tensors_of(options))):
        return options
    similar = options.similar
    if similar is not None:
        guide = None if guide_rows is None or guide_columns is None else (guide_rows, guide_columns)
        similar = replace(similar, guide=guide)
    return replace(options, ids=ids, negative_ids=negative_ids, similar=similar)


def losses_of(sweep: Sweep) -> tuple[Tensor, Tensor | None]:
    """The losses of two sweeps' first, (N, 1) each."""
    row_loss, column_loss = sweep.losses()
    nothing = _nan_of_columns(sweep)
    if nothing is not None:
        row_loss, column_loss = row_loss + nothing, None if column_loss is None else column_loss + nothing
    return row_loss, column_loss


def _nan_of_columns(sweep: Sweep) -> Tensor | None:
    """NaN where some column holds one, else 0; None where the losses show it themselves.

    Ids and a guide can mask a column in every row: it is hidden from the losses then, but not from the gradients,
    whose products multiply it by 0.
    """
    options = sweep.options
    if options.ids is None and (options.similar is None or options.similar.guide is None):
        return None
    nothing = sweep.operands.keys.sum(dtype=sweep.ops.precision.sums) * 0
    return nothing if options.exchange is None else options.exchange.sum(nothing)


def loss_and_gradients_of(call: Call, needs: Needs) -> tuple[Tensor, list[Tensor | None]]:
    """A sum or mean, and its gradients in the sums' dtype and the inputs' shapes, the temperature's last."""
    if call.takes_one_sweep:
        sweep = sweep_of(call)
        ops, options, sums = sweep.ops, call.options, sweep.ops.precision.sums
        losses, tape, acc_rows, acc_columns = _one_sweep(sweep, needs, call)
        scale = _scale(None, options)
        out = finish(ops, options, tape, acc_rows, acc_columns, needs, sweep.kappa, scale, sums)
        of_temperature = _of_temperature(out.kappa, sweep.kappa, call.temperature, sums)
        return reduced(losses, None, options), [*out.inputs, of_temperature]
    ops = _ops(call)
    sums = ops.precision.sums
    inputs: Any = tuple(None if x is None else x.to(sums) for x in call.inputs)
    call = replace(call, inputs=inputs)  # whose gradients are not rounded then
    sweep = sweep_of(call, ops)
    row_loss, column_loss = losses_of(sweep)
    out = _two_sweep_gradients(sweep, needs, row_loss, column_loss, None)
    of_temperature = _of_temperature(out.kappa, sweep.kappa, call.temperature, sums)
    return reduced(row_loss, column_loss, call.options), [*out.inputs, of_temperature]


def gradients_of(
    call: Call, needs: Needs, row_loss: Tensor, column_loss: Tensor | None, upstream: Tensor
) -> list[Tensor | None]:
    """Gradients by two sweeps from the losses of the first, the temperature's last."""
    sweep = sweep_of(call)
    out = _two_sweep_gradients(sweep, needs, row_loss, column_loss, upstream)
    return [*out.inputs, _of_temperature(out.kappa, sweep.kappa, call.temperature)]


def _two_sweep_gradients(
    sweep: Sweep, needs: Needs, row_loss: Tensor, column_loss: Tensor | None, upstream: Tensor | None
) -> Gradients:
    """upstream: None for 1, of a mean or sum."""
    options = sweep.options
    if options.reduction == "none":
        assert upstream is not None
        weights = upstream.contiguous()[:, None]  # `loss.sum()` hands an expanded scalar back
        return sweep.gradients(needs, row_loss, column_loss, weights, Scale(None, options.gradient_factor))
    return sweep.gradients(needs, row_loss, column_loss, None, _scale(upstream, options))


def _scale(upstream: Tensor | None, options: Options) -> Scale:
    return Scale(upstream, options.gradient_factor)


def _of_temperature(
    d_kappa: Tensor | None, kappa: float | Tensor, temperature: float | Tensor, dtype: torch.dtype | None = None
) -> Tensor | None:
    """dτ = −κ² dκ, in the temperature's shape; in its dtype and place, or in ``dtype`` where it is."""
    if d_kappa is None or not isinstance(temperature, Tensor):
        return None
    of_tau = (d_kappa * (-kappa * kappa)).reshape(temperature.shape)
    return of_tau.to(temperature) if dtype is None else of_tau.to(dtype)


NO_SECOND_DERIVATIVE = (
    "gs_infonce has no second derivative: its gradients are formed without a graph. "
    'For double backward on small batches use backend="reference".'
)


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes gradients on, and says why there is no derivative of them with respect to what they are made of.

    The upstream gradient and the inputs are arguments, so that no way to a second derivative goes past this node:
    the engine runs only nodes that lead to what it was asked for.
    """

    @staticmethod
    def forward(ctx, sources: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        return tuple(g.clone() for g in tensors[sources:])

    @staticmethod
    def backward(ctx, *_: Tensor):  # type: ignore[no-untyped-def]
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _kappa(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """1/τ, NaN where τ is no positive number; a float wherever the host can read one without waiting."""
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().reshape(())
        if temperature.device.type != "cpu":
            temperature = temperature.to(dtype)
            return torch.where(temperature > 0, temperature.reciprocal(), math.nan)
        temperature = temperature.item()
    return 1 / temperature if temperature > 0 else math.nan


def reduced(row_loss: Tensor, column_loss: Tensor | None, options: Options) -> Tensor:
    """Losses of this rank's rows, (N,), or the sum or mean over all ranks'; the mean of both directions."""
    if options.decoupled:  # rows without a negative count 0
        row_loss = row_loss.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)
        if column_loss is not None:
            column_loss = column_loss.nan_to_num(nan=math.nan, posinf=math.inf, neginf=0.0)
    losses = row_loss if column_loss is None else (row_loss + column_loss) / 2  # (N, 1)
    if options.reduction == "none":
        return losses[:, 0].clone()  # the caller's own: what the backward needs is not changed through it
    if options.exchange is None:
        return losses.mean() if options.reduction == "mean" else losses.sum()
    total = options.exchange.sum(losses.sum())
    return total / options.total("positives") if options.reduction == "mean" else total


class as_a_kernel:  # noqa: N801 (a context manager; a class takes a third of a generator's time)
    """As a kernel of torch's own runs: on the tensors' device; below autograd, which would look at each operation
    for a graph that there never is (6 % of a small loss); with products' dtypes chosen here, not by autocast.
    """

    __slots__ = ("below", "casts", "device", "there")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.casts = torch.is_autocast_enabled(device.type)
        here = device.type != "cuda" or device.index == torch.cuda.current_device()
        self.there: Any = None if here else torch.cuda.device(device)
        self.below: Any = torch._C._AutoDispatchBelowAutograd()

    def __enter__(self) -> None:
        if self.casts:  # torch.autocast(enabled=False) does the same in thirty times the time
            torch.set_autocast_enabled(self.device.type, False)
        if self.there is not None:
            self.there.__enter__()
        self.below.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.below.__exit__(*error)
        if self.there is not None:
            self.there.__exit__(*error)
        if self.casts:
            torch.set_autocast_enabled(self.device.type, True)
