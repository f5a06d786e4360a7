"""InfoNCE and GS-InfoNCE over cosine similarities without the N×M matrix, and their metrics."""

from . import _checkout  # noqa: F401 (before whatever imports the kernels)
from .functional import cosine_logsumexp, gs_infonce, info_nce
from .metrics import alignment, anisotropy, asymptotic_terms, contrastive_stats, uniformity
from .module import GSInfoNCELoss

__all__ = [
    "GSInfoNCELoss",
    "alignment",
    "anisotropy",
    "asymptotic_terms",
    "contrastive_stats",
    "cosine_logsumexp",
    "gs_infonce",
    "info_nce",
    "uniformity",
]
__version__ = "0.2.0"  # pyproject.toml reads it from here
