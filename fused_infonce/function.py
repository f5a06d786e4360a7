"""The autograd function: which way over the matrix is taken, what is kept for the backward, what comes back."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import torch
from torch import Tensor

from .arguments import Call
from .sweep import Needs, Sweep
from .torch_ops import Precision, TorchOps


def fused_loss(call: Call) -> Tensor:
    """Losses of the rows (N,), or their sum or mean (0-dim), in nats; differentiable once."""
    wanted = (*call.inputs, call.temperature)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in wanted):
        return _FusedInfoNCE.apply(*wanted, call)  # type: ignore[no-any-return, no-untyped-call]
    with _outside_autocast(call.inputs[0].device.type):
        return _reduced(*sweep_of(call).losses(), call.options.reduction)


def sweep_of(call: Call) -> Sweep:
    """The call's operands, normalised, on its backend."""
    anchors = call.inputs[0]
    columns = sum(x.shape[0] for x in call.inputs[1:] if x is not None)
    precision = Precision.of(call.product_dtype, anchors.device, columns * anchors.numel())
    ops = TorchOps(precision, anchors.device, call.options.workspace_bytes)
    kappa = _kappa(call.temperature, precision.sums)
    return Sweep(ops, call.options, kappa, *call.inputs, call.noise_rows)


class _FusedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, positives, negatives, queue, temperature, call: Call) -> Tensor:  # type: ignore[no-untyped-def]
        inputs = (anchors, positives, negatives, queue)
        options = call.options
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        ctx.options = options
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.temperature = None if isinstance(temperature, Tensor) else temperature
        bound = call.kappa_bound
        ctx.one_sweep = (
            bound is not None
            and options.fits_one_sweep(bound)
            and options.reduction != "none"
            and not options.symmetric
        )
        with _outside_autocast(anchors.device.type):
            if bound is not None and ctx.one_sweep:
                memory = _gradient_memory(ctx.needs, call)
                with torch.inference_mode():  # spares dozens of small operations their bookkeeping
                    sweep = sweep_of(call)
                    losses, gradients = sweep.one_sweep(ctx.needs, bound, memory)
                of_temperature = _of_temperature(gradients.kappa, sweep.kappa, temperature)
                ctx.save_for_backward(*gradients.inputs, of_temperature)
                return _reduced(losses, None, options.reduction)
            # Tensors go through save_for_backward: freed with the graph, and watched for changes in place.
            ctx.call = replace(call, inputs=(), temperature=None, noise_rows=None)  # type: ignore[arg-type]
            row_loss, column_loss = sweep_of(call).losses()
            tau = temperature if isinstance(temperature, Tensor) else None
            ctx.save_for_backward(*inputs, tau, call.noise_rows, row_loss, column_loss)
            return _reduced(row_loss, column_loss, options.reduction)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[no-untyped-def]
        with torch.no_grad(), _outside_autocast(upstream.device.type):
            grads = _one_sweep_backward(ctx, upstream) if ctx.one_sweep else _two_sweep_backward(ctx, upstream)
        if torch.is_grad_enabled():
            present = [g for g in grads if g is not None]
            graph = torch.zeros((), requires_grad=True)
            marked = iter(_FirstDerivativeOnly.apply(graph, *present))  # type: ignore[no-untyped-call]
            grads = [None if g is None else next(marked) for g in grads]
        return *grads, None


def _gradient_memory(needs: Needs, call: Call) -> dict[str, Tensor]:
    """Uninitialised accumulators, made outside of inference mode: autograd is to keep them."""
    dtype = torch.promote_types(call.product_dtype, torch.float32)
    wanted = (needs.rows, needs.positives, needs.negatives, needs.queue)
    names = ("anchors", "positives", "negatives", "queue")
    return {
        name: torch.empty(x.shape, dtype=dtype, device=x.device)
        for name, want, x in zip(names, wanted, call.inputs, strict=True)
        if want and x is not None
    }


def _one_sweep_backward(ctx, upstream: Tensor) -> list[Tensor | None]:  # type: ignore[no-untyped-def]
    scale = upstream / ctx.options.num_anchors if ctx.options.reduction == "mean" else upstream
    *of_inputs, of_temperature = ctx.saved_tensors
    grads = [None if g is None else (g * scale).to(dtype) for g, dtype in zip(of_inputs, ctx.dtypes, strict=True)]
    return [*grads, None if of_temperature is None else of_temperature * scale.to(of_temperature)]


def _two_sweep_backward(ctx, upstream: Tensor) -> list[Tensor | None]:  # type: ignore[no-untyped-def]
    options = ctx.options
    *inputs, temperature, noise_rows, row_loss, column_loss = ctx.saved_tensors
    if temperature is None:
        temperature = ctx.temperature
    weights, scale = None, upstream
    if options.reduction == "mean":
        scale = upstream / options.num_anchors
    elif options.reduction == "none":
        weights, scale = upstream, upstream.new_ones(())
    call = replace(ctx.call, inputs=tuple(inputs), temperature=temperature, noise_rows=noise_rows)
    sweep = sweep_of(call)
    gradients = sweep.gradients(ctx.needs, row_loss, column_loss, weights, scale)
    grads = [None if g is None else g.to(dtype) for g, dtype in zip(gradients.inputs, ctx.dtypes, strict=True)]
    return [
        *grads,
        _of_temperature(gradients.kappa, sweep.kappa, temperature) if ctx.needs.temperature else None,
    ]


def _of_temperature(d_kappa: Tensor | None, kappa: Tensor, temperature: float | Tensor) -> Tensor | None:
    """dτ = −κ² dκ, in the temperature's shape, dtype and place."""
    if d_kappa is None or not isinstance(temperature, Tensor):
        return None
    return (-kappa * kappa * d_kappa).to(temperature).reshape(temperature.shape)


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
    losses = row_loss if column_loss is None else (row_loss + column_loss) / 2
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _outside_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """The dtypes of every product are chosen here, not by autocast."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
