"""The loss under torch.compile: one piece for the compiler, the same loss and gradients as in eager."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CASES, COMPARABLE, build
from helpers import relative_error, rows

from fused_infonce import GSInfoNCELoss, gs_infonce, info_nce

N, D = 12, 8


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def leaves(dtype=torch.float32):
    return [rows(n, D, seed=n, dtype=dtype).requires_grad_() for n in (N, N, 2 * N)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", COMPARABLE)
def test_no_graph_break_and_the_same_as_eager(name, backend):
    inputs, options, _ = build(CASES[name], N, D, torch.float32)
    inputs = [x.requires_grad_() for x in inputs]

    def step(q, *more):
        return gs_infonce(2 * q, *more, backend=backend, **options).mean()

    whole = not CASES[name].guide  # the operator takes no guide: such a call breaks the graph
    compiled, eager = torch.compile(step, fullgraph=whole, backend="aot_eager")(*inputs), step(*inputs)
    assert relative_error(compiled.detach(), eager.detach()) < 1e-6
    for a, b in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs), strict=True):
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("symmetric", "learn"), list(itertools.product((False, True), repeat=2)))
def test_opcheck(backend, symmetric, learn):
    tau = torch.tensor(0.1, requires_grad=True) if learn else None
    arguments = (
        *leaves(), None, tau, None, None, None, None, 0.0 if learn else 0.05, 0.02, 0, 1.0, "sampled", 0.0,
        symmetric, "mean", backend, None, learn, 0.2, 1.0, 0.0, 0.1, None, None, [True, True, True, False, learn],
    )  # fmt: skip
    torch.library.opcheck(torch.ops.fused_infonce.gs_infonce.default, arguments)
