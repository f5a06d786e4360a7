"""What autograd may be asked for: once, in reverse; all else is an error that says so, never a wrong number."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from helpers import rows
from torch.autograd import forward_ad

from fused_infonce import GSInfoNCELoss, alignment, gs_infonce, info_nce, uniformity

N, D = 6, 4
SECOND = "has no second derivative"
LOSSES = {
    "one sweep": {},
    "sum": {"reduction": "sum"},
    "two sweeps": {"temperature": 0.002},
    "symmetric": {"symmetric": True},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "symmetric smoothing": {"label_smoothing": 0.2, "symmetric": True, "angular_margin": 0.1},
    "noise": {"num_noise": 9, "noise": "expected"},
    "ids": {"ids": torch.arange(N) // 2, "symmetric": True},
    "decoupled": {"decoupled": True, "hardness": 1.0, "reduction": "none"},
    "filter": {"filter_margin": 0.1, "symmetric": True},
}


def leaf(*shape, seed=0, dtype=torch.float64):
    return rows(*shape, seed=seed, dtype=dtype).requires_grad_()


def scalar(x, p, **options):
    """A term whose own second derivative is right, beside the loss."""
    return gs_infonce(x, p, **{"num_noise": 0, **options}).sum() + 0.01 * x.pow(3).sum()


# ---------------------------------------------------------------------- second derivatives


def by_backward(x, y, loss):
    loss.backward(create_graph=True)
    x.grad.square().sum().backward()


def by_grad(x, y, loss):
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(g.square().sum(), x)


def by_grad_of_the_other(x, y, loss):
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.autograd.grad(g.square().sum(), y)


def by_grads_of_both(x, y, loss):
    g, h = torch.autograd.grad(loss, (x, y), create_graph=True)
    torch.autograd.grad((g + h).sum(), (x, y), allow_unused=True)


ROUTES = [by_backward, by_grad, by_grad_of_the_other, by_grads_of_both]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_an_error_by_every_route(name, route):
    x, y = leaf(N, D), leaf(N, D, seed=1)
    with pytest.raises(RuntimeError, match=SECOND):
        route(x, y, scalar(x, y, **LOSSES[name]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("vectorize", [False, True])
def test_functional_hessians_and_jacobians_of_gradients_are_errors(name, vectorize):
    p = rows(N, D, seed=1)
    loss = functools.partial(scalar, p=p, **LOSSES[name])
    with pytest.raises((RuntimeError, NotImplementedError), match="gs_infonce has no"):
        torch.autograd.functional.hessian(loss, rows(N, D), vectorize=vectorize)

    def gradient(x):
        return torch.autograd.grad(loss(x), x, create_graph=True)[0]

    with pytest.raises((RuntimeError, NotImplementedError), match="gs_infonce has no"):
        torch.autograd.functional.jacobian(gradient, rows(N, D), vectorize=vectorize)
    for function in (torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        with pytest.raises(RuntimeError, match=SECOND):
            function(loss, rows(N, D), rows(N, D, seed=2))


@pytest.mark.parametrize("name", LOSSES)
def test_the_derivative_with_respect_to_an_upstream_weight_is_an_error(name):
    x, p = leaf(N, D), rows(N, D, seed=1)
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = weight * gs_infonce(x, p, **{"num_noise": 0, **LOSSES[name]}).sum()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(g.sum(), weight)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"label_smoothing": 0.1}], ids=str)
def test_mixed_second_derivatives_of_every_input(options):
    """From the gradient of one input to each of the others, a temperature among them."""
    inputs = {
        "anchors": leaf(N, D),
        "positives": leaf(N, D, seed=1),
        "negatives": leaf(2 * N, D, seed=2),
        "queue": leaf(3, D, seed=3),
        "temperature": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
    }
    for first, second in itertools.product(inputs, repeat=2):
        (g,) = torch.autograd.grad(info_nce(**inputs, **options), inputs[first], create_graph=True)
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(g.sum(), inputs[second])


def test_metrics():
    x, y = leaf(N, D), leaf(N, D, seed=1)
    (g,) = torch.autograd.grad(uniformity(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(g.sum(), x)
    assert torch.autograd.gradgradcheck(alignment, (x, y))
    unit = torch.nn.functional.normalize(y.detach(), dim=1)
    hessian = torch.autograd.functional.hessian(lambda z: alignment(z, unit), unit.clone())
    eye = torch.eye(D, dtype=torch.float64)
    for i in range(N):  # where the distances are 0
        assert torch.allclose(hessian[i, :, i], 2 / N * (eye - unit[i][:, None] * unit[i]))


def test_what_does_not_depend_on_the_loss_is_differentiated_on():
    x, p, w = leaf(N, D), rows(N, D, seed=1), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = info_nce(x, p) + w**2 * x.pow(3).sum()
    (g,) = torch.autograd.grad(loss, x, create_graph=True)
    (of_w,) = torch.autograd.grad(g.sum(), w)
    assert torch.allclose(of_w, (2 * w * 3 * x.square()).sum())


def test_the_reference_has_second_derivatives():
    x, p = leaf(N, D), leaf(N, D, seed=1)
    loss = functools.partial(info_nce, backend="reference", temperature=0.3)
    assert torch.autograd.gradgradcheck(loss, (x, p))


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"reduction": "none"}], ids=str)
def test_under_a_compiler_too(options):
    torch.compiler.reset()
    p = rows(N, D, seed=1)
    for backend in ("eager", "aot_eager"):
        loss = torch.compile(functools.partial(info_nce, **options), backend=backend, fullgraph=True)
        for weight in (1.0, torch.tensor(2.0, requires_grad=True)):
            x = leaf(N, D)
            (g,) = torch.autograd.grad((weight * loss(x, p)).sum() + x.pow(3).sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match=r"second derivative|double backward"):
                torch.autograd.grad(g.square().sum(), x)


def test_batched_gradients_are_an_error():
    x, p = leaf(N, D), rows(N, D, seed=1)
    for options in ({}, {"reduction": "none"}):
        loss = info_nce(x, p, **options)
        batch = torch.ones(3, *loss.shape, dtype=loss.dtype)
        with pytest.raises(NotImplementedError, match="no batched backward"):
            torch.autograd.grad(loss, x, batch, is_grads_batched=True)


# ---------------------------------------------------------------------- forward mode and torch.func

TANGENTS = {
    "anchors": {},
    "positives": {"symmetric": True},
    "negatives": {"reduction": "none"},
    "queue": {"label_smoothing": 0.1},
    "temperature": {},
}


def call_with(name, value, options, **more):
    inputs = {"anchors": rows(N, D), "positives": rows(N, D, seed=1), **more, name: value}
    return info_nce(**inputs, **options)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", TANGENTS)
def test_forward_mode_is_an_error(name, requires_grad):
    primal = torch.tensor(0.1, dtype=torch.float64) if name == "temperature" else rows(N, D, seed=2)
    primal.requires_grad_(requires_grad)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(primal, torch.ones_like(primal))
        with pytest.raises(NotImplementedError, match=r"forward-mode differentiation.*reverse mode"):
            call_with(name, dual, TANGENTS[name])
        with torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode"):
            call_with(name, dual, TANGENTS[name])
        assert call_with("anchors", rows(N, D), {}).isfinite()  # no tangent, no error


def test_forward_mode_of_the_module_and_the_metrics():
    x = rows(N, D)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for loss in (GSInfoNCELoss(), GSInfoNCELoss(num_noise=0, symmetric=True, learnable_temperature=True)):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                loss(dual, x)
            with pytest.raises(NotImplementedError, match="forward-mode"):
                loss(x, dual)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            uniformity(dual)
        assert forward_ad.unpack_dual(alignment(dual, rows(N, D, seed=1))).tangent is not None


def test_the_reference_has_forward_mode_and_torch_func():
    x, p, v = rows(N, D), rows(N, D, seed=1), rows(N, D, seed=2)
    loss = functools.partial(info_nce, positives=p, backend="reference")
    leaf_x = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf_x), leaf_x)
    assert torch.allclose(torch.func.grad(loss)(x), want)
    assert torch.allclose(torch.func.jvp(loss, (x,), (v,))[1], (want * v).sum())
    hessian = torch.func.hessian(loss)(x)
    assert torch.allclose(hessian, torch.autograd.functional.hessian(loss, x))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent
    assert torch.allclose(tangent, (want * v).sum())


def transformed(transform, loss, x):
    if transform == "jvp":
        return torch.func.jvp(loss, (x,), (x,))
    if transform == "vjp":
        return torch.func.vjp(loss, x)
    if transform == "vmap":
        return torch.func.vmap(loss)(torch.stack([x, x]))
    return getattr(torch.func, transform)(loss)(x)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "vjp", "jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"label_smoothing": 0.1}], ids=str)
def test_transforms_of_torch_func_say_what_is_supported(transform, options):
    p = rows(N, D, seed=1)
    message = "does not support torch.func's transforms.*torch.autograd.grad.*backend='reference'"
    for loss in (
        functools.partial(info_nce, positives=p, **options),
        lambda q: info_nce(p, q, **options),
        lambda q: info_nce(p, p, queue=q, **options),
        lambda q: info_nce(p, p, temperature=q.square().sum(), **options),
        functools.partial(GSInfoNCELoss(**options), positives=p),
        uniformity,
    ):
        with pytest.raises(NotImplementedError, match=message):
            transformed(transform, loss, rows(N, D))


def test_functional_call_is_no_transform():
    loss = GSInfoNCELoss(0.1, learnable_temperature=True, num_noise=0)
    x, p = rows(N, D, dtype=torch.float32), rows(N, D, seed=1, dtype=torch.float32)
    state = {"log_temperature": torch.tensor([0.2]).log().requires_grad_()}
    got = torch.func.functional_call(loss, state, (x, p))
    assert torch.allclose(got, info_nce(x, p, temperature=0.2))
    (g,) = torch.autograd.grad(got, state["log_temperature"])
    assert g.shape == (1,)


# ---------------------------------------------------------------------- changes in place

GIVEN = {
    "anchors": lambda: rows(N, D),
    "positives": lambda: rows(N, D, seed=1),
    "negatives": lambda: rows(2 * N, D, seed=2),
    "queue": lambda: rows(3, D, seed=3),
    "temperature": lambda: torch.tensor(0.2, dtype=torch.float64),
    "ids": lambda: torch.arange(N) // 2,
    "negative_ids": lambda: torch.arange(2 * N) // 3,
    "noise": lambda: rows(7, D, seed=4),
    "guide": lambda: [rows(n, 3, seed=5 + n) for n in (N, N, 2 * N, 3)],
}
WAYS = {
    "one sweep": {},
    "two sweeps": {"temperature": 0.004},
    "symmetric": {"symmetric": True},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "one sweep, tiled": {"workspace_bytes": 1},
    "symmetric, tiled": {"symmetric": True, "workspace_bytes": 1},
    "none, tiled": {"reduction": "none", "workspace_bytes": 1},
}


def tensors_of(way):
    given = {name: make() for name, make in GIVEN.items()}
    if "smoothing" in way:
        given = {name: x for name, x in given.items() if name not in ("ids", "negative_ids", "guide")}
    if way == "two sweeps":
        given["temperature"] = torch.tensor(0.004, dtype=torch.float64)
    for name in ("anchors", "positives", "negatives", "queue", "temperature"):
        given[name].requires_grad_()
    return given


def changed(x):
    """In place, below autograd's view of leaves, but seen by its counters."""
    with torch.no_grad():
        x.copy_(x.flip(0) + 1 if x.ndim else x * 1.5)


def gradients(loss, given):
    leaves = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    weights = torch.arange(1.0, 1 + loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, leaves, weights)


def targets(given):
    for name, x in given.items():
        if name == "guide":
            yield from ((f"guide[{i}]", lambda g, i=i: g["guide"][i]) for i in range(len(x)))
        else:
            yield name, lambda g, name=name: g[name]


def assert_watched_or_not_needed(way, call, without=()):
    make = lambda: {k: v for k, v in tensors_of(way).items() if k not in without}  # noqa: E731
    given = make()
    want = gradients(call(given), given)
    for name, target in targets(make()):
        given = make()
        loss = call(given)
        changed(target(given))
        try:
            got = gradients(loss, given)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_changed_before_the_backward_is_an_error_or_not_needed(way, backend):
    options = {name: x for name, x in WAYS[way].items() if name != "temperature"} | {"backend": backend}
    assert_watched_or_not_needed(way, lambda given: gs_infonce(**given, **options))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_of_every_kind(dtype):
    """In tiles, of int64 the caller's own memory is read by the backward, of the others a copy."""
    x, p, ids = leaf(N, D), rows(N, D, seed=1), (torch.arange(N) // 2).to(dtype)
    options = {"symmetric": True, "workspace_bytes": 1}
    want = torch.autograd.grad(info_nce(x, p, ids=ids, **options), x)[0]
    loss = info_nce(x, p, ids=ids, **options)
    ids.zero_()
    if dtype == torch.int64:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, x)
    else:
        assert torch.equal(torch.autograd.grad(loss, x)[0], want)


@pytest.mark.parametrize("way", ["one sweep", "symmetric", "none", "smoothing"])
def test_the_same_of_the_operator(way):
    torch.compiler.reset()
    options = WAYS[way]
    compiled = torch.compile(lambda given: gs_infonce(**given, **options), backend="eager", fullgraph=True)
    assert_watched_or_not_needed(way, compiled, without=("guide",))
