"""SentEval's transfer tasks: its files, its protocols against scikit-learn by hand, and the command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from test_simcse_model import make_tiny_model

from simcse import evaluate, transfer
from simcse.errors import UserError
from simcse.sts import Pairs, correlations
from simcse.transfer import FILES, TREC_CLASSES, Examples, TransferTask, files_of, read_transfer, score_transfer

THINGS = ["film", "book", "song", "meal", "hotel", "phone", "camera", "car", "game", "play", "show", "tale"]
GOOD = "a lovely {} that i enjoyed\nwhat a great and warm {}\nthe {} is a joy\n"
BAD = "a dull {} that i regret\nwhat a bad and cold {}\nthe {} is a bore\n"


def sentences(pattern, things=THINGS):
    return [line for thing in things for line in pattern.format(*[thing] * 3).splitlines()]


def write(path: Path, lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All seven tasks, small, of two kinds of sentences that tell themselves apart."""
    root = tmp_path_factory.mktemp("senteval")
    good, bad = sentences(GOOD, THINGS[:5]), sentences(BAD, THINGS[:5])
    for name in ("MR", "CR", "SUBJ", "MPQA"):
        for file, lines in zip(FILES[name], (good, bad), strict=True):
            write(root / file, lines, "latin-1")
    labelled = [f"{line}\t1" for line in good] + [f"{line}\t0" for line in bad]
    for file in FILES["SST2"]:
        write(root / file, labelled)
    questions = [f"{name}:some {name.lower()} question about a {t} ?" for name in TREC_CLASSES for t in THINGS]
    write(root / FILES["TREC"][0], questions, "latin-1")
    write(root / FILES["TREC"][1], questions[::5], "latin-1")
    pairs = [f"1\t1\t2\t{one}\t{one} !" for one in good] + [
        f"0\t1\t2\t{one}\t{other}" for one, other in zip(good, bad, strict=True)
    ]
    for file in FILES["MRPC"]:
        write(root / file, ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", *pairs])
    return root


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def random_task(split_sizes, classes=2, width=1, seed=0):
    """A task with noisy labels, and vectors for its sentences."""
    random = np.random.default_rng(seed)
    splits, vectors = {}, {}
    for split, size in split_sizes.items():
        examples = Examples()
        for i in range(size):
            names = tuple(f"{split} {i} {side} " + "word " * random.integers(5) for side in range(width))
            label = i % classes
            for name in names:
                vector = random.normal(size=4) + 0.7 * label * np.ones(4)
                vectors[name] = torch.tensor(vector, dtype=torch.float32)
            examples.sentences.append(names)
            examples.labels.append(label)
        splits[split] = examples.sorted()
    return TransferTask("T", splits), vectors


def matrix(examples, vectors):
    return np.stack([vectors[one].double().numpy() for (one,) in examples.sentences]), np.array(examples.labels)


def folds(x, y, count=3):
    return StratifiedKFold(count, shuffle=True, random_state=1111).split(x, y)


def accuracy(c, x, y, test_x, test_y):
    return LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(x, y).score(test_x, test_y)


def best(grid, x, y):
    means = [np.mean([accuracy(c, x[a], y[a], x[b], y[b]) for a, b in folds(x, y)]) for c in grid]
    return grid[int(np.argmax(np.round(means, 4)))], 100 * max(means)


def test_task_without_a_test_split_is_cross_validated_with_an_inner_choice_of_c():
    task, vectors = random_task({"train": 80})
    x, y = matrix(task.splits["train"], vectors)
    dev, test = [], []
    for fit, held in folds(x, y):
        c, chosen = best([0.25, 0.5, 1, 2, 4, 8], x[fit], y[fit])
        dev.append(chosen)
        test.append(100 * accuracy(c, x[fit], y[fit], x[held], y[held]))
    result = score_transfer(task, vectors, folds=3)
    assert result["acc"] == pytest.approx(np.mean(test), abs=0.02)
    assert result["devacc"] == pytest.approx(np.mean(dev), abs=0.02)
    assert (result["ndev"], result["ntest"]) == (80, 80)
    assert 55 < result["acc"] < 95  # so that another choice would show
    assert score_transfer(task, vectors, folds=3) == result


def test_task_with_a_test_split_chooses_c_by_cross_validation_on_the_training_set():
    task, vectors = random_task({"train": 90, "test": 60}, classes=3)
    (x, y), (test_x, test_y) = (matrix(task.splits[split], vectors) for split in ("train", "test"))
    c, chosen = best([0.5, 1, 2, 4, 8, 16, 32], x, y)
    result = score_transfer(task, vectors, folds=3)
    assert result["acc"] == pytest.approx(100 * accuracy(c, x, y, test_x, test_y), abs=0.01)
    assert result["devacc"] == pytest.approx(chosen, abs=0.01)
    assert (result["ndev"], result["ntest"]) == (90, 60)
    assert "f1" not in result


def test_task_with_a_dev_split_chooses_c_on_it():
    task, vectors = random_task({"train": 60, "dev": 40, "test": 50}, seed=3)
    data = {split: matrix(examples, vectors) for split, examples in task.splits.items()}
    grid = [0.25, 0.5, 1, 2, 4, 8]
    dev = [accuracy(c, *data["train"], *data["dev"]) for c in grid]
    result = score_transfer(task, vectors)
    assert result["devacc"] == pytest.approx(100 * max(dev), abs=0.01)
    want = accuracy(grid[int(np.argmax(dev))], *data["train"], *data["test"])
    assert result["acc"] == pytest.approx(100 * want, abs=0.01)
    assert (result["ndev"], result["ntest"]) == (40, 50)


def test_pairs_are_told_apart_by_difference_and_product_with_f1_of_the_paraphrases():
    task, vectors = random_task({"train": 60, "test": 40}, width=2, seed=5)
    features = {}
    for split, examples in task.splits.items():
        u, v = (np.stack([vectors[pair[i]].double().numpy() for pair in examples.sentences]) for i in (0, 1))
        features[split] = np.concatenate([abs(u - v), u * v], axis=1), np.array(examples.labels)
    c, _ = best([0.5, 1, 2, 4, 8, 16, 32], *features["train"])
    test_x, test_y = features["test"]
    predicted = LogisticRegression(C=c, max_iter=1000, tol=1e-6).fit(*features["train"]).predict(test_x)
    hits = ((predicted == 1) & (test_y == 1)).sum()
    result = score_transfer(task, vectors, folds=3)
    assert result["acc"] == pytest.approx(100 * np.mean(predicted == test_y), abs=0.01)
    assert result["f1"] == pytest.approx(200 * hits / ((predicted == 1).sum() + (test_y == 1).sum()), abs=0.01)


def test_files_are_read_as_senteval_has_them(tmp_path):
    # latin-1, in which byte 0x85 does not end a line; runs of blanks are one
    (tmp_path / "pos").write_bytes(b"caf\xe9  is\tgood\n" + b"one \x85 line\n" * 12)
    (tmp_path / "neg").write_bytes(b"bad\n" * 12)
    mr = read_transfer("MR", [tmp_path / "pos", tmp_path / "neg"], folds=10)
    train = mr.splits["train"]
    assert dict(zip(train.sentences, train.labels, strict=True))[("café is good",)] == 1
    assert (train.labels.count(1), train.labels.count(0)) == (13, 12)
    assert train.sentences[0] == ("bad",)  # by length

    write(tmp_path / "train", [f"{name}:x What : is it ?" for name in TREC_CLASSES], "latin-1")
    trec = read_transfer("TREC", [tmp_path / "train"] * 2, folds=1)
    assert trec.splits["test"].labels == [0, 1, 2, 3, 4, 5]
    assert trec.splits["train"].sentences[0] == ("What : is it ?",)

    write(tmp_path / "sst", ["so « good »\t1", "bad\t0"])
    sst = read_transfer("SST2", [tmp_path / "sst"] * 3, folds=10)
    assert list(sst.splits) == ["train", "dev", "test"]
    assert sst.splits["dev"].sentences == [("bad",), ("so « good »",)]

    rows = ["\ufeffQuality\tid\tid\ta\tb", '1\t7\t8\tHe said "yes\tYes', "0\t7\t8\tNo\tOther words"]
    write(tmp_path / "mrpc", rows)
    mrpc = read_transfer("MRPC", [tmp_path / "mrpc"] * 2, folds=1)
    assert mrpc.splits["train"].sentences == [("No", "Other words"), ('He said "yes', "Yes")]
    assert mrpc.splits["train"].labels == [0, 1]


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("SST2", b"good\t1\nbad 0\n", "line 2: a sentence, a tab and the label"),
        ("SST2", b"good\t1\nbad\t2\n", "line 2: .* label 0 or 1"),
        ("SST2", b"good\t1\n\xff\t0\n", "UTF-8"),
        ("SST2", b"good\t1\nfine\t1\n", "SST2 needs at least two classes"),
        ("TREC", b"HUM:x Who ?\nWHO:x Who ?\n", "line 2: CLASS:subclass and a question"),
        ("TREC", b"HUM:x\n", "line 1: CLASS:subclass"),
        ("MRPC", b"Quality\n1\t2\t3\ta\n", "line 2: five cells"),
        ("MRPC", b"Quality\n", "no pair below"),
        ("MR", b"", "is empty"),
        ("MR", b"good\n" * 11, "12 training examples per class"),
        ("TREC", b"HUM:x Who ?\n" * 9 + b"LOC:x Where ?\n" * 10, "10 training examples per class"),
    ],
)
def test_what_a_file_lacks_is_named(tmp_path, task, content, message):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_transfer(task, [tmp_path / "data"] * len(FILES[task]), folds=10)
    assert str(tmp_path / "data") in str(caught.value)


def test_missing_files_are_named_together(folder, tmp_path):
    with pytest.raises(UserError, match=r"lacks MR/rt-polarity.pos, MR/rt-polarity.neg, TREC/train_5500.label"):
        files_of(tmp_path, ["MR", "TREC"])
    (tmp_path / "downstream").symlink_to(folder)
    assert files_of(tmp_path, ["CR"])["CR"][0].read_bytes() == (folder / "CR/custrev.pos").read_bytes()


@pytest.fixture
def one_c(monkeypatch):
    """The commands below try one C only, to be quick; how C is chosen is shown above."""
    monkeypatch.setattr(transfer, "GRID", [8.0])
    monkeypatch.setattr(transfer, "CROSS_VALIDATED_GRID", [1.0])


def run(tiny, *arguments):
    evaluate.main(["--model_name_or_path", str(tiny), "--mode", "fasttest", *map(str, arguments)])


def test_command_prints_one_row_in_the_references_order(tiny, folder, one_c, tmp_path, capsys):
    out, details, page = (tmp_path / name for name in ("scores.json", "details.json", "scores.md"))
    outputs = ("--output_json", out, "--details_json", details, "--output_md", page)
    run(tiny, "--task_set", "transfer", "--transfer_data", folder, *outputs)
    captured = capsys.readouterr()
    scores, measured = json.loads(out.read_text()), json.loads(details.read_text())
    order = ["MR", "CR", "SUBJ", "MPQA", "SST2", "TREC", "MRPC"]
    assert list(scores) == list(measured) == order
    lines = captured.out.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == [*order, "Avg."])
    average = sum(scores.values()) / 7
    assert lines[head + 2].split() == [f"{scores[name]:.2f}" for name in order] + [f"{average:.2f}"]
    assert f"| {' | '.join(order)} | Avg. |" in page.read_text()
    assert measured["MRPC"]["acc"] == scores["MRPC"]
    assert set(measured["MRPC"]) == {"devacc", "acc", "ndev", "ntest", "f1"}
    assert all(scores[name] > 75 for name in ("MR", "SST2", "TREC"))  # the classes differ by their words
    assert captured.err == ""  # progress bars are for terminals


def test_command_takes_tasks_by_name_and_mixes_both_kinds(tiny, folder, one_c, tmp_path, capsys):
    out = tmp_path / "scores.json"
    data = ("--transfer_data", folder, "--output_json", out)
    run(tiny, "--tasks", "CR", "MR", *data)
    assert list(json.loads(out.read_text())) == ["MR", "CR"]
    assert "SUBJ, MPQA, SST2, TREC, MRPC were not scored" in capsys.readouterr().out
    run(tiny, "--task_set", "na", "--tasks", "MR", "demo", *data, "--mode", "dev")
    scores = json.loads(out.read_text())
    assert list(scores) == ["demo-dev", "alignment", "uniformity", "MR"]
    details = tmp_path / "details.json"
    run(tiny, "--tasks", "MR", *data, "--mode", "dev", "--details_json", details)
    assert json.loads(out.read_text())["MR"] == json.loads(details.read_text())["MR"]["devacc"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task_set", "transfer"], "--transfer_data is required for MR, CR"),
        (["--tasks", "MR"], "--transfer_data is required for MR:"),
        (["--task_set", "transfer", "--transfer_data", "nowhere"], "the folder nowhere does not exist"),
        (["--task_set", "full", "--transfer_data", "."], "lacks MR/rt-polarity.pos"),
        (["--task_set", "na"], "--tasks"),
        (["--task_set", "sts", "--tasks", "STS12"], "exclude each other"),
        (["--tasks", "STS12"], "not STS12"),
        (["--tasks", "mr", "demo"], "not mr; transfer tasks are MR, CR"),
        (["--task_set", "transfer", "--transfer_data", ".", "--plots", "x"], "--plots"),
        (["--details_json", "nowhere/x.json"], "the folder nowhere does not exist"),
        (["--output_json", "x.json", "--details_json", "x.json"], "name the same file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_before_the_model_is_loaded(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_encoder", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as ended:
        evaluate.main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def at_angle(degrees):
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def test_aggregates_are_sentevals():
    vectors = {str(angle): at_angle(angle) for angle in range(0, 90, 5)}
    one = [(5, 5.0), (40, 3.0), (20, 2.0), (80, 1.0)]  # angle between the two, grade
    two = [(15, 1.0), (30, 5.0), (60, 2.0)]
    angles, grades = zip(*one, *two, strict=True)
    pairs = Pairs("T", "test", ["0"] * 7, [str(a) for a in angles], list(grades), ["one"] * 4 + ["two"] * 3)
    cosine = np.cos(np.radians(angles))
    rank = lambda values: np.argsort(np.argsort(values))  # noqa: E731
    measured = correlations(pairs, vectors)
    for measure, of in (("spearman", rank), ("pearson", np.asarray)):
        first, second = (
            100 * np.corrcoef(of(cosine[part]), of(np.array(grades)[part]))[0, 1]
            for part in (slice(4), slice(4, 7))
        )
        values = measured["all"][measure]
        assert values["mean"] == pytest.approx((first + second) / 2, abs=1e-4)
        assert values["wmean"] == pytest.approx((4 * first + 3 * second) / 7, abs=1e-4)
        assert measured["subsets"]["one"][measure] == pytest.approx(first, abs=1e-4)
        assert values["all"] != pytest.approx(values["mean"], abs=1)
    assert measured["all"]["pearson"]["all"] == pytest.approx(100 * np.corrcoef(cosine, grades)[0, 1], abs=1e-4)
    assert [subset["nsamples"] for subset in measured["subsets"].values()] == [4, 3]


def test_sts_table_has_the_references_columns(tiny, tmp_path, capsys):
    names = {"STS12": "STS12", "SICKR": "SICKRelatedness", "STSB": "STSBenchmark"}
    words = ["snow", "rain", "a man plays", "a woman sings"]
    lines = ["\t".join(("task", "subset", "split", "score", "sentence1", "sentence2"))]
    lines += [f"{task}\ts\ttest\t{i}\tice\t{word}" for task in names for i, word in enumerate(words)]
    write(tmp_path / "sts.tsv", lines)
    out = tmp_path / "scores.json"
    chosen = ("--tasks", "SICKRelatedness", "STSBenchmark", "STS12")
    run(tiny, "--sts_data", tmp_path / "sts.tsv", *chosen, "--output_json", out)
    printed, scores = capsys.readouterr().out, json.loads(out.read_text())
    lines = [line.split() for line in printed.splitlines()]
    row = lines[lines.index(["STS12", "STSBenchmark", "SICKRelatedness", "Avg."]) + 2]
    values = [scores[name] for name in ("STS12", "STSB", "SICKR")]
    assert row == [f"{value:.2f}" for value in [*values, sum(values) / 3]]
    assert "Pearson × 100" in printed
    assert "STS13, STS14, STS15, STS16 were not scored" in printed
