"""The jobs of ``python -m bench first-contact``: what is planned, checked, launched, captured and counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from bench.candidates import load
from bench.cases import Case, make_batch, run_step
from bench.contact import calls, counters, jobs, kernels, launchers, plan, table
from bench.gate import Gate, Wrong
from bench.measure import clock_for
from bench.registry import Unsupported

ROOT = Path(__file__).parents[1]
CASE = Case(16, 16)


def results_of(job, *arguments, **more) -> list[dict]:
    return [facts for event, facts in job(*arguments, **more) if event == "result"]


# ------------------------------------------------------------------ what is planned for a GPU


def test_the_plan_for_a_gpu():
    made = plan.items("cuda", plan.STEPS)
    names = [(x.step, x.name) for x in made]
    assert len(names) == len(set(names))
    assert list(dict.fromkeys(x.step for x in made)) == list(plan.STEPS)
    known = load()
    assert all(name in known for x in made for name in x.candidates)
    timed = {x.case: x.candidates for x in made if x.job == "bench.measure:loss"}
    for case in (Case(32768, 768, mode, "bf16") for mode in ("one-way", "symmetric", "forward")):
        assert timed[case] == ("ours-triton", "naive", "naive-compile")
    assert {case.D for case in timed} == {128, 256, 384, 768, 1024}
    compiled = {(x.case, name) for x in made if x.step == "compile" for name in x.candidates}
    wanted = {(x.case, name) for x in made for name in x.candidates if name in ("ours-triton", "naive-compile")}
    assert wanted - compiled == set()
    assert {x.more["call"] for x in made if x.step == "compile" and "call" in x.more} == set(calls.CALLS)


def test_what_is_compiled_is_what_the_chosen_steps_need():
    assert plan.items("cuda", ["compile"]) == []
    steps = {x.step for x in plan.items("cuda", ["small", "compile"])}
    assert steps == {"compile", "small"}
    assert all(x.case.N <= 1024 for x in plan.items("cuda", ["small", "compile"]))


def test_calls_are_run_once_in_advance():
    for more in ({}, {"call": "ids"}):
        (row,) = results_of(jobs.warm, CASE, [load()["ours-torch"]], "cpu", 0.0, **more)
        assert len(row["seconds"]) == 2


def test_a_wrong_answer_is_not_passed(monkeypatch):
    right = calls.gs_infonce

    def wrong(*rows, backend, **options):
        return right(*rows, backend=backend, **options) * (1 if backend == "reference" else 1.05)

    monkeypatch.setattr(calls, "gs_infonce", wrong)
    for call in calls.CALLS.values():
        with pytest.raises(Wrong):
            calls.check(call.at_most(32, 16), "cpu", "torch")


def test_a_nan_is_not_passed(monkeypatch):
    monkeypatch.setattr(calls, "relative_errors", lambda *_: {"loss": 0.0, "dq": float("nan")})
    with pytest.raises(Wrong, match="dq is off by nan"):
        calls.check(calls.CALLS["one tile"].at_most(8, 8), "cpu", "torch")


# ------------------------------------------------------------------ launchers


def test_launchers_are_called_alone_with_the_arguments_of_a_call():
    """In Triton's interpreter."""
    pytest.importorskip("triton")
    case, ours = Case(32, 16, mode="one-way", noise=16), load()["ours-triton"]
    rows = results_of(launchers.measure, case, [ours], "cpu", 0.0)
    found = {row["candidate"].partition(".")[2]: row for row in rows if row["variant"] == "as called"}
    assert {"normalise_pairs", "exp_similarity", "close_rows", "grad_products", "normalise_backward"} <= set(found)
    assert all(row["status"] == "ok" and row["gb_s"] > 0 for row in found.values())
    one = found["exp_similarity"]
    C, T, D = 32, int(one["shapes"]["keys"].strip("()").split(",")[0]), 16
    assert one["tflops"] == pytest.approx(2 * C * T * D / one["ms"] / 1e9)
    assert found["normalise_pairs"]["tflops"] is None
    assert {row["variant"] for row in rows} >= {"as called", "tma=True", "warp_specialize=True", "library=True"}
    compiled = results_of(launchers.measure, case, [ours], "cpu", 0.0, with_variants=False, timed=False)
    assert {row["candidate"] for row in compiled} == {row["candidate"] for row in rows}
    assert all(len(row["seconds"]) == 1 for row in compiled)


def test_a_variant_that_cannot_run_is_recorded(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(launchers, "variants", lambda arguments: [("broken", {})])
    rows = results_of(launchers.measure, CASE, [load()["ours-triton"]], "cpu", 0.0)
    broken = [row for row in rows if row["variant"] == "broken"]
    assert broken
    assert all(row["status"] == "failed" and "TypeError" in row["reason"] for row in broken)


def test_a_call_without_launchers_says_so():
    with pytest.raises(RuntimeError, match="ours-torch called no launcher"):
        list(launchers.measure(CASE, [load()["ours-torch"]], "cpu", 0.0))


def test_what_the_launchers_need_compiles_without_a_gpu():
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    script = ROOT / "tests" / "contact_on_fake_driver.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    warmed, *launched, names = map(json.loads, done.stdout.splitlines())
    assert len(warmed["seconds"]) == 2
    assert {row["candidate"].partition(".")[2] for row in launched} >= {"exp_similarity", "grad_products"}
    assert {row["status"] for row in launched} == {"ok"}
    assert {"exp_similarity_kernel", "grad_products_kernel", "normalise_backward_kernel"} <= set(names)


# ------------------------------------------------------------------ what only a GPU has, with stand-ins


def test_a_step_is_captured_after_it_was_warmed_up_on_another_stream(monkeypatch):
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    steps = []
    replay = jobs.captured(lambda: steps.append(cuda.graph.called))
    assert steps == [False] * jobs.WARM_UP + [True]
    assert replay is cuda.CUDAGraph.return_value.replay
    jobs._wait("cuda")
    cuda.synchronize.assert_called_once()


@pytest.mark.parametrize("fails", [False, True])
def test_small_batches_are_timed_with_and_without_a_graph(fails, monkeypatch):
    def captured(step):
        if fails:
            raise RuntimeError("no capture here")
        return step

    for name, stand_in in {
        "Gate": lambda case, device: Gate(case, "cpu"),
        "make_batch": lambda case, device: make_batch(case, "cpu"),
        "run_step": lambda loss, batch, case, device: run_step(loss, batch, case, "cpu"),
        "clock_for": lambda device: clock_for("cpu"),
        "captured": captured,
        "_wait": lambda device: None,
        "WALL_SECONDS": 0.01,
    }.items():
        monkeypatch.setattr(jobs, name, stand_in)
    (row,) = results_of(jobs.small, CASE, [load()["ours-torch"]], "cuda", 0.0)
    assert row["status"] == "ok"
    assert set(row["ms"]) == {"wall", "device"} | ({"graph"} if not fails else set())
    assert (row.get("reason") == "no graph: RuntimeError: no capture here") == fails


def test_the_gpu_is_described(monkeypatch):
    monkeypatch.setattr(jobs.results, "describe", lambda device: {"machine": {"gpu": "a GPU"}})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**31))
    (row,) = results_of(jobs.versions, CASE, [], "cuda", 0.0)
    assert row["machine"] == {
        "gpu": "a GPU", "multi_processor_count": 132, "L2_cache_size": None,
        "shared_memory_per_block_optin": None, "free_memory_gib": 1.0,
    }  # fmt: skip


def test_kernels_are_named_and_added_up(monkeypatch):
    def kernel(name, us):
        return SimpleNamespace(name=name, duration=us)

    def product(name, shapes, *kernels):
        cpu = torch.autograd.DeviceType.CPU
        return SimpleNamespace(name=name, device_type=cpu, input_shapes=shapes, kernels=kernels)

    def ran(name, us):
        time_range = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CUDA, time_range=time_range)

    events = [
        product("aten::mm", [[8, 4], [4, 16], [8, 16]], kernel("gemm", 2.0), kernel("reduce", 1.0)),
        product("aten::addmm", [[8, 4], [8, 16], [16, 4], [], [], [8, 4]], kernel("gemm", 4.0)),
        product("aten::addmm", [[8, 4], [8, 16], [16, 4], [], [], [8, 4]], kernel("gemm", 4.0)),
        product("aten::exp", [[8, 4]], kernel("exp", 1.0)),
        ran("gemm", 2.0), ran("reduce", 1.0), ran("gemm", 4.0),
    ]  # fmt: skip
    monkeypatch.setattr(kernels, "_events", lambda step, device: events)
    second, first = kernels.by_product(lambda: None, "cuda")
    assert first == {"product": "(8,4) × (4,16)", "kernel": "gemm + reduce", "calls": 1, "us": 3.0,
                     "tflops": pytest.approx(2 * 8 * 4 * 16 / 3.0 / 1e6)}  # fmt: skip
    assert (second["product"], second["calls"], second["us"]) == ("(8,16) × (16,4)", 2, 8.0)
    found = kernels.by_kernel(lambda: None, "cuda")
    assert [(row["kernel"], row["calls"], row["us"]) for row in found] == [("gemm", 2, 6.0), ("reduce", 1, 1.0)]


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","exp_similarity_kernel","GPU Speed Of Light Throughput","Duration","ms","2.10"
"0","exp_similarity_kernel","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","71.5"
"1","grad_products_kernel","Occupancy","Achieved Occupancy","%","12.5"
"1","grad_products_kernel","Rule","","",""
"""


def ncu_that(folder: Path, says: str, monkeypatch) -> None:
    """Puts a program ``ncu`` on the path that says this, after the command that it is given where it can count."""
    file = folder / "ncu"
    file.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\nat = sys.argv.index('-m')\n"
        f"says = {says!r}\nif 'ERROR' not in says: subprocess.run([sys.executable, *sys.argv[at:]], check=True)\n"
        "print(says)\n"
    )
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def counted() -> list[dict]:
    return results_of(counters.counters, CASE, [load()["ours-torch"]], "cpu", 0.0, limit=60.0)


def test_counters_are_read(tmp_path, monkeypatch):
    ncu_that(tmp_path, NCU, monkeypatch)
    first, second = counted()
    assert first["metrics"] == {"Duration": "2.10 ms", "Compute (SM) Throughput": "71.5 %"}
    assert second["candidate"] == "grad_products_kernel #1"
    assert second["metrics"] == {"Achieved Occupancy": "12.5 %"}


@pytest.mark.parametrize(
    ("says", "error", "reason"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission", Unsupported, "without a privilege"),
        ("==ERROR== No kernels were profiled", RuntimeError, "No kernels were profiled"),
        (None, Unsupported, "ncu is not on the path"),
    ],
)
def test_why_there_are_no_counters(says, error, reason, tmp_path, monkeypatch):
    if says is None:
        monkeypatch.setenv("PATH", "")
    else:
        ncu_that(tmp_path, says, monkeypatch)
    with pytest.raises(error, match=reason):
        counted()


def test_a_gpu_s_rows_have_a_table():
    """Launchers, memory, graphs and counters, which have no rows on a CPU."""
    row = {"step": "launchers", "item": "a case", "status": "ok"}
    document = {"device": "cuda", "started": "now", "rows": [
        row | {"candidate": "products.grad_products", "variant": "library=True", "calls": 2, "ms": 1.5,
               "tflops": 700.0},
        row | {"step": "calls", "item": "memory", "candidate": "naive", "mib": {"all": 2048.0}},
        row | {"step": "small", "candidate": "naive", "ms": {"wall": 0.25, "device": 0.2, "graph": 0.125}},
        row | {"step": "small", "candidate": "ours", "ms": {"wall": 0.5}, "reason": "no graph: why"},
        row | {"step": "counters", "candidate": "exp", "metrics": {"Duration": "2.10 ms"}},
        row | {"step": "correctness", "status": "wrong", "errors": {"dq": None, "dk": 0.1}, "bound": 0.01},
    ]}  # fmt: skip
    said = "\n".join(" ".join(line.split()) for line in table.lines(document))
    for text in ("products.grad_products library=True 2 1.5 700", "memory naive 2048", "naive 0.25 0.2 0.125",
                 "ours 0.5 no graph: why", "exp 2.10 ms", "FAIL dq inf of 1e-02 wrong"):  # fmt: skip
        assert text in said


def test_items_have_the_sizes_they_name():
    call = calls.CALLS["many chunks"]
    assert replace(call, N=64, D=32) == call.at_most(64, 32)
    assert call.at_most(1 << 20, 1 << 20) == call
