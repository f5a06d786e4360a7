"""Training with sharded weights (FSDP2): gradient caching gives the weights of one process, and runs are resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import free_port
from safetensors.torch import load_file
from test_simcse_model import make_tiny_model
from test_simcse_sts import write_sts
from test_simcse_train import flags

from simcse import train
from simcse.dataset import shipped
from simcse.table import read_table

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    sentences = [row[0] for row in read_table(shipped("sentences.txt")).rows]
    (folder / "train.txt").write_text("\n".join(sentences[:160]), encoding="utf-8")
    grades = [5.0, 4.2, 3.0, 2.5, 1.0, 0.0]
    pairs = [("STSB", "x", "dev", grades[i % 6], sentences[i], sentences[i + 1]) for i in range(24)]
    write_sts(folder / "sts.tsv", pairs)
    return folder


def argv(folder, output, batch, **change):
    settings = {
        "pooler_type": "cls",
        "dropout": 0.0,
        "learning_rate": 3e-5,
        "max_steps": 10,
        "eval_steps": 5,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 5,
        "load_best_model_at_end": False,
        "per_device_train_batch_size": batch,
        "mini_batch_size": 5,
        **change,
    }
    return flags(folder, output, **settings)


def sharded(folder, output, **change):
    """``torchrun --nproc-per-node 2 -m simcse.train ... --fsdp``."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--rdzv-endpoint", f"localhost:{free_port()}",
        "--nproc-per-node", "2", "-m", "simcse.train", *argv(folder, output, 8, **change),
        "--fsdp",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280, check=False)


def weights(output):
    """All tensors of the saved model."""
    files = [output / "model.safetensors", output / "2_Dense" / "model.safetensors"]
    return {f"{file.parent.name if file.parent != output else ''} {name}": x
            for file in files for name, x in load_file(file).items()}  # fmt: skip


def log_of(output, name):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in log if name in entry]


def test_two_sharded_processes_train_save_and_resume_as_one_process(folder, tmp_path):
    two = sharded(folder, tmp_path / "two")
    assert two.returncode == 0, two.stderr[-3000:]
    torch.use_deterministic_algorithms(False)
    train.main(argv(folder, tmp_path / "one", 16))
    # The exact gradient of a key's bias is 0, so that Adam's steps are rounding.
    one = {name: x for name, x in weights(tmp_path / "one").items() if not name.endswith("key.bias")}
    found = weights(tmp_path / "two")
    start = load_file(folder / "model" / "model.safetensors")
    assert max(float((one[f" {name}"] - x).abs().max()) for name, x in start.items() if f" {name}" in one) > 1e-4
    for name, x in one.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6, msg=name)
    for name in ("loss", "eval_stsb_spearman", "eval_uniformity"):
        assert log_of(tmp_path / "two", name) == pytest.approx(log_of(tmp_path / "one", name), rel=1e-4), name

    resumed = sharded(folder, tmp_path / "on", resume_from_checkpoint=tmp_path / "two" / "checkpoint-5")
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert log_of(tmp_path / "on", "loss") == log_of(tmp_path / "two", "loss")
    again = weights(tmp_path / "on")
    assert all(torch.equal(again[name], x) for name, x in found.items())


def test_what_cannot_be_sharded_is_refused(folder, tmp_path):
    two = sharded(folder, tmp_path / "two", learn_temperature=True)
    assert two.returncode != 0
    assert "simcse.train: error: --fsdp cannot be combined with --learn_temperature" in two.stderr
