"""Random directions: M Gaussian vectors, or the closed form of what infinitely many of them would add.

The noise of a call is a function of a seed and a row number, so any block of it can be generated alone, and again
in the backward pass: nothing of size M×D is ever kept.
"""

from __future__ import annotations

import functools
import hashlib
import math

import torch
from torch import Tensor

NOISE_BLOCK = 1024  # rows that are drawn at a time, and again alone
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of splitmix64 (Steele et al., 2014)
_WORD = 2**64 - 1
_TERMS = 2048  # of the series; enough for κ up to 1800


def draw_seed(generator: torch.Generator | None) -> Tensor:
    """A fresh seed on the host, (1,), from ``generator`` (default: torch's CPU generator; ``torch.manual_seed``).

    Nothing waits for a device: a device generator's state lives on the host.
    """
    if generator is None or generator.device.type == "cpu":
        return torch.randint(0, 2**62, (1,), generator=generator, device="cpu")
    state = generator.get_state().numpy().tobytes()
    torch.empty(1, device=generator.device).normal_(generator=generator)  # moves the state on
    digest = hashlib.blake2b(state, digest_size=8).digest()
    return torch.tensor([int.from_bytes(digest, "little") >> 2], device="cpu")


def draw_device_seed(generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A fresh seed on the device, (1,): nothing waits, and a captured graph draws a new one at each replay.

    ``generator`` may be the CPU's or the device's; default: the device's own, which ``torch.manual_seed`` sets.
    """
    if generator is not None and generator.device.type != device.type:
        return draw_seed(generator).to(device, non_blocking=True)
    return torch.randint(0, 2**62, (1,), generator=generator, device=device)


def sample_block(
    seed: Tensor,
    block: int,
    num_noise: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    out: Tensor | None = None,
) -> Tensor:
    """Rows [block·NOISE_BLOCK, …) of the ``num_noise`` standard normal vectors that ``seed`` stands for.

    A generator on a CPU takes 32 bits of its seed, so two draw one half each: together they depend on all of it.
    """
    rows = min(NOISE_BLOCK, num_noise - block * NOISE_BLOCK)
    if out is None:
        out = torch.empty(rows, D, dtype=dtype, device=device)
    mixed = _mixed(int(seed), block)
    for half, word in zip(out.view(-1).tensor_split(2), (mixed & 0xFFFFFFFF, mixed >> 32), strict=True):
        half.normal_(generator=torch.Generator(device).manual_seed(word))
    return out


def _mixed(seed: int, block: int) -> int:
    """64 bits that differ for every seed of a block: splitmix64, one to one in the seed."""
    x = (seed + (block + 1) * _MIX[0]) & _WORD
    x = ((x ^ x >> 30) * _MIX[1]) & _WORD
    x = ((x ^ x >> 27) * _MIX[2]) & _WORD
    return x ^ x >> 31


def sample_all(seed: Tensor, num_noise: int, D: int, device: torch.device) -> Tensor:
    """All the vectors at once, (M, D): for the reference."""
    blocks = range(num_blocks(num_noise))
    return torch.cat([sample_block(seed, b, num_noise, D, torch.float32, device) for b in blocks])


def num_blocks(num_noise: int) -> int:
    return -(-num_noise // NOISE_BLOCK)


def log_mean_exp_cosine(kappa: float | Tensor, D: int) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """log c_D(κ) and its derivative ρ, where c_D(κ) = E[e^(κ cos)] over directions uniform on the sphere in R^D.

    c_D(κ) = ₀F₁(; D/2; κ²/4), ρ = I_{D/2}(κ) / I_{D/2−1}(κ). Summed as a series in float64, where scipy's ``ive``
    underflows and ``hyp0f1`` overflows: errors below 2e-12 for D from 2 to 4096 and κ from 0.1 to 1800.
    Floats of a float; of a tensor 0-dim float64 tensors on its device, differentiable.
    """
    if isinstance(kappa, Tensor):
        return _series(kappa.to(torch.float64), D)
    return _series_of_float(kappa, D)


def _series(kappa: Tensor, D: int) -> tuple[Tensor, Tensor]:
    n = torch.arange(1, _TERMS + 1, dtype=torch.float64, device=kappa.device)
    log_terms = (2 * (kappa / 2).log() - (n * (n + (D / 2 - 1))).log()).cumsum(0)
    log_c = torch.logaddexp(log_terms.logsumexp(0), torch.zeros_like(kappa))
    mean_n = (n * (log_terms - log_c).exp()).sum()
    return log_c, mean_n * 2 / kappa


@functools.lru_cache(maxsize=64)
def _series_of_float(kappa: float, D: int) -> tuple[float, float]:
    if not 0 < kappa < math.inf:  # a temperature that a tensor held: NaN out, as everywhere
        return math.nan, math.nan
    log_c, rho = _series(torch.tensor(kappa, dtype=torch.float64, device="cpu"), D)
    return log_c.item(), rho.item()
