"""What to watch while training: alignment, uniformity, and how the loss's denominator is made up."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .api import info_nce
from .arguments import check_matrix, finite, resolve
from .function import stats_of


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
    if x.shape[0] < 2:
        raise ValueError(f"x must be a matrix (N, D) with at least two rows, not {tuple(x.shape)}")
    t = finite("t", t)
    if not t > 0:
        raise ValueError(f"t must be > 0, not {t}")
    N = x.shape[0]
    ratios = info_nce(x, x, temperature=1 / (2 * t), reduction="none").expm1()  # Σ_{j≠i} e^(2t(s_ij − 1)), (N,)
    return (ratios.sum() / (N * (N - 1))).log()


@torch.no_grad()
def contrastive_stats(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    queue: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    num_noise: int = 192,
    noise_weight: float = 1.0,
    noise: Literal["sampled", "expected"] | Tensor = "sampled",
    generator: torch.Generator | None = None,
    hard_negative_weight: float = 0.0,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    workspace_bytes: int | None = None,
) -> dict[str, Tensor]:
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

    Pairs masked by ``ids`` count in none of them; without in-batch negatives the last two are NaN.
    """
    call = resolve(
        anchors,
        positives,
        negatives,
        queue=queue,
        temperature=temperature,
        min_temperature=None,
        num_noise=num_noise,
        noise_weight=noise_weight,
        noise=noise,
        generator=generator,
        hard_negative_weight=hard_negative_weight,
        ids=ids,
        negative_ids=negative_ids,
        symmetric=False,
        reduction="none",
        backend="torch",
        workspace_bytes=workspace_bytes,
    )
    with torch.autocast(anchors.device.type, enabled=False):
        return stats_of(call)
