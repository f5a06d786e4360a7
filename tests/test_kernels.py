"""The Triton kernels, in the interpreter without a GPU and on it with one: the loss and each kernel alone."""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, COMPARABLE, LossCase, both
from helpers import loss_and_grads, relative_error, rows
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fused_infonce import autograd, cosine_logsumexp, gs_infonce
from fused_infonce.kernels import common, noise, normalise, products, ratios, settings, similarity
from fused_infonce.tiled import operands, triton_backend, triton_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N, D, H, M = 21, 20, 42, 9
INTERPRETED = settings.default_settings("interpreter", torch.float32, "ieee", 0, 0)
PLAIN = common.Terms(), common.Counts()


def make(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return rows(*shape, seed=seed, dtype=dtype).to(DEVICE)


def compare(case, dtype, sizes=(N, D), temperature=None, workspace_bytes=3_000):
    """Compares the kernels with the reference in float64; a tiny workspace makes several chunks."""
    options = {"workspace_bytes": workspace_bytes, "temperature": temperature, "device": DEVICE, "exact": True}
    ours, want = both(case, "triton", *sizes, dtype, **options)
    assert_close(ours, want, dtype, temperature or case.options.get("temperature", 0.05))


def assert_close(ours, want, dtype, temperature=0.05):
    """fp32 as the torch backend is held to; half precision: rows and results are rounded to it."""
    if dtype != torch.float32:
        ours, want = ours[:3], want[:3]
    limit = {torch.float32: 1e-5 * max(1, 0.05 / temperature), torch.float16: 4e-3, torch.bfloat16: 1e-2}[dtype]
    for name, a, b in zip(("loss", *"abcdef"), ours, want, strict=False):
        assert relative_error(a, b) < limit, name


@pytest.fixture(autouse=True)
def _no_product_is_too_small(monkeypatch):
    """Else all that the interpreter can do in time would run in fp32."""
    monkeypatch.setattr(autograd, "SMALL_PRODUCT", 0)


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("name", COMPARABLE)
def test_every_case(name):
    compare(CASES[name], torch.float32)


HALF = ["weights", "noise, negatives", "noise, symmetric", "noise, symmetric, none", "decoupled, noise"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", [*HALF, "margin, expected, symmetric"])
def test_half_precision(name, dtype):
    compare(CASES[name], dtype, temperature=0.1)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 8), (2, 3), (17, 1), (5, 130), (33, 16), (3, 8192)], ids=str)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=["oneway", "symmetric"])
def test_ragged_sizes(sizes, options):
    compare(LossCase(options), torch.float32, sizes, temperature=0.2)


@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=["oneway", "symmetric"])
def test_any_strides_and_two_runs_that_give_the_same_bits(options):
    wide = make(N, 2 * D, seed=1)
    views = [wide[:, ::2], make(D, N, seed=2).T]
    found = [loss_and_grads(views, backend="triton", num_noise=0, **options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    plain = loss_and_grads([x.contiguous() for x in views], backend="triton", num_noise=0, **options)
    for a, b in zip(found[0], plain, strict=True):  # a compiled kernel's order of sums may depend on strides
        assert relative_error(a, b) <= 1e-6


def test_ids_and_upstream_gradients_of_any_strides():
    q, k, ids = make(N, D, seed=1), make(N, D, seed=2), torch.arange(4 * N, device=DEVICE)[::4] // 8
    found = []
    for backend in ("triton", "torch"):
        leaf = q.clone().requires_grad_()
        loss = gs_infonce(leaf, k, num_noise=0, ids=ids, reduction="none", backend=backend)
        loss.sum().backward()  # an expanded scalar comes back
        found.append(leaf.grad)
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("options", [{}, {"symmetric": True}], ids=["oneway", "symmetric"])
def test_nan_and_zero_rows(options):
    q, k = make(N, D, seed=1), make(N, D, seed=2)
    q[3] = 0
    loss, dq, _ = loss_and_grads([q, k], backend="triton", num_noise=0, **options)
    assert loss.isfinite()
    assert dq.isfinite().all()
    assert (dq[3] == 0).all()
    q[5, 2] = torch.nan
    assert loss_and_grads([q, k], backend="triton", num_noise=0, **options)[0].isnan()


def test_without_gradients_and_only_those_that_are_wanted():
    q, k, h = make(N, D, seed=1), make(N, D, seed=2), make(H, D, seed=3)
    whole = loss_and_grads([q, k, h], backend="triton", num_noise=0)
    assert torch.allclose(gs_infonce(q, k, h, num_noise=0, backend="triton"), whole[0], rtol=1e-6)
    for wanted in (0, 1, 2):
        leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate((q, k, h))]
        gs_infonce(*leaves, num_noise=0, backend="triton").backward()
        assert relative_error(leaves[wanted].grad, whole[1 + wanted]) < 1e-6
        assert all(x.grad is None for i, x in enumerate(leaves) if i != wanted)


def test_sampled_noise_is_that_of_the_kernel_in_both_passes(monkeypatch):
    """Noise over several blocks equals the same vectors given; the default generator reproduces it."""
    monkeypatch.setattr(triton_backend.TritonBackend, "noise_block", 8)
    generator = torch.Generator(DEVICE).manual_seed(3)
    seed = torch.randint(0, 2**62, (1,), generator=generator, device=DEVICE)
    vectors = torch.empty(M + 10, D, device=DEVICE)
    noise.sample_noise(seed, 0, None, vectors, None)
    for options in ({}, {"symmetric": True}):
        inputs = [make(N, D, seed=1), make(N, D, seed=2)]
        generator.manual_seed(3)
        sampled = loss_and_grads(inputs, backend="triton", num_noise=M + 10, generator=generator, **options)
        given = loss_and_grads(inputs, backend="triton", noise=vectors, **options)
        for a, b in zip(sampled, given, strict=True):
            assert relative_error(a, b) < 1e-6
    torch.manual_seed(7)
    first, other = (gs_infonce(*inputs, num_noise=7, backend="triton") for _ in range(2))
    torch.manual_seed(7)
    assert gs_infonce(*inputs, num_noise=7, backend="triton") == first != other


# ---------------------------------------------------------------------- each kernel alone


def test_noise_is_normal_and_any_range_alone_gives_the_same():
    seed = torch.tensor([12345678901234567], device=DEVICE)
    whole = torch.empty(150, 37, device=DEVICE)
    noise.sample_noise(seed, 0, None, whole, None)
    part = torch.empty(20, 37, device=DEVICE)
    noise.sample_noise(seed, 128, None, part, None)
    assert torch.equal(part, whole[128:148])
    assert torch.allclose(whole.norm(dim=1), torch.ones(150, device=DEVICE), atol=1e-5)
    moments = (whole * 37**0.5).flatten().double()  # nearly normal: a coordinate of a direction in R^37
    count = moments.numel()
    assert abs(moments.mean()) < 4 / count**0.5
    assert abs(moments.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((moments**4).mean() - 3 * 37 / 39) < 4 * (96 / count) ** 0.5
    correlation = whole.double() @ whole.double().T
    assert correlation.fill_diagonal_(0).abs().max() < 0.85
    long = torch.empty(2, 8192, device=DEVICE)
    noise.sample_noise(seed, 0, None, long, None)
    assert torch.allclose(long.norm(dim=1), torch.ones(2, device=DEVICE), atol=1e-5)
    far = torch.empty(4, 37, device=DEVICE)
    noise.sample_noise(seed, 2**31 - 2, None, far, None)  # rows on both sides of 2^31
    assert far.isfinite().all()
    assert torch.unique(far, dim=0).shape[0] == 4


def test_normalise_pairs():
    x, y = make(N, 50, seed=1)[:, ::2], make(N, 25, seed=2)
    x[4] = 0
    queries, keys = torch.empty(N, 25, device=DEVICE), torch.empty(N, 25, device=DEVICE)
    vectors = tuple(torch.empty(N, 1, device=DEVICE) for _ in range(5))
    center_q, center_k = torch.empty(25, device=DEVICE), torch.empty(25, device=DEVICE)
    normalise.normalise_pairs(x, y, 3.0, queries, keys, None, vectors, center_q, center_k, True, 256)
    r_q, r_k = (torch.where(z.norm(dim=1) > 0, 1 / z.double().norm(dim=1), 0)[:, None] for z in (x, y))
    unit_q, unit_k = x.double() * r_q, y.double() * r_k
    chosen = torch.arange(16, device=DEVICE) * N // 16
    c = unit_k[chosen].mean(0)
    want = (3 * unit_q, unit_k - c, r_q, r_k, 3 * (unit_q * (unit_k - c)).sum(1, keepdim=True))
    for got, exact in zip((queries, keys, *vectors), want, strict=False):
        assert relative_error(got, exact) < 1e-6
    assert relative_error(vectors[3], (unit_q * unit_k).sum(1, keepdim=True)) < 1e-6
    assert relative_error(vectors[4], (unit_q - unit_k).square().sum(1, keepdim=True) / 2) < 1e-6
    assert relative_error(center_q, unit_q[chosen].mean(0)) < 1e-6


def test_exp_similarity_and_its_partial_sums():
    q, k, shift = make(N, D, seed=1), make(H, D, seed=2), make(N, 1, seed=3)
    out = torch.empty(N, H, device=DEVICE)
    partials = similarity.exp_similarity(
        q, k, out, shift, 0, common.Terms(bias=0.5), common.Counts(), INTERPRETED.similarity
    )
    want = torch.exp2(q.double() @ k.double().T + 0.5 - shift.double())
    assert relative_error(out, want) < 1e-6
    assert relative_error(partials.sum(1), want.sum(1)) < 1e-6


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grad_products_of_both_ways(add, dtype):
    E = make(N, H, seed=1, dtype=dtype).abs()
    keys, anchors = make(H, D, seed=2, dtype=dtype), make(N, D, seed=3, dtype=dtype)
    before = [make(N, D, seed=4), make(H - 3, D, seed=5)]
    acc_rows, acc = (x.clone() for x in before)
    products.grad_products(
        E, keys, acc_rows, add, E[:, 3:], anchors, acc, add, INTERPRETED.products, library=False
    )
    e = E.double()
    want = [e @ keys.double(), e[:, 3:].T @ anchors.double()]
    for got, exact, start in zip((acc_rows, acc), want, before, strict=True):
        assert relative_error(got, exact + add * start.double()) < 1e-5


def test_the_library_products_are_the_kernel_s():
    E, keys, anchors = make(N, H, seed=1), make(H, D, seed=2), make(N, D, seed=3)
    results = []
    for library in (False, True):
        acc_rows, acc = torch.ones(N, D, device=DEVICE), torch.ones(H, D, device=DEVICE)
        products.grad_products(E, keys, acc_rows, True, E, anchors, acc, False, INTERPRETED.products, library)
        results.append((acc_rows, acc))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-6


def test_memory_maps_load_what_pointers_load():
    q, k = make(32, 32, seed=1), make(48, 32, seed=2)
    found = []
    for tma in (False, True):
        tile = settings.Tile(16, 16, 16, 4, 1, tma=tma)
        out = torch.empty(32, 48, device=DEVICE)
        similarity.exp_similarity(q, k, out, make(32, 1, seed=3), 0, *PLAIN, tile)
        assert common.operands(q, k, out, tile)[3] == tma
        found.append(out)
    assert torch.equal(*found)
    assert not common.operands(make(32, 33, seed=1)[:, :32], k, None, settings.Tile(16, 16, 16, 4, 1, tma=True))[3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strides_of_what_kernels_load_are_aligned(dtype):
    """Multiples of 16 elements: Triton compiles for these alone loads of several elements."""
    library = replace(INTERPRETED, library_products=True)
    ops = triton_backend.TritonBackend(operands.Precision.of(dtype, DEVICE), DEVICE, None, 5000, 5000, library)
    found = [ops.rows(5, 20, dtype), ops.tile(5, 21), ops.column_accumulator(5, 20, single_chunk=True).grad]
    assert all(x.stride(0) % 16 == 0 for x in found)
    assert all(x.data_ptr() % 16 == 0 for x in ops.vectors(3, 21))


# ---------------------------------------------------------------------- costs


class _Launches(TorchDispatchMode):
    """Operations that launch something on a device, by name."""

    FREE = (
        "view",
        "empty",
        "detach",
        "slice",
        "select",
        "unsqueeze",
        "as_strided",
        "alias",
        "expand",
        "unbind",
        "promote_types",
    )

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(name in str(function) for name in self.FREE):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("small", [0, 1 << 24], ids=["bf16", "fp32"])
def test_a_small_call_takes_six_launches(small, monkeypatch):
    """Forward and backward: rows, exponentials, closing, both products, mean; rows again."""
    if DEVICE.type != "cpu":
        pytest.skip("launches of the kernels are counted in the interpreter")
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__
    mode = _Launches()
    monkeypatch.setattr(autograd, "SMALL_PRODUCT", small)

    def counted(self, *args, **options):
        mode.found.append(self.fn.__name__)
        with _disable_current_modes():
            return launch(self, *args, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    q, k = (make(64, 32, seed=s, dtype=torch.bfloat16).requires_grad_() for s in (1, 2))
    upstream = torch.ones(())
    with mode:
        torch.autograd.grad(gs_infonce(q, k, num_noise=0, backend="triton"), (q, k), upstream)
    assert len(mode.found) == 6, mode.found


def test_noise_of_a_seed_is_the_same_everywhere():
    """In the interpreter and on every GPU, to rounding."""
    found = torch.empty(2, 4, device=DEVICE)
    noise.sample_noise(torch.tensor([1], device=DEVICE), 0, None, found, None)
    known = torch.tensor([[0.2309, 0.9145, -0.2936, -0.1554], [-0.0162, 0.1388, 0.8443, 0.5174]], device=DEVICE)
    assert (found - known).abs().max() < 1e-4


def test_costs_are_what_is_launched_and_allocated(monkeypatch):
    interpreter = pytest.importorskip("interpreter")
    if DEVICE.type != "cpu":
        pytest.skip("products are counted in the interpreter")
    C, T, d = 32, 64, 32
    q, k, shift, out = make(C, d, seed=1), make(T, d, seed=2), make(C, 1, seed=3), torch.empty(C, T)
    tile = settings.Tile(16, 32, 16, 4, 1)
    both_sides = (make(C, 1, seed=4), make(T, seed=5))

    def allocated(run) -> int:
        found: list[int] = []
        empty, new_empty = torch.empty, torch.Tensor.new_empty
        with monkeypatch.context() as patch:
            for target, name, make_memory in ((torch, "empty", empty), (torch.Tensor, "new_empty", new_empty)):

                def counted(*args, make_memory=make_memory, **options):
                    memory = make_memory(*args, **options)
                    found.append(memory.numel() * memory.element_size())
                    return memory

                patch.setattr(target, name, counted)
            run()
        return sum(found)

    cases = [
        (
            lambda: similarity.exp_similarity(q, k, out, shift, 0, *PLAIN, tile),
            similarity.exp_similarity_cost(C, T, d, 4, 4, tile),
        ),
        (
            lambda: ratios.ratio_sums(q, k, 0, 0, shift, both_sides, *PLAIN, tile),
            ratios.ratios_cost(C, T, d, 4, 0, True, tile),
        ),
        (
            lambda: ratios.weighted_ratios(q, k, out, 0, 0, shift, None, None, *PLAIN, tile),
            ratios.ratios_cost(C, T, d, 4, 4, False, tile),
        ),
        (
            lambda: products.grad_products(out, k, torch.zeros(C, d), True, out, None, None, True, tile, False),
            products.product_cost(C, T, d, 4, True),
        ),
    ]
    for run, cost in cases:
        interpreter.flops = 0
        assert allocated(run) == cost.workspace
        assert interpreter.flops == cost.flops
    # Bytes: each operand once, each result once.
    assert cases[0][1].bytes == 4 * (q.numel() + k.numel() + out.numel() + shift.numel() + C * 2)
    assert cases[3][1].bytes == 4 * (out.numel() + k.numel() + 2 * C * d)
    assert normalise.normalise_pairs_cost(C, d, 4, 4, 2).bytes == 4 * (4 * C * d + 5 * C)
    assert normalise.normalise_backward_cost(C, d, 4, 2).bytes == 4 * 6 * C * d
    assert noise.sample_noise_cost(C, d, 2, 1).bytes == 2 * C * d


# ---------------------------------------------------------------------- faults are caught

FAULTS = {  # what is wrong: the file, what stands there, what a mistake would write; None: the line is gone
    "the positive counts as a negative": ("common.py", "(i[:, None] == j[None, :]) | (j", "(j"),
    "the mask is one off": ("common.py", "(i[:, None] == j[None, :]) | (j", "(i[:, None] + 1 == j[None, :]) | (j"),
    "tiles of positives are not found": (
        "common.py",
        "(num_positives > 0) & (last",
        "(num_positives < 0) & (last",
    ),
    "ids one off": ("common.py", "tl.load(ids.columns + j * ids", "tl.load(ids.columns + (j + 1) * ids"),
    "own negatives one off": (
        "common.py",
        "num_positives, 1))[None, :] == i[",
        "num_positives, 1))[None, :] == 1 + i[",
    ),
    "a dimension of the product lost": ("common.py", "[:, None] < D - d,", "[:, None] < D - d - 1,"),
    "a scale off by 0.1 %": ("normalise.py", "(q * factor).to(queries", "(q * factor * 1.001).to(queries"),
    "the centre is not taken out": ("normalise.py", "tl.where(mask, k - c, 0.0)", "tl.where(mask, k, 0.0)"),
    "shares off by 0.1 %": ("normalise.py", "other=0.0)[:, None] * other", "other=0.0)[:, None] * other * 1.001"),
    "weights of columns one off": (
        "ratios.py",
        "tl.load(terms.column_bias + j0 + columns)",
        "tl.load(terms.column_bias + j0 + tl.maximum(columns - 1, 0))",
    ),
    "columns beyond the end": ("common.py", " | (j >= end)[None, :]", ""),
    "tiles beyond the end are not found": ("similarity.py", "(start_t + BLOCK_T > T)", "(start_t > T)"),
    "a part of the sums lost": (
        "rows.py",
        "tl.range(0, tiles, BLOCK_P)",
        "tl.range(0, tiles - 32, BLOCK_P)",
    ),
    "the reflection is not undone": ("normalise.py", "v = reflect(v, mirror_of(side.center, offs_d, D))", None),
}


def _largest_error() -> float:
    """In units of the limits, over calls that use what the faults are in; NaN counts as infinite."""
    worst = 0.0
    special = CASES["ids, negatives"].given(hard_negative_weight=1.3)
    for dtype, unit, case in (
        (torch.float32, 1e-5, CASES["info_nce"]),
        (torch.float32, 1e-5, LossCase(negatives=2)),
        (torch.float32, 1e-5, special),
        (torch.bfloat16, 1e-2, special),  # here the anchors are centred
    ):
        options = {"workspace_bytes": 100_000, "temperature": 0.2, "device": DEVICE, "exact": True}
        ours, want = both(case, "triton", N, D, dtype, **options)
        errors = [relative_error(a, b) / unit for a, b in zip(ours[:5], want[:5], strict=True)]
        worst = max(worst, *(e if e == e else float("inf") for e in errors))
    x, y = (rows(n, D, seed=n, dtype=torch.float32).to(DEVICE) for n in (N, N + 3))
    weighted = {"log_weights": torch.arange(N + 3, device=DEVICE) % 5 * 1.0, "temperature": 0.2}
    sums = [cosine_logsumexp(x, y, backend=backend, **weighted) for backend in ("triton", "reference")]
    return max(worst, relative_error(*sums) / 1e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_faults_are_caught(fault, tmp_path, monkeypatch):
    """The same comparison that the kernels pass fails for kernels with one fault."""
    file, right, wrong = FAULTS[fault]
    package = tmp_path / "mutant"
    shutil.copytree(Path(similarity.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (package / file).read_text()
    assert text.count(right) == 1, "the fault's place has gone: update FAULTS"
    line = next(x for x in text.splitlines() if right.splitlines()[0] in x)
    gone = text.replace(line, line[: len(line) - len(line.lstrip())] + "pass")
    (package / file).write_text(gone if wrong is None else text.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [x for x in sys.modules if x.split(".")[0] == "mutant"]:
        del sys.modules[name]
    for name in ("products", "ratios", "similarity"):
        monkeypatch.setattr(triton_backend, name, importlib.import_module(f"mutant.{name}"))
    for name in ("noise", "normalise"):
        monkeypatch.setattr(triton_rows, name, importlib.import_module(f"mutant.{name}"))
    for module in (triton_backend, triton_rows):
        monkeypatch.setattr(module, "row_kernels", importlib.import_module("mutant.rows"))
    assert _largest_error() > 1


def test_without_a_fault_the_same_comparison_passes():
    assert _largest_error() < 1
