"""Every option of the loss, on the torch backend against the reference: loss and every gradient."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from cases import CASES, COMPARABLE, NOISE, LossCase, both
from helpers import loss_and_grads, relative_error, rows

from fused_infonce import autograd, gs_infonce, info_nce, resolve
from fused_infonce.testing import naive
from fused_infonce.tiled import two_pass
from fused_infonce.tiled.operands import GradScale, NeedsGrad, Precision
from fused_infonce.tiled.problem import TiledProblem
from fused_infonce.tiled.torch_backend import TorchBackend

N, D, H = 37, 24, 74
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
# Arguments that change where or how a result is computed, and not the result.
NO_OPTIONS = {"min_temperature", "generator", "group", "strategy", "backend", "workspace_bytes"}


def against_reference(case, dtype, temperature=0.05):
    ours, want = both(case, "torch", N, D, dtype, workspace_bytes=20_000, temperature=temperature)
    limit = TOLERANCE[dtype] * max(1, 0.05 / temperature)
    # dτ is a sum over rows that may cancel: in fp32 it is held to its own scale in test_accuracy.
    last = None if dtype == torch.float64 else -1
    for name, a, b in zip(
        ("loss", "anchors", "positives", "more", "more", "more"), ours[:last], want, strict=False
    ):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < limit, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", COMPARABLE)
def test_every_case(name, dtype):
    against_reference(CASES[name], dtype, CASES[name].options.get("temperature", 0.05))


def test_every_option_has_a_case():
    used = {"negatives", "queue", "ids", "guide"}
    assert all(any(getattr(case, x) for case in CASES.values()) for x in used)
    assert {case.own for case in CASES.values()} == {False, "equal", "uneven"}
    used |= {"negative_ids", "negative_owners"}
    assert any(case.ids and case.negatives for case in CASES.values())
    used |= {name for case in CASES.values() for name in case.options}
    assert used == set(inspect.signature(gs_infonce).parameters) - {"anchors", "positives"} - NO_OPTIONS


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_combination(dtype, symmetric, reduction):
    plain = {"symmetric": symmetric, "reduction": reduction, "noise_weight": 0.7}
    for noise, negatives, temperature in itertools.product(NOISE, (False, True), (1e-3, 0.02, 0.05, 10.0)):
        for masked, own in itertools.product((False, True), (0.0, 1.3) if negatives else (0.0,)):
            case = LossCase(
                {**plain, **NOISE[noise], "hard_negative_weight": own},
                negatives=2 * negatives,
                queue=negatives,
                ids=masked,
            )
            against_reference(case, dtype, temperature)


@pytest.mark.parametrize("log_weight", [-40.0, 40.0])
def test_large_weights_keep_their_range(log_weight):
    against_reference(LossCase({"hard_negative_weight": log_weight}, negatives=2, queue=True), torch.float32)
    against_reference(LossCase({"noise": "given", "noise_weight": math.exp(log_weight)}), torch.float32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(symmetric, reduction):
    q, k, h, queue = (rows(n, 5, seed=n).requires_grad_() for n in (4, 4, 8, 3))
    tau = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def loss(q, k, h, queue, tau):
        return gs_infonce(
            q, k, h, queue=queue, temperature=tau, noise=rows(19, 5, seed=5), symmetric=symmetric,
            hard_negative_weight=0.5, ids=torch.tensor([0, 1, 0, 2]), reduction=reduction, backend="torch",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (q, k, h, queue, tau))


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=5))[1:])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=["oneway", "symmetric"])
def test_only_the_gradients_that_are_wanted(wanted, options):
    tensors = [rows(8, 6, seed=1), rows(8, 6, seed=2), rows(16, 6, seed=3), rows(5, 6, seed=4), torch.tensor(0.1)]
    tensors[4] = tensors[4].double()
    results = []
    for require in (wanted, (True,) * 5):
        leaves = [x.clone().requires_grad_(r) for x, r in zip(tensors, require, strict=True)]
        loss = gs_infonce(
            *leaves[:3],
            queue=leaves[3],
            temperature=leaves[4],
            noise=rows(9, 6, seed=5),
            backend="torch",
            **options,
        )
        loss.backward()
        results.append([x.grad for x in leaves])
    for some, every, want in zip(*results, wanted, strict=True):
        assert (some is None) == (not want)
        if want:
            assert relative_error(some, every) < 1e-12


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"ids": torch.arange(N) // 2}], ids=str)
def test_without_gradients_the_same_loss(options):
    q, k = rows(N, D, seed=1, dtype=torch.float32), rows(N, D, seed=2, dtype=torch.float32)
    with_gradients = info_nce(q.clone().requires_grad_(), k, backend="torch", **options).detach()
    assert torch.allclose(info_nce(q, k, backend="torch", **options), with_gradients, rtol=1e-6)
    with torch.no_grad():
        assert not info_nce(q.requires_grad_(), k, backend="torch", **options).requires_grad


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"reduction": "sum"}], ids=str)
@pytest.mark.parametrize("size", [(40, 24), (256, 300)], ids=["small", "large"])
def test_half_precision_inputs(dtype, options, size, monkeypatch):
    inputs = [rows(*size, seed=s, dtype=dtype) for s in (1, 2)]
    temperature = torch.tensor(0.1)
    large = size[0] > 40
    if large:
        monkeypatch.setattr(autograd, "SMALL_PRODUCT", 0)  # whose products run in fp32
    ours = loss_and_grads(inputs, backend="torch", num_noise=0, temperature=temperature, **options)
    want = loss_and_grads([x.double() for x in inputs], backend="reference", num_noise=0,
                          temperature=temperature.double(), **options)  # fmt: skip
    assert ours[0].dtype == torch.float32
    assert [g.dtype for g in ours[1:3]] == [dtype, dtype]
    assert relative_error(ours[0], want[0]) < 1e-4
    for a, b in zip(ours[1:3], want[1:3], strict=True):
        assert relative_error(a, b) < 3e-3
    with torch.autocast("cpu", enabled=False):
        exact = loss_and_grads([x.float() for x in inputs], backend="torch", num_noise=0, temperature=temperature,
                               **options)  # fmt: skip
    rounded = ours[0] != exact[0]
    assert rounded == large  # products in the inputs' dtype leave their trace


def test_mixed_inputs_are_promoted_and_gradients_come_in_their_own_dtype():
    q, k = rows(12, 8, seed=1, dtype=torch.bfloat16), rows(12, 8, seed=2, dtype=torch.float32)
    ours = loss_and_grads([q, k], num_noise=0)
    want = loss_and_grads([q.float(), k], num_noise=0)
    assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.float32]
    assert relative_error(ours[2], want[2]) < 1e-6


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"symmetric": True}], ids=str)
def test_autocast_changes_products_and_nothing_else(options):
    q, k = (rows(512, 160, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(q, k, backend="torch", **options)
        grads = torch.autograd.grad(loss, (q, k))  # the backward inside the region, as outside of it
        usual = torch.autograd.grad(naive(q, k), (q, k))
    assert loss.dtype == torch.float32
    exact = info_nce(q, k, backend="reference", **options)
    assert 1e-8 < relative_error(loss.detach(), exact.detach()) < 1e-3
    want = torch.autograd.grad(exact, (q, k))
    usual_error = relative_error(usual[0], torch.autograd.grad(naive(q.double(), k.double()), q)[0])
    for a, b in zip(grads, want, strict=True):
        assert a.dtype == torch.float32
        assert 1e-6 < relative_error(a, b) < 0.8 * usual_error


def test_fp32_products_as_one_backend_was_told():
    """Where a backend was told something of its own, torch.get_float32_matmul_precision() raises."""
    q, k = (rows(300, 400, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    found, was = {}, torch.backends.mkldnn.matmul.fp32_precision
    try:
        for told in ("ieee", "bf16"):
            torch.backends.mkldnn.matmul.fp32_precision = told
            found[told] = torch.autograd.grad(info_nce(q, k, backend="torch"), (q, k))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = was
    want = torch.autograd.grad(info_nce(q, k, backend="reference"), (q, k))
    for told, limit in (("ieee", 5e-6), ("bf16", 1e-2)):
        for got, exact in zip(found[told], want, strict=True):
            assert relative_error(got, exact) < limit, told


DEFAULTS = {
    name: p.default for name, p in inspect.signature(gs_infonce).parameters.items() if p.kind == p.KEYWORD_ONLY
}


@pytest.mark.parametrize("product", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"num_noise": 50}, {"hardness": 2.0}], ids=str)
def test_a_temperature_on_the_device_scales_the_queries(product, options):
    """Where the host does not know the product's factor; on a CPU it always does, so the tensor is handed on."""
    inputs = [rows(40, 30, seed=s, dtype=torch.float32) for s in (1, 2)]
    noise = {"noise": rows(50, 30, seed=3, dtype=torch.float32)} if options.get("num_noise") else {}
    asked = {**DEFAULTS, "num_noise": 0, **options, **noise}
    call = resolve.resolve(*inputs, None, **{name: x for name, x in asked.items() if name != "group"})
    found = []
    for kappa in (20.0, torch.tensor(20.0)):
        ops = TorchBackend(Precision.of(product, inputs[0].device), inputs[0].device, None)
        problem = TiledProblem(ops, call.options, kappa, call.inputs, call.noise_rows)
        losses = two_pass.losses(problem)
        needs = NeedsGrad(True, True, False, False, True)
        out = two_pass.gradients(problem, needs, *losses, None, GradScale(None, 1.0))
        found.append([x for x in (*losses, out.anchors, out.positives, out.kappa) if x is not None])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < (1e-6 if product == torch.float32 else 2e-2)


def test_losses_of_rows_are_the_caller_s_own():
    """Changed in place, they change no gradient."""
    q, k = (rows(9, 6, seed=s).requires_grad_() for s in (1, 2))
    weights = torch.arange(9.0, dtype=torch.float64)
    want = torch.autograd.grad((info_nce(q, k, reduction="none") * weights).sum(), (q, k))
    losses = info_nce(q, k, reduction="none")
    losses *= weights
    losses.detach().add_(1.0)
    got = torch.autograd.grad(losses.sum(), (q, k))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast_leaves_fp64_alone():
    q, k = rows(300, 300, seed=1), rows(300, 300, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(q, k), info_nce(q, k, backend="torch"))
        assert relative_error(info_nce(q, k), info_nce(q, k, backend="reference")) < 1e-12


# ---------------------------------------------------------------------- noise


def test_noise_is_reproduced_by_the_seed_and_fresh_otherwise():
    q, k = rows(8, 6, seed=1), rows(8, 6, seed=2)
    torch.manual_seed(3)
    first, second = gs_infonce(q, k), gs_infonce(q, k)
    torch.manual_seed(3)
    assert gs_infonce(q, k) == first != second
    generator = torch.Generator().manual_seed(5)
    a, b = gs_infonce(q, k, generator=generator), gs_infonce(q, k, generator=generator)
    assert a != b
    assert gs_infonce(q, k, generator=torch.Generator().manual_seed(5)) == a


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"reduction": "none"}], ids=str)
def test_the_backward_sees_the_noise_of_the_forward(options):
    """Sampled noise over several blocks equals the same vectors given."""
    from fused_infonce import noise

    q, k = rows(12, 6, seed=1), rows(12, 6, seed=2)
    seed = noise.draw_seed(torch.Generator().manual_seed(1))
    vectors = torch.cat([noise.sample_block(seed, b, 2500, 6, torch.float64, q.device) for b in range(3)])
    upstream = rows(12, seed=3) if "reduction" in options else None
    tau = torch.tensor(0.2, dtype=torch.float64)
    sampled = loss_and_grads(
        [q, k], upstream, num_noise=2500, generator=torch.Generator().manual_seed(1), temperature=tau, **options
    )
    given = loss_and_grads([q, k], upstream, noise=vectors, temperature=tau, **options)
    for a, b in zip(sampled, given, strict=True):
        assert relative_error(a, b) < 1e-12


def test_no_noise_is_info_nce_to_the_bit():
    q, k = rows(20, 6, seed=1, dtype=torch.float32), rows(20, 6, seed=2, dtype=torch.float32)
    want = loss_and_grads([q, k], num_noise=0)
    for options in (
        {"noise_weight": 0.0},
        {"noise_weight": 0.0, "noise": "expected"},
        {"noise": torch.empty(0, 6)},
    ):
        assert all(torch.equal(a, b) for a, b in zip(loss_and_grads([q, k], **options), want, strict=True))


def test_expected_noise_is_the_mean_of_much_sampled_noise():
    q, k = rows(4, 32, seed=1), rows(4, 32, seed=2)
    sampled = gs_infonce(q, k, num_noise=300_000, noise_weight=1 / 300, temperature=0.2)
    expected = gs_infonce(q, k, num_noise=1000, temperature=0.2, noise="expected")
    assert torch.allclose(sampled, expected, rtol=3e-3)
    assert expected > gs_infonce(q, k, num_noise=0, temperature=0.2) + 0.1


# ---------------------------------------------------------------------- autograd


@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=["oneway", "symmetric"])
def test_backward_twice_and_scaled(options):
    q = rows(9, 5, seed=1).requires_grad_()
    loss = info_nce(q, rows(9, 5, seed=2), **options)
    (once,) = torch.autograd.grad(loss, q, retain_graph=True)
    kept = once.clone()
    (scaled,) = torch.autograd.grad(loss, q, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    once.mul_(0)
    (again,) = torch.autograd.grad(loss, q)
    assert torch.equal(again, kept)
    assert torch.allclose(scaled, 3 * kept, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=["oneway", "symmetric"])
def test_second_derivative_is_refused_in_words(options):
    q = rows(9, 5, seed=1).requires_grad_()
    (grad,) = torch.autograd.grad(info_nce(q, rows(9, 5, seed=2), **options), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r'no second derivative.*backend="reference"'):
        grad.sum().backward()


def test_temperature_shapes_and_places():
    q, k = rows(9, 5, seed=1), rows(9, 5, seed=2)
    for tau in (
        torch.tensor(0.1),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.bfloat16),
    ):
        tau.requires_grad_()
        info_nce(q, k, temperature=tau).backward()
        assert tau.grad.shape == tau.shape
        assert tau.grad.dtype == tau.dtype


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"noise": "expected"}], ids=str)
def test_a_bad_temperature_tensor_gives_nan(bad, options):
    q = rows(9, 5, seed=1).requires_grad_()
    loss = gs_infonce(q, rows(9, 5, seed=2), temperature=torch.tensor(bad), **options)
    assert loss.isnan()
    assert torch.autograd.grad(loss, q)[0].isnan().all()
    assert gs_infonce(q[:1], q[1:2], temperature=torch.tensor(bad), **options).isnan()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["anchors", "positives", "negatives", "queue"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"temperature": 0.001}], ids=str)
def test_nan_and_inf_come_out_as_nan(value, where, options):
    inputs = {name: rows(8, 5, seed=s) for s, name in enumerate(("anchors", "positives", "negatives", "queue"))}
    inputs[where][3, 2] = value
    anchors = inputs.pop("anchors").requires_grad_()
    loss = gs_infonce(anchors, **inputs, **options)
    assert loss.isnan()
    with torch.no_grad():
        assert gs_infonce(anchors, **inputs, **options).isnan()


def test_auto_says_once_what_it_chose(caplog):
    from fused_infonce import backends

    backends._logged.clear()
    with caplog.at_level("INFO", logger="fused_infonce"):
        info_nce(rows(3, 4), rows(3, 4))
        info_nce(rows(3, 4), rows(3, 4))
    assert len(caplog.records) == 1
    assert "torch" in caplog.text


def test_a_promised_bound_licenses_one_sweep_without_asking_the_device():
    """Only a device tensor's value is not read; "meta" stands for a device here."""
    tau = torch.empty((), device="meta")
    assert resolve._kappa_bound(tau, None) is None
    assert resolve._kappa_bound(tau, 0.015) == 1 / 0.015
    assert resolve._kappa_bound(torch.tensor(0.5), 0.015) == 2


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"noise": "expected"}], ids=str)
def test_inside_a_compiled_step(options):
    """A graph break, and the same numbers with fresh noise at each call."""
    q, k = rows(16, 8, seed=1).requires_grad_(), rows(16, 8, seed=2)

    def step(q, k):
        return 2 * gs_infonce(1.0 * q, k, temperature=0.5, **options)

    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        state = torch.get_rng_state()
        got = compiled(q, k)
        torch.set_rng_state(state)
        want = step(q, k)
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(loss, q)[0] for loss in (got, want)))


@pytest.mark.parametrize(
    ("capability", "dtype", "D", "chosen", "reason"),
    [
        ((9, 0), torch.bfloat16, 768, "triton", "backend 'triton' for cuda tensors"),
        ((7, 5), torch.bfloat16, 768, "torch", "compute capability 8.0 or newer"),
        ((9, 0), torch.float64, 768, "torch", "no float64"),
        ((9, 0), torch.float32, 9000, "torch", "at most 8192 features"),
    ],
)
def test_auto_takes_the_kernels_where_they_run(capability, dtype, D, chosen, reason, caplog, monkeypatch):
    from fused_infonce import backends

    pytest.importorskip("triton")
    monkeypatch.setattr(backends, "_capability", lambda device: capability)
    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level("INFO", logger="fused_infonce"):
        assert backends.choose_backend("auto", torch.device("cuda"), dtype, D) == chosen
    assert reason in caplog.text
    if chosen == "torch":
        with pytest.raises(ValueError, match=reason):
            backends.choose_backend("triton", torch.device("cuda"), dtype, D)
