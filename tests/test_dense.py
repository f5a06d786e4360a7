"""The dense path of small batches: every option against the reference and against the tiled path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import loss_and_grads, relative_error, rows

from fused_infonce import backends, dense, gs_infonce, info_nce

DECIDE = backends.multiplies_faster  # before conftest.py replaces it
N, D, H, Q, M, G = 17, 12, 34, 5, 9, 7
VARIANTS = {
    "plain": {},
    "decoupled": {"decoupled": True},
    "margin": {"angular_margin": 0.3},
    "hardness": {"hardness": 4.0},
    "filter": {"filter_margin": 0.05, "filter_threshold": 0.3},
    "guide": {"guide": [rows(n, G, seed=20 + i) for i, n in enumerate((N, N, H, Q))], "filter_threshold": 0.7},
    "all": {"decoupled": True, "angular_margin": 0.2, "hardness": 3.0, "filter_margin": 0.1},
}
NOISE = {
    "none": {"num_noise": 0},
    "given": {"noise": rows(M, D, seed=5)},
    "expected": {"noise": "expected", "num_noise": 50},
}


def leaves(dtype=torch.float64):
    return [rows(n, D, seed=s, dtype=dtype) for s, n in enumerate((N, N, H))]


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_is_the_reference_and_the_tiled_path(name, symmetric, noise, monkeypatch):
    for reduction, tau, own in itertools.product(("mean", "sum", "none"), (2e-3, 0.02, 0.05, 10.0), (0.0, 1.3)):
        options = {
            "queue": rows(Q, D, seed=4), "temperature": torch.tensor(tau, dtype=torch.float64),
            "hard_negative_weight": own, "symmetric": symmetric, "reduction": reduction, "noise_weight": 0.7,
            **NOISE[noise], **VARIANTS[name],
        }  # fmt: skip
        if own:
            options |= {"ids": torch.arange(N) // 2, "negative_ids": torch.arange(H) % 12}
        upstream = rows(N, seed=6) if reduction == "none" else None
        found = loss_and_grads(leaves(), upstream, backend="torch", **options)
        want = loss_and_grads(leaves(), upstream, backend="reference", **options)
        with monkeypatch.context() as patch:
            patch.setattr(dense, "MAX_LOGITS", 0)
            tiled = loss_and_grads(leaves(), upstream, backend="torch", **options)
        limit = 1e-10 * max(1, 0.05 / tau)
        for a, b, c in zip(found, want, tiled, strict=True):
            assert relative_error(a, b) < limit, (reduction, tau, own)
            assert relative_error(a, c) < limit, (reduction, tau, own)


def test_which_batches_are_dense_follows_from_shapes_alone(monkeypatch):
    """Not from the temperature, the options or the values: a run gives the same bits whatever is in it."""
    seen = []
    losses = dense.losses
    monkeypatch.setattr(dense, "losses", lambda call, *rest: seen.append(1) or losses(call, *rest))

    def is_dense(n, d, m=0, **options):
        seen.clear()
        q, k = (rows(n, d, seed=s, dtype=torch.float32) for s in (1, 2))
        gs_infonce(q, k, num_noise=m, **options)
        return bool(seen)

    side = math.isqrt(dense.MAX_LOGITS)
    for options in ({}, {"temperature": 0.002}, {"symmetric": True}, {"reduction": "none"}, {"decoupled": True}):
        assert is_dense(side, 8, **options)
        assert not is_dense(side + 1, 8, **options)
    assert not is_dense(side, 8, m=2)
    assert is_dense(side, 8, m=2, noise="expected")  # adds no column
    assert not is_dense(2, 8, m=dense.MAX_ELEMENTS // 8)  # noise vectors of any number are not all held at once
    assert not is_dense(64, 8, workspace_bytes=1000)
    assert not is_dense(64, 8, backend="reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["plain", "margin", "hardness", "decoupled"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
def test_products_of_half_precision(name, symmetric, dtype):
    """Products rounded to 8 or 11 bits, all else in fp32: gradients within a few roundings."""
    q, k = (rows(300, 400, seed=s, dtype=dtype) for s in (1, 2))
    options = {"num_noise": 0, "symmetric": symmetric, "temperature": torch.tensor(0.1), **VARIANTS[name]}
    found = loss_and_grads([q, k], backend="torch", **options)
    want = loss_and_grads([q.double(), k.double()], backend="reference", **options)
    for i, (a, b) in enumerate(zip(found[:3], want[:3], strict=True)):
        assert relative_error(a, b) < (1e-3 if i == 0 else 6e-3)
    assert relative_error(found[1], want[1]) > 1e-5  # it did round


@pytest.mark.parametrize("factor", [1e-8, 1e8])
@pytest.mark.parametrize("options", [{}, {"decoupled": True}, {"temperature": 0.002}], ids=str)
def test_an_upstream_factor_of_any_size_scales_the_gradients(factor, options):
    q, k = (rows(20, 6, seed=s, dtype=torch.float32) for s in (1, 2))
    plain = loss_and_grads([q, k], num_noise=0, **options)
    scaled = loss_and_grads([q, k], torch.tensor(factor), num_noise=0, **options)
    for a, b in zip(scaled[1:], plain[1:], strict=True):
        assert relative_error(a / factor, b) < 1e-5


def test_tensors_of_the_caller_may_change_between_forward_and_backward():
    """The dense path reads none of them again; what it does not read cannot be wrong."""
    for name, make, options in (
        ("ids", lambda: torch.arange(8) // 2, {"symmetric": True}),
        ("guide", lambda: [rows(8, 3, seed=3), rows(8, 3, seed=4)], {"reduction": "none"}),
        ("noise", lambda: rows(6, 5, seed=5), {}),
    ):
        q, k, given = rows(8, 5, seed=1).requires_grad_(), rows(8, 5, seed=2), make()
        call = info_nce if name != "noise" else gs_infonce
        want = torch.autograd.grad(call(q, k, **{name: make()}, **options).sum(), q)[0]
        loss = call(q, k, **{name: given}, **options).sum()
        for x in given if isinstance(given, list) else [given]:
            x.mul_(-3).add_(1)
        assert torch.equal(torch.autograd.grad(loss, q)[0], want), name


@pytest.mark.parametrize("n", [300, 900], ids=["dense", "tiled"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_where_half_precision_is_slower_products_are_fp32(n, symmetric, dtype, monkeypatch):
    """So the loss is that of fp32, and gradients differ by no more than the rounding to their own dtype."""
    monkeypatch.setattr(backends, "multiplies_faster", lambda dtype, device_type: False)
    q, k = (rows(n, 64, seed=s, dtype=dtype) for s in (1, 2))
    options = {"num_noise": 0, "symmetric": symmetric, "temperature": torch.tensor(0.1)}
    found = loss_and_grads([q, k], backend="torch", **options)
    want = loss_and_grads([q.double(), k.double()], backend="reference", **options)
    assert relative_error(found[0], want[0]) < 1e-6
    for a, b in zip(found[1:3], want[1:3], strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b.to(dtype)) < 4 * torch.finfo(dtype).eps * 1e-2  # few round to another neighbour
    assert relative_error(found[3], want[3]) < 1e-6


def test_which_devices_multiply_half_precision_faster(monkeypatch):
    function = DECIDE.__wrapped__
    for machine, amx, avx512_bf16, vendor, bf16, fp16 in (
        ("x86_64", False, False, "GenuineIntel", False, False),
        ("x86_64", False, True, "GenuineIntel", False, False),
        ("x86_64", False, True, "AuthenticAMD", True, False),
        ("AMD64", True, True, "GenuineIntel", True, True),
        ("aarch64", False, False, "", True, True),
    ):
        monkeypatch.setattr(backends.platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx512_bf16: found)
        monkeypatch.setattr(backends, "_cpu_vendor", lambda vendor=vendor: vendor)
        assert function(torch.bfloat16, "cpu") is bf16
        assert function(torch.float16, "cpu") is fp16
        assert function(torch.float16, "cuda")
