"""The evaluation: the file of graded pairs, the 'all' setting, and the reference points."""

import csv
import json
import math
import os
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from test_simcse_model import make_tiny_model

from simcse import evaluate
from simcse.errors import UserError
from simcse.model import load_encoder
from simcse.sts import COLUMNS, Pairs, cone, encode, geometry, read_sts, read_sts_source, spearman, watched_pairs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def write_sts(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return path


def at_angle(degrees):
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


ROWS = [
    ("STS12", "one", "test", 5.0, "a", "b"),
    ("STS12", "one", "test", 3.0, "a", "c"),
    ("STS12", "one", "test", 4.0, "c", "d"),
    ("STSB", "x", "dev", 1.0, "a", "d"),
    ("STS12", "two", "test", 1.0, "b", "d"),
    ("STS12", "two", "test", 2.0, "b", "c"),
    ("STSB", "x", "dev", 4.5, "a", "b"),
]
VECTORS = {"a": at_angle(0), "b": at_angle(35) * 3, "c": at_angle(50) * 0.1, "d": at_angle(90)}


def test_subsets_are_concatenated_into_one_spearman(tmp_path):
    sts12, stsb = read_sts(write_sts(tmp_path / "sts.tsv", ROWS))
    assert (sts12.name, stsb.name) == ("STS12", "STSB-dev")
    assert len(sts12.scores) == 5
    cosines = [math.cos(math.radians(angle)) for angle in (35, 50, 40, 55, 15)]
    together = 100 * spearmanr(cosines, [5, 3, 4, 1, 2]).statistic
    assert spearman(sts12, VECTORS) == pytest.approx(together, abs=1e-6)
    apart = [spearmanr(cosines[:3], [5, 3, 4]).statistic, spearmanr(cosines[3:], [1, 2]).statistic]
    assert together != pytest.approx(50 * sum(apart), abs=1)


def test_correlation_that_is_undefined_is_nan_without_a_warning(recwarn):
    same = Pairs("t", "dev", ["a", "c"], ["b", "d"], [3.0, 3.0])
    assert math.isnan(spearman(same, VECTORS))
    assert math.isnan(spearman(Pairs("t", "dev", ["a"], ["b"], [1.0]), VECTORS))
    assert not recwarn.list


def test_alignment_takes_pairs_above_four_and_uniformity_every_sentence():
    pairs = Pairs("t", "dev", ["a", "a", "c"], ["b", "d", "d"], [4.1, 4.0, 0.0])
    measured = geometry(pairs, VECTORS)
    assert measured["alignment"] == pytest.approx(2 - 2 * math.cos(math.radians(35)), rel=1e-4)
    angles = [0, 0, 50, 35, 90, 90]  # repeats count
    distances = [2 - 2 * math.cos(math.radians(angles[j] - angles[i])) for i in range(6) for j in range(i + 1, 6)]
    by_hand = math.log(sum(math.exp(-2 * d) for d in distances) / len(distances))
    assert measured["uniformity"] == pytest.approx(by_hand, rel=1e-4)
    assert "alignment" not in geometry(Pairs("t", "dev", ["a"], ["b"], [4.0]), VECTORS)


def test_anisotropy_takes_every_sentence_with_its_repeats():
    pairs = Pairs("t", "dev", ["a", "a", "c"], ["b", "d", "d"], [4.1, 4.0, 0.0])
    angles = [0, 0, 50, 35, 90, 90]
    cosines = [math.cos(math.radians(b - a)) for a, b in combinations(angles, 2)]
    measured = cone(pairs, VECTORS)
    assert measured["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)
    assert 1 < measured["effective_rank"] < 2  # the vectors lie in a plane
    same = cone(Pairs("t", "dev", ["a"], ["a"], [4.0]), VECTORS)
    assert (same["mean_cosine"], same["effective_rank"]) == (pytest.approx(1), pytest.approx(1))


def test_watched_are_the_dev_rows_of_stsb_else_of_the_first_task(tmp_path):
    rows = [("demo", "d", "dev", 1, "a", "b"), *ROWS]
    tasks = read_sts(write_sts(tmp_path / "sts.tsv", rows))
    assert watched_pairs(tasks).name == "STSB-dev"
    assert watched_pairs([pairs for pairs in tasks if pairs.task != "STSB"]).name == "demo-dev"
    assert watched_pairs([pairs for pairs in tasks if pairs.split == "test"]) is None


def test_cells_are_quoted_as_csv_does(tmp_path):
    hard = 'He said "yes",\tand "no".'
    (pairs,) = read_sts(write_sts(tmp_path / "sts.tsv", [("t", "s", "dev", 1, hard, "'plain'")]))
    assert (pairs.first, pairs.second) == ([hard], ["'plain'"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task\tscore\nSTSB\t1\n", "lacks the columns subset, split, sentence1, sentence2"),
        ("", "lacks the columns"),
        ("\t".join(COLUMNS) + "\n", "holds no pair"),
        ("\t".join(COLUMNS) + "\nSTSB\tx\tdev\tgood\ta\tb\n", r"line 2: the score is 'good'"),
        ("\t".join(COLUMNS) + "\nSTSB\tx\tdev\tnan\ta\tb\n", r"line 2: the score is 'nan'"),
        ("\t".join(COLUMNS) + "\nSTSB\tx\tdev\t1\ta\n", r"line 2: 5 tab-separated cells; the header has 6"),
        ("\t".join(COLUMNS) + '\nSTSB\tx\tdev\t1\t"a" b\tc\n', r"line 2: .*quote it as Python's csv does"),
    ],
)
def test_what_is_not_an_sts_file_is_named(tmp_path, text, message):
    path = tmp_path / "sts.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_sts(path)
    assert "sts.tsv" in str(caught.value)


def test_evaluation_cuts_only_at_the_models_own_limit(tiny):
    encoder, tokenizer = load_encoder(str(tiny), "avg")
    long = "word " * 505
    vectors = encode(encoder, tokenizer, [long + "snow", long + "fire", "word " * 600], progress=False)
    assert len(tokenizer(long + "snow")["input_ids"]) == 508
    assert not torch.allclose(vectors[long + "snow"], vectors[long + "fire"], rtol=0, atol=1e-7)
    assert all(vector.isfinite().all() for vector in vectors.values())


def test_vectors_do_not_depend_on_the_batch_and_dropout_is_off(tiny):
    encoder, tokenizer = load_encoder(str(tiny), "avg")
    encoder.train()
    sentences = ["a", "a b c d e f", "the cat sat on the mat", "a"]
    together = encode(encoder, tokenizer, sentences, batch_size=8, progress=False)
    alone = encode(encoder, tokenizer, sentences, batch_size=1, progress=False)
    assert set(together) == set(sentences)
    for sentence in sentences:
        torch.testing.assert_close(together[sentence], alone[sentence])
    assert encoder.training  # as it was


def test_command_prints_a_table_and_writes_flat_json(tiny, tmp_path, capsys):
    words = {"a": "snow", "b": "rain", "c": "a man plays", "d": "a woman sings"}
    rows = [(*row[:4], words[row[4]], words[row[5]]) for row in ROWS]
    sts = write_sts(tmp_path / "sts.tsv", [*rows, ("SICKR", "s", "test", 1, "snow", "rain")])
    out = tmp_path / "scores.json"
    evaluate.main(["--model_name_or_path", str(tiny), "--sts_data", str(sts), "--output_json", str(out)])
    scores = json.loads(out.read_text())
    assert list(scores) == ["STS12", "STSB-dev", "SICKR", "alignment", "uniformity"]
    assert scores["SICKR"] is None  # one pair has no correlation, and JSON no NaN
    printed = capsys.readouterr().out
    assert f"{scores['STS12']:.2f}" in printed
    assert "avg" in printed  # which pooler it was
    assert (
        len(re.findall(r"STSB-dev: mean cosine 0\.\d{4}, .*effective rank \d+\.\d in 32 features", printed)) == 1
    )

    encoder, tokenizer = load_encoder(str(tiny), "avg")
    pairs = read_sts(sts)[0]
    vectors = encode(encoder, tokenizer, pairs.sentences, progress=False)
    assert scores["STS12"] == pytest.approx(spearman(pairs, vectors), abs=1e-3)


def test_command_takes_folders_and_modes_and_writes_markdown_and_plots(tiny, tmp_path, capsys):
    words = dict(zip("abcd", ("snow", "rain", "a man plays", "a woman sings"), strict=True))
    rows = [(*row[:4], words[row[4]], words[row[5]]) for row in ROWS]
    (tmp_path / "data").mkdir()
    write_sts(tmp_path / "data" / "one.tsv", rows)
    write_sts(
        tmp_path / "data" / "two.tsv", [("SICKR", "s", "trial", i, "snow", words[w]) for i, w in enumerate("bcd")]
    )
    scores = {}
    for mode in ("dev", "test"):
        output = tmp_path / f"{mode}.json"
        run = [
            "--model_name_or_path",
            str(tiny),
            "--sts_data",
            str(tmp_path / "data"),
            "--output_json",
            str(output),
        ]
        run += ["--output_md", str(tmp_path / "scores.md"), "--plots", str(tmp_path / "plots"), "--mode", mode]
        evaluate.main(run)
        scores[mode] = set(json.loads(output.read_text())) - {"alignment", "uniformity"}
    assert scores == {"dev": {"STSB-dev", "SICKR-trial"}, "test": {"STS12"}}
    assert "| STS12 | 5 |" in (tmp_path / "scores.md").read_text()
    for name in ("cosine_densities", "singular_values", "alignment_uniformity"):
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_sets_of_the_hub_are_read_as_mteb_has_them(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, 2.0]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"validation": rows, "test": rows, "train": rows})
    assert [pairs.name for pairs in read_sts_source("mteb/stsbenchmark-sts")] == ["STSB-dev", "STSB"]
    assert len(read_sts_source("mteb")) == 14
    monkeypatch.setattr(datasets, "load_dataset", lambda name: 1 / 0)
    with pytest.raises(UserError, match=r"cannot fetch mteb/sts12-sts .*--sts_data"):
        read_sts_source("mteb")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sts_data", "nowhere.tsv"], "nowhere.tsv"),
        (["--model_name_or_path", "./nowhere"], "the model folder ./nowhere does not exist"),
        (["--pooler", "median"], "median"),
        (["--poler", "avg"], "--pooler"),
        (["--output_json", "nowhere/scores.json"], "nowhere"),
        (["--batch_size", "0"], "batch_size"),
    ],
)
def test_command_names_what_is_wrong_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.data
@pytest.mark.skipif("SIMCSE_DATA" not in os.environ, reason="SIMCSE_DATA is not set")
@pytest.mark.parametrize(
    ("pooler", "score", "alignment", "uniformity"),
    [("avg", 86.72, 0.2360, -3.8408), ("cls_before_pooler", 79.73, 0.1017, -1.7441)],
)
def test_reference_points_on_sts_b_dev(pooler, score, alignment, uniformity):
    pairs = watched_pairs(read_sts(Path(os.environ["SIMCSE_DATA"]) / "sts_eval.tsv"))
    vectors = encode(*load_encoder("minilm", pooler), pairs.sentences, progress=False)
    assert pairs.name == "STSB-dev"
    assert spearman(pairs, vectors) == pytest.approx(score, abs=0.05)
    measured = geometry(pairs, vectors)
    assert measured["alignment"] == pytest.approx(alignment, abs=5e-4)
    assert measured["uniformity"] == pytest.approx(uniformity, abs=5e-4)
