"""Mini batches give the gradients of one pass; a resumed run is the unbroken one; checkpoints are whole."""

import json
import subprocess
import sys

import pytest
import torch
from test_simcse_options import folder, prepared  # noqa: F401 (a fixture)
from test_simcse_train import flags

from simcse import train
from simcse.errors import UserError
from simcse.mini_batches import MiniBatches, choose, embed_in_mini_batches
from simcse.trainer import SimCSETrainer


def gradients(trainer, batch, seed=0):
    torch.manual_seed(seed)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    named = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), named


def assert_same(first, second, rtol=1e-4):
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    assert first[1].keys() == second[1].keys()
    scale = max(grad.abs().max() for grad in first[1].values())
    for name, grad in first[1].items():
        torch.testing.assert_close(grad, second[1][name], rtol=rtol, atol=2e-6 * float(scale), msg=name)


@pytest.mark.parametrize("size", [5, 8])
def test_mini_batches_without_dropout_give_the_gradients_of_one_pass(folder, tmp_path, size):  # noqa: F811
    change = {"dropout": 0.0, "learn_temperature": True, "do_mlm": True, "train_file": folder / "train.jsonl"}
    trainer = prepared(folder, tmp_path, **change)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    whole = gradients(trainer, batch)
    assert "loss.log_temperature" in whole[1]
    trainer._draws, trainer.model.mini_batches = None, MiniBatches(size)
    assert_same(gradients(trainer, batch), whole)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mini_batches_with_dropout_replay_it(folder, tmp_path, checkpointing, monkeypatch):  # noqa: F811
    trainer = prepared(folder, tmp_path, mini_batch_size=6, activation_checkpointing=checkpointing)
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    cached = gradients(trainer, batch)

    def with_graphs_kept(function, *tensors, use_reentrant):
        return function(*tensors)

    monkeypatch.setattr("simcse.mini_batches.checkpoint", with_graphs_kept)
    trainer._draws = None
    assert_same(cached, gradients(trainer, batch))
    trainer._draws = None
    other = gradients(trainer, batch, seed=1)
    assert cached[0] != pytest.approx(other[0], rel=1e-5)  # dropout was on


def test_activations_of_one_mini_batch_at_a_time_are_held(folder, tmp_path):  # noqa: F811
    def held(size):
        trainer = prepared(folder, tmp_path, mini_batch_size=size, per_device_train_batch_size=32)
        batch = next(iter(trainer.get_train_dataloader()))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            trainer.compute_loss(trainer.model.train(), batch)
        return sum(sizes)

    assert held(4) < held(0) / 5


@pytest.mark.parametrize("bf16", [False, True])
def test_kept_activations_change_no_bit(folder, tmp_path, bf16):  # noqa: F811
    """With room for all activations, for those of some mini batches, and for none."""
    trainer = prepared(folder, tmp_path, mini_batch_size=4, do_mlm=True, bf16=bf16)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    found = []
    for budget in (0, 100, 1e9):
        trainer._draws, trainer.model.mini_batches = None, MiniBatches(4, 1.0, budget)
        with trainer.accelerator.autocast():
            found.append(gradients(trainer, batch))
    for loss, grads in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(grad, found[0][1][name]) for name, grad in grads.items())


def test_bf16_mini_batches_sum_their_gradients_in_fp32(folder, tmp_path):  # noqa: F811
    """64 mini batches are no further from fp32 than one pass in bf16 is."""
    options = {"dropout": 0.0, "num_noise": 0, "per_device_train_batch_size": 32}
    trainer = prepared(folder, tmp_path, mini_batch_size=0, bf16=True, **options)
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    exact = gradients(trainer, batch)[1]
    far = {}
    for size in (0, 1):
        trainer.model.mini_batches = MiniBatches(size)
        with trainer.accelerator.autocast():
            grads = gradients(trainer, batch)[1]
        errors = [float((grads[name] - grad).double().square().sum()) for name, grad in exact.items()]
        far[size] = sum(errors) ** 0.5
    assert far[1] < 1.3 * far[0]


@pytest.mark.parametrize(
    ("seconds", "free", "chosen"),
    [
        ({32: 1.0, 64: 0.95}, 1e12, 32),
        ({32: 1.0, 64: 0.5, 128: 0.49}, 1e12, 64),
        ({32: 1.0, 64: 0.5, 128: 0.25, 200: 0.1}, 1e12, 0),
        ({32: 1.0, 64: 0.5}, 2.1 * 64 * 8 * 10, 64),
    ],
)
def test_auto_doubles_the_size_while_that_is_faster_and_fits(monkeypatch, seconds, free, chosen):
    monkeypatch.setattr("simcse.mini_batches._seconds_per_row", lambda *args: seconds[args[-1]])
    monkeypatch.setattr("simcse.mini_batches._bytes_per_token", lambda *_: 10.0)
    monkeypatch.setattr("simcse.mini_batches._free_memory", lambda _: free)
    ids = torch.ones(200, 8, dtype=torch.int64)
    plan = choose(lambda **_: None, {"input_ids": ids, "attention_mask": ids}, [], None)
    assert plan == MiniBatches(chosen, 10.0, free / 2)


def test_auto_measures_says_and_records_its_size(folder, tmp_path, capsys):  # noqa: F811
    """The size that it names gives the same bits, and the measurement has no part in them."""
    named, weights = [], []
    for size in ("auto", None):
        trainer = prepared(folder, tmp_path / str(size), mini_batch_size=size or named[0], do_mlm=True)
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        run = json.loads((tmp_path / str(size) / "run.json").read_text())
        named.append(run["settings"]["mini_batch_size"])
    assert f"(--mini_batch_size {named[0]})" in capsys.readouterr().out
    assert named[0] == named[1]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def test_a_resumed_run_takes_the_size_over(folder, tmp_path, capsys):  # noqa: F811
    steps = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "sts_data": None}
    train.main(flags(folder, tmp_path / "run", mini_batch_size=5, **steps))
    resume = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-2"}
    train.main(flags(folder, tmp_path / "on", **steps, **resume))
    assert "embeds   5 of 32 sentences at once (--mini_batch_size 5)" in capsys.readouterr().out
    for checkpoint in (tmp_path / "on").glob("checkpoint-*"):
        assert json.loads((checkpoint / "run.json").read_text())["settings"]["mini_batch_size"] == 5
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "on"))
    assert first == second


@pytest.mark.parametrize("size", ["-1", "many", "2.5"])
def test_a_size_that_is_none_is_refused(folder, tmp_path, size):  # noqa: F811
    with pytest.raises(UserError, match="--mini_batch_size must be auto, a number of sentences, or 0"):
        prepared(folder, tmp_path, mini_batch_size=size)


@pytest.mark.parametrize("change", [{"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_mini_batches_train_with_autocast_and_accumulation(folder, tmp_path, change):  # noqa: F811
    losses = []
    for size in (0, 6):
        trainer = prepared(folder, tmp_path / str(size), dropout=0.0, mini_batch_size=size, **change)
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if "bf16" in change else 1e-4)


def test_resumed_run_is_the_unbroken_one_to_the_bit(folder, tmp_path, capsys):  # noqa: F811
    options = {"queue_size": 16, "learn_temperature": True, "do_mlm": True, "per_device_train_batch_size": 8}
    steps = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 9, "max_steps": 9, "logging_steps": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(flags(folder, whole, sts_data=None, **options, **steps))
    resume = {"resume_from_checkpoint": whole / "checkpoint-4"}
    train.main(flags(folder, parts, sts_data=None, **options, **steps, **resume))
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (whole, parts)]
    names = ("loss", "mlm_loss", "temperature", "uniformity")
    curves = [[[entry[name] for name in names] for entry in log if "loss" in entry] for log in logs]
    assert len(curves[0]) == 9
    assert curves[0] == curves[1]
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_checkpoint_that_was_broken_off_is_not_there(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    save = SimCSETrainer._save_rng_state

    def die_at_four(self, folder):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        save(self, folder)

    monkeypatch.setattr(SimCSETrainer, "_save_rng_state", die_at_four)
    steps = {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8, "sts_data": None}
    with pytest.raises(SystemExit):
        train.main(flags(folder, tmp_path / "run", **steps))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    train.main(flags(folder, tmp_path / "run", **steps, resume_from_checkpoint=True))
    assert not (tmp_path / "run" / ".unfinished").exists()
    assert (tmp_path / "run" / "checkpoint-6").is_dir()


@pytest.mark.parametrize(("left", "widths"), [(False, [6, 3, 2]), (True, [6, 6, 6])])
def test_mini_batches_hold_no_more_padding_than_they_need(left, widths):
    lengths = torch.tensor([2, 6, 1, 3, 4, 2])
    mask = torch.arange(6) < lengths[:, None]
    mask = (mask.flip(1) if left else mask).long()
    seen = []

    def embed(input_ids, attention_mask):
        seen.append(input_ids.shape[1])
        return (input_ids * attention_mask).sum(1, keepdim=True).double(), torch.zeros(())

    ids = torch.arange(36).view(6, 6)
    vectors, _ = embed_in_mini_batches(embed, {"input_ids": ids, "attention_mask": mask}, MiniBatches(2))
    assert seen == widths
    assert torch.equal(vectors, embed(ids, mask)[0])  # in the rows' own order


PARTS = """
import torch
from transformers import BertConfig, BertModel

from fused_infonce.testing import process_memory
from simcse.mini_batches import MiniBatches, embed_in_mini_batches, keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()
encoder = BertModel(
    BertConfig(vocab_size=500, hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768)
)


def embed(**tokens):
    vectors = encoder(**tokens).last_hidden_state[:, 0]
    return vectors, vectors.new_zeros(())


for parts in (8, 32):
    ids = torch.ones(32 * parts, 32, dtype=torch.int64)
    vectors, _ = embed_in_mini_batches(embed, {"input_ids": ids, "attention_mask": ids}, MiniBatches(32))
    vectors.square().sum().backward()
    print(process_memory("VmHWM") / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak memory is read from /proc")
def test_memory_follows_the_mini_batch_and_not_the_batch():
    done = subprocess.run([sys.executable, "-c", PARTS], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    few, many = map(float, done.stdout.split())
    assert many < few + 160  # MiB; 24 parts' activations would be 2400
