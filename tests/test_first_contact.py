"""``python -m bench first-contact``: whatever happens, the file holds what was measured and lists the rest."""

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
from pathlib import Path

import pytest
import torch
from helpers import interruptible

from bench import cli
from bench.cases import Case
from bench.contact import calls, command, plan

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
    made = [item("correctness", f"{i} {job}", job, limit=1.5 if job == "hanging" else 600.0)
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
