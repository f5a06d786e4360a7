"""The loss under torch.compile: one piece for the compiler, the same loss and gradients as in eager."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, rows

from fused_infonce import GSInfoNCELoss, gs_infonce, info_nce

N, D = 12, 8
CASES = {
    "one sweep": {},
    "negatives": {"negatives": True, "hard_negative_weight": 0.5},
    "symmetric": {"symmetric": True, "negatives": True},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum", "ids": torch.arange(N) // 2},
    "given noise": {"noise": rows(9, D, seed=5, dtype=torch.float32)},
    "expected noise": {"noise": "expected", "num_noise": 30},
    "decoupled": {"decoupled": True, "angular_margin": 0.2, "hardness": 2.0},
    "filter": {"filter_margin": 0.05, "filter_threshold": 0.4, "symmetric": True},
    "smoothing": {"label_smoothing": 0.1, "negatives": True},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def leaves(dtype=torch.float32):
    return [rows(n, D, seed=n, dtype=dtype).requires_grad_() for n in (N, N, 2 * N)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_no_graph_break_and_the_same_as_eager(name, backend):
    options = {"num_noise": 0, "backend": backend, **CASES[name]}
    use_negatives = options.pop("negatives", False)

    def step(q, k, h):
        return gs_infonce(2 * q, k, h if use_negatives else None, **options).mean()

    inputs = leaves()
    wanted = inputs if use_negatives else inputs[:2]
    compiled, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), step(*inputs)
    assert relative_error(compiled.detach(), eager.detach()) < 1e-6
    for a, b in zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eager, wanted), strict=True):
        assert relative_error(a, b) < 1e-6


def test_inductor_and_a_model_with_the_module():
    model = torch.nn.Linear(D, D)
    loss = GSInfoNCELoss(learnable_temperature=True, num_noise=5, noise="expected")

    def step(x, y):
        return loss(model(x), model(y))

    x, y = (z.detach() for z in leaves()[:2])
    parameters = [*model.parameters(), *loss.parameters()]
    eager = torch.autograd.grad(step(x, y), parameters)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True)(x, y), parameters)
    for a, b in zip(compiled, eager, strict=True):
        assert relative_error(a, b) < 1e-5


def test_other_batch_sizes():
    step = torch.compile(lambda q, k: info_nce(q, k), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 9, 16):
        q, k = rows(n, D, seed=1, dtype=torch.float32), rows(n, D, seed=2, dtype=torch.float32)
        assert torch.allclose(step(q, k), info_nce(q, k), rtol=1e-6)


def test_sampled_noise_is_fresh_and_reproducible():
    step = torch.compile(lambda q, k: gs_infonce(q, k, num_noise=20), fullgraph=True, backend="aot_eager")
    q, k = leaves()[:2]
    torch.manual_seed(1)
    first, second = step(q, k), step(q, k)
    torch.manual_seed(1)
    assert step(q, k) == first != second


def test_autocast_is_that_of_the_trace():
    q, k = (rows(512, 160, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))

    def step(q, k):
        with torch.autocast("cpu", torch.bfloat16):
            return info_nce(q, k)

    compiled, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k), step(q, k)
    assert compiled.dtype == torch.float32
    assert compiled == eager != info_nce(q, k)


def test_fp16_gradients_are_scaled_before_they_are_rounded():
    """Tiny gradients of fp16 inputs under a gradient scaler's factor."""
    q, k = (x.detach().half().requires_grad_() for x in leaves()[:2])
    compiled = torch.compile(lambda q, k: info_nce(q, k, temperature=1.0), fullgraph=True, backend="aot_eager")
    small = 2.0**-14
    grads = [
        torch.autograd.grad(f(q, k) * small * 2**14, q)[0]
        for f in (compiled, lambda q, k: info_nce(q, k, temperature=1.0))
    ]
    assert relative_error(*grads) < 1e-3


def test_a_generator_breaks_the_graph_and_works():
    generator = torch.Generator().manual_seed(1)
    step = torch.compile(lambda q, k: gs_infonce(q, k, generator=generator), backend="aot_eager")
    q, k = leaves()[:2]
    got = step(q, k)
    assert got == gs_infonce(q, k, generator=torch.Generator().manual_seed(1))
