"""LoRA: what is trained, what a checkpoint holds, and the two ways of saving it."""

import json

import pytest
import torch
from test_simcse_decoders import SENTENCES, folder, options, their_vectors, vectors_of  # noqa: F401 (a fixture)
from test_simcse_exact import assert_same, gradients
from test_simcse_model import make_tiny_model
from transformers import AutoModel

from simcse import train
from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.saved_model import save_encoder
from simcse.sts import encode_rows

peft = pytest.importorskip("peft", reason="the package peft (extra lora) is not installed")

LORA = {"lora_r": 4, "dropout": 0.1, "learning_rate": 0.02}


def weights_of(path):
    return AutoModel.from_pretrained(path).state_dict()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapter_alone_is_trained(folder, tmp_path, kind):  # noqa: F811
    trainer = train.prepare(options(folder, tmp_path, kind, **LORA))
    trained = [name for name, weight in trainer.model.encoder.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    before = {name: weight.clone() for name, weight in trainer.model.encoder.named_parameters()}
    trainer.train()
    for name, weight in trainer.model.encoder.named_parameters():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "alone"])
def test_saved_model_gives_everyone_the_same_vectors(folder, tmp_path, kind, merge, capsys):  # noqa: F811
    base = folder / kind
    if kind == "bert" and not base.exists():
        make_tiny_model(base)
    pooler = "cls" if kind == "bert" else "last"
    run = tmp_path / "run"
    trainer = train.prepare(options(folder, run, kind, pooler_type=pooler, lora_merge=merge, **LORA))
    trainer.train()
    trainer.save_model()
    ours = encode_rows(trainer.model.encoder, trainer.processing_class, SENTENCES, progress=False)
    assert (run / "model.safetensors").exists() == merge
    assert (run / "adapter_model.safetensors").exists() == (not merge)
    torch.testing.assert_close(vectors_of(run), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(their_vectors(run), ours, rtol=0, atol=1e-5)
    if merge:
        config, before = (json.loads((place / "config.json").read_text()) for place in (run, base))
        assert {name: config[name] for name in before if "drop" in name} == {
            name: value for name, value in before.items() if "drop" in name
        }
        assert weights_of(run).keys() == weights_of(base).keys()
    else:
        config = json.loads((run / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)
    plain = encode_rows(*load_encoder(str(base), pooler, new_mlp=True), SENTENCES, progress=False)
    assert (plain - ours).abs().max() > 1e-3  # it learned something


@pytest.mark.parametrize("change", [{"mini_batch_size": 5}, {"activation_checkpointing": True}], ids=str)
def test_parts_and_checkpoints_give_the_gradients_of_one_pass(folder, tmp_path, change):  # noqa: F811
    found = []
    for number, further in enumerate(({}, change)):
        trainer = train.prepare(
            options(folder, tmp_path / str(number), train_file=folder / "pairs.jsonl", lora_r=4, **further)
        )
        if "activation_checkpointing" in further:
            trainer.model.activation_checkpointing_enable()
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:  # it starts at zero, where the gradient of the other half is zero too
                torch.nn.init.constant_(weight, 0.1)
        trainer.model.train()
        found.append(gradients(trainer, next(iter(trainer.get_train_dataloader()))))
    assert found[0][1]
    assert_same(*found)


def test_checkpoint_holds_the_adapter_and_resumes_to_the_bit(folder, tmp_path, capsys):  # noqa: F811
    steps = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "max_steps": 4}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(options(folder, whole, sts_data=folder / "sts.tsv", eval_steps=2, **steps, **LORA))
    checkpoint = whole / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resume = {"resume_from_checkpoint": checkpoint, "sts_data": folder / "sts.tsv", "eval_steps": 2}
    train.main(options(folder, parts, **resume, **steps, **LORA))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    torch.testing.assert_close(vectors_of(checkpoint), their_vectors(checkpoint), rtol=0, atol=1e-5)
    with pytest.raises(SystemExit):
        train.main(options(folder, tmp_path / "other", **resume, **steps, **{**LORA, "lora_r": 8}))
    assert "--lora_r 8 (was 4)" in capsys.readouterr().err


def test_adapter_of_peft_without_a_tokenizer_is_read(folder, tmp_path):  # noqa: F811
    base = AutoModel.from_pretrained(folder / "llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    encoder, tokenizer = load_encoder(str(tmp_path), "last")
    tokens = tokenizer(SENTENCES[:1], return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**tokens).last_hidden_state[:, -1]
        torch.testing.assert_close(encoder.eval()(**tokens), expected, rtol=0, atol=1e-5)
    save_encoder(encoder, tokenizer, tmp_path / "merged")
    assert weights_of(tmp_path / "merged").keys() == weights_of(folder / "llama").keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("weights", "has no weights"),
        ("base", "for a model that cannot be read"),
        ("config", "is damaged"),
        ("bytes", "cannot load the adapter"),
        ("itself", "is an adapter too"),
        ("model", "a model of its own"),
    ],
)
def test_spoilt_adapter_is_named(folder, tmp_path, spoil, message):  # noqa: F811
    base = AutoModel.from_pretrained(folder / "llama")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if spoil == "weights":
        (tmp_path / "adapter_model.safetensors").unlink()
    elif spoil == "bytes":
        (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    elif spoil == "model":
        base.config.save_pretrained(tmp_path)
    elif spoil == "config":
        (tmp_path / "adapter_config.json").write_text("{")
    else:
        config["base_model_name_or_path"] = str(tmp_path if spoil == "itself" else tmp_path / "gone")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(str(tmp_path), "last")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_r": -1}, "--lora_r must be"),
        ({"lora_alpha": 8}, "give its rank too"),
        ({"lora_merge": False}, "give its rank too"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha must be"),
        ({"lora_r": 4, "lora_dropout": 1.0}, "--lora_dropout must be"),
        ({"lora_r": 4, "lora_target_modules": "nobody"}, "--lora_target_modules nobody"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_refused(folder, tmp_path, change, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        train.prepare(options(folder, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_adapter_on_an_adapter_is_refused(folder, tmp_path):  # noqa: F811
    base = AutoModel.from_pretrained(folder / "llama")
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "first")
    with pytest.raises(UserError, match="is an adapter itself"):
        train.prepare(options(folder, tmp_path / "run", model_name_or_path=tmp_path / "first", **LORA))


def test_layers_are_chosen_by_name_or_all_of_them(folder, tmp_path):  # noqa: F811
    def adapted(targets):
        trainer = train.prepare(options(folder, tmp_path, lora_r=2, lora_target_modules=targets, dropout=0.1))
        names = [name for name, _ in trainer.model.named_parameters() if "lora_A" in name]
        return {name.split(".lora_A")[0].rpartition(".")[2] for name in names}

    assert adapted("k_proj, up_proj") == {"k_proj", "up_proj"}
    assert {"q_proj", "o_proj", "down_proj"} < adapted("all-linear")


def test_missing_package_is_named(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("simcse.lora.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[lora\]'"):
        train.prepare(options(folder, tmp_path, lora_r=4))
