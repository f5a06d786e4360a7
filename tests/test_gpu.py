"""What the kernels promise on hardware: exactness, no waiting, graphs, sizes beyond 2^31, memory, few launches.

``test_kernels.py`` runs on a GPU too, every option and every kernel alone; here is what only a GPU can show.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import subprocess
import sys
import time

import pytest
import torch
from cases import CASES, COMPARABLE, build
from helpers import differentiated, relative_error

from fused_infonce import gs_infonce, info_nce
from fused_infonce.testing import REGIMES, embeddings, exact, naive, relative_errors

pytest.importorskip("triton")

from fused_infonce.kernels import normalise, settings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]

DEVICE = "cuda"
GIB = 1 << 30


def inputs(name: str, N: int, D: int) -> list[torch.Tensor]:
    return [x.float().to(DEVICE) for x in embeddings(name, N, D)]


def leaves(N: int, D: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    made = (torch.randn(N, D, generator=generator, device=DEVICE, dtype=torch.float32) for _ in "qk")
    return [x.to(dtype).requires_grad_() for x in made]


def needs_memory(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, there are {free:.0f}")


@pytest.fixture
def tf32():
    was = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(was)


# ---------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("N", [1, 2, 63, 1024])
def test_fp32(name, N):
    for D, tau in itertools.product((1, 3, 64, 768, 1023), (1e-3, 0.01, 0.05, 1.0, 10.0)):
        q, k = inputs(name, N, D)
        found = relative_errors(differentiated(info_nce, q, k, tau), exact(q, k, tau), tau)
        limit = 5e-6 * max(1, 0.05 / tau) * (1 if N >= 63 and D >= 64 else 4)
        if name == "retrieval" and tau == 1e-3:
            del found["dtau"]  # 2.8e-4 at N = 63, D = 64: a small difference of inner products near 0.9
        assert max(found.values()) <= limit, (D, tau, found)


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("N", [2, 63, 300, 1024])
def test_bf16_products(name, N):
    q, k = inputs(name, N, 768)
    want = exact(q, k, 0.05)
    found = relative_errors(differentiated(info_nce, q, k, 0.05, autocast=True), want, 0.05)
    assert max(found.values()) <= 1e-3, found
    usual = relative_errors(differentiated(naive, q, k, 0.05, autocast=True), want, 0.05)
    for gradient in ("dq", "dk"):
        assert found[gradient] <= 1.25 * usual[gradient]


@pytest.mark.parametrize(("D", "H"), [(768, 0), (768, 2500), (200, 0)], ids=str)
@pytest.mark.parametrize("name", REGIMES)
def test_bf16_products_of_many_rows(name, D, H):
    """Large tiles, and the library's products."""
    q, k = inputs(name, 2500, D)
    given = [q, k, *[torch.randn(H, D, device=DEVICE)] * (H > 0)]
    want = exact(q, k, 0.05, negatives=given[2] if H else None)
    names = ("dq", "dk", "dnegatives")[: len(given)]

    def found(loss):
        wanted = [x.clone().requires_grad_() for x in given]
        with torch.autocast(DEVICE, torch.bfloat16):
            value = loss(*wanted)
        grads = torch.autograd.grad(value, wanted)
        return relative_errors({"loss": value.detach(), **dict(zip(names, grads, strict=True))}, want, 0.05)

    ours, usual = found(info_nce), found(lambda anchors, *columns: naive(anchors, torch.cat(columns)))
    if D == 768:
        assert max(ours[x] for x in ("loss", "dq", "dk")) <= 1e-3, ours
    for gradient in names:
        assert ours[gradient] <= 1.25 * usual[gradient], (ours, usual)


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("N", [63, 1024])
def test_tf32_products_are_no_worse_than_the_usual_way(name, N, tf32):
    q, k = inputs(name, N, 768)
    want = exact(q, k, 0.05)
    ours, usual = (relative_errors(differentiated(f, q, k, 0.05), want, 0.05) for f in (info_nce, naive))
    for gradient in ("dq", "dk"):
        assert ours[gradient] <= 1.25 * usual[gradient]


@pytest.mark.parametrize("name", REGIMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_inputs(name, dtype):
    """Their gradients come back rounded: half a unit in the last place, and what subnormals lose in fp16."""
    q, k = (x.to(dtype) for x in inputs(name, 300, 768))
    want = exact(q, k, 0.05)
    scale = 2.0**14 if dtype == torch.float16 else 1.0  # as a gradient scaler does
    q, k = q.requires_grad_(), k.requires_grad_()
    loss = info_nce(q, k, temperature=0.05)
    grads = torch.autograd.grad(loss * scale, (q, k))
    assert relative_error(loss.detach(), want["loss"]) <= 1e-3
    for got, name in zip(grads, ("dq", "dk"), strict=True):
        assert relative_error(got.double() / scale, want[name]) <= 2.7e-3, name  # 1.7e-3 of it is the rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
def test_65536_anchors_and_as_many_random_directions(dtype, symmetric):
    needs_memory(12)
    N, D = 65536, 64
    q, k = inputs("middle", N, D)
    vectors = torch.randn(N, D, device=DEVICE)
    want = exact(q, k, 0.05, **({"symmetric": True} if symmetric else {"noise": vectors}))
    q, k = q.requires_grad_(), k.requires_grad_()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        loss = info_nce(q, k, symmetric=True) if symmetric else gs_infonce(q, k, noise=vectors)
    loss.backward()
    limit = 5e-6 if dtype == torch.float32 else 2e-3
    for got, name in ((loss.detach(), "loss"), (q.grad, "dq"), (k.grad, "dk")):
        assert relative_error(got, want[name]) <= limit, name


# ---------------------------------------------------------------------- beyond 2^31


@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
def test_a_tile_of_more_than_2_31_elements(symmetric):
    """A workspace as large as the matrix: one tile, 64-bit offsets into it."""
    needs_memory(20)
    N, D = 47_000, 64
    assert N * N > 2**31
    q, k = inputs("middle", N, D)
    results = []
    for workspace in (6 * GIB, None):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = info_nce(a, b, symmetric=symmetric, workspace_bytes=workspace)
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    for one_tile, tiles in zip(*results, strict=True):
        assert relative_error(one_tile, tiles) <= 1e-4
    assert all(x[-100:].isfinite().all() for x in results[0][1:])


def test_rows_of_more_than_2_31_elements():
    """The last of N×D > 2^31: normalised there as alone."""
    needs_memory(24)
    N, D = 262_400, 8192
    assert N * D > 2**31
    x, y = (torch.ones(N, D, dtype=torch.bfloat16, device=DEVICE) for _ in "xy")
    last = torch.randn(3, D, device=DEVICE).bfloat16()
    x[-3:], y[-3:] = last, last.flip(0)
    queries, keys = torch.empty_like(x), torch.empty_like(x)
    vectors = tuple(torch.empty(N, 1, device=DEVICE) for _ in range(5))
    center_k = torch.empty(D, device=DEVICE)
    normalise.normalise_pairs(x, y, 1.0, queries, keys, None, vectors, None, center_k, True, 8192)
    want = torch.nn.functional.normalize(last.double(), dim=1)
    assert relative_error(queries[-3:], want) <= 4e-3
    assert relative_error(keys[-3:], want.flip(0) - center_k.double()) <= 4e-3
    cosines = (want * want.flip(0)).sum(1, keepdim=True)
    assert (vectors[3][-3:] - cosines).abs().max() <= 1e-5


# ---------------------------------------------------------------------- waiting, graphs, compilers


def leaves_of(name: str, N: int, D: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict]:
    """The inputs of a case, which want gradients, and its options."""
    made, options, _ = build(CASES[name], N, D, dtype, DEVICE)
    return [x.requires_grad_() for x in made], options


# Small tiles and products in fp32; large tiles by tensor maps, and the library's products.
BATCHES = [(96, 64, torch.float32), (2500, 768, torch.bfloat16), (2500, 200, torch.bfloat16)]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_device(name, batch):
    inputs, given = leaves_of(name, *batch)
    for learn in (False, True):
        options = dict(given)
        if learn:
            tau = torch.tensor(options.pop("temperature", 0.05), device=DEVICE, requires_grad=True)
            options |= {"temperature": tau, "min_temperature": 0.015}

        def step(options=options):
            loss = gs_infonce(*inputs, **options)
            loss.backward(torch.ones_like(loss))

        step()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_captured_graph_replays_with_fresh_noise(name, batch):
    inputs, options = leaves_of(name, *batch)

    def step():
        loss = gs_infonce(*inputs, **options).sum()
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append([x.clone() for x in results])
    if CASES[name].sampled:
        assert replays[0][0] != replays[1][0]
    else:
        for a, b, eager in zip(*replays, step(), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, eager)


@pytest.mark.parametrize("sizes", [(1000, 200), (2500, 768), (2500, 200)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_two_runs_give_the_same_bits(name, sizes):
    inputs, options = leaves_of(name, *sizes, torch.bfloat16)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        loss = gs_infonce(*inputs, **options)
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", [name for name in COMPARABLE if not CASES[name].guide])
def test_compiled_without_a_graph_break(name):
    inputs, options = leaves_of(name, 96, 64, torch.float32)

    def step(q, *more):
        return gs_infonce(2 * q, *more, **options).sum()

    got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (torch.compile(step, fullgraph=True), step))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_auto_takes_the_kernels(caplog, monkeypatch):
    from fused_infonce import backends

    monkeypatch.setattr(backends, "_logged", set())
    with caplog.at_level("INFO", logger="fused_infonce"):
        info_nce(*leaves(8, 8))
    assert "backend 'triton' for cuda tensors" in caplog.text


# ---------------------------------------------------------------------- memory and launches


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"num_noise": 131072}], ids=str)
def test_memory_stays_within_the_workspace(options):
    """Beyond inputs, unit rows and gradients with their fp32 accumulators."""
    needs_memory(6)
    N, D = 131_072, 768
    options = {"num_noise": 0, **options}
    gs_infonce(*leaves(2500, D, torch.bfloat16), **options).backward()  # cuBLAS takes memory, once in each thread
    q, k = leaves(N, D, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gs_infonce(q, k, **options).backward()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    rows = 2 * N * D * 2  # in bf16
    gradients = 2 * N * D * (4 + 2)
    assert used - rows - gradients <= settings.workspace_of(q.device), used


SMALL = [(64, 384), (256, 768), (1024, 1024)]


@pytest.fixture
def uninitialised_memory(monkeypatch):
    """As in training: filling it with NaN is a launch for each tensor."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.usefixtures("uninitialised_memory")
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_small_batches_take_few_launches(sizes):
    q, k = leaves(*sizes, torch.bfloat16)
    upstream = torch.ones((), device=DEVICE)

    def step():
        torch.autograd.grad(info_nce(q, k), (q, k), upstream)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= 6, kernels


@pytest.mark.usefixtures("uninitialised_memory")
@pytest.mark.parametrize("sizes", SMALL[:1], ids=str)
def test_small_batches_take_little_python(sizes):
    """The time in which the host has handed a call over, where the device is not what it waits for."""
    q, k = leaves(*sizes, torch.bfloat16)
    upstream = torch.ones((), device=DEVICE)
    times = []
    for _ in range(300):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(info_nce(q, k), (q, k), upstream)
        times.append(time.perf_counter() - start)
    assert statistics.median(times[100:]) <= 100e-6


# ---------------------------------------------------------------------- the sanitizer

SANITIZED = """
import torch
from fused_infonce import autograd, gs_infonce

autograd.SMALL_PRODUCT = 0  # else all of this would run in fp32

def step(N, D, dtype, **options):
    q, k, h = (torch.randn(n, D, device="cuda", dtype=dtype, requires_grad=True) for n in (N, N, 2 * N))
    gs_infonce(q, k, h, num_noise=40, **options).backward()

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for D in (8, 33):
        for options in ({}, {"symmetric": True}, {"noise": "expected"}, {"temperature": 0.002},
                        {"ids": torch.arange(70, device="cuda") // 2, "hard_negative_weight": 1.0}):
            step(70, D, dtype, **options)
for options in ({}, {"symmetric": True}):
    step(1100, 64, torch.bfloat16, **options)  # large tiles
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, monkeypatch):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer (CUDA toolkit) is not on the PATH")
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # every tensor gets bounds of its own
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
