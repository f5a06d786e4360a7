"""Output files: what cannot be written is refused before the work, and nothing is left half-written."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bench import results
from bench.cli import main as bench
from bench.report import BEGIN, END
from simcse import cli, convert, encode, evaluate, search, train
from simcse.errors import UserError
from simcse.files import output_file, output_folder, replaced, write_text


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with an ``input.txt``, a folder, a link to nothing and a file that nobody may write."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("A sentence.\nAnother one.\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere/file")
    (tmp_path / "same.txt").symlink_to("input.txt")
    (tmp_path / "pairs.tsv").write_text("")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


FILES = [
    (".", "must name a file, but . is a folder"),
    ("folder", "must name a file, but folder is a folder"),
    ("new/", "must name a file, but new/ is a folder"),
    ("", "must name a file, but it is empty"),
    ("nowhere/new", "the folder nowhere does not exist; create it first"),
    ("input.txt/new", "input.txt is a file, not a folder"),
    ("dangling", "cannot write dangling: No such file"),
    ("/proc/new", "cannot write /proc/new"),
    ("x" * 300, "File name too long"),
]
FOLDERS = [
    ("", "must name a folder, but it is empty"),
    ("input.txt", "must name a folder, but input.txt is a file"),
    ("input.txt/new/newer", "input.txt is a file, not a folder"),
    ("dangling", "the folder dangling does not exist"),
    ("/proc/new", "cannot write /proc/new"),
    ("x" * 300, "File name too long"),
]


@pytest.mark.parametrize(("name", "message"), FILES)
def test_a_file_that_cannot_be_written_is_refused(place, name, message):
    before = contents(place)
    with pytest.raises(UserError, match=r"^--out") as refused:
        output_file("--out", name)
    assert message in str(refused.value)
    assert contents(place) == before


@pytest.mark.parametrize(("name", "message"), FOLDERS)
def test_a_folder_that_cannot_be_made_is_refused(place, name, message):
    before = contents(place)
    with pytest.raises(UserError, match=r"^--out") as refused:
        output_folder("--out", name)
    assert message in str(refused.value)
    assert contents(place) == before


def test_what_permissions_forbid_is_refused(place, monkeypatch):
    """Not as root, who may do anything."""
    (place / "input.txt").chmod(0o444)
    (place / "folder").chmod(0o555)
    monkeypatch.setattr(os, "access", lambda path, mode: bool(Path(path).stat().st_mode & stat.S_IWUSR))
    with pytest.raises(UserError, match="write-protected"):
        output_file("--out", "input.txt")
    if os.geteuid():
        with pytest.raises(UserError, match="Permission denied"):
            output_file("--out", "folder/new")
        with pytest.raises(UserError, match="Permission denied"):
            output_folder("--out", "folder/new")


@pytest.mark.parametrize("name", ["input.txt", "./input.txt", "folder/../input.txt", "same.txt"])
def test_an_output_is_not_an_input(place, name):
    with pytest.raises(UserError, match="--out and --in name the same file"):
        output_file("--out", name, {"--in": ["other.txt", "input.txt"]})


def test_two_outputs_are_not_one_file(place):
    with pytest.raises(UserError, match="--b and --a name the same file"):
        output_file("--b", "./new", {"--a": ["new"], "--c": [None]})


@pytest.mark.parametrize("name", ["new.txt", "input.txt", "folder/new", "~/new", "/dev/null", "/dev/stdout"])
def test_what_can_be_written_is_left_as_it_is(place, name, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "folder"))
    before = contents(place)
    assert output_file("--out", name, {"--in": ["same.md"]}) == Path(name).expanduser()
    assert output_folder("--out", "folder/new/newer") == Path("folder/new/newer")
    assert output_folder("--out", ".") == Path()
    assert contents(place) == before


def test_an_error_leaves_the_old_file_and_nothing_else(place):
    before = contents(place)

    def interrupted():
        with replaced("input.txt") as unfinished:
            unfinished.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(place) == before


def test_a_file_is_replaced_with_its_mode_and_behind_its_link(place):
    (place / "input.txt").chmod(0o600)
    write_text("same.txt", "new τ\n")
    assert (place / "same.txt").is_symlink()
    assert (place / "input.txt").read_text(encoding="utf-8") == "new τ\n"
    assert stat.S_IMODE((place / "input.txt").stat().st_mode) == 0o600


def test_a_pipe_is_written_to_and_not_replaced():
    code = (
        "from simcse.files import write_text; write_text('/dev/stdout', 'whole'); write_text('/dev/null', 'gone')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (out.stdout, out.returncode) == ("whole", 0), out.stderr
    assert not Path("/dev/null").is_file()


# ------------------------------------------------------------------ the commands


@pytest.fixture
def no_work(monkeypatch):
    """Whatever reads a model, data or results, or measures, fails."""

    def work(*_, **__):
        pytest.fail("the work began before the outputs were tried")

    for module, name in (
        (encode, "read_sentences"), (encode, "SimCSE"), (search, "SimCSE"), (evaluate, "read_sts_source"),
        (evaluate, "load_encoder"), (convert, "read_weights"), (train, "load_encoder"),
        (sys.modules["bench.cli"], "_measure"), (sys.modules["bench.cli"], "_tune"),
        (sys.modules["bench.report"], "write"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, work)


FILE_OUTPUTS = {
    "encode": ["encode", "--input", "input.txt", "--output"],
    "evaluate --output_json": ["evaluate", "--output_json"],
    "evaluate --output_md": ["evaluate", "--output_md"],
}
FOLDER_OUTPUTS = {
    "evaluate --plots": ["evaluate", "--plots"],
    "search --index": ["search", "--query", "x", "--sentences", "input.txt", "--index"],
    **{f"bench {job}": ["bench", job, "--out"] for job in ("loss", "memory", "accuracy", "train", "tune")},
    "bench": ["bench", "--quick", "--out"],
}


def refusal(arguments: list[str], capsys) -> str:
    """The one line of a command that exits with status 2."""
    with pytest.raises(SystemExit) as ended:
        bench(arguments[1:]) if arguments[0] == "bench" else cli.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("command", FILE_OUTPUTS)
@pytest.mark.parametrize(("name", "message"), [case for case in FILES if case[0]], ids=lambda x: x[:20])
def test_commands_try_their_files_first(place, no_work, capsys, command, name, message):
    before = contents(place)
    assert message in refusal([*FILE_OUTPUTS[command], name], capsys)
    assert contents(place) == before


@pytest.mark.parametrize("command", FOLDER_OUTPUTS)
@pytest.mark.parametrize(("name", "message"), [case for case in FOLDERS if case[0]], ids=lambda x: x[:20])
def test_commands_try_their_folders_first(place, no_work, capsys, command, name, message):
    before = contents(place)
    assert message in refusal([*FOLDER_OUTPUTS[command], name], capsys)
    assert contents(place) == before


@pytest.mark.parametrize(
    "command", ["convert --path folder", "train --train_file input.txt --per_device_train_batch_size 2"]
)
@pytest.mark.parametrize("name", ["input.txt", "input.txt/new", "/proc/new"])
def test_models_try_their_folders_first(place, no_work, capsys, command, name):
    before = contents(place)
    assert "--output_dir" in refusal([*command.split(), "--output_dir", name], capsys)
    assert contents(place) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "--input", "input.txt", "--output", "same.txt"], "--output and --input name the same file"),
        (
            ["evaluate", "--sts_data", "input.txt", "--output_md", "same.txt"],
            "--output_md and --sts_data name the",
        ),
        (
            ["evaluate", "--sts_data", ".", "--output_json", "pairs.tsv"],
            "--output_json and --sts_data name the same",
        ),
        (["evaluate", "--output_json", "x", "--output_md", "./x"], "--output_md and --output_json name the same"),
        (
            ["convert", "--path", "folder", "--output_dir", "./folder"],
            "--output_dir and --path name the same folder",
        ),
        (["convert", "--path", "folder", "--output_dir", "."], "holds files that this run did not write"),
    ],
)
def test_commands_write_over_no_input_and_no_foreign_files(place, no_work, capsys, arguments, message):
    before = contents(place)
    assert message in refusal(arguments, capsys)
    assert contents(place) == before


@pytest.mark.parametrize("name", ["loss.json", "report.md"])
def test_a_folder_at_the_place_of_a_result_is_found_first(place, no_work, capsys, name):
    (place / "folder" / name).mkdir()
    assert f"--out must name a file, but folder/{name} is a folder" in refusal(
        ["bench", "loss", "--out", "folder"], capsys
    )


def test_a_plot_that_cannot_be_replaced_is_found_first(place, no_work, capsys):
    (place / "folder" / "singular_values.png").mkdir()
    assert "singular_values.png is a folder" in refusal(["evaluate", "--plots", "folder"], capsys)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"log_history": 1}'])
def test_a_damaged_log_of_a_run_is_found_first(place, no_work, capsys, text):
    (place / "folder" / "trainer_state.json").write_text(text)
    command = ["evaluate", "--model_name_or_path", "folder", "--plots", "plots"]
    assert "trainer_state.json is damaged" in refusal(command, capsys)


def test_a_readme_without_marks_or_permission_is_found_first(place, no_work, capsys, monkeypatch):
    assert "must hold the lines" in refusal(["bench", "--readme", "input.txt"], capsys)
    (place / "input.txt").write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "write-protected" in refusal(["bench", "--readme", "input.txt"], capsys)


@pytest.mark.parametrize("text", ["", "{", "\udcff"])
def test_a_damaged_result_is_named(place, capsys, text):
    (place / "folder" / "loss.json").write_text(text, errors="surrogateescape")
    assert "folder/loss.json is not JSON" in refusal(["bench", "report", "folder"], capsys)


def test_results_are_whole_at_every_moment(place):
    found = results.Results("loss", place / "folder")
    found.add([{"candidate": "a"}])
    before = contents(place)
    with pytest.raises(TypeError):
        found.add([{"candidate": object()}])
    assert contents(place) == before
    assert json.loads((place / "folder" / "loss.json").read_text())["rows"] == [{"candidate": "a"}]
