"""Rows of every norm, and offsets of every size: no intermediate product leaves fp32's range."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils._python_dispatch
from helpers import loss_and_grads, relative_error, rows

from fused_infonce import autograd, info_nce

N, D, H = 24, 16, 48
BACKENDS = {"dense": {"backend": "torch"}, "tiled": {"backend": "torch", "workspace_bytes": 20_000}}
BACKENDS["triton"] = {"backend": "triton", "workspace_bytes": 3_000}
WAYS = {
    "plain": {"temperature": 0.05},
    "offset": {"temperature": 0.02},
    "row maximum": {"temperature": 0.005},
    "decoupled": {"decoupled": True, "temperature": 1.0},
    "decoupled, small": {"decoupled": True, "temperature": 0.02},
    "margin": {"angular_margin": 0.3, "temperature": 0.02},
    "none": {"reduction": "none", "temperature": 0.05},
    "symmetric": {"symmetric": True, "temperature": 0.05},
}


def options_for(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    return BACKENDS[backend]


SCALED = [(backend, way, norm) for backend in ("dense", "tiled") for way in WAYS for norm in (1e-18, 1e10, 1e18)]
SCALED += [("triton", way, 1e12) for way in ("plain", "decoupled", "margin")]  # the interpreter is slow


@pytest.mark.parametrize(("backend", "way", "norm"), SCALED)
@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_scale_with_one_over_the_norm(backend, way, norm, product, monkeypatch):
    """The loss does not depend on the norms, so the gradient of s·x is that of x over s: also where s is huge."""
    monkeypatch.setattr(autograd, "SMALL_PRODUCT", 0)
    inputs = [rows(n, D, seed=s, dtype=torch.float32) for s, n in enumerate((N, N, H))]
    upstream = rows(N, seed=6, dtype=torch.float32) if way == "none" else None
    options = {"num_noise": 0, **WAYS[way], **options_for(backend)}
    with torch.autocast("cpu", torch.bfloat16, enabled=product == torch.bfloat16):
        plain = loss_and_grads(inputs, upstream, **options)
        scaled = loss_and_grads([x * norm for x in inputs], upstream, **options)
    assert relative_error(scaled[0], plain[0]) < (1e-5 if product == torch.float32 else 1e-2)
    for name, a, b in zip(("anchors", "positives", "negatives"), scaled[1:], plain[1:], strict=True):
        assert relative_error(a.double() * norm, b) < (2e-5 if product == torch.float32 else 2e-2), name


MARGINS = [
    (b, tau, m) for b in ("dense", "tiled") for tau in (0.002, 0.0136, 0.05, 1.0) for m in (0.1, 1.5, 2.9, 3.1)
]
MARGINS += [("triton", 0.0136, 2.9), ("triton", 0.05, 3.1)]


@pytest.mark.parametrize(("backend", "temperature", "margin"), MARGINS)
def test_identical_rows_under_a_margin_have_finite_gradients(backend, temperature, margin):
    same = rows(1, D, seed=1, dtype=torch.float32).expand(N, D).clone()
    pairs = rows(N, D, seed=2, dtype=torch.float32)
    for q, k in ((same, same.clone()), (pairs, pairs.clone())):
        for decoupled in (False, True):
            found = loss_and_grads(
                [q, k], num_noise=0, angular_margin=margin, temperature=temperature, decoupled=decoupled,
                **options_for(backend),
            )  # fmt: skip
            assert all(x.isfinite().all() for x in found), decoupled


@pytest.mark.parametrize(
    "noise", [{"num_noise": 0}, {"noise": rows(2100, D, seed=5)}, {"noise": "expected"}], ids=str
)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 2e-3, 5e-3, 0.01, 0.02])
def test_one_pass_with_the_row_s_maximum_at_every_temperature(temperature, decoupled, noise, monkeypatch):
    """Blocks of noise come first, so maxima grow and what was summed is scaled again."""
    from fused_infonce.tiled import two_pass

    monkeypatch.setattr(two_pass, "losses", lambda *_: pytest.fail("two passes"))
    for masked in (False, True):
        options = {"temperature": torch.tensor(temperature, dtype=torch.float64), "decoupled": decoupled, **noise}
        if masked:
            options["ids"] = torch.arange(N).clamp(min=N - 2)  # two rows have no negatives but each other
        inputs = [rows(N, D, seed=s) for s in (1, 2)]
        found = loss_and_grads(inputs, backend="torch", workspace_bytes=20_000, **options)
        want = loss_and_grads(inputs, backend="reference", **options)
        for a, b in zip(found, want, strict=True):
            assert relative_error(a, b) < 1e-10 * max(1, 0.05 / temperature)


def test_small_losses_keep_their_digits_under_an_offset():
    """log1p of a sum far below the offset: log(e^−o + S) + o would lose it."""
    q = torch.eye(8, 8)
    k = q + 1e-3 * rows(8, 8, seed=1).float()
    for temperature in (0.02, 0.03, 0.05):
        tau = torch.tensor(temperature, dtype=torch.float64)
        found = loss_and_grads([q, k], num_noise=0, temperature=tau, backend="torch", workspace_bytes=1000)
        want = loss_and_grads([q.double(), k.double()], num_noise=0, temperature=tau, backend="reference")
        assert 0 < want[0] < math.exp(-0.9 / temperature) * 8
        for a, b in zip(found, want, strict=True):
            assert relative_error(a / want[0].clamp(min=1e-30), b / want[0].clamp(min=1e-30)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"symmetric": True}], ids=str)
@pytest.mark.parametrize("n", [300, 900], ids=["dense", "tiled"])
def test_no_subnormal_number_reaches_a_product(n, options, monkeypatch):
    """They would make a step at τ = 0.005 on a CPU 37 times slower, and are far below any sum's rounding."""
    seen = []
    tiny = torch.finfo(torch.float32).tiny

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name().split("::")[1].split(".")[0] in ("mm", "addmm"):
                for x in args:
                    if isinstance(x, torch.Tensor) and x.shape[0] * x.shape[1] == n * n:
                        seen.append(((x.abs() < tiny) & (x != 0)).sum().item())
            return func(*args, **(kwargs or {}))

    q, k = (rows(n, 32, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    loss = info_nce(q, k, temperature=0.005, backend="torch", **options)
    with Watch():
        loss.sum().backward()
        torch.autograd.grad(info_nce(q, k, temperature=0.005, backend="torch", **options).sum(), q)
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("tau", [0.001, 0.005, 0.01, 0.0103])
@pytest.mark.parametrize("spread", [0.4, 4.0], ids=["trained", "random"])
def test_small_temperatures_sum_normal_numbers(tau, spread, monkeypatch):
    """Ratios are tiny there; a CPU takes many times as long for products whose operands or sums are subnormal."""
    from fused_infonce.tiled.torch_backend import TorchBackend

    seen, product = [], TorchBackend.grad_products

    def checked(self, tile, keys, acc_rows, add_rows, columns, anchors, acc, **options):
        product(self, tile, keys, acc_rows, add_rows, columns, anchors, acc, **options)
        seen.extend(x.clone() for x in (tile, anchors, acc_rows, acc.grad))

    monkeypatch.setattr(TorchBackend, "grad_products", checked)
    q = rows(400, 96, seed=1, dtype=torch.float32)
    inputs = [q, q + spread * rows(400, 96, seed=2, dtype=torch.float32)]
    options = {"num_noise": 0, "temperature": torch.tensor(tau)}
    found = loss_and_grads(inputs, backend="torch", workspace_bytes=200_000, **options)
    assert len(seen) > 4, "the batch is not dense"
    tiny = torch.finfo(torch.float32).tiny
    for x in seen:
        assert ((x != 0) & (x.abs() < tiny)).sum() <= 1e-4 * x.numel()
    want = loss_and_grads([x.double() for x in inputs], backend="reference", **options)
    for a, b in zip(found, want, strict=True):
        if b.norm() > 1e-30:  # elsewhere fp32 has no digits left
            assert relative_error(a * 1e20, b * 1e20) < 2e-5
