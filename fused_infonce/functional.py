"""The loss as users call it. The signature of ``gs_infonce`` is the one place that writes its arguments out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from .autograd import fused_loss
from .compile_op import compiled_logsumexp, compiled_loss
from .config import NOISE_OPTIONS, Backend, HardnessMode, Reduction, Strategy
from .distributed import Group, resolve_group
from .reference import reference_logsumexp, reference_loss
from .resolve import resolve, resolve_among, resolve_without_positives
from .smoothing import smoothing_term

P = ParamSpec("P")
R = TypeVar("R")


def gs_infonce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    queue: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    min_temperature: float | None = None,
    num_noise: int = 192,
    noise_weight: float = 1.0,
    noise: Literal["sampled", "expected"] | Tensor = "sampled",
    generator: torch.Generator | None = None,
    hard_negative_weight: float = 0.0,
    ids: Tensor | tuple[Tensor, Tensor] | None = None,
    negative_ids: Tensor | None = None,
    negative_owners: Tensor | None = None,
    symmetric: bool = False,
    reduction: Reduction = "mean",
    group: Group = "local",
    strategy: Strategy = "auto",
    backend: Backend = "auto",
    workspace_bytes: int | None = None,
    decoupled: bool = False,
    angular_margin: float = 0.0,
    hardness: float = 0.0,
    hardness_mode: HardnessMode = "all_negatives",
    label_smoothing: float = 0.0,
    filter_margin: float | None = None,
    filter_threshold: float | None = None,
    focal_gamma: float = 0.0,
    guide: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""Gaussian-smoothed InfoNCE over cosine similarities, without the N×M matrix.

    .. math::
        \ell_i = -\log \frac{e^{s_{ii}/\tau}}
                 {\sum_j e^{s_{ij}/\tau + b_{ij}} + \lambda \sum_{m=1}^{M} e^{\hat q_i \cdot \hat g_m/\tau}}

    s_ij is the cosine of anchor i and column j (in-batch positives, ``negatives``, ``queue``), ĝ_m a random
    direction: GS-InfoNCE (Wu et al., "Smoothed Contrastive Learning for Unsupervised Sentence Embedding",
    COLING 2022). With ``num_noise=0`` or ``noise_weight=0`` it is InfoNCE exactly (van den Oord et al., 2018; the
    SimCSE loss, Gao et al., EMNLP 2021, equation 1). Rows are normalised inside; a zero row has cosine 0 to
    everything and gradient 0.

    Args:
        anchors: (N, D), any strides; float64, float32, bfloat16 or float16 (mixed dtypes are promoted).
        positives: (N, D); row i belongs to anchor i, and is a negative of every other anchor.
        negatives: (H, D) hard negatives, columns for every anchor. Or own ones, each a negative of one anchor
            only: (N, K, D), K of every anchor, or (H, D) with ``negative_owners``, which may be of uneven numbers.
            Their cosines are computed from unrounded rows in fp32; they cost O(N·K·D) time and memory.
        queue: (Q, D) further columns, never an anchor's own (past embeddings).
        temperature: τ > 0, a float or a tensor of one element (on the CPU or the inputs' device), which then gets
            a gradient if it requires one. NaN or a value <= 0 in a tensor gives NaN out. Right from 1e-3 to 10.
        min_temperature: a lower bound that a device tensor's value is promised to keep; where it is large enough
            (about 0.014) the kernels take one pass without asking the device for the value.
        num_noise: M, how many random directions. The paper's code uses 3N.
        noise_weight: λ >= 0. The paper's code declares λ and never uses it: its λ is 1.
        noise: ``"sampled"`` draws M standard normal vectors at each call. ``"expected"`` replaces their sum by its
            expectation λ M c_D(1/τ), c_D(κ) = ₀F₁(; D/2; κ²/4): no sampling, no variance, no product. It stands
            for M samples while M is large against e^(1/(τ²D)): at D = 768, M = 192 the sum's relative deviation
            is 0.06 at τ = 0.05, 0.35 at 0.02, 34 at 0.01. A tensor (M, D) gives the vectors (``num_noise`` is
            ignored). The scale of the noise (the paper's ``std``) has no effect under cosine similarity. Noise
            gets no gradient.
        generator: source of sampled noise; default: torch's CPU generator, or with ``"triton"`` the device's, so
            ``torch.manual_seed`` reproduces a call. Backends need not draw the same bits.
        hard_negative_weight: natural logarithm of the weight of an anchor's *own* hard negatives: those that are
            given as own ones, else the columns j of ``negatives`` with j mod N == i (H must be a multiple of N).
        ids: (N,) integers; a column with the anchor's id is not a negative of it (duplicates in the batch). A
            pair of these, of the anchors and of the positives, masks column j where either equals row i's.
        negative_ids: (H,) integers, of own negatives (N, K, D) (N, K), the same for hard negatives, compared with
            ``ids``, of a pair with those of the positives; None masks none of them.
        negative_owners: (H,) integers from 0 to N − 1: ``negatives`` are own ones, row h of anchor
            ``negative_owners[h]``; with a group, of this rank's anchors. Values on a device are not read by the
            host: one beyond the anchors fails as an index of torch does there.
        symmetric: mean of both directions (CLIP). Hard negatives, own ones too, and queue act in the anchor →
            positive direction only, noise in both.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (N,).
        group: ``"local"``: this process's rows; ``"world"``: those of every process of torch.distributed, which is
            looked up at each call; or a process group. With a group anchors, positives, negatives and queue are
            this rank's rows, the columns are everyone's; how many may differ. Each rank gets the mean or sum over
            all ranks' anchors (``"none"``: of its own). Gradients are those of this global loss multiplied by the
            number of ranks: averaged over ranks, as DistributedDataParallel does, parameters get the gradient that
            one process would give them on all rows; a temperature's, too. ``ids`` are compared across ranks, an
            anchor's own hard negatives are its rank's, sampled noise is the same on all (rank 0's seed; a tensor
            of noise has to be). The upstream gradient of a mean or sum has to be the same on every rank, and
            every rank has to call backward if one does. None is local, too, with a warning before
            ``init_process_group``: ``torch.distributed.group.WORLD`` is None until then.
        strategy: how ranks share columns, with the same result: ``"gather"`` holds all of them at once, ``"ring"``
            passes them round in less memory and always in two sweeps; ``"auto"`` gathers up to 4 GiB a rank.
        backend: ``"triton"`` (GPUs from compute capability 8.0, ROCm; no float64, D <= 8192), ``"torch"`` (any
            device), ``"reference"`` (float64 with the N×M matrix; differentiable twice), or ``"auto"``: Triton
            for tensors on a GPU that it can serve, else torch; logged once with the reason (logger
            ``fused_infonce``, INFO). ``"triton"`` never falls back.
        workspace_bytes: memory for tiles of the matrix; default 64 MiB on CPUs, 256 MiB on other devices; the
            Triton kernels take a fortieth of the device's memory, at least 256 MiB and 1024 rows. At least one row
            of columns is always held. Where a third of it holds all N·T cosines, ``symmetric`` takes three
            products on the torch backend instead of four.
        decoupled: leave the positive out of the denominator (Yeh et al., ECCV 2022, equation 6). The loss may be
            negative; a row whose every negative is masked counts 0.
        angular_margin: m in radians, 0 <= m < π: the positive's cosine is cos(θ_ii + m) (ArcCon, Zhang et al.,
            ACL 2022, equation 4, with m = 10° = 0.175). Beyond θ = π − m it rises again, as in the formula.
        hardness: β >= 0: every negative, noise included, weighs e^(β s_ij), which has no derivative (Lan et al.,
            2025, equation 5, with β = 9). ``symmetric``: in both directions.
        hardness_mode: which negatives ``hardness`` weighs: ``"all_negatives"``; ``"in_batch_negatives"``, the
            columns that anchors share, and noise; or ``"hard_negatives"``, own ones only (EmbeddingGemma, Vera et
            al. 2025).
        label_smoothing: ε: a share of the label that is spread evenly over all columns but the noise, as in
            ``F.cross_entropy``; log-weights are no part of its logits. Not with ``ids``, a filter or own
            negatives.
        filter_margin: columns with s_ij > s_ii + filter_margin are no negatives of anchor i (GISTEmbed, Solatorio
            2024; its margin is −filter_margin); in the other direction of ``symmetric`` with s_ij > s_jj + …
        filter_threshold: columns with s_ij > filter_threshold are no negatives either. A filter compares scores as
            the products round them; it has no derivative and leaves noise alone.
        focal_gamma: γ >= 0: a row's loss is (1 − p_i)^γ loss_i, p_i = e^(−loss_i) the probability of its positive,
            the weight's gradient included (Lin et al., ICCV 2017); ``symmetric``: in each direction. Not with
            ``decoupled``, whose loss is not the logarithm of a probability, nor with ``label_smoothing``.
        guide: embeddings of the same rows by another model, (n, G) for each input given, in their order: their
            cosines are what a filter compares (``filter_margin`` then is 0 where no filter is given). GISTEmbed
            contrasts anchors and positives among themselves too, which this does not. Costs a second product a
            sweep; not with a group.

    Returns:
        The loss in nats: 0-dim, or (N,) with ``reduction="none"``; float32, float64 for float64 inputs.

    Products run in the inputs' dtype, or in autocast's; for fp16 the gradient products in bf16; on x86 CPUs
    without AMX all in fp32, which is faster there. Sums, exponentials and the positives' cosines are fp32. Memory
    beyond inputs, gradients and one normalised copy of the rows is the workspace. Deterministic. NaN or Inf in an
    input gives NaN. Differentiable once, in reverse mode: a second derivative, forward mode and torch.func's
    transforms raise an error; the reference supports them. Under ``torch.compile`` and ``torch.export`` the loss
    is one operator of the graph, for any batch size, temperature and number of noise vectors; a ``generator``, a
    ``guide``, a group or the reference breaks the graph.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; the message names it. With a group
            every rank raises, also where ranks disagree about features, dtype, options or wanted gradients.
        NotImplementedError: forward-mode differentiation or a transform of torch.func.
    """
    return _loss(**locals())


def with_signature_of(
    source: Callable[P, Any], without: Sequence[str]
) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Decorates a function that passes its keyword arguments on to ``source``: it shows their names and defaults.

    Arguments in ``without`` raise TypeError. Static type checkers show them, since no type removes an argument.
    """
    shown = inspect.signature(source)
    names = [name for name in shown.parameters if name not in without]

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in names:
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*args, **kwargs)

        parameters = [shown.parameters[name] for name in names]
        returns = inspect.signature(function).return_annotation
        checked.__signature__ = shown.replace(parameters=parameters, return_annotation=returns)  # type: ignore[attr-defined]
        return checked

    return decorate


@with_signature_of(gs_infonce, without=(*NOISE_OPTIONS, "generator"))
def info_nce(*args: Any, **options: Any) -> Tensor:
    """InfoNCE over cosine similarities, without the N×M matrix: :func:`gs_infonce` without noise.

    Arguments, result and errors are those of :func:`gs_infonce`, but for the noise's arguments.
    """
    return gs_infonce(*args, num_noise=0, **options)


def cosine_logsumexp(
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    min_temperature: float | None = None,
    row_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    column_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    exclude_diagonal: bool = False,
    log_weights: Tensor | None = None,
    filter_threshold: float | Tensor | None = None,
    guide: Sequence[Tensor] | None = None,
    hardness: float = 0.0,
    group: Group = "local",
    strategy: Strategy = "auto",
    backend: Backend = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    r"""Log-sum-exp of every row over all columns of their cosines over τ, without the N×T matrix.

    .. math::
        L_i = \log \sum_{j \in C_i} e^{s_{ij}/\tau + \beta s_{ij} + b_j}

    s_ij is the cosine of row i and column j, C_i the columns that no mask takes from row i. It is the part that
    contrastive losses share: ``softplus(L_i − s_ii/τ)``, with the sum over the negatives alone, is InfoNCE, and
    sums over several sets of columns combine by ``torch.logaddexp``. ``fused_infonce.losses`` makes the published
    losses of it.

    Args:
        rows: (N, D), any strides; float64, float32, bfloat16 or float16 (mixed dtypes are promoted).
        columns: (T, D); may be the same tensor as ``rows``.
        temperature, min_temperature: as in :func:`gs_infonce`.
        row_ids, column_ids: (N,) and (T,) integers; a column whose id is the row's is left out of its sum. Or a
            pair of each: a column is left out where either of its two ids is the row's.
        exclude_diagonal: leave column i out of row i's sum (i < min(N, T); with a group: of this rank's columns).
        log_weights: b_j, (T,): the natural logarithm of each column's weight, −∞ for a column that no row sees;
            gets no gradient. Of any range, since every row is shifted by its largest exponent, and nothing is read
            on the host. With a group, of this rank's columns, on every rank or on none.
        filter_threshold: columns whose cosine exceeds it are left out: a number, or a tensor (N,), one limit per
            row, which gets no gradient. A margin m over a positive is ``positive_cosine.detach() + m``.
        guide: two matrices (N, G) and (T, G), whose cosines are compared with ``filter_threshold`` instead. Not
            with a group.
        hardness: β >= 0; the factor e^(β s_ij) of a column's term carries no gradient (Lan et al. 2025).
        group, strategy, backend, workspace_bytes: as in :func:`gs_infonce`. With a group the columns are those of
            every rank, the rows this rank's.

    Returns:
        (N,) in nats; float32, float64 for float64 inputs. A row without a column has −∞ and gradient 0, whatever
        its upstream gradient is.

    The gradient that each rank of a group gets is that of the sum over ranks of what they make of their rows, so
    that averaging over ranks (DistributedDataParallel) gives the mean of the ranks' losses. Precision, memory,
    determinism and ``torch.compile`` are those of :func:`gs_infonce` with ``reduction="none"``: two sweeps, four
    products. A guide is part of a compiled graph, too. Differentiable once.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong kind; the message names it.
        NotImplementedError: forward-mode differentiation or a transform of torch.func.
    """
    arguments = locals()
    if not torch.compiler.is_compiling():
        return _eager_logsumexp(arguments)
    if (group is None or group == "local") and backend != "reference":
        return compiled_logsumexp(**arguments)
    return _outside_compiler_logsumexp(arguments)


def _eager_logsumexp(arguments: dict[str, Any]) -> Tensor:
    ranks = resolve_group(arguments.pop("group"))
    resolver = resolve_without_positives
    call = resolver(**arguments) if ranks is None else resolve_among(ranks, resolver, **arguments)
    return reference_logsumexp(call) if call.backend == "reference" else fused_loss(call)


def _loss(**arguments: Any) -> Tensor:
    """arguments: those of ``gs_infonce``, all of them."""
    if not torch.compiler.is_compiling():
        return _eager_loss(arguments)
    local = arguments["group"] is None or arguments["group"] == "local"
    plain = arguments["generator"] is None and arguments["guide"] is None
    if local and plain and arguments["backend"] != "reference":
        return compiled_loss(**arguments)
    return _outside_compiler(arguments)


def _eager_loss(arguments: dict[str, Any]) -> Tensor:
    group = arguments.pop("group")
    ranks = resolve_group(group)
    call = resolve(**arguments) if ranks is None else resolve_among(ranks, resolve, **arguments, seed_on_cpu=True)
    loss = reference_loss(call) if call.backend == "reference" else fused_loss(call)
    options = call.options
    if not options.label_smoothing:
        return loss
    smoothing = smoothing_term(
        call.inputs,
        call.temperature,
        label_smoothing=options.label_smoothing,
        angular_margin=options.angular_margin,
        symmetric=options.symmetric,
        reduction=options.reduction,
        dtype=torch.float64 if call.backend == "reference" else loss.dtype,
        exchange=options.exchange,
    )
    return (loss + smoothing).to(loss.dtype)


# Compilers do not trace a generator, a guide, a group, nor the reference.
_outside_compiler: Callable[[dict[str, Any]], Tensor] = torch.compiler.disable(_eager_loss)  # type: ignore[no-untyped-call]
_outside_compiler_logsumexp: Callable[[dict[str, Any]], Tensor] = torch.compiler.disable(_eager_logsumexp)  # type: ignore[no-untyped-call]
