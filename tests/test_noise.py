"""The closed form of expected noise against scipy and against sampling; blocks of sampled noise."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import ive

from fused_infonce.noise import NOISE_BLOCK, log_mean_exp_cosine, num_blocks, sample_block


@pytest.mark.parametrize("D", [2, 3, 64, 384, 768, 1024])
@pytest.mark.parametrize("kappa", [0.1, 1.0, 20.0, 200.0, 1000.0])
def test_closed_form(D, kappa):
    log_c, rho = log_mean_exp_cosine(kappa, D)
    v = D / 2 - 1
    bessel = ive(v, kappa)
    if bessel > 1e-290:  # where scipy does not underflow
        want = math.lgamma(D / 2) + v * math.log(2 / kappa) + math.log(bessel) + kappa
        assert math.isclose(log_c, want, rel_tol=1e-10, abs_tol=2e-11)
        assert math.isclose(rho, ive(v + 1, kappa) / bessel, rel_tol=1e-9)
    slope = log_mean_exp_cosine(kappa * 1.0001, D)[0] - log_mean_exp_cosine(kappa * 0.9999, D)[0]
    assert math.isclose(rho, slope / (0.0002 * kappa), rel_tol=1e-4)


def test_known_values():
    assert math.isclose(math.exp(log_mean_exp_cosine(20.0, 768)[0]), 1.297, abs_tol=5e-4)
    assert math.isclose(math.exp(log_mean_exp_cosine(20.0, 384)[0]), 1.682, abs_tol=5e-4)
    assert math.isclose(math.exp(log_mean_exp_cosine(3.0, 1)[0]), math.cosh(3), rel_tol=1e-12)


def test_tensor_and_float_agree_and_the_tensor_has_a_gradient():
    kappa = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    log_c, rho = log_mean_exp_cosine(kappa, 20)
    assert math.isclose(log_c.item(), log_mean_exp_cosine(7.0, 20)[0])
    assert torch.allclose(torch.autograd.grad(log_c, kappa)[0], rho)


def test_blocks_are_normal_and_the_same_alone():
    M, D = 2 * NOISE_BLOCK + 100, 8
    args = (M, D, torch.float32, torch.device("cpu"))
    blocks = [sample_block(5, b, *args) for b in range(num_blocks(M))]
    assert [len(b) for b in blocks] == [NOISE_BLOCK, NOISE_BLOCK, 100]
    assert torch.equal(sample_block(5, 1, *args), blocks[1])
    assert not torch.equal(blocks[0], blocks[1])
    assert not torch.equal(sample_block(6, 0, *args), blocks[0])
    everything = torch.cat(blocks)
    assert abs(everything.mean()) < 0.03
    assert abs(everything.std() - 1) < 0.03
