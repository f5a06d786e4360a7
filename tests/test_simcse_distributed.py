"""Training on several processes: the weights of one, one log, one folder; and what happens when a process dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from ranks import Ranks, free_port
from test_simcse_model import make_tiny_model
from test_simcse_sts import write_sts
from test_simcse_train import flags

from simcse import train
from simcse.collator import packaged_file
from simcse.elastic import START_FILE
from simcse.readers import read_table

STEPS = 20
WAYS = {
    "plain": {"eval_strategy": "steps", "eval_on_start": True, "sts_data": "sts.tsv"},
    "mini batches and MLM": {"mini_batch_size": 5, "do_mlm": True, "learn_temperature": True, "max_steps": 4},
    "hard negatives": {
        "train_file": "train.jsonl", "mask_duplicates": True, "hard_negative_weight": 0.5, "max_steps": 4,
    },
    "queue": {"queue_size": 32, "max_steps": 4},
    "local": {"negatives": "local", "num_noise": 0, "max_steps": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    sentences = [row[0] for row in read_table(packaged_file("sentences.txt")).rows]
    (folder / "train.txt").write_text("\n".join(sentences[:128]), encoding="utf-8")
    rows = [dict(zip("abcd", sentences[4 * i : 4 * i + 4], strict=True)) for i in range(60)]
    rows += [{**row, "b": "Another one.", "c": rows[i]["a"]} for i, row in enumerate(rows[:4])]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    grades = [5.0, 4.2, 3.0, 2.5, 1.0, 0.0]
    pairs = [("STSB", "x", "dev", grades[i % 6], sentences[i], sentences[i + 1]) for i in range(24)]
    write_sts(folder / "sts.tsv", pairs)
    return folder


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(2)
    yield started
    started.stop()


def argv(folder, output, batch, way):
    settings = {
        "sts_data": None,
        "dropout": 0.0,
        "learning_rate": 3e-5,
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "logging_steps": 1,
        "load_best_model_at_end": False,
        "save_strategy": "no",
        "per_device_train_batch_size": batch,
        **way,
    }
    for name in ("train_file", "sts_data"):
        if settings.get(name):
            settings[name] = folder / settings[name]
    return flags(folder, output, **settings)


def mask_by_text(self, inputs):
    """Masks that do not depend on how the rows are spread over processes."""
    ids = inputs["input_ids"]
    chosen = (ids % 3 == 0) & (ids > 1000) & (inputs["attention_mask"] == 1)
    return {"masked_ids": ids.masked_fill(chosen, 103), "labels": ids.masked_fill(~chosen, -100)}


def run(group, arguments):
    """Weights, losses and evaluations of a run of this process; group: None where it is the only one."""
    torch.use_deterministic_algorithms(False)
    trainer = train.prepare(arguments)
    trainer._mask = mask_by_text.__get__(trainer)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluations = [entry for entry in trainer.state.log_history if "eval_uniformity" in entry]
    return {
        "weights": weights,
        "losses": [entry["loss"] for entry in log],
        "evaluations": [entry["eval_uniformity"] for entry in evaluations],
    }


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_reach_the_weights_of_one(ranks, folder, tmp_path, name, capsys):
    way, rows = WAYS[name], 32 if name == "plain" else 8
    two = ranks.run(run, argv(folder, tmp_path / "two", rows, way))
    one = run(None, argv(folder, tmp_path / "one", 2 * rows, {**way, "negatives": None}))
    before = initial(folder, tmp_path, way)
    assert max(distances(one["weights"], before).values()) > 4e-5  # far more than they may differ
    for rank in two:
        far = max(distances(rank["weights"], one["weights"]).values())
        if name == "local":
            assert far > 1e-5
            continue
        assert far < 1e-5
        mlm = way.get("do_mlm")  # a log entry holds the contrastive part of all, and a process's own MLM part
        assert rank["losses"] == pytest.approx(one["losses"], rel=1e-3 if mlm else 1e-5)
        if name == "plain":
            assert rank["evaluations"] == pytest.approx(one["evaluations"], abs=1e-5)


def distances(some, others):
    """Of all but the keys' biases, whose exact gradient is 0: Adam steps by the sign of what is rounding."""
    names = [name for name in some if not name.endswith("key.bias")]
    return {name: float(np.abs(np.asarray(some[name]) - np.asarray(others[name])).max()) for name in names}


def initial(folder, tmp_path, way):
    trainer = train.prepare(argv(folder, tmp_path / "start", 16, {**way, "negatives": None}))
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


def collectives_of_a_step(group, arguments):
    """Names of what is called between processes in one training step."""
    trainer = train.prepare(arguments)
    seen = []
    with torch.profiler.profile() as profile:
        trainer.train()
    for event in profile.events():
        if event.name.startswith("gloo:"):
            seen.append(event.name)
    return seen


def test_gradients_are_reduced_once_and_nothing_is_called_in_the_loop_over_parts(ranks, folder, tmp_path):
    counts = {}
    for size in (0, 4, 2):  # of 16 rows
        way = {"max_steps": 1, "mini_batch_size": size, "report_to": "none"}
        seen = ranks.run(collectives_of_a_step, argv(folder, tmp_path / str(size), 8, way))
        counts[size] = sorted(seen[0])
    assert counts[0]
    assert counts[4] == counts[0] == counts[2]


def own_dropout(group, arguments):
    trainer = train.prepare(arguments)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    return torch.rand(3)


def test_every_process_draws_its_own_dropout(ranks, folder, tmp_path):
    first, second = ranks.run(own_dropout, argv(folder, tmp_path, 8, {}))
    assert not np.array_equal(first, second)


def saved_and_resumed(group, whole, parts):
    """The queue at the end of an unbroken run and of one that goes on from its checkpoint."""
    torch.use_deterministic_algorithms(False)
    results = []
    for arguments in (whole, parts):
        trainer = train.prepare(arguments)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, trainer.model.queue))
    return results


def test_resumed_run_of_two_is_the_unbroken_one_to_the_bit(ranks, folder, tmp_path):
    way = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    way |= {"queue_size": 24, "dropout": 0.1, "do_mlm": True}
    whole = argv(folder, tmp_path / "whole", 8, way)
    resume = {"resume_from_checkpoint": tmp_path / "whole" / "checkpoint-3"}
    parts = argv(folder, tmp_path / "parts", 8, way | resume)
    for unbroken, resumed in ranks.run(saved_and_resumed, whole, parts):
        assert unbroken[0] == resumed[0]
        assert len(unbroken[0]) == 6
        assert np.array_equal(unbroken[1], resumed[1])
    assert {path.name for path in (tmp_path / "whole").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
    assert not (tmp_path / "whole" / ".unfinished").exists()


def curve(output):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


def losses_of(group, arguments):
    torch.use_deterministic_algorithms(False)
    trainer = train.prepare(arguments)
    trainer.train()
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_torchrun_resumes_when_a_process_is_killed(ranks, folder, tmp_path):
    """SIGKILL of rank 1 after a checkpoint: torchrun names it, starts both again, and the curve is the same."""
    way = {"max_steps": 60, "save_strategy": "steps", "save_steps": 10, "logging_steps": 5, "dropout": 0.1}
    older = tmp_path / "run" / "checkpoint-50"  # of an earlier run in the same folder, which has to go
    older.mkdir(parents=True)
    (older / "trainer_state.json").write_text("{}")
    (tmp_path / "run" / START_FILE).write_text("the earlier run")  # torchrun was cut off in it
    command = [
        sys.executable, "-m", "torch.distributed.run", "--rdzv-endpoint", f"localhost:{free_port()}",
        "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.5",
        "-m", "simcse.train", *argv(folder, tmp_path / "run", 8, way), "--overwrite_output_dir",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as started:
        try:
            wait_for(tmp_path / "run" / "checkpoint-10", started)
            workers = [p for p in psutil.Process(started.pid).children() if p.environ().get("RANK") == "1"]
            assert len(workers) == 1
            workers[0].send_signal(signal.SIGKILL)
            printed, _ = started.communicate(timeout=120)
        finally:
            started.kill()
    assert started.returncode == 0, printed
    assert "exitcode: -9) local_rank: 1" in printed
    assert printed.count("step  5/60") == 1  # not from the start again
    assert printed.count("16 per batch on 2 processes") == 2
    assert curve(tmp_path / "run") == pytest.approx(
        ranks.run(losses_of, argv(folder, tmp_path / "unbroken", 8, way))[0], rel=1e-6
    )
    assert not (tmp_path / "run" / START_FILE).exists()


def wait_for(path, process, seconds=90):
    end = time.monotonic() + seconds
    while not path.is_dir():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_users_mistake_is_one_line_of_one_process(folder, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "simcse.train", "--queue_size", "3",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = [line for line in ended.stderr.splitlines() if line.startswith("simcse.train: error")]
    assert lines == ["simcse.train: error: --queue_size 3 is not a multiple of the 2 processes that share it"]
