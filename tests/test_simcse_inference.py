"""Using a model: encode, similarity, search with and without FAISS, conversion, and the command."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_simcse_model import SENTENCES, make_tiny_model
from transformers import AutoModel

from simcse import SimCSE, cli
from simcse.collator import packaged_file
from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.readers import read_table
from simcse.saved_model import save_encoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(folder / "plain")
    save_encoder(*load_encoder(str(folder / "plain"), "cls", new_mlp=True), folder / "saved")
    return folder / "saved"


@pytest.fixture(scope="module")
def model(tiny):
    return SimCSE(tiny, device="cpu")


@pytest.fixture(scope="module")
def corpus():
    return [row[0] for row in read_table(packaged_file("sentences.txt")).rows[:200]]


def test_encode_has_the_shapes_of_the_reference(model, tiny):
    vector = model.encode("Snow.")
    assert vector.shape == (32,)
    assert vector.norm().item() == pytest.approx(1)
    assert model.encode("Snow.", keepdim=True).shape == (1, 32)
    rows = model.encode(SENTENCES, return_numpy=True, normalize_to_unit=False)
    assert isinstance(rows, np.ndarray)
    theirs = SentenceTransformer(str(tiny), device="cpu").encode(SENTENCES)
    np.testing.assert_allclose(rows, theirs, rtol=0, atol=1e-6)
    long = "word " * 40
    assert torch.equal(model.encode(long, max_length=8), model.encode(long + "more", max_length=8))
    torch.testing.assert_close(model.encode(SENTENCES, batch_size=1), model.encode(SENTENCES))


def test_similarity_is_the_cosine(model):
    rows = model.encode(SENTENCES, return_numpy=True)
    np.testing.assert_allclose(model.similarity(SENTENCES[:2], SENTENCES), rows[:2] @ rows.T, atol=1e-5)
    assert model.similarity("Snow.", "Snow.") == pytest.approx(1, abs=1e-5)
    assert model.similarity("Snow.", 3 * rows).shape == (3,)


def test_search_finds_the_nearest_above_the_threshold_with_faiss_and_without(model, corpus):
    queries = ["A man is playing a guitar.", corpus[7]]
    vectors, rows = model.encode(queries, return_numpy=True), model.encode(corpus, return_numpy=True)
    answers = {}
    for use_faiss in (True, False):
        model.build_index(corpus[:150], use_faiss=use_faiss)
        model.add_to_index(corpus[150:])
        answers[use_faiss] = model.search(queries, threshold=0.3, top_k=6)
        assert model.search(corpus[7], top_k=3) == model.search([corpus[7]], top_k=3)[0]
    for query, found, other in zip(vectors, answers[True], answers[False], strict=True):
        cosines = rows @ query
        best = [i for i in np.argsort(-cosines)[:6] if cosines[i] >= 0.3]
        assert [text for text, _ in found] == [corpus[i] for i in best]
        assert [text for text, _ in other] == [text for text, _ in found]
        np.testing.assert_allclose([c for _, c in found], cosines[best], atol=1e-5)
    assert answers[True][1][0][0] == corpus[7]
    assert model.search("Snow.", threshold=1.1) == []


def test_fast_index_and_saved_index(model, corpus, tmp_path):
    model.build_index(corpus, faiss_fast=True)
    assert model.search(corpus[3])[0][0] == corpus[3]
    model.save_index(tmp_path)
    other = SimCSE("minilm", device="cpu")
    with pytest.raises(UserError, match="another model"):
        other.load_index(tmp_path)
    with pytest.raises(UserError, match="no index yet"):
        other.search("Snow.")
    model.load_index(tmp_path, use_faiss=False)
    assert model.search(corpus[3])[0][0] == corpus[3]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_checkpoint_of_the_reference_is_converted(tiny, tmp_path, form):
    from safetensors.torch import load_file, save_file

    tensors = {f"bert.{k}": v for k, v in load_file(tiny / "model.safetensors").items() if "pooler" not in k}
    torch.manual_seed(3)
    tensors |= {"mlp.dense.weight": torch.randn(32, 32) / 6, "mlp.dense.bias": torch.randn(32)}
    tensors["lm_head.bias"] = torch.zeros(5)
    source = make_tiny_model(tmp_path / "reference")
    (source / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        save_file(tensors, source / "model.safetensors")
    cli.main(["convert", "--path", str(source), "--output_dir", str(tmp_path / "out")])
    model = SimCSE(tmp_path / "out", device="cpu")
    tokens = model.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    plain = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        out = plain(**tokens)
        cls = out.last_hidden_state[:, 0]
    want = torch.tanh(cls @ tensors["mlp.dense.weight"].T + tensors["mlp.dense.bias"])
    torch.testing.assert_close(model.encode(SENTENCES, normalize_to_unit=False), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.pooler_output, want, rtol=0, atol=1e-5)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(theirs, want, rtol=0, atol=1e-5)


class Surprise:
    def __reduce__(self):
        return print, ("executed",)


def test_pickle_with_more_than_tensors_is_not_loaded(tmp_path, capsys):
    source = make_tiny_model(tmp_path / "reference")
    (source / "model.safetensors").unlink()
    torch.save({"x": Surprise()}, source / "pytorch_model.bin")
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "--path", str(source), "--output_dir", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert "executed" not in captured.out
    assert "more than tensors" in captured.err
    assert not (tmp_path / "out").exists()


def test_command_encodes_a_file(tiny, tmp_path, model, capsys):
    text = tmp_path / "s.txt"
    text.write_text("\n".join(SENTENCES))
    want = model.encode(SENTENCES, return_numpy=True)
    for name in ("v.npy", "v.parquet"):
        run = ["--model_name_or_path", str(tiny), "--input", str(text), "--output", str(tmp_path / name)]
        cli.main(["encode", *run])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), want, atol=1e-6)
    table = pq.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["sentence"] == SENTENCES
    np.testing.assert_allclose(table["embedding"], want, atol=1e-6)


def test_command_searches_and_keeps_the_index(tiny, tmp_path, capsys):
    text = tmp_path / "s.txt"
    text.write_text("\n".join(SENTENCES))
    run = ["search", "--model_name_or_path", str(tiny), "--query", "Snow.", "--index", str(tmp_path / "index")]
    cli.main([*run, "--sentences", str(text)])
    first = capsys.readouterr().out
    assert "Snow." in first
    assert "1.0000" in first
    cli.main(run)
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran"], "unknown command tran; choose from train"),
        (["encode", "--input", "x.txt"], "--output are required"),
        (["encode", "--input", "nowhere.txt", "--output", "x.npy"], "nowhere.txt"),
        (["encode", "--input", "x.txt", "--output", "x.csv"], "unsupported file type; use .npy or .parquet"),
        (["search", "--query", "x", "--sentences", "nowhere.txt"], "nowhere.txt"),
        (["search", "--query", "x"], "--sentences or --index"),
        (["convert", "--path", "nowhere", "--output_dir", "x"], "nowhere is not a checkpoint folder"),
        (["train", "--train_file", "nowhere.txt"], "nowhere.txt"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_two(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_the_commands(capsys):
    cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)
