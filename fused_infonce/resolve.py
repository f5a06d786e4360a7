"""A call's arguments, checked and resolved before any work: the inputs, the options, dtypes and the backend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import backends, checks
from . import noise as noise_source
from .config import MUST_AGREE_ACROSS_RANKS, SMOOTHING_IS_ALONE, LossConfig, make_config, switch
from .distributed import Counts, Exchange, Facts, agree, choose_strategy
from .options import NoiseKind, Options, Similar
from .own_negatives import OwnNegatives, positives_limit

_COLUMNS = ("positives", "negatives", "queue")
# Options of a call without positives, see ``Options``.
WITHOUT_POSITIVES: dict[str, Any] = {"decoupled": True, "reduction": "none", "num_noise": 0}


@dataclass(slots=True, eq=False)
class Call:
    """What a backend is given."""

    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # anchors, positives, negatives, queue
    noise_rows: Tensor | None  # (M, D), where the caller gave them
    temperature: float | Tensor
    kappa_bound: float | None  # an upper bound of 1/τ that the host knows without waiting for a device
    options: Options
    dtype: torch.dtype  # of the inputs, promoted
    product_dtype: torch.dtype  # of the matrix products
    backend: Literal["triton", "torch", "reference"]
    own: OwnNegatives | None = None  # what ``own_log_sums`` was computed from, in a call that is not traced
    own_log_sums: Tensor | None = (
        None  # (N,) log O_i with its graph; None without own negatives, or in the reference
    )

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
    own_log_sums: Tensor | None = None  # (N,) of own hard negatives
    num_own: int = 0  # at most in a row


def resolve(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    *,
    queue: Tensor | None,
    temperature: float | Tensor,
    noise: str | Tensor,
    generator: torch.Generator | None,
    ids: Tensor | tuple[Tensor, Tensor] | None,
    negative_ids: Tensor | None,
    negative_owners: Tensor | None,
    guide: Sequence[Tensor] | None,
    traced: Traced | None = None,
    seed_on_cpu: bool = False,
    **options: Any,  # the other fields of LossConfig
) -> Call:
    """Returns the arguments of ``gs_infonce`` as a Call of one process; errors name what is wrong."""
    negatives, own = own_of(anchors, negatives, negative_owners)
    tensors = checks.check_inputs(anchors, positives, negatives, queue)
    noise_rows = checks.check_noise_vectors(noise, anchors) if isinstance(noise, Tensor) else None
    temperature = checks.check_temperature(temperature, anchors.device)
    checks.check_generator(generator)
    config = make_config({**options, "noise": noise if noise_rows is None else "sampled"})
    lengths = [0 if x is None else x.shape[0] for x in (anchors, negatives, queue)]
    counts, given_negatives = Counts(*lengths), None if negatives is None else lengths[1]
    if own is not None:
        negative_ids, given_negatives = own.flat_ids(negative_ids), own.rows.shape[:-1].numel()
        guide = own.taken_from(guide)
    ids, negative_ids = checks.check_both_ids(ids, negative_ids, given_negatives, counts.positives, anchors.device)
    similar = _filter(config, guide, tensors)
    if own is not None:
        own.ids, negative_ids = own.shaped(negative_ids), None
    _check_with_tensors(config, counts, ids, similar, own, traced)
    if traced is None and config.backend != "reference":
        given = [*tensors, temperature, noise, ids, negative_ids, *(guide or ())]
        checks.check_transforms(given if own is None else [*given, own.rows])

    wide = own.rows if own is not None else None if traced is None else traced.own_log_sums
    dtype = torch.float64 if wide is not None and wide.dtype == torch.float64 else _promoted(tensors)
    backend = backends.choose_backend(config.backend, anchors.device, dtype, anchors.shape[1])
    num_noise = config.num_noise if noise_rows is None else noise_rows.shape[0]
    kind: NoiseKind = config.noise if noise_rows is None else "given"
    if num_noise == 0 or config.noise_weight == 0:
        kind = "none"
    seed = None
    if kind == "sampled":
        seed = traced.seed if traced else _drawn_seed(backend, generator, anchors.device, seed_on_cpu)
    resolved = Options.of(config, num_noise, counts, kind, ids, negative_ids, similar, seed)
    product_dtype = _product_dtype(dtype, anchors.device.type, backend, traced)
    bound = None if backend == "reference" else _kappa_bound(temperature, config.min_temperature)
    inputs = (anchors, positives, negatives, queue)
    if resolved.noise_kind != "given":
        noise_rows = None
    call = Call(inputs, noise_rows, temperature, bound, resolved, dtype, product_dtype, backend, own)
    if traced is not None and traced.own_log_sums is not None:
        _with_own(call, traced.own_log_sums, traced.num_own)
    elif own is not None:
        log_sums = None
        if backend != "reference":
            log_sums = own_log_sums(own, anchors, positives, temperature, ids, similar, **vars(config))
        _with_own(call, log_sums, own.most)
    return call


def own_of(
    anchors: Tensor, negatives: Tensor | None, owners: Tensor | None
) -> tuple[Tensor | None, OwnNegatives | None]:
    """Returns the negatives that all anchors share, or those that are each anchor's own."""
    if owners is None and (not isinstance(negatives, Tensor) or negatives.ndim != 3):
        return negatives, None
    checks.check_matrix("anchors", anchors)
    return None, OwnNegatives(*checks.check_own_negatives(anchors, negatives, owners))


def own_log_sums(
    own: OwnNegatives,
    anchors: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    ids: Tensor | None,
    similar: Similar | None,
    *,
    hardness: float,
    hardness_mode: str,
    hard_negative_weight: float,
    **_: Any,  # the other fields of LossConfig
) -> Tensor:
    """log O_i of own hard negatives, (N,), differentiable; NaN where the temperature is no positive number."""
    limit, guide = positives_limit(anchors, positives, similar)
    if isinstance(temperature, Tensor):
        temperature = torch.where(temperature > 0, temperature, math.nan)
    if ids is not None and ids.ndim == 2:
        ids = ids[:, 1]  # a hard negative has a document's id
    return own.log_sum(
        anchors,
        temperature,
        hardness=0.0 if hardness_mode == "in_batch_negatives" else hardness,
        log_weight=hard_negative_weight,
        ids=ids,
        limit=limit,
        guide=guide,
    )


def _with_own(call: Call, log_sums: Tensor | None, most: int) -> None:
    """Adds what is known of own hard negatives to the call."""
    log_own = None if log_sums is None else log_sums.detach()[:, None]
    call.own_log_sums, call.options = log_sums, replace(call.options, log_own=log_own, num_own=most)


def resolve_without_positives(
    rows: Tensor,
    columns: Tensor,
    *,
    temperature: float | Tensor,
    row_ids: Tensor | tuple[Tensor, Tensor] | None,
    column_ids: Tensor | tuple[Tensor, Tensor] | None,
    exclude_diagonal: bool,
    log_weights: Tensor | None,
    filter_threshold: float | Tensor | None,
    guide: Sequence[Tensor] | None,
    traced: Traced | None = None,
    **options: Any,  # other fields of LossConfig
) -> Call:
    """Returns the arguments of ``cosine_logsumexp`` as a Call: the rows are anchors, the columns negatives."""
    tensors = checks.check_rows_and_columns(rows, columns)
    (N, D), T, device = rows.shape, columns.shape[0], rows.device
    temperature = checks.check_temperature(temperature, device)
    limit = None
    if isinstance(filter_threshold, Tensor):
        limit = checks.check_row_limits("filter_threshold", filter_threshold, N, device)
        filter_threshold = None
    config = make_config({**options, "filter_threshold": filter_threshold, **WITHOUT_POSITIVES})
    row_ids, column_ids = checks.check_row_and_column_ids(row_ids, column_ids, N, T, device)
    if log_weights is not None:
        log_weights = checks.check_log_weights(log_weights, T, device)
    similar = None if limit is None and filter_threshold is None else Similar(None, filter_threshold, None, limit)
    if guide is not None:
        if similar is None:
            raise ValueError("guide needs filter_threshold: the guide's cosines are compared with it")
        similar.guide = checks.check_guide(guide, tensors)
    exclude_diagonal = switch("exclude_diagonal", exclude_diagonal)
    if traced is None and config.backend != "reference":
        checks.check_transforms([*tensors, temperature, row_ids, column_ids, limit, log_weights, *(guide or ())])

    dtype = _promoted(tensors)
    backend = backends.choose_backend(config.backend, device, dtype, D)
    counts = Counts(0, T, 0, unpaired=N)
    resolved = Options.of(config, 0, counts, "none", row_ids, column_ids, similar, None, exclude_diagonal)
    if log_weights is not None:
        resolved = replace(resolved, log_weights=log_weights)
    bound = None if backend == "reference" else _kappa_bound(temperature, config.min_temperature)
    product_dtype = _product_dtype(dtype, device.type, backend, traced)
    return Call((rows, None, columns, None), None, temperature, bound, resolved, dtype, product_dtype, backend)


def _promoted(tensors: list[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = dtype if x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    return dtype


def _product_dtype(dtype: torch.dtype, device_type: str, backend: str, traced: Traced | None) -> torch.dtype:
    """That of autocast where it is on, but for float64; fp32 where a narrower one is slower."""
    autocast = autocast_dtype(device_type) if traced is None else traced.autocast_dtype
    chosen = dtype if dtype == torch.float64 or autocast is None else autocast
    narrow = chosen in (torch.bfloat16, torch.float16)
    if backend == "torch" and narrow and not backends.multiplies_faster(chosen, device_type):
        return torch.float32
    return chosen


def _drawn_seed(
    backend: str, generator: torch.Generator | None, device: torch.device, seed_on_cpu: bool
) -> Tensor:
    if backend == "triton" and not seed_on_cpu:
        return noise_source.draw_device_seed(generator, device)
    return noise_source.draw_seed(generator)


def _filter(config: LossConfig, guide: Any, tensors: list[Tensor]) -> Similar | None:
    """Returns which negatives are too similar; a guide without a filter has a margin of 0."""
    similar = Similar(config.filter_margin, config.filter_threshold, None) if config.filters else None
    if guide is None:
        return similar
    return replace(similar or Similar(0.0, None, None), guide=checks.check_guide(guide, tensors))


def _check_with_tensors(
    config: LossConfig,
    counts: Counts,
    ids: Tensor | None,
    similar: Similar | None,
    own: OwnNegatives | None,
    traced: Traced | None,
) -> None:
    """Raises ValueError for an option that the call's tensors do not allow."""
    none_are_own = own is None and (traced is None or traced.own_log_sums is None)
    if config.hardness and config.hardness_mode == "hard_negatives" and none_are_own:
        raise ValueError(
            "hardness_mode='hard_negatives' weighs own hard negatives, and none came: give negatives as (N, K, "
            "features), or with negative_owners"
        )
    if config.label_smoothing and not none_are_own:
        raise ValueError(
            "label_smoothing cannot be combined with own hard negatives: rows would spread it over different "
            "columns; leave one out, or give negatives as columns of every anchor (H, features)"
        )
    if config.hard_negative_weight and counts.negatives % counts.positives:
        raise ValueError(
            f"negatives: {counts.negatives} rows came, but with hard_negative_weight they must be a multiple of "
            f"the {counts.positives} anchors, row hN + i belonging to anchor i"
        )
    if config.label_smoothing and (ids is not None or similar is not None):
        raise ValueError(SMOOTHING_IS_ALONE)


def resolve_among(group: ProcessGroup, resolver: Callable[..., Call], **arguments: Any) -> Call:
    """Returns ``resolver``'s call with a process group: the ranks agree on what must be equal, and the seed is
    rank 0's.
    """
    try:
        call = resolver(**arguments)
        if call.backend == "reference":
            raise ValueError(
                "backend='reference' supports a single process only; use 'auto' or 'torch' with a group"
            )
        if arguments["guide"] is not None:
            raise ValueError(
                "guide supports a single process only; leave it out with a group, or filter without a guide"
            )
    except Exception as error:  # whatever it is, the others must not wait for this rank
        with contextlib.suppress(ValueError):  # the others' message
            agree(group, Facts({}, Counts(0, 0, 0), error=f"{type(error).__name__}: {error}"))
        raise
    options, needs = call.options, _needs(call)
    needs_own = call.own_log_sums is not None and call.own_log_sums.requires_grad
    facts = {
        "the number of features": call.inputs[0].shape[1],
        "the dtype": call.dtype,
        "the dtype of products (autocast, or the CPU)": call.product_dtype,
        "the device type": call.inputs[0].device.type,
        "the backend": call.backend,
        "temperature": _known(arguments["temperature"]),
        **{name: str(getattr(options, name)) for name in MUST_AGREE_ACROSS_RANKS},
        "noise": options.noise_kind,
        "whether there are positives": options.paired,
        "the number of ids per row": 0 if options.ids is None else options.ids.ndim,
        "whether negative_ids are given": (None if call.inputs[2] is None else options.negative_ids is not None),
        "whether log_weights are given": options.log_weights is not None,
        **{f"whether {name} need a gradient": need for name, need in needs.items()},
        "whether anything needs a gradient": any(needs.values()) or needs_own,
    }
    seed = None if options.seed is None else int(options.seed)
    call.options = _with_exchange(call, group, agree(group, Facts(facts, options.counts, seed)))
    return call


def _with_exchange(call: Call, group: ProcessGroup, everyone: list[Facts]) -> Options:
    options, counts = call.options, [other.counts for other in everyone]
    columns = sum(other.columns for other in counts)
    chosen: Literal["gather", "ring"] = "gather"  # a ring of one would send to itself
    if len(everyone) > 1:
        chosen = choose_strategy(options.strategy, columns, call.inputs[0].shape[1], call.product_dtype.itemsize)
    wants = {name for other in everyone for name in _COLUMNS if other.same[f"whether {name} need a gradient"]}
    masks_negatives = any(other.same["whether negative_ids are given"] for other in everyone)
    seed = None
    if options.seed is not None:
        seed = torch.tensor([everyone[0].seed]).to(_seed_device(call), non_blocking=True)
    return replace(
        options,
        exchange=Exchange(group, counts, frozenset(wants), chosen, masks_negatives),
        own_log_weight=options.hard_negative_weight if any(other.negatives for other in counts) else 0.0,
        seed=seed,
    )


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
