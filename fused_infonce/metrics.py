"""What to watch while training: alignment, uniformity, anisotropy, and what the loss is made up of."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import stats_of
from .checks import check_matrix
from .config import finite
from .functional import gs_infonce, info_nce, with_signature_of
from .geometry import unit_rows
from .resolve import resolve
from .smoothing import smoothing_term


def alignment(x: Tensor, y: Tensor, alpha: float = 2.0) -> Tensor:
    """Mean of ‖x̂_i − ŷ_i‖^α over pairs of rows, normalised first; lower is better.

    Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020. x, y: (N, D) floating point. Returns a differentiable 0-dim tensor; fp32, or fp64 for
    fp64 inputs.
    """
    check_matrix("x", x)
    check_matrix("y", y)
    if x.shape != y.shape:
        raise ValueError(
            f"x and y must be matrices of one shape (N, D), not {tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = F.normalize(x.to(dtype), dim=1), F.normalize(y.to(dtype), dim=1)
    if alpha == 2:  # the norm of equal rows has no second derivative, its square has
        return (x - y).square().sum(1).mean()
    distances: Tensor = torch.linalg.vector_norm(x - y, dim=1)
    return distances.pow(alpha).mean()


def uniformity(x: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean of e^(−t ‖x̂_i − x̂_j‖²) over pairs i < j of rows, normalised first; lower is better.

    Wang & Isola (ICML 2020). x: (N, D), N >= 2, no zero rows. Since ‖x̂_i − x̂_j‖² = 2 − 2 s_ij, it is the sum of
    InfoNCE's ratios of x with itself at τ = 1/(2t), and computed through the same tiles: O(N·D) memory,
    differentiable once. Returns a 0-dim tensor; fp32, or fp64 for fp64 inputs.
    """
    check_matrix("x", x)
    if x.is_meta:
        raise ValueError("x is on meta, where tensors have no values; move it to another device")
    N = _at_least_two_rows("x", x)
    t = finite("t", t)
    if not t > 0:
        raise ValueError(f"t must be > 0, not {t}")
    ratios = info_nce(x, x, temperature=1 / (2 * t), reduction="none").expm1()  # Σ_{j≠i} e^(2t(s_ij − 1)), (N,)
    return (ratios.sum() / (N * (N - 1))).log()


def anisotropy(x: Tensor) -> dict[str, Tensor]:
    r"""How far the rows of x, normalised first, crowd into a narrow cone: their mean cosine and their spectrum.

    With W the matrix of the unit rows x̂_i, σ_1 >= … >= σ_r its singular values, r = min(N, D), and
    p_k = σ_k / Σ_l σ_l, the result holds these 0-dim tensors, all without a unit:

    - ``mean_cosine``: the mean of x̂_i · x̂_j over pairs i < j, (‖Σ_i x̂_i‖² − Σ_i ‖x̂_i‖²) / (N(N − 1)); 0 for rows
      spread evenly, 1 for collapsed ones (Ethayarajh, EMNLP 2019, measures contextual vectors so);
    - ``top_singular_share``: p_1, the share of the largest singular value in their sum, from 1/r to 1;
    - ``top_eigenvalue_share``: σ_1² / Σ_k σ_k², the share of the largest eigenvalue in the trace of WWᵀ, from 1/r
      to 1. It is at least the mean of all entries of WWᵀ;
    - ``effective_rank``: exp(−Σ_k p_k log p_k), from 1 to r (Roy & Vetterli, EUSIPCO 2007).

    The rows are not centred: a common direction of all rows is what is measured.

    Args:
        x: (N, D), N >= 2; float64, float32, bfloat16 or float16, any strides. A zero row has cosine 0 to others.

    Returns:
        Tensors in fp32, or fp64 for fp64 inputs. NaN or Inf in x gives NaN; without any row but zero rows the
        spectrum's figures are NaN. For fp32 inputs the singular values are within about 1e-7 σ_1 of exact ones.

    Memory is O(N·D): the singular values come from W itself, not from a product with its transpose, which would
    lose half of the digits of small ones. Differentiable, also where singular values are equal, with these limits:

    - where σ_1 = σ_2, ``top_singular_share`` and ``top_eigenvalue_share`` have several gradients; one is returned;
    - singular values that rounding alone may have made, at most eps · r · σ_1, are constants to the gradients: the
      slope of ``effective_rank`` is infinite at 0, and its direction would be that of rounding errors;
    - second derivatives and forward mode are those of ``torch.linalg.svdvals``: singular values must be distinct.

    On a GPU the decomposition waits for the device, so call it at evaluations, not at every step.

    Raises:
        ValueError, TypeError: x is not a dense floating-point matrix of at least two rows.
    """
    check_matrix("x", x)
    N = _at_least_two_rows("x", x)
    unit = unit_rows(x, torch.promote_types(x.dtype, torch.float32))
    nothing = unit.sum() * 0  # NaN where a row is not finite, which svdvals raises an error for on a CPU
    values = torch.linalg.svdvals(torch.where(nothing.isnan(), 0.0, unit)) + nothing  # (r,)
    rounding = torch.finfo(values.dtype).eps * min(x.shape) * values.detach()[0]
    values = torch.where(values <= rounding, values.detach(), values)
    shares, squares = values / values.sum(), values.square()
    surprise = -torch.where(shares == 0, 1.0, shares).log()
    total = unit.sum(0)
    return {
        "mean_cosine": (total.square().sum() - unit.square().sum()) / (N * (N - 1)),
        "top_singular_share": shares[0],
        "top_eigenvalue_share": squares[0] / squares.sum(),
        "effective_rank": (shares * surprise).sum().exp(),
    }


def asymptotic_terms(anchors: Tensor, positives: Tensor, temperature: float | Tensor = 0.05) -> dict[str, Tensor]:
    r"""The two terms that InfoNCE − log N tends to as N grows, and Jensen's lower bound of the second; in nats.

    .. math::
        \lim_{N \to \infty} \mathcal{L} - \log N
        = \underbrace{-\frac{1}{\tau}\, \mathbb{E}_{(q, k)}\, \hat q \cdot \hat k}_{\text{alignment}}
        + \underbrace{\mathbb{E}_{q} \log \mathbb{E}_{k'}\, e^{\hat q \cdot \hat k'/\tau}}_{\text{uniformity}}

    where (q, k) is a pair and k' a positive drawn without regard to q (Wang & Isola, ICML 2020, theorem 1; SimCSE,
    Gao et al., EMNLP 2021, equations 6 and 7). With s_ij the cosine of anchor i and positive j, the result holds
    estimates of them as 0-dim tensors:

    - ``alignment``: −(1/τ) mean_i s_ii. Wang & Isola's distance is another scale of it:
      ``alignment(anchors, positives)`` is 2 − 2 mean_i s_ii;
    - ``uniformity``: mean_i log (1/(N − 1)) Σ_{j≠i} e^(s_ij/τ). The anchor's own positive is left out: it is
      not drawn without regard to q, and at τ = 0.05 its e^(s_ii/τ) would outweigh millions of others. Where both
      inputs are x, this is at most ``uniformity(x, t=1/(2τ))`` + 1/τ, by Jensen's inequality once more;
    - ``bound`` <= ``uniformity``: (1/τ) Σ_{i≠j} s_ij / (N(N − 1)), for any data. Where both inputs are x, with
      unit rows W, it is (Sum(WWᵀ) − N) / (τN(N − 1)): the sum of all entries but for constants.

    On a batch of N rows InfoNCE − log(N − 1) exceeds ``alignment`` + ``uniformity`` by exactly
    mean_i log(1 + 1/R_i), R_i = Σ_{j≠i} e^((s_ij − s_ii)/τ), which falls as 1/N. The sampling error of the
    estimates is O(N^(−1/2)).

    Args:
        anchors: (N, D), N >= 2; float64, float32, bfloat16 or float16, any strides.
        positives: (N, D); row i belongs to anchor i.
        temperature: τ > 0, a float or a tensor of one element, which then gets a gradient if it requires one. NaN
            or a value <= 0 in a tensor gives NaN.

    Returns:
        Tensors in fp32, or fp64 for fp64 inputs. NaN or Inf in an input gives NaN. A zero row has cosine 0 to all.

    Memory is O(N·D) and the workspace of :func:`info_nce`, whose sweep computes ``uniformity``; the rows are this
    process's. Differentiable once, in reverse mode; what :func:`info_nce` refuses is refused here.

    Raises:
        ValueError, TypeError: as :func:`info_nce`, and for fewer than two rows.
        NotImplementedError: forward-mode differentiation or a transform of torch.func.
    """
    check_matrix("anchors", anchors)
    N = _at_least_two_rows("anchors", anchors)
    log_ratios = info_nce(anchors, positives, temperature=temperature, decoupled=True)  # mean_i log R_i
    q, k = unit_rows(anchors, log_ratios.dtype), unit_rows(positives, log_ratios.dtype)
    kappa: float | Tensor
    if isinstance(temperature, Tensor):
        tau = temperature.reshape(()).to(log_ratios)
        kappa = torch.where(tau > 0, tau, math.nan).reciprocal()
    else:
        kappa = 1 / float(temperature)
    positive = (q * k).sum()
    aligned = kappa * (positive / N)
    others = (q.sum(0) * k.sum(0)).sum() - positive  # Σ_{i≠j} s_ij; no product, which autocast would round
    return {
        "alignment": -aligned,
        "uniformity": log_ratios + aligned - math.log(N - 1),
        "bound": kappa * (others / (N * (N - 1))),
    }


def _at_least_two_rows(name: str, x: Tensor) -> int:
    """The number of rows; ValueError where there is no pair of them."""
    if x.shape[0] < 2:
        raise ValueError(f"{name} must be a matrix (N, D) with at least two rows, not {tuple(x.shape)}")
    return x.shape[0]


@with_signature_of(
    gs_infonce, without=("symmetric", "reduction", "group", "strategy", "backend", "min_temperature")
)
@torch.no_grad()
def contrastive_stats(*args: Any, **options: Any) -> dict[str, Tensor]:
    """What :func:`gs_infonce` sees with the same arguments, from one product and without gradients.

    Returns 0-dim tensors on the inputs' device (nothing waits for it):

    - ``loss``: the loss, mean over anchors, in nats;
    - ``noise_share``: mean share of the denominator that is noise. With the paper's numbers it is small, since
      e^(s_ii/τ) dominates: about 1e-5 for a well-aligned pair;
    - ``accuracy``: share of anchors whose positive is at least as similar as every in-batch negative (rounding
      decides between equals);
    - ``positive_cosine``, ``negative_cosine``: means over the positives and the in-batch negatives;
    - ``alignment``: of anchors and positives, α = 2 (Wang & Isola 2020);
    - ``uniformity``: log of the mean of e^(−2 ‖q̂_i − k̂_j‖²) over the in-batch negatives (i, j): where both sides
      are views of the same data an estimate of ``uniformity(anchors)``, without its extra product.

    The arguments are those of :func:`gs_infonce` that have a meaning for one direction, one process and the mean.
    Pairs masked by ``ids`` count in none of them; without in-batch negatives the last two are NaN.
    """
    bound = inspect.signature(gs_infonce).bind(*args, **options)
    bound.apply_defaults()
    arguments = {**bound.arguments, "reduction": "none", "backend": "torch"}
    del arguments["group"]
    call = resolve(**arguments)
    with torch.autocast(call.inputs[0].device.type, enabled=False):
        stats = stats_of(call)
        if call.options.label_smoothing:
            stats["loss"] = stats["loss"] + smoothing_term(
                call.inputs,
                call.temperature,
                label_smoothing=call.options.label_smoothing,
                angular_margin=call.options.angular_margin,
                symmetric=False,
                reduction="mean",
                dtype=stats["loss"].dtype,
            )
    return stats
