"""Unit rows, and the angle between a pair of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_SINE = 1e-6  # of equal rows, whose gradient has no direction


def unit_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x̂, differentiable; a row whose norm is 0 in ``dtype`` becomes zero and has gradient 0. → (n, D)"""
    x = x.to(dtype)
    zero = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) == 0
    return F.normalize(torch.where(zero, torch.ones_like(x), x), dim=1, eps=0).masked_fill(zero, 0)


def cosine_with_margin(s: Tensor, half_squared_chord: Tensor, zero: Tensor, m: float) -> tuple[Tensor, Tensor]:
    """cos(θ + m) = s cos m − sin θ sin m in the place of s = cos θ, and its derivative in s.

    sin²θ = 1 − s² comes from ½‖q̂ − k̂‖² = 1 − s: from s itself nothing would be left of it for close pairs.
    zero: where one of the rows is, and θ a right angle.
    """
    square = half_squared_chord * (2 - half_squared_chord)
    sine = torch.where(zero, 1.0, square).clamp(min=_LEAST_SINE**2).sqrt()
    return s * math.cos(m) - sine * math.sin(m), math.cos(m) + s / sine * math.sin(m)
