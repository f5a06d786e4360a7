"""Training with sharded weights (FSDP2): the gradients and weights of one process, and runs that are resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks, free_port
from safetensors.torch import load_file
from test_simcse_decoders import make_decoder
from test_simcse_model import make_tiny_model
from test_simcse_sts import write_sts
from test_simcse_train import flags
from torch.distributed.tensor import DTensor
from transformers import AutoModel, TrainerCallback

from simcse import SimCSE, train
from simcse.collator import packaged_file
from simcse.errors import UserError
from simcse.readers import read_table
from simcse.sharding import check_sharded

STEPS = 10
WAYS = {
    "encoder": {"pooler_type": "cls", "queue_size": 32, "gradient_accumulation_steps": 2},
    "decoder": {"pooler_type": "last", "model_name_or_path": "decoder", "max_steps": 4},
    "bf16": {"pooler_type": "avg", "bf16": True, "max_steps": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    make_decoder(folder / "decoder")
    sentences = [row[0] for row in read_table(packaged_file("sentences.txt")).rows]
    (folder / "train.txt").write_text("\n".join(sentences[:320]), encoding="utf-8")
    grades = [5.0, 4.2, 3.0, 2.5, 1.0, 0.0]
    pairs = [("STSB", "x", "dev", grades[i % 6], sentences[i], sentences[i + 1]) for i in range(24)]
    write_sts(folder / "sts.tsv", pairs)
    return folder


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(2)
    yield started
    started.stop()


def argv(folder, output, batch, **change):
    settings = {
        "dropout": 0.0,
        "learning_rate": 3e-5,
        "max_steps": STEPS,
        "eval_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "per_device_train_batch_size": batch,
        "mini_batch_size": 5,
        **change,
    }
    if "model_name_or_path" in settings:
        settings["model_name_or_path"] = folder / settings["model_name_or_path"]
    return flags(folder, output, **settings)


class Gradients(TrainerCallback):
    """The whole gradients of the first step."""

    def __init__(self):
        self.seen = {}
        self.sharded = set()

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if state.global_step:
            return
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sharded = isinstance(parameter.grad, DTensor)
                whole = parameter.grad.full_tensor() if sharded else parameter.grad
                self.seen[name] = whole.clone()
                if sharded and parameter.to_local().numel() < whole.numel():
                    self.sharded.add(name)


def prepare(group, arguments):
    train.prepare(arguments)


def run(group, arguments):
    """A whole run: gradients of the first step, log, and which weights were divided."""
    torch.use_deterministic_algorithms(False)
    trainer = train.prepare(arguments)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    queue = trainer.model.queue
    return {
        "gradients": gradients.seen,
        "sharded": gradients.sharded,
        "log": trainer.state.log_history,
        "queue": queue,
        "mini_batch": trainer.model.mini_batches.size,
    }


def weights(output):
    """All tensors of the saved model."""
    return {
        f"{file.parent.relative_to(output)}/{name}": x
        for file in [output / "model.safetensors", *output.glob("2_Dense/model.safetensors")]
        for name, x in load_file(file).items()
    }


def values(log, name):
    return [entry[name] for entry in log if name in entry]


def without_key_bias(tensors):
    """Their exact gradient is 0, so that Adam's steps are rounding."""
    return {name: x for name, x in tensors.items() if not name.endswith("key.bias")}


@pytest.mark.parametrize("name", WAYS)
def test_two_sharded_processes_are_as_one(ranks, folder, tmp_path, name):
    way = WAYS[name]
    first, second = ranks.run(run, [*argv(folder, tmp_path / "two", 8, **way), "--fsdp"])
    one = run(None, argv(folder, tmp_path / "one", 16, **way))
    assert first["sharded"] == set(one["gradients"]) == second["sharded"]
    # bf16: mini batches of other rows are padded to other lengths, and round differently.
    rel = 0.05 if way.get("bf16") else 1e-5
    for of_rank in (first, second):
        assert values(of_rank["log"], "loss") == pytest.approx(values(one["log"], "loss"), rel=rel)
        assert values(of_rank["log"], "grad_norm") == pytest.approx(values(one["log"], "grad_norm"), rel=rel)
    # Before the first step: evaluation is in fp32, whatever the training is in.
    assert values(first["log"], "eval_uniformity")[0] == pytest.approx(
        values(one["log"], "eval_uniformity")[0], abs=1e-6
    )
    for parameter, gradient in one["gradients"].items():
        error = np.linalg.norm(first["gradients"][parameter] - gradient.numpy())
        assert error <= rel * max(np.linalg.norm(gradient), 1e-3), parameter
    if way.get("bf16"):
        return
    found, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    for name, x in without_key_bias(expected).items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=1e-6, msg=name)
    layout = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert {str(p.relative_to(tmp_path / "two")) for p in (tmp_path / "two").rglob("*") if p.is_file()} == layout
    AutoModel.from_pretrained(tmp_path / "two")
    vectors = [SimCSE(str(tmp_path / which)).encode(["A sentence."]) for which in ("one", "two")]
    torch.testing.assert_close(*vectors, rtol=0, atol=1e-5)


def test_sharded_run_is_resumed_to_the_bit(ranks, folder, tmp_path):
    way = {"pooler_type": "cls", "dropout": 0.1, "queue_size": 32, "max_steps": 6, "eval_steps": 2}
    way |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9, "mini_batch_size": "auto"}
    # Alignment falls in this run: the best by this measure is that of step 2.
    way |= {"load_best_model_at_end": True, "metric_for_best_model": "alignment", "greater_is_better": True}
    way |= {"eval_on_start": False}
    whole = ranks.run(run, [*argv(folder, tmp_path / "whole", 8, **way), "--fsdp"])
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resume = {"resume_from_checkpoint": checkpoint}
    parts = ranks.run(run, [*argv(folder, tmp_path / "parts", 8, **way, **resume), "--fsdp"])
    for unbroken, resumed in zip(whole, parts, strict=True):
        assert values(unbroken["log"], "loss") == values(resumed["log"], "loss")
        assert len(values(resumed["log"], "loss")) == 6
        assert np.array_equal(unbroken["queue"], resumed["queue"])
        assert resumed["mini_batch"] == unbroken["mini_batch"] == 64
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    best, last = (weights(tmp_path / "whole" / f"checkpoint-{step}") for step in (2, 6))
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
        assert torch.equal(best[name], x), name
    assert any(not torch.equal(last[name], x) for name, x in expected.items())
    with pytest.raises(SystemExit):  # its optimizer's state is in other files
        train.main(argv(folder, tmp_path / "one", 16, **way, **resume))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learn_temperature": True}, "--learn_temperature"),
        ({"do_mlm": True}, "--do_mlm"),
        ({"fsdp_config": '{"state_dict_type": "SHARDED_STATE_DICT"}'}, "--fsdp_config state_dict_type SHARDED"),
        ({"fsdp_config": '{"version": 1, "reshard_after_forward": "full_shard"}'}, "--fsdp_config version 1"),
        ({"fsdp_config": '{"activation_checkpointing": true}'}, "--fsdp_config activation_checkpointing"),
    ],
)
def test_what_cannot_be_sharded_is_refused(ranks, folder, tmp_path, change, name):
    for _, error in ranks.tried(prepare, [*argv(folder, tmp_path / "two", 8, **change), "--fsdp"]):
        assert f"--fsdp cannot be combined with {name}" in error


def test_one_process_and_deepspeed_are_refused(folder, tmp_path, capsys):
    for further, message in [
        (["--fsdp"], "--fsdp divides the weights among processes, and this is a single one"),
        (["--deepspeed", "zero3.json"], "--deepspeed is not supported: --fsdp shards"),
    ]:
        with pytest.raises(SystemExit) as ended:
            train.main([*argv(folder, tmp_path / "one", 8), *further])
        assert ended.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("simcse.train: error: ")
        assert message in line


def test_weights_that_stayed_whole_are_an_error():
    with pytest.raises(UserError, match="accelerate did not shard weight on this device"):
        check_sharded(torch.nn.Linear(2, 2))


def test_torchrun_shards_by_the_flag_alone(folder, tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--rdzv-endpoint", f"localhost:{free_port()}",
        "--nproc-per-node", "2", "-m", "simcse.train", *argv(folder, tmp_path, 8, max_steps=2, eval_strategy="no"),
        "--fsdp", "--overwrite_output_dir",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert len(values(log, "loss")) == 2
