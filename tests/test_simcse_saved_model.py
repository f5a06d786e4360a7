"""A saved folder is read by sentence-transformers and by transformers alone, with the same vectors."""

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from test_simcse_model import SENTENCES, make_tiny_model

from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.saved_model import save_encoder
from simcse.sts import encode


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("pooler", "mlp_only_train"), [("cls", False), ("cls", True), ("cls_before_pooler", False), ("avg", False)]
)
def test_sentence_transformers_gives_the_same_vectors(tiny, tmp_path, pooler, mlp_only_train):
    encoder, tokenizer = load_encoder(str(tiny), pooler, mlp_only_train, new_mlp=True)
    save_encoder(encoder, tokenizer, tmp_path, "Trained on a test.")
    ours = encode(encoder, tokenizer, SENTENCES, progress=False)
    model = SentenceTransformer(str(tmp_path), device="cpu")
    theirs = model.encode(SENTENCES, convert_to_tensor=True)
    for sentence, row in zip(SENTENCES, theirs, strict=True):
        torch.testing.assert_close(row, ours[sentence], rtol=0, atol=1e-6)
    assert model.max_seq_length == 512
    assert "Trained on a test." in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.rglob("*.bin"))


def test_folder_that_sentence_transformers_saved_is_read_with_its_pooling(tiny, tmp_path):
    for pooler in ("cls_before_pooler", "avg"):
        save_encoder(*load_encoder(str(tiny), pooler), tmp_path / pooler)
        SentenceTransformer(str(tmp_path / pooler), device="cpu").save(str(tmp_path / f"{pooler}-st"))
        (tmp_path / f"{pooler}-st" / "simcse_config.json").unlink(missing_ok=True)
        assert load_encoder(str(tmp_path / f"{pooler}-st"))[0].pooler_type == pooler
    config = tmp_path / "avg" / "1_Pooling" / "config.json"
    config.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_max_tokens": True}))
    (tmp_path / "avg" / "simcse_config.json").unlink()
    with pytest.raises(UserError, match=r"its pooling is max"):
        load_encoder(str(tmp_path / "avg"))


@pytest.mark.parametrize("pooler", ["avg_top2", "avg_first_last"])
def test_what_sentence_transformers_cannot_express_it_does_not_mean_pool(tiny, tmp_path, pooler):
    save_encoder(*load_encoder(str(tiny), pooler), tmp_path)
    assert "cannot express" in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match=r"cannot express|trust_remote_code|simcse\.layout"):
        SentenceTransformer(str(tmp_path), device="cpu")


@pytest.mark.parametrize("when", ["writing", "moving"])
def test_a_save_that_is_cut_off_leaves_the_old_model_or_none(tiny, tmp_path, when, monkeypatch):
    encoder, tokenizer = load_encoder(str(tiny), "avg")
    save_encoder(encoder, tokenizer, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "writing":
            patch.setattr(type(tokenizer), "save_pretrained", cut_off)
        else:
            replace = Path.replace
            patch.setattr(
                Path, "replace", lambda self, to: cut_off() if self.suffix == ".safetensors" else replace(self, to)
            )
        with pytest.raises(KeyboardInterrupt):
            save_encoder(encoder, tokenizer, tmp_path, "a newer card")
    assert not (tmp_path / ".unfinished-model").exists()
    if when == "writing":
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    else:
        with pytest.raises(UserError, match=r"no config\.json"):
            load_encoder(str(tmp_path))
    save_encoder(encoder, tokenizer, tmp_path)
    assert load_encoder(str(tmp_path))[0].pooler_type == "avg"
