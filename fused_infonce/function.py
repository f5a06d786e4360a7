"""The autograd function: which way over the matrix is taken, what is kept for the backward, what comes back."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from . import dense
from .arguments import Call
from .operands import Accumulator, Precision, Scale
from .options import Options
from .sweep import Gradients, Needs, Sweep, finish
from .torch_ops import TorchOps

# Multiply-adds up to which products run in fp32, also for bf16 and fp16 inputs and under autocast: rounding to bf16
# would dominate such short sums, and fp32 is as fast there (64 × 64 × 1024 on a core with AMX: 0.9 of bf16's time;
# 256 × 256 × 384: 1.4).
SMALL_PRODUCT = 1 << 23
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
    if dense.fits(call):
        return reduced(*_dense_losses(call)[:2], call.options)
    sweep = sweep_of(call)
    if call.takes_one_sweep:  # no maxima to look for
        return reduced(sweep.one_sweep(NOTHING_ASKED, call.kappa_bound or math.nan)[0], None, call.options)
    return reduced(*sweep.losses(), call.options)


def sweep_of(call: Call, ops: TorchOps | None = None) -> Sweep:
    """The call's operands, normalised, on its backend."""
    ops = ops or _ops(call)
    return Sweep(ops, call.options, _kappa(call.temperature, ops.precision.sums), call.inputs, call.noise_rows)


def _dense_losses(call: Call) -> tuple[Tensor, Tensor | None, dense.Residuals]:
    precision = _precision(call)
    return dense.losses(call, _kappa(call.temperature, precision.sums), precision)


def _precision(call: Call) -> Precision:
    anchors, options, dtype = call.inputs[0], call.options, call.product_dtype
    rows, columns = options.total("positives"), options.total("columns")
    if rows * columns * anchors.shape[1] <= SMALL_PRODUCT:
        dtype = dtype if dtype == torch.float64 else torch.float32
    return Precision.of(dtype, anchors.device)


def _ops(call: Call) -> TorchOps:
    anchors, options = call.inputs[0], call.options
    columns = options.total("columns")
    precision, workspace_bytes = _precision(call), options.workspace_bytes
    if call.backend == "triton":
        from .triton_ops import TritonOps  # here, for Triton need not be installed

        return cast(TorchOps, TritonOps(precision, anchors.device, workspace_bytes, anchors.shape[0], columns))
    return TorchOps(precision, anchors.device, workspace_bytes)


class _FusedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, positives, negatives, queue, temperature, call: Call) -> Tensor:  # type: ignore[no-untyped-def]
        inputs = (anchors, positives, negatives, queue)
        ctx.needs = Needs(*ctx.needs_input_grad[:5])
        ctx.options, ctx.temperature = call.options, temperature
        tau = temperature if isinstance(temperature, Tensor) else None
        ctx.is_dense = dense.fits(call)
        if ctx.is_dense:
            ctx.dtypes = [None if x is None else x.dtype for x in inputs]
            with as_a_kernel(anchors.device):
                row_loss, column_loss, kept = _dense_losses(call)
                ctx.save_for_backward(tau, *kept)
                return reduced(row_loss, column_loss, call.options)
        ctx.ops = _ops(call)
        with as_a_kernel(anchors.device):
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
            return reduced(row_loss, column_loss, call.options)

    @staticmethod
    def backward(ctx, upstream: Tensor):  # type: ignore[no-untyped-def]
        saved = ctx.saved_tensors
        grads = _dense_backward(ctx, saved, upstream) if ctx.is_dense else _tiled_backward(ctx, saved, upstream)
        if torch.is_grad_enabled():
            present = [g for g in grads if g is not None]
            graph = torch.zeros((), requires_grad=True)
            marked = iter(_FirstDerivativeOnly.apply(graph, *present))  # type: ignore[no-untyped-call]
            grads = [None if g is None else next(marked) for g in grads]
        return *grads, None


def _dense_backward(ctx: Any, saved: tuple[Any, ...], upstream: Tensor) -> list[Tensor | None]:
    temperature = ctx.temperature if saved[0] is None else saved[0]
    kept = dense.Residuals(*saved[1:])
    with as_a_kernel(upstream.device):
        kappa = _kappa(temperature, kept.center.dtype)
        out = dense.gradients(kept, ctx.options, ctx.needs, kappa, upstream, ctx.dtypes)
        return [*out.inputs, _of_temperature(out.kappa, kappa, temperature)]


def _tiled_backward(ctx: Any, saved: tuple[Any, ...], upstream: Tensor) -> list[Tensor | None]:
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
            noise_rows, *losses = kept
            sweep = Sweep(ops, options, kappa, inputs, noise_rows)
            out = _two_sweep_gradients(sweep, ctx.needs, losses[0], losses[1], upstream)
        ops.release()
        return [*out.inputs, _of_temperature(out.kappa, kappa, temperature)]


def one_sweep_of(call: Call, needs: Needs) -> tuple[Tensor, list[Tensor | None]]:
    """Losses in nats, (N, 1), and gradients of their sum or mean in the sums' dtype, the temperature's last."""
    if dense.fits(call):
        losses, _, kept = _dense_losses(call)
        return losses, _dense_gradients(call, needs, kept, None, [kept.center.dtype] * 4)
    sweep = sweep_of(call)
    ops, options = sweep.ops, call.options
    losses, tape, acc_rows, acc_columns = sweep.one_sweep(needs, call.kappa_bound or math.nan)
    sums = ops.precision.sums
    out = finish(ops, options, tape, acc_rows, acc_columns, needs, sweep.kappa, _scale(None, options), sums)
    of_temperature = None if out.kappa is None else (out.kappa * (-sweep.kappa * sweep.kappa)).to(sums)
    if of_temperature is not None and isinstance(call.temperature, Tensor):
        of_temperature = of_temperature.reshape(call.temperature.shape)
    return losses, [*out.inputs, of_temperature]


def gradients_of(
    call: Call, needs: Needs, row_loss: Tensor, column_loss: Tensor | None, upstream: Tensor
) -> list[Tensor | None]:
    """Gradients from the losses, which only two sweeps read; the temperature's last."""
    if dense.fits(call):
        dtypes = [None if x is None else x.dtype for x in call.inputs]
        return _dense_gradients(call, needs, _dense_losses(call)[2], upstream, dtypes)
    sweep = sweep_of(call)
    out = _two_sweep_gradients(sweep, needs, row_loss, column_loss, upstream)
    return [*out.inputs, _of_temperature(out.kappa, sweep.kappa, call.temperature)]


def losses_of(call: Call) -> tuple[Tensor, Tensor | None]:
    """Losses of rows and, where the loss is symmetric, of columns, for ``gradients_of``."""
    return _dense_losses(call)[:2] if dense.fits(call) else sweep_of(call).losses()


def _dense_gradients(
    call: Call, needs: Needs, kept: dense.Residuals, upstream: Tensor | None, dtypes: list[torch.dtype | None]
) -> list[Tensor | None]:
    kappa = _kappa(call.temperature, kept.center.dtype)
    out = dense.gradients(kept, call.options, needs, kappa, upstream, dtypes)
    return [*out.inputs, _of_temperature(out.kappa, kappa, call.temperature)]


def _two_sweep_gradients(
    sweep: Sweep, needs: Needs, row_loss: Tensor, column_loss: Tensor | None, upstream: Tensor
) -> Gradients:
    options = sweep.options
    if options.reduction == "none":
        weights = upstream.contiguous()[:, None]  # `loss.sum()` hands an expanded scalar back
        return sweep.gradients(needs, row_loss, column_loss, weights, Scale(None, options.gradient_factor))
    return sweep.gradients(needs, row_loss, column_loss, None, _scale(upstream, options))


def _scale(upstream: Tensor | None, options: Options) -> Scale:
    return Scale(upstream, options.gradient_factor)


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
