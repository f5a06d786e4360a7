"""InfoNCE and GS-InfoNCE over cosine similarities without the N×M matrix, and their metrics."""

from .api import gs_infonce, info_nce
from .loss import GSInfoNCELoss
from .metrics import alignment, contrastive_stats, uniformity

__all__ = ["GSInfoNCELoss", "alignment", "contrastive_stats", "gs_infonce", "info_nce", "uniformity"]
