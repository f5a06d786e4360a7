"""The autograd function: which path over the logits is taken, what is kept for the backward, what comes back.

``dense`` for a batch whose logits fit in one tensor; else ``tiled.one_pass`` where one upstream gradient serves
all rows of one direction, or ``tiled.two_pass``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import dense, variants
from .kernel_context import as_a_kernel
from .options import Options
from .resolve import Call
from .tiled import one_pass, stats, two_pass
from .tiled.backend import TileBackend, make_backend
from .tiled.operands import Accumulator, Gradients, GradScale, NeedsGrad, Precision
from .tiled.problem import TiledProblem
from .tiled.torch_backend import TorchBackend

# Multiply-adds up to which products run in fp32, also for bf16 and fp16 inputs and under autocast: rounding to
# bf16 would dominate such short sums, and fp32 is about as fast there (64 × 64 × 1024 on a core with AMX takes 0.9
# of bf16's time, 256 × 256 × 384 1.4 of it).
SMALL_PRODUCT = 1 << 23


def fused_loss(call: Call) -> Tensor:
    """Losses of the rows (N,), or their sum or mean (0-dim), in nats; differentiable once.

    Of a call without positives these are the log-sum-exps of the rows.
    """
    differentiable = (*call.inputs, call.temperature, call.own_log_sums)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in differentiable):
        return _FusedInfoNCE.apply(*differentiable, call)  # type: ignore[no-any-return, no-untyped-call]
    with as_a_kernel(call.inputs[0].device):
        if not dense.fits(call) and call.takes_one_pass:  # the fewest passes over the tiles
            return reduced(
                one_pass.one_pass(problem_of(call), NeedsGrad.none(), call.kappa_bound)[0], None, call.options
            )
        return reduced(*losses_of(call), call.options)


class _FusedInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchors, positives, negatives, queue, temperature, own_log_sums, call: Call) -> Tensor:  # type: ignore[no-untyped-def]
        inputs = (anchors, positives, negatives, queue)
        ctx.needs = NeedsGrad(*ctx.needs_input_grad[:6])
        ctx.options = _with_tensors(call.options)
        ctx.temperature, tau = (None, temperature) if isinstance(temperature, Tensor) else (temperature, None)
        # All that the backward reads goes through save_for_backward: it is freed with the graph, and autograd
        # raises an error where a tensor of the caller's was changed in place in between.
        with as_a_kernel(anchors.device):
            tensors: tuple[Tensor | None, ...]
            if dense.fits(call):
                row_loss, column_loss, tensors = dense.losses(call, _kappa_of(call), _precision(call))
                ctx.gradients = _dense_gradients
            elif call.takes_one_pass:
                ctx.backend, column_loss = _backend(call), None
                row_loss, kept = one_pass.one_pass(problem_of(call, ctx.backend), ctx.needs, call.kappa_bound)
                acc = kept.acc_columns
                tensors = (kept.acc_rows, *((None, None) if acc is None else (acc.grad, acc.sums)))
                ctx.kept, ctx.gradients = replace(kept, acc_rows=None, acc_columns=None), _one_pass_gradients
                ctx.backend.release()
            else:
                ctx.backend = _backend(call)
                problem = problem_of(call, ctx.backend)
                products = two_pass.kept_products(problem)
                row_loss, column_loss = two_pass.losses(problem, products)
                if products is None:
                    tensors = (row_loss, column_loss, call.noise_rows, *_tensors_of(call.options))
                    ctx.gradients = _two_pass_gradients
                else:
                    out = two_pass.reduced_gradients(problem, ctx.needs, row_loss, column_loss, products)
                    tau_grad = _of_temperature(out.kappa, problem.kappa_given, call.temperature, row_loss.dtype)
                    tensors = (*out.inputs, tau_grad, out.log_own)
                    ctx.gradients = _scaled_gradients
                ctx.backend.release()
            ctx.save_for_backward(*inputs, tau, own_log_sums, *tensors)
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
        temperature = ctx.temperature if saved[4] is None else saved[4]
        with as_a_kernel(upstream.device):
            grads: list[Tensor | None] = ctx.gradients(ctx, saved[:4], temperature, saved[6:], upstream)
        if torch.is_grad_enabled():
            present = [g for g in grads if g is not None]
            sources = [x for x in (upstream, *saved[:6]) if x is not None]
            marked = iter(_FirstDerivativeOnly.apply(len(sources), *sources, *present))  # type: ignore[no-untyped-call]
            grads = [None if g is None else next(marked) for g in grads]
        return *grads, None


Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _dense_gradients(
    ctx: Any, inputs: Inputs, temperature: float | Tensor, saved: tuple[Any, ...], upstream: Tensor
) -> list[Tensor | None]:
    kept = dense.Residuals(*saved)
    kappa, dtypes = _kappa(temperature, kept.center.dtype), [None if x is None else x.dtype for x in inputs]
    out = dense.gradients(kept, ctx.options, ctx.needs, kappa, upstream, dtypes)
    return [*out.inputs, _of_temperature(out.kappa, kappa, temperature), out.log_own]


def _one_pass_gradients(
    ctx: Any, inputs: Inputs, temperature: float | Tensor, saved: tuple[Any, ...], upstream: Tensor
) -> list[Tensor | None]:
    acc_rows, grad, sums = saved
    kept = replace(ctx.kept, acc_rows=acc_rows, acc_columns=None if grad is None else Accumulator(grad, sums))
    kappa = _kappa(temperature, ctx.backend.precision.sums)
    present = [x for x in inputs if x is not None]
    scale = GradScale(upstream, ctx.options.gradient_factor)
    out = one_pass.gradients(ctx.backend, ctx.options, kept, present, ctx.needs, kappa, scale)
    ctx.backend.release()
    return [*out.inputs, _of_temperature(out.kappa, kappa, temperature), out.log_own]


def _scaled_gradients(
    ctx: Any, inputs: Inputs, temperature: float | Tensor, saved: tuple[Any, ...], upstream: Tensor
) -> list[Tensor | None]:
    """saved: gradients of the reduced loss, in the sums' dtype; the engine casts them to the inputs' dtypes."""
    grads: list[Tensor | None] = [None if g is None else g * upstream for g in saved]
    of_temperature = grads[4]
    if of_temperature is not None and isinstance(temperature, Tensor):
        grads[4] = of_temperature.to(temperature)  # its device, too
    return grads


def _two_pass_gradients(
    ctx: Any, inputs: Inputs, temperature: float | Tensor, saved: tuple[Any, ...], upstream: Tensor
) -> list[Tensor | None]:
    row_loss, column_loss, noise_rows, *given = saved
    kappa = _kappa(temperature, ctx.backend.precision.sums)
    problem = TiledProblem(ctx.backend, _with_tensors(ctx.options, *given), kappa, inputs, noise_rows)
    out = _weighted_gradients(problem, ctx.needs, row_loss, column_loss, upstream)
    ctx.backend.release()
    return [*out.inputs, _of_temperature(out.kappa, kappa, temperature), out.log_own]


def _weighted_gradients(
    problem: TiledProblem, needs: NeedsGrad, row_loss: Tensor, column_loss: Tensor | None, upstream: Tensor
) -> Gradients:
    """upstream: of the rows' losses or of the reduced one."""
    factor, weights = problem.options.gradient_factor, None
    scale = GradScale(upstream, factor)
    if problem.options.reduction == "none":
        weights = upstream.contiguous()[:, None]  # the backward of `loss.sum()` passes an expanded scalar
        scale = GradScale(None, factor)
    return two_pass.gradients(problem, needs, row_loss, column_loss, weights, scale)


# ---------------------------------------------------------------------- for the compiler's operators


def losses_of(call: Call) -> tuple[Tensor, Tensor | None]:
    """Losses of the rows and, where the loss is symmetric, of the columns, (N, 1) each."""
    if dense.fits(call):
        return dense.losses(call, _kappa_of(call), _precision(call))[:2]
    return two_pass.losses(problem_of(call))


def loss_and_gradients_of(call: Call, needs: NeedsGrad) -> tuple[Tensor, list[Tensor | None]]:
    """A sum or mean, and its gradients in the sums' dtype and the inputs' shapes, those of the
    temperature and of log O_i last.
    """
    options, kappa, sums = call.options, _kappa_of(call), _precision(call).sums
    column_loss = None
    if dense.fits(call):
        row_loss, column_loss, kept = dense.losses(call, kappa, _precision(call))
        out = dense.gradients(kept, options, needs, kappa, None, [sums] * 4)
    elif call.takes_one_pass:
        problem = problem_of(call)
        row_loss, residuals = one_pass.one_pass(problem, needs, call.kappa_bound)
        present, scale = [x for x in call.inputs if x is not None], GradScale(None, options.gradient_factor)
        out = one_pass.gradients(problem.backend, options, residuals, present, needs, kappa, scale, sums)
    else:
        problem = problem_of(call)
        products = two_pass.kept_products(problem)
        row_loss, column_loss = two_pass.losses(problem, products)
        out = two_pass.reduced_gradients(problem, needs, row_loss, column_loss, products)
    of_temperature = _of_temperature(out.kappa, kappa, call.temperature, sums)
    return reduced(row_loss, column_loss, options), [*out.inputs, of_temperature, out.log_own]


def gradients_of(
    call: Call, needs: NeedsGrad, row_loss: Tensor, column_loss: Tensor | None, upstream: Tensor
) -> list[Tensor | None]:
    """Gradients in the inputs' dtypes, from the losses that ``losses_of`` returned; those of the
    temperature and of log O_i last.
    """
    kappa = _kappa_of(call)
    if dense.fits(call):
        kept = dense.losses(call, kappa, _precision(call))[2]
        dtypes = [None if x is None else x.dtype for x in call.inputs]
        out = dense.gradients(kept, call.options, needs, kappa, upstream, dtypes)
    else:
        out = _weighted_gradients(problem_of(call), needs, row_loss, column_loss, upstream)
    return [*out.inputs, _of_temperature(out.kappa, kappa, call.temperature), out.log_own]


def stats_of(call: Call) -> dict[str, Tensor]:
    """The figures of ``contrastive_stats``; the call's backend must be torch's."""
    backend = TorchBackend(_precision(call), call.inputs[0].device, call.options.workspace_bytes)
    return stats.stats(problem_of(call, backend), backend)


# ---------------------------------------------------------------------- a call's parts


def problem_of(call: Call, backend: TileBackend | None = None) -> TiledProblem:
    """The call's operands, normalised, on its backend."""
    return TiledProblem(backend or _backend(call), call.options, _kappa_of(call), call.inputs, call.noise_rows)


def _backend(call: Call) -> TileBackend:
    anchors, options = call.inputs[0], call.options
    return make_backend(
        call.backend,
        _precision(call),
        anchors.device,
        options.workspace_bytes,
        len(anchors),
        options.total("columns"),
    )


def _precision(call: Call) -> Precision:
    anchors, options, dtype = call.inputs[0], call.options, call.product_dtype
    size = options.total("rows") * options.total("columns") * anchors.shape[1]
    if size <= SMALL_PRODUCT and dtype != torch.float64:
        dtype = torch.float32
    return Precision.of(dtype, anchors.device)


def _kappa_of(call: Call) -> float | Tensor:
    return _kappa(call.temperature, torch.float64 if call.product_dtype == torch.float64 else torch.float32)


def _tensors_of(options: Options) -> tuple[Tensor | None, ...]:
    """The tensors among the options: ids, negative_ids, a guide's two, row limits, log O_i, weights of columns."""
    similar = options.similar
    guide = None if similar is None else similar.guide
    limit = None if similar is None else similar.limit
    return options.ids, options.negative_ids, *(guide or (None, None)), limit, options.log_own, options.log_weights


def _with_tensors(
    options: Options,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    guide_rows: Tensor | None = None,
    guide_columns: Tensor | None = None,
    limit: Tensor | None = None,
    log_own: Tensor | None = None,
    log_weights: Tensor | None = None,
) -> Options:
    """The options with these in the place of their own; themselves where neither has any."""
    given = (ids, negative_ids, guide_rows, guide_columns, limit, log_own, log_weights)
    if all(x is None for x in (*given, *_tensors_of(options))):
        return options
    similar = options.similar
    if similar is not None:
        guide = None if guide_rows is None or guide_columns is None else (guide_rows, guide_columns)
        similar = replace(similar, guide=guide, limit=limit)
    return replace(
        options, ids=ids, negative_ids=negative_ids, similar=similar, log_own=log_own, log_weights=log_weights
    )


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
    """Losses of this rank's rows, (N,), or the sum or mean over all ranks'; the mean of both directions.

    row_loss, column_loss: as ``variants.row_loss`` returns them, before ``variants.transformed_loss``.
    """
    row_loss = variants.counted_loss(row_loss, options)
    column_loss = None if column_loss is None else variants.counted_loss(column_loss, options)
    losses = row_loss if column_loss is None else (row_loss + column_loss) / 2  # (N, 1)
    if options.reduction == "none":
        return losses[:, 0].clone()  # the caller's own: what the backward needs is not changed through it
    if options.exchange is None:
        return losses.mean() if options.reduction == "mean" else losses.sum()
    total = options.exchange.sum(losses.sum())
    return total / options.total("positives") if options.reduction == "mean" else total
