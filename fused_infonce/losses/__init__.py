"""Published contrastive losses, a function each, on ``cosine_logsumexp`` and the positives' exact cosines.

docs/losses.md lists them with formula, source and cost, and explains the algebra: one denominator per anchor,
whose terms add, each with masks and weights of its own, and the positive counted once.
"""

from ..own_negatives import log_add, pair_cosines
from .corrected import debiased, hcl
from .matryoshka import matryoshka
from .reports import embedding_gemma, focal, gemini_embedding, gistembed, gte, llave, qwen3_embedding
from .targets import clip, cross_entropy, soft_labels, supcon
from .terms import contrast, own_negatives

__all__ = [
    "clip",
    "contrast",
    "cross_entropy",
    "debiased",
    "embedding_gemma",
    "focal",
    "gemini_embedding",
    "gistembed",
    "gte",
    "hcl",
    "llave",
    "log_add",
    "matryoshka",
    "own_negatives",
    "pair_cosines",
    "qwen3_embedding",
    "soft_labels",
    "supcon",
]
