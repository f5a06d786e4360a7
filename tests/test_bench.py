"""The benchmark harness: no time without a right answer, and whatever a candidate does, the rest is measured."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import interruptible
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import charts, cli, report, results, sections, suites, tables, tune
from bench.candidates import load
from bench.cases import MODES, PUBLISHED, TEMPERATURE, Case, make_batch, run_step
from bench.cli import main
from bench.floor import FLOOR
from bench.gate import Gate, Wrong, exact_answer
from bench.measure import clock_for
from bench.registry import Unsupported
from bench.render import _apart, _together
from bench.summary import sentences
from bench.worker import Worker
from fused_infonce import gs_infonce
from fused_infonce.testing import embeddings, exact, relative_errors

ROOT = Path(__file__).parents[1]
ALSO = ROOT / "tests" / "losses_for_bench.py"
RUDE = ["wrong-loss", "wrong-gradient", "no-gradient", "nan", "raising", "crashing", "greedy", "not-here"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of every subcommand that measures a loss, on tiny sizes, rude candidates among the others."""
    folder = tmp_path_factory.mktemp("bench")
    small = ["--d", "16", "--dtype", "fp32", "--out", str(folder), "--seconds", "0.01", "--device", "cpu"]
    rude = ["--also", str(ALSO), "--candidates", "ours-torch", *RUDE, "naive"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main(["loss", "--n", "16", "32", *small, *rude])
        main(["memory", "--n", "64", *small, "--candidates", "ours-torch"])
        main(["accuracy", "--n", "16", *small, "--candidates", "ours-torch", "naive"])
    return folder, said.getvalue()


def rows_of(folder, job="loss"):
    document = json.loads((folder / f"{job}.json").read_text())
    return document, {(row["candidate"], row["N"]): row for row in document["rows"]}


# ------------------------------------------------------------------ the gate


@pytest.mark.parametrize("name", ["wrong-loss", "wrong-gradient", "nan"])
def test_a_wrong_candidate_is_shown_as_wrong_without_a_time(run, name):
    folder, said = run
    row = rows_of(folder)[1][name, 32]
    assert row["status"] == "wrong"
    assert "ms" not in row
    assert "off by" in row["reason"]
    assert name in said


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("no-gradient", "failed", "gives no dk"),
        ("raising", "failed", "this one raises"),
        ("crashing", "crashed", "SIGABRT"),
        ("greedy", "out of memory", ""),
        ("not-here", "skipped", "not installed"),
    ],
)
def test_what_gives_no_result_is_a_result(run, name, status, reason):
    row = rows_of(run[0])[1][name, 32]
    assert row["status"] == status
    assert reason in row["reason"]
    assert "ms" not in row


def test_the_rest_is_measured(run):
    document, rows = rows_of(run[0])
    assert document["complete"]
    for N in (16, 32):
        for name in ("ours-torch", "naive", FLOOR):
            ms = rows[name, N]["ms"]
            assert 0 < ms["p20"] <= ms["median"] <= ms["p80"]
            assert ms["repeats"] >= 5
            expected = 3 * 2 * N * N * 16 / (ms["median"] / 1e3) / 1e12
            assert rows[name, N]["tflops"] == pytest.approx(expected, rel=1e-3)


def test_what_ran_out_of_memory_is_not_tried_at_more_rows(run):
    assert rows_of(run[0])[1]["greedy", 32]["reason"].endswith("at N = 16 already")


def test_a_result_says_where_and_with_what(run):
    document, _ = rows_of(run[0])
    assert document["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads"} <= document["machine"].keys()
    assert {"commit", "started", "suite", "device", "settings"} <= document.keys()


def test_memory_and_accuracy(run):
    folder, _ = run
    _, memory = rows_of(folder, "memory")
    assert memory["ours-torch", 64]["mib"]["all"] >= 0
    rows = json.loads((folder / "accuracy.json").read_text())["rows"]
    trained = {r["candidate"]: r["errors"]["dq"] for r in rows if r["regime"] == "trained"}
    assert trained["ours-torch"] < 1e-5 < trained["naive"]


def test_the_report_of_a_run(run):
    folder, _ = run
    text = (folder / "report.md").read_text()
    assert "| fp32 one-way N=32 D=16 |" in text
    assert "killed by SIGABRT" in text
    for picture in ("time.png", "error.png"):
        assert (folder / picture).stat().st_size > 10_000
        assert f"({picture})" in text


def test_without_a_subcommand(tmp_path, monkeypatch, capsys):
    """Every job of the suite in turn; here one, of one case."""
    entry = suites.Entry(suites.grid([16], [16], ["fp32"]), candidates=("ours-torch", "naive"))
    monkeypatch.setattr(cli, "MEASURED", {"accuracy": 1})
    monkeypatch.setattr(suites, "accuracy", lambda suite, device: [entry])
    main(["--quick", "--out", str(tmp_path), "--device", "cpu"])
    assert "ours-torch" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"accuracy.json", "error.png", "report.md"}


def test_a_budget_leaves_cases_out_and_says_which(tmp_path, capsys):
    small = ["--d", "16", "--dtype", "fp32", "--seconds", "0.01", "--device", "cpu", "--candidates", "naive"]
    main(["loss", "--n", "16", "24", *small, "--budget", "0.0001", "--out", str(tmp_path)])
    document, rows = rows_of(tmp_path)
    assert document["left_out"] == ["fp32 one-way N=16 D=16", "fp32 one-way N=24 D=16"]
    assert not rows
    assert "left out for lack of time: fp32 one-way N=16 D=16" in capsys.readouterr().out
    assert "2 cases left out for lack of time" in (tmp_path / "report.md").read_text()


def test_the_jobs_divide_what_is_left_of_the_budget():
    args = argparse.Namespace(job=None, budget=30)
    ends = [(job, end) for job, end in cli._ends(args, time.monotonic())]
    assert [job for job, _ in ends] == list(cli.MEASURED)
    left = [(end - time.monotonic()) / 60 for _, end in ends]
    assert left == pytest.approx([10, 30 * 6 / 20, 30 * 2 / 14, 30], abs=0.1)  # each began at once here
    assert [end for _, end in cli._ends(argparse.Namespace(job="loss", budget=None), 0.0)] == [math.inf]


def test_a_hanging_candidate_is_given_up():
    worker = Worker(str(ALSO))
    job = {"job": "loss", "case": Case(16, 16).as_dict(), "seconds": 0.0, "candidates": ["hanging"]}
    try:
        assert [e for e in worker.run(job, 120) if e.get("candidate") == "hanging"][-1]["status"] == "ok"
        last = list(worker.run(job | {"case": Case(24, 16).as_dict()}, 2))[-1]
    finally:
        worker.stop()
    assert (last["event"], last["status"]) == ("died", "too slow")


def test_what_was_measured_is_kept_when_interrupted(tmp_path):
    arguments = ["loss", "--n", "16", "24", "--d", "16", "--dtype", "fp32", "--seconds", "0.01", "--out", tmp_path]
    candidates = ["--also", ALSO, "--candidates", "naive", "hanging"]
    command = [sys.executable, "-m", "bench", *map(str, arguments + candidates)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible
    ) as process:
        end = time.monotonic() + 60
        while not (tmp_path / "loss.json").exists() and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"what was measured is kept: python -m bench report {tmp_path}" in said.strip().splitlines()[-1]
    document, rows = rows_of(tmp_path)
    assert not document["complete"]
    assert rows["naive", 16]["status"] == rows["hanging", 16]["status"] == "ok"


# ------------------------------------------------------------------ what is compared with what


PLAIN = [(mode, {}) for mode in (*MODES, *PUBLISHED)]
MORE = [
    (mode, more) for mode in ("one-way", "forward") for more in ({"negatives": 32}, {"noise": 96, "negatives": 32})
]


@pytest.mark.parametrize(("mode", "more"), PLAIN + MORE, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_candidate_that_can_be_had_here_passes_the_gate(mode, more, dtype):
    case = Case(32, 384, mode, dtype, **more)
    gate, passed = Gate(case, "cuda" if torch.cuda.is_available() else "cpu"), ["naive"]
    for name, candidate in load().items():
        if name == "naive-compile":
            continue  # naive, compiled: half a minute
        if (name, mode, dtype) == ("naive", "gte", "bf16"):
            continue  # its gradient is wrong by half, see below
        try:
            loss = candidate.loss_for(case)
        except Unsupported:
            continue
        gate.check(candidate, loss)
        passed.append(name)
    assert {"ours-torch", "naive"} <= set(passed)
    if "noise" not in more:
        assert {"st-mnrl", "st-cached-mnrl"} <= set(passed)


def test_the_dense_gte_loss_is_refused_in_bf16():
    """Its cosines of documents with themselves are 1 and no more: the gate says so, and it gets no time."""
    case = Case(32, 384, "gte", "bf16")
    with pytest.raises(Wrong):
        Gate(case, "cpu").check(load()["naive"], load()["naive"].loss_for(case))


def test_the_exact_answer_is_that_of_the_formula():
    """Against autograd in float64, with noise and hard negatives, and chunk by chunk."""
    q, k = (x.requires_grad_() for x in embeddings("middle", 40, 12))
    negatives = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(50, 12, dtype=torch.float64)
    columns = F.normalize(torch.cat([k, negatives, noise]), dim=1)
    loss = F.cross_entropy(F.normalize(q, dim=1) @ columns.T / TEMPERATURE, torch.arange(40))
    dq, dk, dn = torch.autograd.grad(loss, (q, k, negatives))
    want = exact(q, k, TEMPERATURE, negatives=negatives, noise=noise)
    got = {"loss": loss.detach(), "dq": dq, "dk": dk, "dnegatives": dn}
    assert max(relative_errors(got, want, TEMPERATURE).values()) < 1e-12


@pytest.mark.parametrize("options", [{"symmetric": True}, {"noise": "expected", "num_noise": 64}], ids=str)
def test_the_exact_answer_is_that_of_the_reference(options):
    q, k = (x.requires_grad_() for x in embeddings("middle", 40, 12))
    value = gs_infonce(q, k, **({"num_noise": 0} | options), backend="reference")
    dq, dk = torch.autograd.grad(value, (q, k))
    case = Case(40, 12, "symmetric" if "symmetric" in options else "one-way", noise=options.get("num_noise", 0))
    batch = make_batch(case, "cpu", given_noise=True)
    batch.q, batch.k = q, k
    want = exact_answer(batch, case, "expected" if case.noise else "sampled")
    assert max(relative_errors({"loss": value.detach(), "dq": dq, "dk": dk}, want, TEMPERATURE).values()) < 1e-12


# ------------------------------------------------------------------ the trainers, and tuning


@pytest.mark.parametrize("trainer", ["simcse.train", "st-cached-mnrl"])
def test_training_steps(trainer):
    worker = Worker(silent=True)
    case = {"N": 4, "steps": 1}
    try:
        events = list(worker.run({"job": "train", "case": case, "candidates": [trainer], "seconds": 0}, 240))
    finally:
        worker.stop()
    (row,) = (event for event in events if event["event"] == "result")
    assert row["status"] == "ok", row
    assert row["sentences_per_second"] == pytest.approx(4e3 / row["ms"]["median"])
    assert row["mib"] > 0
    assert 0 < row["loss_share"] < 1
    assert 0 < row["at_once"] <= 8  # of two views of four sentences


def test_tuning_finds_the_fastest_and_leaves_out_what_fails():
    cost = {"a": 3.0, "b": 1.0, "c": 1.1, "d": 9.0}
    calls: list[str] = []

    def step(setting):
        if setting == "broken":
            raise RuntimeError("no such tile")
        return lambda: calls.append(setting)

    def clock(made):
        made()
        return cost[calls[-1]]

    ranked = tune.search(["a", "broken", "b", "c", "d"], step, clock)
    assert [setting for setting, _ in ranked] == ["b", "c"]
    assert calls.count("d") < calls.count("b")


def test_tuning_the_workspace(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(suites.TUNE, "quick", ((64, 16),))
    main(["tune", "--quick", "--out", str(tmp_path), "--device", "cpu"])
    assert "put workspace_bytes =" in capsys.readouterr().out
    assert json.loads((tmp_path / "tune.json").read_text())["rows"]


def test_tuning_the_kernels():
    """Each search makes a step for each setting, and the default workspace's chunk is what it times."""
    pytest.importorskip("triton")
    from fused_infonce.kernels.settings import Tile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = tune.kernel_searches(Case(40, 16), device, [Tile(16, 32, 16, 4, 1), Tile(32, 16, 16, 4, 1)])
    assert [one.what for one in found] == ["similarity", "ratios", "products"]
    for one in found:
        assert "settings.py" in one.where
        ranked = tune.search(one.settings, one.step, clock_for("cpu"), rounds=1)
        assert ranked


# ------------------------------------------------------------------ the report


def fake(N, ms, candidate="ours-torch", **more):
    times = {"median": ms, "p20": ms, "p80": ms, "repeats": 5}
    return Case(N, 256).as_dict() | {"candidate": candidate, "status": "ok", "ms": times} | more


def test_ratios_are_of_one_case():
    rows = [fake(64, 3.0), fake(64, 2.0, "naive"), fake(64, 1.0, FLOOR), fake(64, 6.0, "st-mnrl", loss="InfoNCE")]
    (line,) = tables.ratios(rows).rows
    assert line[3:] == ["732", "3.00×", "1.50×", "–", "0.50× (st-mnrl)"]  # 3 ms / 64² = 732 ns


@pytest.mark.parametrize(("p80", "warned"), [(1.1, False), (1.5, True)])
def test_a_disturbed_run_says_so(p80, warned, tmp_path):
    floor = fake(64, 1.0, FLOOR)
    floor["ms"]["p80"] = p80
    head = {"machine": {"cpu": "", "capability": "", "threads": 1}, "versions": {"torch": "", "python": ""}}
    head |= {"commit": "", "started": "", "suite": "", "complete": True, "device": "cpu"}
    documents = {"loss": head | {"rows": [fake(64, 2.0), floor]}}
    report.write(documents, sections.make(documents), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert ("in 1 of 1 cases the bare products' own" in text) == warned


def block(name):
    return f"<!-- bench: begin {name} (python -m bench report) -->\n{report.END}\n"


def test_a_page_takes_the_blocks_that_it_names(run, tmp_path, capsys):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    names = ("summary", "pictures", "time", "memory", "error", "train")
    page.write_text("a\n" + "\nb\n".join(map(block, names)) + "c\n")
    main(["report", str(run[0]), "--readme", str(page)])
    parts = [text for _, _, text in report.BLOCK.findall(page.read_text())]
    assert "at the stage *trained* has a relative error of" in parts[0]
    assert parts[0].replace("- ", "") in capsys.readouterr().out
    assert "readme-error.png" not in parts[1]  # of bf16, which was not measured
    assert "| fp32 one-way N=32 D=16 |" in parts[2]
    assert (page.parent / re.search(r"\]\((.*error.png)\)", parts[4])[1]).is_file()
    assert not parts[5]
    page.write_text(block("nonsense"))
    with pytest.raises(SystemExit):
        main(["report", str(run[0]), "--readme", str(page)])
    assert "a block named nonsense; known are error, floor" in capsys.readouterr().err


def accuracy_rows(errors):
    facts = Case(512, 768, dtype="bf16", regime="trained").as_dict()
    found = {name: facts | {"candidate": name, "status": "ok", "errors": {"dq": e}} for name, e in errors.items()}
    return {"accuracy": {"rows": list(found.values())}}


def test_sentences_name_the_size_the_ratio_and_the_opponent():
    (said,) = sentences(accuracy_rows({"ours-torch": 1e-3, "naive": 0.2, "st-mnrl": 1e-4, "pml-ntxent": 0.1}))
    assert said.startswith(
        "Accuracy: the gradient of ours-torch for 512 pairs of 768 features in bf16 at the stage"
    )
    assert "error of 1.0e-03, 200 times smaller than the standard loss and 10 times larger than the best" in said
    assert said.endswith("the best other candidate, st-mnrl.")
    rows = [fake(n, ms, name) for n, ms, name in [(64, 3.0, "ours-torch"), (64, 2.0, "naive"),
            (4096, 10.0, "ours-torch"), (4096, 25.0, "naive"), (4096, 12.0, "naive-compile")]]  # fmt: skip
    (said,) = sentences({"loss": {"rows": rows}})
    assert said.startswith(
        "Time: ours-torch takes 10 ms for 4,096 pairs of 256 features in fp32, 2.50 times faster"
    )
    assert "than the standard loss and 1.20 times faster than its compiled form; for 64 pairs it is 1.50" in said
    assert said.endswith("1.50 times slower than the standard loss.")


def test_lines_that_hide_each_other_share_a_name():
    line = [(64.0, 1.0), (256.0, 2.0)]
    lines = {"a": line, "b": [(x, 1.02 * y) for x, y in line], "c": [(x, 1.1 * y) for x, y in line], "d": line[:1]}
    assert _together(lines | {"e": []}) == [["a", "b"], ["c"], ["d"]]


def test_names_of_lines_are_apart_and_near_their_lines():
    assert _apart([0.2, 0.5], 0.1) == [0.2, 0.5]
    assert _apart([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    assert _apart([0.3, 0.98, 1.0], 0.1) == pytest.approx([0.2, 0.9, 1.0], abs=0.11)
    assert max(_apart([0.98, 1.0], 0.1)) <= 1


def test_the_pictures_of_the_readme_have_one_size(tmp_path):
    documents = results.read(ROOT / "bench" / "results")
    sizes = {Image.open(chart.draw(tmp_path)).size for chart in charts.readme_charts(documents)}
    assert len(list(tmp_path.iterdir())) == 2
    assert len(sizes) == 1


def test_the_readme_takes_the_section_between_its_marks(run, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    main(["report", str(run[0]), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| fp32 one-way N=32 D=16 |" in text
    main(["report", str(run[0]), "--readme", str(readme)])
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["loss", "--candidates", "st-mnlr"], "st-mnlr is unknown; known are"),
        (["loss", "--n", "0"], "--n must be positive, not 0"),
        (["loss", "--also", "/no/such/file.py"], "--also /no/such/file.py cannot be run"),
        (["report", "/no/such/folder"], "contains no results"),
        (["train", "--train_file", "/no/such.txt"], "--train_file /no/such.txt does not exist"),
        (["loss", "--readme", "/no/such/README.md"], "cannot read or write /no/such/README.md"),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["--quick", "loss"], ["loss", "--quick"], ["--quick"]], ids=" ".join)
def test_a_flag_of_every_job_stands_before_or_after_the_subcommand(words):
    args = cli.make_parser().parse_args(words)
    assert args.suite == "quick"
    assert (args.n, args.steps, args.seconds) == (None, None, None)


def test_marks_that_are_not_there_are_named(run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(SystemExit):
        main(["report", str(run[0]), "--readme", str(tmp_path / "README.md")])
    assert report.BEGIN in capsys.readouterr().err


def test_flops_of_the_floor():
    unit = 2 * 10 * 10 * 4
    assert Case(10, 4).flops == 3 * unit
    assert Case(10, 4, "symmetric").flops == 4 * unit
    assert Case(10, 4, "forward").flops == unit
    assert Case(10, 4, "gte").flops == 7 * unit
    assert Case(10, 4, "matryoshka").flops == 3 * unit
    assert Case(10, 4, noise=10, negatives=20).flops == 3 * 3 * unit + 2 * unit
    assert math.isclose(Case(100, 4, noise=300).at(50).noise, 150)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_paper_suite_holds_every_size_and_mode(device):
    cases = {case for entry in suites.loss("paper", device) for case in entry.cases}
    assert {case.D for case in cases} == {128, 384, 768, 1024, 4096}
    assert {64, 4096, 1_048_576} <= {case.N for case in cases}
    assert {case.dtype for case in cases} == set(suites.dtypes_for(device))
    for D in (128, 768, 4096):
        some = [case for case in cases if case.D == D]
        assert {case.mode for case in some} == {*MODES, *PUBLISHED}
        assert {(case.noise // case.N, case.negatives // case.N) for case in some} == {(0, 0), (3, 0), (0, 1)}


@pytest.mark.parametrize("suite", suites.SUITES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_suite_measures_a_case_twice_or_a_smaller_one_after_it_was_given_up(suite, device):
    for job in ("loss", "memory", "accuracy"):
        for entry in getattr(suites, job)(suite, device):
            assert len(set(entry.cases)) == len(entry.cases)
            lines = {}
            for case in entry.cases:
                line = (case.D, case.mode, case.dtype, case.noise > 0, case.negatives > 0)
                line += (case.regime, case.temperature)
                assert lines.get(line, 0) < case.N
                lines[line] = case.N


def test_a_retrieval_model_at_its_own_temperature(tmp_path):
    """Negatives at cosine 0.75 ± 0.04, positives at 0.9; the standard implementations pass the gate there."""
    q, k = (F.normalize(x, dim=1) for x in embeddings("retrieval", 400, 768))
    cosines = q @ k.T
    others = cosines[~torch.eye(400, dtype=torch.bool)]
    assert float(others.mean()) == pytest.approx(0.75, abs=5e-3)
    assert float(others.std()) == pytest.approx(0.04, abs=3e-3)
    assert torch.allclose(cosines.diagonal(), torch.tensor(0.9, dtype=torch.float64))
    flags = ["--n", "64", "--d", "32", "--dtype", "fp32", "bf16", "--seconds", "0.01", "--device", "cpu"]
    names = ["ours-torch", "naive", "st-mnrl", "torch-linear-ce"]
    with contextlib.redirect_stdout(io.StringIO()):
        main(["loss", "--regime", "retrieval", "--candidates", *names, "--out", str(tmp_path), *flags])
    rows = rows_of(tmp_path)[0]["rows"]
    assert {row["regime"] for row in rows} == {"retrieval"}
    assert [row["candidate"] for row in rows if row["status"] == "ok"] == [*names, FLOOR, "copy"] * 2
    assert "| fp32 one-way N=64 D=32 retrieval |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("job", ["loss", "accuracy"])
@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_holds_the_retrieval_regime(job, suite):
    assert any(case.regime == "retrieval" for entry in getattr(suites, job)(suite, "cpu") for case in entry.cases)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs torch 2.13")
@pytest.mark.parametrize("job", ["loss", "memory", "accuracy"])
@pytest.mark.parametrize("suite", ["standard", "paper"])
def test_torch_s_chunked_cross_entropy_is_in_every_suite(job, suite):
    entries = [e for e in getattr(suites, job)(suite, "cpu") if "torch-linear-ce" not in e.without]
    assert any(e.candidates is None for e in entries)
    assert "torch-linear-ce" in load()


def test_small_temperatures_and_a_larger_workspace_are_measured():
    entries = list(suites.loss("standard", "cpu"))
    cases = [
        case for entry in entries for case in entry.cases if (case.N, case.D, case.regime) == (4096, 384, "random")
    ]
    assert {case.temperature for case in cases} == {1e-3, 2e-3, 5e-3, 0.01, 0.05}
    symmetric = [e for e in entries if e.candidates and "ours-256MiB" in e.candidates]
    assert {(c.N, c.D, c.mode) for e in symmetric for c in e.cases} == {(4096, 768, "symmetric")}
    case = Case(48, 16, "symmetric")
    Gate(case, "cpu").check(load()["ours-256MiB"], load()["ours-256MiB"].loss_for(case))


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
@pytest.mark.parametrize(
    "name", ["memeff", "memeff-qwen3", "memeff-matryoshka", "liger", "cce", "quack", "inf-cl"]
)
def test_peers_that_need_a_gpu_are_skipped_with_the_reason(name):
    peer = load()[name]
    with pytest.raises(Unsupported, match="needs CUDA"):
        peer.loss_for(Case(16, 512, peer.modes[0], "bf16"))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs torch 2.13")
def test_torch_s_chunked_cross_entropy_stores_no_matrix(monkeypatch):
    """Its dense form, which ignores the options, would call F.cross_entropy on all of the logits."""
    case = Case(512, 64)
    batch, called = make_batch(case, "cpu"), []
    monkeypatch.setattr(F, "linear", lambda *args: called.append(args))
    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest[0] = max([largest[0], *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    with Largest():
        run_step(load()["torch-linear-ce"].loss_for(case), batch, case, "cpu")
    assert not called
    assert 0 < largest[0] <= 512 * 512 // 2


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="needs torch 2.13")
@pytest.mark.parametrize("job", ["loss", "memory", "accuracy"])
def test_torch_s_chunked_cross_entropy_is_measured(job):
    worker = Worker()
    spec = {"job": job, "case": Case(96, 32).as_dict(), "seconds": 0.01, "candidates": ["torch-linear-ce"]}
    try:
        events = list(worker.run(spec, 120))
    finally:
        worker.stop()
    (row,) = (e for e in events if e["event"] == "result" and e["candidate"] == "torch-linear-ce")
    assert row["status"] == "ok", row


def test_a_worker_leaves_no_pipe_open():
    """Also one that was stopped while it hung."""
    code = (
        "from bench.cases import Case\n"
        "from bench.worker import Worker\n"
        f"worker = Worker({str(ALSO)!r})\n"
        "for N, limit in ((16, 120), (24, 1)):\n"
        "    spec = {'job': 'accuracy', 'case': Case(N, 16).as_dict(), 'seconds': 0, 'candidates': ['hanging']}\n"
        "    print([e.get('status') for e in worker.run(spec, limit)][-1])\n"
        "worker.stop()\n"
    )
    command = [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["ok", "too slow"], done.stderr
    assert "ResourceWarning" not in done.stderr


def test_the_committed_results_make_the_committed_report(tmp_path):
    source = ROOT / "bench" / "results"
    for file in source.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    main(["report", str(tmp_path)])
    assert (tmp_path / "report.md").read_text() == (source / "report.md").read_text()
    assert {x.name for x in tmp_path.glob("*.png")} == {x.name for x in source.glob("*.png")}


def test_no_module_of_the_benchmarks_imports_in_a_circle():
    imports = {
        path.stem: set(re.findall(r"^\s*from bench\.(\w+) import", path.read_text(), re.MULTILINE))
        | {x for line in re.findall(r"^\s*from bench import (.*?)(?:#|$)", path.read_text(), re.MULTILINE)
           for x in line.replace(" ", "").split(",")}
        for path in (ROOT / "bench").glob("*.py")
    }  # fmt: skip
    while free := [name for name, needs in imports.items() if not needs & imports.keys()]:
        for name in free:
            del imports[name]
    assert not imports
