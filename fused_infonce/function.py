"""The autograd function: which way over the matrix is taken, what is kept for the backward, what comes back."""

from __future__ import annotations

import contextlib
import math
from typing import cast

import torch
from torch import Tensor

from .arguments import Call
from .operands import Accumulator, Precision
from .sweep import Needs, Sweep, finish
from .torch_ops import TorchOps


def fused_loss(call: Call) -> Tensor:
    """Losses of the rows (N,), or their sum or mean (0-dim), in nats; differentiable once."""
    wanted = (*call.inputs, call.temperature)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in wanted):
        return _FusedInfoNCE.apply(*wanted, call)  # type: ignore[no-any-return, no-untyped-call]
    with torch.no_grad(), _outside_autocast(call.inputs[0].device.type):
        return _reduced(*sweep_of(call).losses(), call.options.reduction)


def sweep_of(call: Call, ops: TorchOps | None = None) -> Sweep:
    """The call's operands, normalised, on its backend."""
    ops = ops or _ops(call)
    return Sweep(ops, call.options, _kappa(call.temperature, ops.precision.sums), call.inputs, call.noise_rows)


def _ops(call: Call) -> TorchOps:
    anchors = call.inputs[0]
    columns = sum(x.shape[0] for x in call.inputs[1:] if x is not None)
    if call.backend == "triton":
        from .triton_ops import TritonOps  # here, for Triton need not be installed

        precision = Precision.of(call.product_dtype)
        ops = TritonOps(precision, anchors.device, call.options.workspace_bytes, anchors.shape[0], columns)
        return cast(TorchOps, ops)
    dtype = TorchOps.product_dtype(call.product_dtype, anchors.device, columns * anchors.numel())
    return TorchOps(Precision.of(dtype), anchors.device, call.options.workspace_bytes)


class _FusedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, positives, negatives, queue, temperature, call: Call) -> Tensor:  # type: ignore[no-untyped-def]
        inputs = (anchors, positives, negatives, queue)
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        ctx.ops, ctx.options = _ops(call), call.options
        ctx.temperature = temperature
        tau = temperature if isinstance(temperature, Tensor) else None
        with _outside_autocast(anchors.device.type):
            sweep = sweep_of(call, ctx.ops)
            # Large tensors go through save_for_backward: freed with the graph, and watched for changes in place.
            if call.takes_one_sweep:
                row_loss, ctx.tape, acc_rows, acc = sweep.one_sweep(ctx.needs, call.kappa_bound or math.nan)
                ctx.tape.units.detach()
                acc_columns = (None, None) if acc is None else (acc.grad, acc.sums)
                ctx.save_for_backward(*inputs, tau, acc_rows, *acc_columns)
                column_loss = None
            else:
                row_loss, column_loss = sweep.losses()
                ctx.tape = None
                ctx.save_for_backward(*inputs, tau, call.noise_rows, row_loss, column_loss)
            ctx.ops.release()
            return _reduced(row_loss, column_loss, call.options.reduction)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[no-untyped-def]
        *inputs, tau = ctx.saved_tensors[:5]
        kept, ops, options = ctx.saved_tensors[5:], ctx.ops, ctx.options
        temperature = ctx.temperature if tau is None else tau
        with torch.no_grad(), _outside_autocast(upstream.device.type):
            scale = upstream / options.num_anchors if options.reduction == "mean" else upstream
            kappa = _kappa(temperature, ops.precision.sums)
            if ctx.tape is not None:
                acc_rows, grad, sums = kept
                acc_columns = None if grad is None else Accumulator(grad, sums)
                units = ctx.tape.units.attach([x for x in inputs if x is not None])
                out = finish(ops, options, ctx.tape, acc_rows, acc_columns, ctx.needs, kappa, scale)
                units.detach()
            else:
                noise_rows, row_loss, column_loss = kept
                weights = None
                if options.reduction == "none":
                    weights, scale = upstream[:, None], upstream.new_ones(())
                sweep = Sweep(ops, options, kappa, inputs, noise_rows)
                out = sweep.gradients(ctx.needs, row_loss, column_loss, weights, scale)
            ops.release()
            grads = [*out.inputs, _of_temperature(out.kappa, kappa, temperature)]
        if torch.is_grad_enabled():
            present = [g for g in grads if g is not None]
            graph = torch.zeros((), requires_grad=True)
            marked = iter(_FirstDerivativeOnly.apply(graph, *present))  # type: ignore[no-untyped-call]
            grads = [None if g is None else next(marked) for g in grads]
        return *grads, None


def _of_temperature(d_kappa: Tensor | None, kappa: float | Tensor, temperature: float | Tensor) -> Tensor | None:
    """dτ = −κ² dκ, in the temperature's shape, dtype and place."""
    if d_kappa is None or not isinstance(temperature, Tensor):
        return None
    return (d_kappa * (-kappa * kappa)).to(temperature).reshape(temperature.shape)


class _FirstDerivativeOnly(torch.autograd.Function):
    """Passes gradients on, and says why there is no derivative of them."""

    @staticmethod
    def forward(ctx, graph: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        return tuple(g.clone() for g in grads)

    @staticmethod
    def backward(ctx, *_: Tensor):  # type: ignore[no-untyped-def]
        raise RuntimeError(
            "gs_infonce has no second derivative: its gradients are formed without a graph. "
            'For double backward on small batches use backend="reference".'
        )


def _kappa(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """1/τ, NaN where τ is no positive number; a float wherever the host can read one without waiting."""
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().reshape(())
        if temperature.device.type != "cpu":
            temperature = temperature.to(dtype)
            return torch.where(temperature > 0, temperature.reciprocal(), math.nan)
        temperature = temperature.item()
    return 1 / temperature if temperature > 0 else math.nan


def _reduced(row_loss: Tensor, column_loss: Tensor | None, reduction: str) -> Tensor:
    losses = row_loss if column_loss is None else (row_loss + column_loss) / 2  # (N, 1)
    if reduction == "none":
        return losses[:, 0]
    return losses.mean() if reduction == "mean" else losses.sum()


def _outside_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """The dtypes of every product are chosen here, not by autocast."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
