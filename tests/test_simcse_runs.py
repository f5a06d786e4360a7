"""Runs and their folders: what is resumed, refused and kept, and what happens when a disk or a file fails."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_simcse_model import make_tiny_model
from test_simcse_sts import write_sts
from test_simcse_train import flags
from transformers.training_args import OptimizerNames

from simcse import convert, storage, train
from simcse.collator import packaged_file
from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.readers import read_table
from simcse.runs import RUN_FILE, STATE_FILE
from simcse.saved_model import save_encoder

STEPS = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "max_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    sentences = [row for (row,) in read_table(packaged_file("sentences.txt")).rows]
    (folder / "train.txt").write_text("\n".join(sentences[:96]), encoding="utf-8")
    (folder / "odd.txt").write_text("\n".join(sentences[:33]), encoding="utf-8")
    (folder / "other.txt").write_text("\n".join(sentences[96:192]), encoding="utf-8")
    grades = [5.0, 4.2, 3.0, 2.5, 1.0, 0.0]
    rows = [("STSB", "x", "dev", grades[i % 6], sentences[i], sentences[i + 1]) for i in range(24)]
    write_sts(folder / "sts.tsv", rows)
    return folder


def unwatched(folder, output, **others):
    return flags(folder, output, **{"sts_data": None, "eval_steps": None, **STEPS, **others})


def refused(arguments, capsys, main=train.main):
    """What a command that ends with exit status 2 says, in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    lines = [line for line in error.splitlines() if ": warning: " not in line]
    assert len(lines) == 1, error
    assert ": error: " in lines[0]
    return lines[0]


def state_of(output):
    return json.loads((output / STATE_FILE).read_text(), parse_constant=lambda name: pytest.fail(name))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder):
    return load_encoder(str(folder))[0].state_dict()


def assert_same_weights(first, second):
    first, second = weights_of(first), weights_of(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


# When checkpoints are written


@pytest.mark.parametrize("watched", [True, False], ids=["pairs", "no pairs"])
@pytest.mark.parametrize(
    "change",
    [
        {"save_strategy": "steps"},
        {"save_strategy": "epoch"},
        {"save_strategy": "steps", "save_steps": 3},
        {"save_strategy": "steps", "save_steps": 0.3, "eval_strategy": "epoch"},
        {"save_strategy": "epoch", "eval_steps": 2},
        {"save_strategy": "no"},
    ],
    ids=lambda change: " ".join(map(str, change.values())),
)
def test_save_strategies_go_with_every_eval_strategy(folder, tmp_path, capsys, watched, change):
    output = tmp_path / "run"
    settings = {"eval_steps": None, "max_steps": None, "num_train_epochs": 1, "per_device_train_batch_size": 24}
    train.main(flags(folder, output, **{**settings, **change}, **({} if watched else {"sts_data": None})))
    state = state_of(output)
    steps = {int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")}
    if change["save_strategy"] == "no":
        assert not steps
        return
    assert 4 in steps  # the last
    if watched:
        scores = {e["step"]: e["eval_stsb_spearman"] for e in state["log_history"] if "eval_stsb_spearman" in e}
        scores.pop(0)
        best = max(scores, key=scores.get)
        assert best == state["best_global_step"]
        assert best in steps
        assert_same_weights(output, output / f"checkpoint-{best}")


# A run keeps what it has under another path


@pytest.mark.parametrize("way", ["moved", "absolute", "relative", "link", "copied elsewhere"])
def test_run_keeps_its_best_checkpoint_under_another_path(folder, tmp_path, capsys, monkeypatch, way):
    monkeypatch.chdir(tmp_path)
    watched = {**STEPS, "eval_steps": 1, "learning_rate": 0.0, "save_steps": 1}  # nothing improves on the first
    first = tmp_path / "run" if way == "relative" else Path("run")
    train.main(flags(folder, first, **{**watched, "max_steps": 3}))
    assert state_of(tmp_path / "run")["best_global_step"] == 1
    best = contents(tmp_path / "run" / "checkpoint-1")
    place, resume = tmp_path / "run", "true"
    if way == "moved":
        place = Path("elsewhere")
        Path("run").rename(place)
    elif way == "relative":
        place = Path("run")
    elif way == "link":
        place = tmp_path / "link"
        place.symlink_to("run")
    elif way == "copied elsewhere":
        place, resume = tmp_path / "new", "run/checkpoint-3"
    changed = {**watched, "max_steps": 4, "learning_rate": 0.0}
    train.main(flags(folder, place, **changed, resume_from_checkpoint=resume))
    if way == "copied elsewhere":
        shutil.rmtree("run")
    state = state_of(place)
    assert state["global_step"] == 4
    assert state["best_global_step"] == 1
    assert Path(state["best_model_checkpoint"]).samefile(place / "checkpoint-1")
    kept = contents(place / "checkpoint-1")
    assert {name: data for name, data in kept.items() if name.name != RUN_FILE} == {
        name: data for name, data in best.items() if name.name != RUN_FILE
    }
    assert "the best, step 1" in capsys.readouterr().out


def test_resume_without_the_best_checkpoint_is_refused_by_name(folder, tmp_path, capsys):
    watched = {**STEPS, "eval_steps": 1, "learning_rate": 0.0}
    train.main(flags(folder, tmp_path / "run", **watched))
    shutil.rmtree(tmp_path / "run" / "checkpoint-1")
    resume = flags(folder, tmp_path / "run", **watched, resume_from_checkpoint=True)
    assert "checkpoint-1" in refused(resume, capsys)
    train.main([*resume, "--load_best_model_at_end", "false"])
    assert state_of(tmp_path / "run")["best_model_checkpoint"] is None


# Whose folder it is


def test_folder_of_somebody_else_is_refused_and_left_as_it_was(folder, tmp_path, capsys, monkeypatch):
    for name in ("README.md", "notes.txt", "src/code.py", "checkpoint-7/trainer_state.json", "config.json"):
        place = tmp_path / name.replace("/", "-")
        (place / name).parent.mkdir(parents=True)
        (place / name).write_text("{}")
        before = contents(place)
        monkeypatch.chdir(place)
        error = refused(unwatched(folder, "."), capsys)
        assert name.split("/")[0] in error
        assert "--overwrite_output_dir" in error
        assert contents(place) == before
    train.main(unwatched(folder, ".", max_steps=1, overwrite_output_dir=True))
    load_encoder(".")


def test_folder_of_another_run_is_refused_unless_told(folder, tmp_path, capsys):
    output = tmp_path / "run"
    train.main(unwatched(folder, output, pooler_type="cls"))
    (output / "mine.txt").write_text("mine")
    before = contents(output)
    for change in ({}, {"pooler_type": "avg"}, {"resume_from_checkpoint": False}):
        error = refused(unwatched(folder, output, **change), capsys)
        assert "--resume_from_checkpoint true" in error
        assert "--overwrite_output_dir" in error
    assert contents(output) == before
    told = {"overwrite_output_dir": True, "pooler_type": "avg"}
    train.main(unwatched(folder, output, **told, max_steps=3, save_steps=1, save_total_limit=1))
    assert not (output / "2_Dense").exists()
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-3"}
    assert (output / "mine.txt").read_text() == "mine"
    train.main(
        unwatched(folder, output, pooler_type="avg", max_steps=4, save_steps=1, resume_from_checkpoint=True)
    )
    assert state_of(output)["global_step"] == 4


def test_run_that_came_to_nothing_does_not_keep_its_folder(folder, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("simcse.trainer.SimCSETrainer.compute_loss", stop)
        with pytest.raises(SystemExit):
            train.main(unwatched(folder, tmp_path / "run"))
    train.main(unwatched(folder, tmp_path / "run", max_steps=1))


def test_true_is_this_runs_latest_checkpoint_and_not_an_abandoned_one(folder, tmp_path, capsys):
    output = tmp_path / "run"
    train.main(unwatched(folder, output, max_steps=6))
    train.main(unwatched(folder, output, max_steps=3, resume_from_checkpoint=output / "checkpoint-2"))
    assert state_of(output)["global_step"] == 3
    capsys.readouterr()
    train.main(unwatched(folder, output, max_steps=4, resume_from_checkpoint=True))
    printed = capsys.readouterr()
    assert f"goes on from {output / 'checkpoint-3'}" in printed.out
    assert "checkpoint-6 is of another run" in printed.err
    assert state_of(output)["global_step"] == 4


def test_model_that_is_saved_over_another_leaves_none_of_its_modules(folder, tmp_path):
    encoder, tokenizer = load_encoder(str(folder / "model"), "cls", new_mlp=True)
    save_encoder(encoder, tokenizer, tmp_path)
    for name in ("README.md", "2_Dense/notes.txt"):
        (tmp_path / name).write_text("mine")
    encoder, tokenizer = load_encoder(str(folder / "model"), "avg")
    save_encoder(encoder, tokenizer, tmp_path)
    assert {path.name for path in (tmp_path / "2_Dense").iterdir()} == {"notes.txt"}
    save_encoder(*load_encoder(str(folder / "model"), "avg_top2"), tmp_path)
    assert not (tmp_path / "1_Pooling").exists()


@pytest.mark.parametrize("listed", [["../kept"], ["/tmp/kept"], "kept", [1], None])
def test_list_of_a_models_files_deletes_nothing_outside_its_folder(folder, tmp_path, listed):
    (tmp_path / "kept").write_text("mine")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "simcse_config.json").write_text(json.dumps({"pooler_type": "avg", "files": listed}))
    save_encoder(*load_encoder(str(folder / "model"), "avg"), tmp_path / "model")
    assert (tmp_path / "kept").read_text() == "mine"


def test_convert_refuses_a_folder_with_files(folder, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "README.md").write_text("mine")
    arguments = ["--path", str(folder / "model"), "--output_dir", str(output)]
    assert "README.md" in refused(arguments, capsys, convert.main)
    assert contents(output) == {Path("README.md"): b"mine"}
    convert.main([*arguments, "--overwrite_output_dir"])
    load_encoder(str(output))
    assert "--output_dir and --path name the same folder" in refused(
        ["--path", str(folder / "model"), "--output_dir", str(folder / "model")], capsys, convert.main
    )


# Checkpoints that are damaged, incomplete, or of other settings

FULL = {"queue_size": 8, "learn_temperature": True, "do_mlm": True, "pooler_type": "cls"}
NEEDED = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "objective.safetensors",
    "trainer_state.json",
    "model.safetensors",
    "2_Dense/model.safetensors",
    "config.json",
    "run.json",
)


@pytest.fixture(scope="module")
def full(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("full") / "run"
    train.main(unwatched(folder, output, **FULL))
    return output


@pytest.mark.parametrize("damage", ["half", "empty", "directory", "missing", "other"])
def test_checkpoint_that_is_not_whole_is_refused_by_name(folder, full, tmp_path, capsys, damage):
    for name in NEEDED:
        checkpoint = tmp_path / name.replace("/", "-") / "checkpoint-2"
        shutil.copytree(full / "checkpoint-2", checkpoint)
        file = checkpoint / name
        data = file.read_bytes()
        file.unlink()
        if damage == "half":
            file.write_bytes(data[: len(data) // 2])
        elif damage == "empty":
            file.touch()
        elif damage == "directory":
            file.mkdir()
        elif damage == "other":
            file.write_bytes(b"[]")
        output = tmp_path / "out"
        error = refused(unwatched(folder, output, **FULL, resume_from_checkpoint=checkpoint), capsys)
        assert file.name in error, error
        assert str(checkpoint) in error, error
        assert not output.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "objective.safetensors"])
def test_checkpoint_whose_parts_fit_no_more_is_refused_by_name(folder, full, tmp_path, capsys, name):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(full / "checkpoint-2", checkpoint)
    if name == "objective.safetensors":
        from safetensors.torch import load_file, save_file

        state = load_file(checkpoint / name)
        for lost in list(state):
            save_file({key: value for key, value in state.items() if key != lost}, checkpoint / name)
            arguments = unwatched(folder, tmp_path / "out", **FULL, resume_from_checkpoint=checkpoint)
            assert lost in refused(arguments, capsys)
        return
    torch.save({"of": "something else"}, checkpoint / name)
    arguments = unwatched(folder, tmp_path / "out", **FULL, resume_from_checkpoint=checkpoint)
    assert name in refused(arguments, capsys)


CHANGES = {
    "batch": {"per_device_train_batch_size": 8},
    "accumulation": {"gradient_accumulation_steps": 2},
    "data": {"train_file": "other.txt"},
    "length": {"max_seq_length": 16},
    "temperature": {"temp": 0.1},
    "noise": {"num_noise": 0},
    "noise's weight": {"noise_weight": 0.5},
    "queue": {"queue_size": 16},
    "no queue": {"queue_size": 0},
    "MLM": {"do_mlm": False},
    "learned temperature": {"learn_temperature": False},
    "pooler": {"pooler_type": "avg"},
    "dropout": {"dropout": 0.3},
    "seed": {"seed": 7},
    "rate": {"learning_rate": 1e-4},
    "optimiser": {"optim": "sgd"},
    "schedule": {"lr_scheduler_type": "constant"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_resume_with_other_settings_is_refused_by_name(folder, full, tmp_path, capsys, change):
    ((name, value),) = change.items()
    if name == "train_file":
        change = {name: folder / value}
    resume = {"resume_from_checkpoint": full / "checkpoint-2"}
    error = refused(unwatched(folder, tmp_path / "out", **{**FULL, **change}, **resume), capsys)
    assert f"--{name}" in error
    assert "--model_name_or_path" in error  # the remedy
    assert not (tmp_path / "out").exists()


def test_resume_may_change_the_length_which_is_told_and_what_changes_no_bit(folder, full, tmp_path, capsys):
    data = tmp_path / "moved.txt"
    shutil.copy(folder / "train.txt", data)
    free = {"train_file": data, "save_steps": 1, "logging_steps": 1, "max_steps": 5}
    resume = {"resume_from_checkpoint": full / "checkpoint-2"}
    train.main(unwatched(folder, tmp_path / "out", **{**FULL, **free}, **resume))
    error = capsys.readouterr().err
    assert "--max_steps is 5 and was 4" in error
    assert error.count("\n") == 1  # none of transformers' own lines
    assert state_of(tmp_path / "out")["global_step"] == 5


def test_what_goes_to_a_file_is_plain_lines_and_at_a_resume_ours_only(folder, tmp_path):
    steps = {"eval_steps": 0.5, "save_steps": 1, "save_strategy": "steps", "max_steps": 3}
    arguments = flags(folder, tmp_path / "run", **steps, disable_tqdm=None)  # no bars either: it is no terminal
    command = [sys.executable, "-m", "simcse.train", *arguments]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "run").rename(tmp_path / "b")
    resume = ["--output_dir", str(tmp_path / "b"), "--resume_from_checkpoint", str(tmp_path / "b/checkpoint-2")]
    second = subprocess.run([*command, *resume], capture_output=True, text=True, check=True)
    assert (first.stderr, second.stderr) == ("", "")
    assert "\r" not in first.stdout + second.stdout
    assert first.stdout.startswith(f"{folder / 'model'}, cls_before_pooler: 96 sentences, 16 per batch; GS-")


def test_run_that_is_at_its_end_trains_no_further_step(folder, tmp_path, capsys):
    output = tmp_path / "run"  # 4 of the 6 steps of an epoch
    train.main(unwatched(folder, output))
    before = contents(output)[Path("model.safetensors")]
    train.main(unwatched(folder, output, resume_from_checkpoint=True))
    assert state_of(output)["global_step"] == 4
    assert contents(output)[Path("model.safetensors")] == before


# Disks that are full


@pytest.mark.parametrize("missing", [1, 64, 1000, 20_000])
@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.pt"])
def test_full_disk_is_one_line(folder, full, tmp_path, capsys, part, missing):
    """``torch.save`` fails in other words for each number of bytes that do not fit."""
    resource = pytest.importorskip("resource", reason="limits of processes are POSIX's")
    size = (full / "checkpoint-2" / part).stat().st_size - missing  # the optimizer's state is the larger file
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        error = refused(unwatched(folder, tmp_path / "run", **FULL), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.startswith("simcse.train: error: cannot write ")
    assert "checkpoint-2" in error
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {RUN_FILE, ".simcse-started"}


@pytest.mark.parametrize(
    "function",
    [
        "checkpoints.save_encoder",
        "checkpoints.save_file",
        "trainer.SimCSETrainer._save_rng_state",
        "train.plot_path",
    ],
)
def test_full_disk_in_any_save_is_one_line(folder, tmp_path, capsys, monkeypatch, function):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"simcse.{function}", full)
    change = {"sts_data": folder / "sts.tsv"} if "plot" in function else {"learn_temperature": True}
    error = refused(unwatched(folder, tmp_path / "run", **change), capsys)
    assert "No space left on device" in error
    assert str(tmp_path / "run") in error
    assert not (tmp_path / "run" / ".unfinished").exists()


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0", 1 << 40),
        ("basic_ios::clear: iostream error", 1 << 40),
        ("PytorchStreamWriter failed writing file data/1", 1 << 40),
        ("words of another release", 0),
    ],
)
def test_saving_knows_a_failed_write_by_its_words_or_by_the_disk(tmp_path, monkeypatch, text, free):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with (
        pytest.raises(UserError, match=r"cannot write .*checkpoint-2: "),
        storage.saving(tmp_path / "run/checkpoint-2"),
    ):
        raise RuntimeError(text)


def test_saving_hides_no_error_of_another_kind(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), storage.saving(tmp_path):
        raise RuntimeError("shapes do not match")


# Small matters


@pytest.mark.parametrize("steps", [0, -5])
def test_no_steps_are_refused(folder, tmp_path, capsys, steps):
    assert "--max_steps" in refused(unwatched(folder, tmp_path / "run", max_steps=steps), capsys)


def test_batch_of_one_row_writes_no_nan(folder, tmp_path, capsys):
    settings = {"train_file": folder / "odd.txt", "per_device_train_batch_size": 16, "dataloader_drop_last": False}
    train.main(unwatched(folder, tmp_path / "run", **{**settings, "max_steps": 3, "logging_steps": 1}))
    logs = state_of(tmp_path / "run")["log_history"]
    assert [entry["step"] for entry in logs if "loss" in entry] == [1, 2, 3]
    assert "nan" not in capsys.readouterr().out
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        state_of(checkpoint)


def test_score_that_is_not_defined_writes_no_nan(folder, tmp_path, capsys):
    sts = write_sts(tmp_path / "sts.tsv", [("STSB", "x", "dev", 3.0, "a man", f"a dog {i}") for i in range(4)])
    train.main(flags(folder, tmp_path / "run", sts_data=sts, max_steps=2, eval_steps=1))
    state = state_of(tmp_path / "run")
    assert state["best_metric"] is None
    assert all(math.isfinite(value) for entry in state["log_history"] for value in entry.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "GS-InfoNCE with 192 noise vectors (--num_noise 0 is SimCSE's InfoNCE)"),
        ({"num_noise": 0}, "; InfoNCE;"),
        ({"noise_weight": 0}, "; InfoNCE;"),
        ({"noise": "expected", "num_noise": 8}, "GS-InfoNCE with the expectation of 8 noise vectors"),
    ],
)
def test_first_line_names_the_loss(folder, tmp_path, capsys, change, words):
    train.prepare(unwatched(folder, tmp_path / "run", **change))
    assert words in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"eval_steps": 2}, "--eval_steps"),
        ({"eval_strategy": "steps"}, "--eval_strategy"),
        ({"metric_for_best_model": "stsb_spearman"}, "--metric_for_best_model"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end"),
        ({"save_strategy": "best"}, "--save_strategy"),
        ({"eval_strategy": "no", "load_best_model_at_end": False, "eval_on_start": False}, None),
        ({"recipe": "simcse-bert-base"}, None),
    ],
)
def test_evaluation_flags_without_pairs_get_a_warning(folder, tmp_path, capsys, change, named):
    train.prepare(unwatched(folder, tmp_path / "run", **change))
    error = capsys.readouterr().err
    if named is None:
        assert not error
    else:
        assert named in error
        assert error.startswith("simcse.train: warning: without --sts_data nothing is evaluated")
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "comet_ml", "mlflow", "clearml", "codecarbon", "nosuch"])
def test_tracker_that_is_not_installed_is_one_line(folder, tmp_path, capsys, name):
    if name == "nosuch" or not _is_installed(name):
        assert name in refused(unwatched(folder, tmp_path / "run", report_to=name), capsys)
        assert not (tmp_path / "run").exists()


def _is_installed(name):
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("name", [optimizer.value for optimizer in OptimizerNames])
def test_optimizer_is_there_or_refused_in_one_line(folder, tmp_path, capsys, name):
    message = None
    try:
        train.prepare(unwatched(folder, tmp_path / "run", optim=name))
    except UserError as error:
        message = str(error)
    if message:
        assert f"--optim {name}" in message
        assert not (tmp_path / "run").exists()


def test_missing_bitsandbytes_is_named(folder, tmp_path, capsys):
    if not _is_installed("bitsandbytes"):
        error = refused(unwatched(folder, tmp_path / "run", optim="adamw_8bit"), capsys)
        assert "--optim adamw" in error
        assert "bitsandbytes" in error


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "cosine_with_min_lr"])
def test_schedule_that_cannot_be_followed_is_refused(folder, tmp_path, capsys, kind):
    assert kind in refused(unwatched(folder, tmp_path / "run", lr_scheduler_type=kind), capsys)
    train.main(unwatched(folder, tmp_path / "run", max_steps=1))  # and its folder is free
