"""The loss under torch.compile: one piece for the compiler, the same loss and gradients as in eager."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import CASES, COMPARABLE, build
from helpers import relative_error, rows
from torch._dynamo.testing import CompileCounterWithBackend

from fused_infonce import GSInfoNCELoss, gs_infonce, info_nce
from fused_infonce.compile_op import _NUMBERS, _PLAIN, _TENSORS
from fused_infonce.config import FIELDS

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


def graphs(function, calls, **options):
    """How many graphs a compiler needs for these calls, each checked against eager."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, **options)
    for call in calls:
        got, want = compiled(*call), function(*call)
        assert torch.allclose(got.detach(), want.detach(), rtol=1e-5)
        if got.requires_grad:
            inputs = [x for x in call if isinstance(x, torch.Tensor) and x.requires_grad]
            for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (got, want)), strict=True):
                assert relative_error(a, b) < 1e-5
    return counter.frame_count


LEARNED = {"learnable_temperature": True, "num_noise": 0}
SIZES = {
    "one way": info_nce,
    "no gradients": functools.partial(info_nce, reduction="sum"),
    "symmetric": functools.partial(info_nce, symmetric=True),
    "none": functools.partial(info_nce, reduction="none"),
    "small temperature": functools.partial(info_nce, temperature=0.005),
    "smoothing": functools.partial(info_nce, label_smoothing=0.1, symmetric=True),
    "sampled": lambda q, k: gs_infonce(q, k, noise_weight=1e-25),  # drawn, but too light to be seen
    "learned": GSInfoNCELoss(**LEARNED),
    "learned, symmetric": GSInfoNCELoss(**LEARNED, symmetric=True),
    "learned, expected": GSInfoNCELoss(learnable_temperature=True, noise="expected"),
    "decoupled": functools.partial(info_nce, decoupled=True, hardness=1.0),
}


@pytest.mark.parametrize(
    ("name", "dynamic"), [*((name, None) for name in SIZES), *((name, True) for name in list(SIZES)[:3])]
)
def test_two_graphs_serve_every_batch_size(name, dynamic):
    batches = [
        [rows(n, D, seed=n + s, dtype=torch.float32).requires_grad_(name != "no gradients") for s in (1, 2)]
        for n in range(3, 19)
    ]
    assert graphs(SIZES[name], batches, dynamic=dynamic) <= 2


def test_two_graphs_serve_every_number_of_hard_negatives():
    batches = [[rows(m, D, seed=m, dtype=torch.float32) for m in (n, n, 2 * n)] for n in range(3, 13)]
    assert graphs(functools.partial(info_nce, hard_negative_weight=0.5), batches) <= 2


NUMBERS = {
    "temperature": (0.05, 0.01),
    "noise_weight": (0.5, 0.1),
    "hard_negative_weight": (0.5, 0.1),
    "angular_margin": (0.1, 0.01),
    "hardness": (1.0, 0.1),
    "filter_threshold": (0.5, 0.01),
    "num_noise": (10, 1),
    "workspace_bytes": (10_000, 100),
    "min_temperature": (0.02, 0.001),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_two_graphs_serve_a_number_that_changes(name):
    q, k, h = leaves()
    start, step = NUMBERS[name]
    options = {"noise": "expected", "num_noise": 5}

    def loss(q, k, x):
        return gs_infonce(q, k, h, **{**options, name: x})

    assert graphs(loss, [(q, k, start + i * step) for i in range(10)]) <= 2


def test_two_graphs_serve_several_numbers_at_once():
    q, k, _ = leaves()

    def loss(q, k, tau, smoothing, beta):
        return info_nce(q, k, temperature=tau, label_smoothing=smoothing, hardness=beta)

    assert graphs(loss, [(q, k, 0.05 + 0.01 * i, 0.1 + 0.05 * i, 0.5 + i) for i in range(8)]) <= 2


class Exported(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.loss = GSInfoNCELoss(num_noise=0, **options)

    def forward(self, q, k):
        return self.loss(2 * q, k)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"learnable_temperature": True}], ids=str)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(options, strict):
    module, batch = Exported(**options), torch.export.Dim("batch")
    q, k = (x.detach() for x in leaves()[:2])
    program = torch.export.export(module, (q, k), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    for n in (2, 7, 30):
        q, k = rows(n, D, seed=1, dtype=torch.float32), rows(n, D, seed=2, dtype=torch.float32)
        assert torch.allclose(program.module()(q, k), module(q, k), rtol=1e-6)


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
            return info_nce(q, k, reduction="none")

    compiled, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k), step(q, k)
    assert compiled.dtype == torch.float32
    assert torch.equal(compiled, eager)
    assert not torch.equal(eager, info_nce(q, k, reduction="none"))  # products were rounded


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


# ---------------------------------------------------------------------- layouts and the operators themselves

LAYOUTS = {
    "contiguous": lambda x: x,
    "column-major": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "every other row": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}
WAYS = {
    "one sweep": {},
    "two sweeps": {"temperature": 0.004},
    "symmetric": {"symmetric": True},
    "none": {"reduction": "none"},
}


def operator_arguments(layout, way, backend="torch", learn=False, varying=False, needs_grad=True):
    """Arguments of the operator in the order of its schema."""
    options = {name: field.default for name, field in FIELDS.items()}
    options |= {"angular_margin": 0.2, "hardness": 1.0, "filter_margin": 0.1, "num_noise": 0, "backend": backend}
    options |= {"temperature": None if learn else 0.05, "decoupled": learn, **WAYS[way]}
    tau = torch.tensor(options["temperature"] or 0.1, requires_grad=needs_grad) if learn else None
    if learn:
        options["temperature"] = None
    numbers = torch.tensor([options["temperature"], 1.5], dtype=torch.float64) if varying else None
    inputs = [LAYOUTS[layout](x.detach()).requires_grad_(needs_grad) for x in leaves()]
    ids = torch.arange(N) // 2
    own = rows(N, seed=8, dtype=torch.float32).requires_grad_(needs_grad)  # log-sums of own hard negatives
    tensors = (*inputs, None, tau, own, None, ids, *[None] * (len(_TENSORS) - 8), numbers)
    changing = "temperature,hardness" if varying else ""
    return (
        *tensors,
        changing,
        *(options[name] for name in (*_NUMBERS, *_PLAIN)),
        False,
        3,
        None,
        [True, True, True, False, learn, True],
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_the_loss(layout, way):
    torch.library.opcheck(torch.ops.fused_infonce.gs_infonce.default, operator_arguments(layout, way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_the_backward(layout, way):
    arguments = operator_arguments(layout, way, needs_grad=False)
    loss, *kept = torch.ops.fused_infonce.gs_infonce(*arguments)
    torch.library.opcheck(
        torch.ops.fused_infonce.gs_infonce_backward.default, (torch.ones_like(loss), kept, *arguments)
    )


@pytest.mark.parametrize("way", ["one sweep", "symmetric"])
@pytest.mark.parametrize(("backend", "varying"), [("triton", False), ("torch", True)])
def test_opcheck_of_other_backends_and_changing_numbers(backend, varying, way):
    for learn in (False, True):
        if learn and varying:
            continue
        arguments = operator_arguments("contiguous", way, backend, learn, varying)
        torch.library.opcheck(torch.ops.fused_infonce.gs_infonce.default, arguments)


@pytest.fixture
def _no_caches(monkeypatch):
    """What an earlier run compiled proves nothing."""
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


@pytest.mark.usefixtures("_no_caches")
def test_inductor_with_every_layout_and_way():
    """Gradients of the operator's own inputs, and of what comes before it."""

    def step(q, k, h, factor):
        losses = [gs_infonce(q, k + factor * q, h, num_noise=0, **options).mean() for options in WAYS.values()]
        return torch.stack(losses)

    compiled = torch.compile(step, fullgraph=True)
    for make in LAYOUTS.values():
        inputs = [make(x.detach()).requires_grad_() for x in leaves()]
        factor = torch.tensor(2.0, requires_grad=True)
        wanted = (*inputs, factor)
        got, want = compiled(*wanted), step(*wanted)
        assert torch.allclose(got.detach(), want.detach(), rtol=1e-5)
        grads = [torch.autograd.grad(x.sum(), wanted) for x in (got, want)]
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # equal rows leave nothing but rounding
