"""``python -m bench first-contact``: whatever happens, what was measured is in the file, and the rest is listed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from helpers import interruptible

from bench import cli
from bench.candidates import load
from bench.cases import Case, make_batch, run_step
from bench.contact import calls, command, counters, jobs, kernels, launchers, plan
from bench.gate import Gate, Wrong
from bench.measure import clock_for
from bench.registry import Unsupported

ROOT = Path(__file__).parents[1]
GPU_STEPS = {"compile", "launchers", "counters"}
CASE = Case(16, 16)


def contact(folder: Path, *arguments: str) -> tuple[int, str]:
    """Runs the command. Returns its exit status and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            command.main(["--device", "cpu", "--out", str(folder), *arguments])
        except SystemExit as end:
            return end.code or 0, said.getvalue()
    return 0, said.getvalue()


def rows_of(folder: Path) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in json.loads((folder / "first-contact.json").read_text())["rows"]:
        found.setdefault((row["step"], row["item"]), []).append(row)
    return found


def results_of(job, *arguments, **more) -> list[dict]:
    return [facts for event, facts in job(*arguments, **more) if event == "result"]


def item(step: str, name: str, job: str, **facts) -> plan.Item:
    return plan.Item(step, name, job if ":" in job else f"tests.jobs_for_contact:{job}", CASE, **facts)


class Here:
    """A worker that runs the jobs in this process."""

    def __init__(self, device: str) -> None:
        self.device = device

    def run(self, job, limit, end):
        module, name = job["job"].split(":")
        try:
            for event, facts in getattr(importlib.import_module(module), name)(
                CASE, [], self.device, job["seconds"]
            ):
                yield {"event": event, **facts}
        except RuntimeError as error:
            yield {"event": "failed", "status": "failed", "reason": str(error)}

    def stop(self) -> None:
        pass


def use(monkeypatch, *items: plan.Item) -> None:
    """Makes these the items of the chosen steps, in this process."""
    monkeypatch.setattr(command, "items", lambda device, steps: [x for x in items if x.step in steps])
    monkeypatch.setattr(command, "Worker", Here)


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """Every step on a CPU, and what the command printed."""
    folder = tmp_path_factory.mktemp("contact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SECONDS", 0.01)
        code, said = contact(folder)
    assert code == 0, said
    return folder, said


def test_every_step_runs_where_there_is_no_gpu(tried):
    folder, said = tried
    document = json.loads((folder / "first-contact.json").read_text())
    assert document["complete"]
    assert document["commit"]
    assert {row["step"] for row in document["rows"]} == set(plan.STEPS)
    for (step, name), rows in rows_of(folder).items():
        needs_gpu = step in GPU_STEPS or name.startswith("memory")
        for row in rows:
            reason = row.get("reason", "")
            assert (row["status"], reason) == (("skipped", "no CUDA device") if needs_gpu else ("ok", "")), row
    assert "skipped: no CUDA device" in said


def test_the_rows_hold_errors_times_and_shapes(tried):
    found = rows_of(tried[0])
    for name, call in calls.CALLS.items():
        (row,) = found["correctness", name]
        assert max(row["errors"].values()) <= row["bound"] == call.bound
    products = found["products", "fp32 one-way N=64 D=32"]
    assert products[0]["ms"] > 0
    assert {(row["candidate"], row["calls"]) for row in products[1:]} == {
        ("(64,32) × (32,64)", 1), ("(64,64) × (64,32)", 2)
    }  # fmt: skip
    timed = {row["candidate"]: row for row in found["calls", "time, fp32 symmetric N=64 D=32"]}
    assert set(timed) == {"ours-torch", "naive", "floor", "copy"}
    assert all(row["ms"]["median"] > 0 for row in timed.values())
    assert {row["candidate"] for row in found["calls", "kernels, fp32 one-way N=64 D=32"]} >= {"aten::mm"}
    assert all(row["ms"]["wall"] > 0 for row in found["small", "fp32 one-way N=16 D=32"])


def test_report_prints_the_table_of_the_file(tried, capsys):
    folder, said = tried
    cli.main(["report", str(folder)])
    table = capsys.readouterr().out.strip()
    assert table
    assert table in said
    assert "× floor" in table
    assert "pass" in table


def test_other_subcommands_results_are_reported_beside_it(tried, tmp_path, capsys):
    for file in (tried[0] / "first-contact.json", ROOT / "bench" / "results" / "train.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    cli.main(["report", str(tmp_path)])
    said = capsys.readouterr().out
    assert "== correctness" in said
    assert "Training steps" in (tmp_path / "report.md").read_text()


def test_a_second_run_keeps_the_steps_of_the_first(tmp_path, monkeypatch):
    use(monkeypatch, item("versions", "a", "fine"), item("small", "b", "fine"))
    contact(tmp_path, "--steps", "versions")
    assert set(rows_of(tmp_path)) == {("versions", "a")}
    contact(tmp_path, "--steps", "small")
    assert set(rows_of(tmp_path)) == {("versions", "a"), ("small", "b")}
    file = tmp_path / "first-contact.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "another"}))
    contact(tmp_path, "--steps", "small")  # what another commit measured is not mixed with this one's
    assert set(rows_of(tmp_path)) == {("small", "b")}
    file.write_text("{")
    contact(tmp_path, "--steps", "versions")
    assert set(rows_of(tmp_path)) == {("versions", "a")}


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    """In the worker of the steps, and in the processes that compile beside each other."""
    jobs = ("fine", "raising", "wrong", "crashing", "silent", "os:no_such_job", "hanging", "fine")
    made = [item("correctness", f"{i} {job}", job, limit=1.5 if job == "hanging" else 60.0)
            for i, job in enumerate(jobs)]  # fmt: skip
    made += [item("compile", name, name) for name in ("raising", "crashing", "fine")]
    monkeypatch.setattr(command, "items", lambda device, steps: made)
    code, said = contact(tmp_path)
    assert code == 1
    found = rows_of(tmp_path)
    states = [[row["status"] for row in found["correctness", f"{i} {job}"]] for i, job in enumerate(jobs)]
    failed = ["failed"]
    assert states == [["ok"], ["ok", "failed"], ["wrong"], ["crashed"], failed, failed, ["too slow"], ["ok"]]
    assert "this job raises" in found["correctness", "1 raising"][1]["reason"]
    assert found["correctness", "2 wrong"][0]["errors"] == {"dq": 0.5, "dk": 0.1}
    assert found["correctness", "3 crashing"][0]["candidate"] == "the one that crashes"
    assert "no_such_job" in found["correctness", "5 os:no_such_job"][0]["reason"]
    states = [[row["status"] for row in found["compile", name]] for name in ("raising", "crashing", "fine")]
    assert states == [["ok", "failed"], ["crashed"], ["ok"]]
    for text in ("FAIL", "this job raises", "dq is off by 5.0e-01", "SIGABRT", "5 ok", "8 without a result"):
        assert text in said


def test_only_a_failed_correctness_call_gives_exit_status_1(tmp_path, monkeypatch):
    use(monkeypatch, item("small", "a", "raising"), item("correctness", "b", "fine"))
    assert contact(tmp_path)[0] == 0
    assert [row["status"] for row in rows_of(tmp_path)["small", "a"]] == ["ok", "failed"]


def test_it_stops_with_the_budget_and_lists_what_remains(tmp_path, monkeypatch):
    made = [item("compile", "c", "hanging"), item("small", "a", "hanging"), item("correctness", "b", "fine")]
    monkeypatch.setattr(command, "items", lambda device, steps: made)
    start = time.monotonic()
    code, said = contact(tmp_path, "--budget", "3")
    assert time.monotonic() - start < 8
    assert code == 0
    rows = [row for found in rows_of(tmp_path).values() for row in found]
    assert [row["status"] for row in rows] == ["not run"] * 3
    assert "3 not run" in said
    assert not json.loads((tmp_path / "first-contact.json").read_text())["complete"]


def test_an_interrupted_run_leaves_a_valid_file(tmp_path, monkeypatch, capsys):
    use(monkeypatch, item("versions", "a", "fine"), item("small", "b", "interrupted"), item("small", "c", "fine"))
    assert contact(tmp_path)[0] == 130
    said = capsys.readouterr().err.strip()
    assert said.endswith(f"interrupted; what was measured is kept: {tmp_path}/first-contact.json")
    assert [rows[0]["status"] for rows in rows_of(tmp_path).values()] == ["ok", "not run", "not run"]


def test_processes_that_compile_can_be_interrupted(tmp_path):
    code = (
        "from bench.contact import command, plan; from bench.cases import Case\n"
        "def item(step, name, job): return plan.Item(step, name, 'tests.jobs_for_contact:' + job, Case(16, 16))\n"
        "command.items = lambda device, steps: [item('compile', 'a', 'fine'), item('compile', 'b', 'hanging'), "
        "item('compile', 'c', 'hanging'), item('small', 'd', 'fine')]\n"
        f"command.main(['--device', 'cpu', '--out', {str(tmp_path)!r}])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=interruptible,
    ) as process:  # fmt: skip
        assert "a: ok" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said.strip().endswith(f"interrupted; what was measured is kept: {tmp_path}/first-contact.json")
    assert [rows[0]["status"] for rows in rows_of(tmp_path).values()] == ["ok", "not run", "not run", "not run"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "0"], "--budget must be positive, not 0.0"),
        (["--steps", "speed"], "'speed'"),
        (["--out", __file__], "--out must name a folder"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
@pytest.mark.parametrize("main", [command.main, lambda arguments: cli.main(["first-contact", *arguments])])
def test_a_mistake_is_one_line_and_exit_status_2(main, arguments, says, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert says in said
    assert len(said.splitlines()) == 1


def test_it_needs_torch_alone(tmp_path):
    """A plain checkout on a machine without the packages that the other subcommands need."""
    for name in ("rich", "matplotlib", "numpy", "scipy", "transformers", "datasets", "accelerate", "pytest"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name='{name}')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    arguments = ["--device", "cpu", "--out", str(tmp_path / "out"), "--steps", "versions", "correctness"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "bench", "first-contact", *arguments], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["status"] == "ok" for rows in rows_of(tmp_path / "out").values() for row in rows)


def test_the_help_of_bench_lists_it(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "first-contact" in capsys.readouterr().out


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
        row | {"candidate": "products.grad_products", "variant": "library=True", "calls": 2, "ms": 1.5, "tflops": 700.0},
        row | {"step": "calls", "item": "memory", "candidate": "naive", "mib": {"all": 2048.0}},
        row | {"step": "small", "candidate": "naive", "ms": {"wall": 0.25, "device": 0.2, "graph": 0.125}},
        row | {"step": "small", "candidate": "ours", "ms": {"wall": 0.5}, "reason": "no graph: why"},
        row | {"step": "counters", "candidate": "exp", "metrics": {"Duration": "2.10 ms"}},
        row | {"step": "correctness", "status": "wrong", "errors": {"dq": None, "dk": 0.1}, "bound": 0.01},
    ]}  # fmt: skip
    said = "\n".join(" ".join(line.split()) for line in command.table.lines(document))
    for text in ("products.grad_products library=True 2 1.5 700", "memory naive 2048", "naive 0.25 0.2 0.125",
                 "ours 0.5 no graph: why", "exp 2.10 ms", "FAIL dq inf of 1e-02 wrong"):  # fmt: skip
        assert text in said


def test_items_have_the_sizes_they_name():
    call = calls.CALLS["many chunks"]
    assert replace(call, N=64, D=32) == call.at_most(64, 32)
    assert call.at_most(1 << 20, 1 << 20) == call
