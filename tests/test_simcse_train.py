"""Training from the command line: what it learns, keeps and prints, and how it refuses."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import interruptible
from test_simcse_model import make_tiny_model
from test_simcse_sts import write_sts

from fused_infonce import gs_infonce
from fused_infonce.testing import has_bf16_instructions
from simcse import train
from simcse.collator import packaged_file
from simcse.model import load_encoder
from simcse.readers import read_table
from simcse.report import evaluations
from simcse.sts import encode, geometry, read_sts, spearman, watched_pairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, sentences and graded pairs."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    sentences = [row for (row,) in read_table(packaged_file("sentences.txt")).rows]
    (folder / "train.txt").write_text("\n".join(sentences[:96]), encoding="utf-8")
    grades = [5.0, 4.2, 3.0, 2.5, 1.0, 0.0]
    rows = [("STSB", "x", "dev", grades[i % 6], sentences[i], sentences[i + 1]) for i in range(24)]
    write_sts(folder / "sts.tsv", rows)
    return folder


def flags(folder, output, **others):
    inputs = {"model_name_or_path": "model", "train_file": "train.txt", "sts_data": "sts.tsv"}
    settings = {
        **({name: folder / file for name, file in inputs.items()} if folder else {}),
        "output_dir": output,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "max_steps": 6,
        "eval_steps": 2,
        "logging_steps": 2,
        "disable_tqdm": True,
        **others,
    }
    return [text for name, value in settings.items() if value is not None for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A short run with a real encoder: its output folder, what it printed, its log."""
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = {"model_name_or_path": "minilm", "learning_rate": 5e-5}
    run = subprocess.run(
        [sys.executable, "-m", "simcse.train", *flags(folder, output, **settings)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    state = json.loads((output / "trainer_state.json").read_text())
    return output, run.stdout, state


def test_training_spreads_the_sentences_out(trained):
    points = evaluations(trained[2]["log_history"])
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    assert points[-1]["uniformity"] < points[0]["uniformity"] - 0.1


def test_saved_model_is_the_best_checkpoint(trained, folder):
    output, _, state = trained
    points = evaluations(state["log_history"])[1:]
    best = max(points, key=lambda point: point["spearman"])
    assert state["best_global_step"] == best["step"]
    checkpoints = list(output.glob("checkpoint-*"))
    assert output / f"checkpoint-{best['step']}" in checkpoints
    assert len(checkpoints) <= 2

    pairs = watched_pairs(read_sts(folder / "sts.tsv"))
    for place in (output, output / f"checkpoint-{best['step']}"):
        encoder, tokenizer = load_encoder(str(place))
        assert encoder.pooler_type == "cls_before_pooler"
        vectors = encode(encoder, tokenizer, pairs.sentences, progress=False)
        assert spearman(pairs, vectors) == pytest.approx(best["spearman"], abs=1e-2)
        assert geometry(pairs, vectors)["uniformity"] == pytest.approx(best["uniformity"], abs=1e-4)


def test_run_ends_with_the_table_and_a_plot(trained):
    output, printed, state = trained
    first, *points = evaluations(state["log_history"])
    best = next(point for point in points if point["step"] == state["best_global_step"])
    table = printed[printed.index("STSB-dev, cls_before_pooler") :]
    for metric, form, better in (
        ("spearman", ".2f", "higher"),
        ("alignment", ".4f", "lower"),
        ("uniformity", ".4f", "lower"),
    ):
        row = next(line for line in table.splitlines() if line.lower().startswith(metric))
        assert f"{first[metric]:{form}}" in row
        assert f"{best[metric]:{form}}" in row
        assert row.endswith(better)
    assert (output / train.PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_seed_decides_the_run_and_evaluating_does_not(folder, tmp_path, capsys):
    losses = {}
    unwatched = {"eval_strategy": "no", "eval_on_start": False}
    for name, change in {"first": {}, "same": unwatched, "other": {"seed": 7}}.items():
        train.main(flags(folder, tmp_path / name, **change))
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
    assert losses["same"] == pytest.approx(losses["first"], rel=1e-5)
    assert losses["other"] != pytest.approx(losses["first"], rel=1e-3)


def test_loss_is_gs_infonce_between_the_two_views(folder, tmp_path):
    trainer = train.prepare(flags(folder, tmp_path, num_noise=0, temp=0.1))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 2 * 16
    trainer.model.train()
    torch.manual_seed(1)
    loss, vectors = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    first, second = F.normalize(vectors).chunk(2)
    usual = F.cross_entropy(first @ second.T / 0.1, torch.arange(16))
    assert loss.item() == pytest.approx(usual.item(), rel=1e-4)
    assert abs(usual - math.log(16)) > 0.01  # what vectors that are all the same would give

    trainer.model.loss.num_noise, trainer.model.loss.noise = 50, "expected"
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    vectors = trainer.model(**batch)[0].chunk(2)
    expected = gs_infonce(*vectors, temperature=0.1, num_noise=50, noise="expected")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_noise_does_not_change_the_dropout_that_a_seed_draws(folder, tmp_path):
    trainer = train.prepare(flags(folder, tmp_path, num_noise=0))
    batch = next(iter(trainer.get_train_dataloader()))
    seen = {}
    for trainer.model.loss.num_noise in (0, 100):
        torch.manual_seed(3)
        loss, vectors = trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
        seen[trainer.model.loss.num_noise] = loss.item(), vectors, torch.get_rng_state()
    assert seen[100][0] > seen[0][0]
    assert torch.equal(seen[100][1], seen[0][1])
    assert torch.equal(seen[100][2], seen[0][2])


def test_bf16_training_is_evaluated_in_fp32(folder, tmp_path):
    exact = train.prepare(flags(folder, tmp_path / "a"))
    exact = exact.evaluate()
    trainer = train.prepare(flags(folder, tmp_path / "b", bf16=True, max_steps=2, eval_steps=1, learning_rate=0.0))
    trainer.train()
    points = evaluations(trainer.state.log_history)
    assert len(points) == 3
    for point in points:
        for metric in ("spearman", "alignment", "uniformity"):
            key = next(key for key in exact if key.endswith(metric))
            assert point[metric] == pytest.approx(exact[key], abs=1e-6)
    tokens = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    assert not torch.equal(trainer.model(**tokens)[0], trainer.model.encoder.embed(**tokens))  # forward is in bf16


def test_every_pooler_trains_and_a_new_mlp_is_saved(folder, tmp_path, capsys):
    train.main(flags(folder, tmp_path / "mlp", pooler_type="cls", mlp_only_train=True, max_steps=2))
    encoder, _ = load_encoder(str(tmp_path / "mlp"))
    assert (encoder.pooler_type, encoder.mlp_only_train) == ("cls", True)
    fresh = train.prepare(flags(folder, tmp_path / "new", pooler_type="cls")).model.encoder
    assert not torch.equal(encoder.mlp[0].weight, fresh.mlp[0].weight)
    again = train.prepare(
        flags(folder, tmp_path / "again", model_name_or_path=tmp_path / "mlp")
    ).model.encoder  # goes on from the saved MLP
    assert torch.equal(encoder.mlp[0].weight, again.mlp[0].weight)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"gradient_accumulation_steps": 2},
        {"num_train_epochs": 2, "max_steps": -1, "eval_strategy": "epoch", "per_device_train_batch_size": 40},
        {"lr_scheduler_type": "constant", "optim": "sgd", "eval_steps": 0.5},
        {"metric_for_best_model": "uniformity"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_training_arguments_of_transformers_work(folder, tmp_path, capsys, change):
    train.main(flags(folder, tmp_path / "run", **change))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    points = evaluations(state["log_history"])
    metric, pick = ("uniformity", min) if "metric_for_best_model" in change else ("spearman", max)
    best = pick(points[1:], key=lambda point: point[metric])
    assert state["best_metric"] == pytest.approx(best[metric])
    if "num_train_epochs" in change:  # 96 sentences: two batches of 40, the rest left out
        assert [point["step"] for point in points] == [0, 2, 4]


def test_training_without_pairs_saves_the_last_model(folder, tmp_path, capsys):
    train.main(flags(folder, tmp_path / "run", sts_data=None, max_steps=2))
    load_encoder(str(tmp_path / "run"))
    assert "no pairs" in capsys.readouterr().out


def test_task_of_another_name_is_watched_and_named(folder, tmp_path, capsys):
    sts = tmp_path / "sts.tsv"
    sts.write_text((folder / "sts.tsv").read_text().replace("STSB\t", "mine\t"))
    train.main(flags(folder, tmp_path / "run", sts_data=sts, max_steps=2))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert "eval_mine_spearman" in state["log_history"][0]
    assert "mine-dev" in capsys.readouterr().out


def test_run_goes_on_from_a_checkpoint(folder, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = {"save_strategy": "steps", "save_steps": 2, "eval_steps": 2, "save_total_limit": 9}
    train.main(flags(folder, whole, **steps))
    train.main(flags(folder, parts, **steps, resume_from_checkpoint=whole / "checkpoint-2"))
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (whole, parts)]
    whole_points, parts_points = ({p["step"]: p["uniformity"] for p in evaluations(log)} for log in logs)
    assert parts_points[6] == pytest.approx(whole_points[6], abs=1e-4)


REFUSED = {
    "missing file": ({"train_file": "nowhere.txt"}, "nowhere.txt"),
    "missing pairs": ({"sts_data": "nowhere.tsv"}, "nowhere.tsv"),
    "missing model": ({"model_name_or_path": "./nowhere"}, "./nowhere"),
    "batch": ({"per_device_train_batch_size": 200}, "200 sentences is more than the 96 in"),
    "length": ({"max_seq_length": 1000}, "512 tokens"),
    "no length": ({"max_seq_length": 2}, "max_seq_length"),
    "temperature": ({"temp": 0}, "--temp"),
    "noise": ({"num_noise": -1}, "num_noise"),
    "choice": ({"noise": "pink"}, "pink"),
    "number": ({"learning_rate": "fast"}, "fast"),
    "negative rate": ({"learning_rate": -1}, "learning_rate"),
    "pooler": ({"pooler_type": "median"}, "median"),
    "typo": ({"learnin_rate": 1}, "--learning_rate"),
    "strategy": ({"eval_strategy": "weekly"}, "weekly"),
    "metric": ({"metric_for_best_model": "accuracy"}, "stsb_spearman"),
    "checkpoint": ({"resume_from_checkpoint": "nowhere"}, "trainer_state.json"),
    "evaluation in bf16": ({"bf16_full_eval": True}, "fp32"),
    "sampling": ({"train_sampling_strategy": "group_by_length"}, "group_by_length"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, change, message):
    output = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        train.main(flags(folder, output, **change))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("simcse.train: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()


def test_pairs_without_a_dev_split_are_refused(folder, tmp_path, capsys):
    sts = write_sts(tmp_path / "sts.tsv", [("STS12", "x", "test", 1, "a", "b")])
    with pytest.raises(SystemExit):
        train.main(flags(folder, tmp_path / "run", sts_data=sts))
    assert "split 'dev'" in capsys.readouterr().err


def test_output_dir_that_is_a_file_is_refused(folder, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        train.main(flags(folder, tmp_path / "run"))
    assert ended.value.code == 2
    assert "--output_dir" in capsys.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


def test_error_of_the_command_has_no_traceback(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "simcse.train", "--train_file", "nowhere.txt"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.count("\n") == 1
    assert "nowhere.txt" in run.stderr
    assert not list(tmp_path.iterdir())


def test_interrupt_is_one_line_and_exit_130(folder, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-m",
            "simcse.train",
            *flags(folder, tmp_path / "run", max_steps=100_000, logging_steps=1),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    try:
        while "loss" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        for _ in range(3):  # Python may drop one that falls into a destructor; a user presses again
            process.send_signal(signal.SIGINT)
            try:
                _, error = process.communicate(timeout=15)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.strip().splitlines()[-1] == "simcse.train: interrupted"


@pytest.mark.data
@pytest.mark.skipif("SIMCSE_DATA" not in os.environ, reason="SIMCSE_DATA is not set")
def test_simcse_improves_sts_b_on_real_sentences(tmp_path, capsys):
    data = Path(os.environ["SIMCSE_DATA"])
    pairs = watched_pairs(read_sts(data / "sts_eval.tsv"))
    rows = [("STSB", "some", "dev", *row) for row in zip(pairs.scores, pairs.first, pairs.second, strict=True)]
    settings = {
        "model_name_or_path": "minilm",
        "pooler_type": "cls_before_pooler",
        "train_file": data / "wiki_sentences.txt.gz",
        "sts_data": write_sts(tmp_path / "sts.tsv", rows[::4]),  # a quarter, to be quick
        "per_device_train_batch_size": 64,
        "learning_rate": 3e-5,
        "bf16": has_bf16_instructions(),  # emulated it takes minutes
        "max_steps": 10,
        "eval_steps": 10,
    }
    train.main(flags(None, tmp_path / "run", **settings))
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    before, after = evaluations(state["log_history"])
    assert after["spearman"] > before["spearman"] + 1.5
    assert after["uniformity"] < before["uniformity"] - 0.5
