"""The symmetric loss where the workspace holds all products: three of them instead of four, the same results."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, COMPARABLE, NOISE, LossCase, both
from helpers import loss_and_grads, relative_error, rows
from torch.utils.flop_counter import FlopCounterMode

from fused_infonce import autograd, dense, gs_infonce, info_nce
from fused_infonce.tiled.torch_memory import TorchMemory

N, D = 37, 24
HELD, NOT_HELD = {"workspace_bytes": 1 << 20}, {"workspace_bytes": 20_000}


@pytest.fixture(autouse=True)
def answers(monkeypatch):
    """What each call was told: whether the workspace holds its products."""
    found = []
    real = TorchMemory.kept_products

    def spy(self, *sizes):
        products = real(self, *sizes)
        found.append(products is not None)
        return products

    monkeypatch.setattr(dense, "MAX_LOGITS", 0)  # tiles at any size
    monkeypatch.setattr(TorchMemory, "kept_products", spy)
    return found


def against_reference(case, dtype, temperature, answers):
    answers.clear()
    ours, want = both(case, "torch", N, D, dtype, workspace_bytes=1 << 20, temperature=temperature)
    assert answers == [True]
    limit = (1e-11 if dtype == torch.float64 else 1e-5) * max(1, 0.05 / temperature)
    last = None if dtype == torch.float64 else -1  # dτ may cancel: test_accuracy holds it to its own scale
    for a, b in zip(ours[:last], want, strict=False):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < limit


SYMMETRIC = [
    name
    for name in COMPARABLE
    if CASES[name].options.get("symmetric") and CASES[name].options.get("reduction") != "none"
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_every_symmetric_case(name, dtype, answers):
    against_reference(CASES[name], dtype, CASES[name].options.get("temperature", 0.05), answers)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 0.05, 10.0])
def test_every_combination(reduction, temperature, answers):
    for noise, more, ids in itertools.product(NOISE, (False, True), (False, True)):
        options = {"symmetric": True, "reduction": reduction, "noise_weight": 0.7, **NOISE[noise]}
        options["hard_negative_weight"] = 1.3 if more else 0.0
        case = LossCase(options, negatives=2 * more, queue=more, ids=ids)
        against_reference(case, torch.float64, temperature, answers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(dtype, answers, monkeypatch):
    """The products are kept as rounded as they are multiplied, so nothing is lost."""
    monkeypatch.setattr(autograd, "SMALL_PRODUCT", 0)  # whose products run in fp32
    inputs = [rows(256, 300, seed=s, dtype=dtype) for s in (1, 2)]
    options = {"symmetric": True, "num_noise": 0, "temperature": torch.tensor(0.1)}
    kept = loss_and_grads(inputs, backend="torch", workspace_bytes=8 << 20, **options)
    anew = loss_and_grads(inputs, backend="torch", workspace_bytes=200_000, **options)
    want = loss_and_grads([x.double() for x in inputs], backend="reference", **options)
    assert answers == [True, False]
    for a, b, exact in zip(kept[:3], anew[:3], want[:3], strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, exact) < 6e-3
        assert relative_error(a, exact) < 1.3 * relative_error(b, exact) + 1e-7


def products_of(n, workspace_bytes, **options):
    """How many products of N rows, N columns and D features the loss and its gradients take."""
    inputs = [rows(n, 64, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2)]
    with FlopCounterMode(display=False) as counter:
        info_nce(*inputs, symmetric=True, workspace_bytes=workspace_bytes, **options).backward()
    return counter.get_total_flops() / (2 * n * n * 64)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.002}, {"decoupled": True}, {"hardness": 2.0}], ids=str)
def test_three_products_by_count(options):
    assert 3 <= products_of(400, 4 << 20, **options) < 3.05
    assert 4 <= products_of(400, 1 << 18, **options) < 4.05


def test_what_the_workspace_must_hold(answers):
    """All products, the anchors of a tile and a block of noise: a third of the bytes that were asked for."""
    q, k = (rows(100, 16, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    for columns, noise in ((100, {"num_noise": 0}), (100 + 50, {"num_noise": 50})):
        held = 3 * 4 * 100 * (columns + 16)
        for workspace_bytes in (held, held - 12):
            gs_infonce(q, k, symmetric=True, workspace_bytes=workspace_bytes, **noise)
        assert answers == [True, False]
        answers.clear()
    gs_infonce(q, k, symmetric=True, reduction="none", **HELD)  # rows' gradients need not be equal
    with torch.no_grad():
        gs_infonce(q, k, symmetric=True, **HELD)  # there is no second pass
    assert answers == []


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=5))[1:])
def test_only_the_gradients_that_are_wanted(wanted):
    tensors = [rows(n, 6, seed=n) for n in (8, 9, 16, 5)]
    tensors[1] = tensors[1][:8]
    tensors.append(torch.tensor([0.1], dtype=torch.float64))
    results = []
    for require, place in ((wanted, HELD), ((True,) * 5, NOT_HELD)):
        leaves = [x.clone().requires_grad_(r) for x, r in zip(tensors, require, strict=True)]
        options = {"queue": leaves[3], "temperature": leaves[4], "noise": rows(9, 6, seed=5), "symmetric": True}
        gs_infonce(*leaves[:3], **options, **place).backward()
        results.append([x.grad for x in leaves])
    for some, every, want in zip(*results, wanted, strict=True):
        assert (some is None) == (not want)
        if want:
            assert some.shape == every.shape
            assert relative_error(some, every) < 1e-12


def test_each_backward_scales_the_gradients_and_keeps_them():
    q, k = (rows(N, D, seed=s).requires_grad_() for s in (1, 2))
    loss = info_nce(q, k, symmetric=True, **HELD)
    (first,) = torch.autograd.grad(loss, q, retain_graph=True)
    expected = 3 * first
    first.zero_()  # the caller's own
    (second,) = torch.autograd.grad(3 * loss, q)
    assert torch.equal(second, expected)


def test_an_input_changed_before_the_backward_is_an_error():
    q, k = (rows(N, D, seed=s).requires_grad_() for s in (1, 2))
    loss = info_nce(q, k, symmetric=True, **HELD)
    with torch.no_grad():
        k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
