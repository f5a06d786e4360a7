"""SentEval's transfer tasks: the accuracy of a logistic regression on the vectors of a frozen encoder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from torch import Tensor
from tqdm.auto import tqdm

from simcse.errors import UserError

SEED = 1111  # SentEval's, which decides the folds
# task → its files below the data folder: two classes, or train and test, or train, dev and test
FILES = {
    "MR": ("MR/rt-polarity.pos", "MR/rt-polarity.neg"),
    "CR": ("CR/custrev.pos", "CR/custrev.neg"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.pos", "MPQA/mpqa.neg"),
    "SST2": ("SST/binary/sentiment-train", "SST/binary/sentiment-dev", "SST/binary/sentiment-test"),
    "TREC": ("TREC/train_5500.label", "TREC/TREC_10.label"),
    "MRPC": ("MRPC/msr_paraphrase_train.txt", "MRPC/msr_paraphrase_test.txt"),
}
TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
# The values of C that are tried, where C is chosen by cross-validation on a training set, and elsewhere.
CROSS_VALIDATED_GRID = [2.0**k for k in range(-1, 6)]
GRID = [2.0**k for k in range(-2, 4)]


@dataclass
class Examples:
    """Labelled examples: of one sentence each, or of two, which is a pair."""

    sentences: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def sorted(self) -> "Examples":
        """In SentEval's order, by the sentences' numbers of words, then by label: the folds depend on it."""
        order = sorted(
            range(len(self.labels)),
            key=lambda i: (*(len(sentence.split()) for sentence in self.sentences[i]), self.labels[i]),
        )
        return Examples([self.sentences[i] for i in order], [self.labels[i] for i in order])


@dataclass
class TransferTask:
    """A task's examples by split: ``train`` alone, ``train`` and ``test``, or ``train``, ``dev`` and ``test``."""

    name: str
    splits: dict[str, Examples]

    @property
    def sentences(self) -> list[str]:
        """Every sentence of every split, repeats included."""
        return [one for split in self.splits.values() for example in split.sentences for one in example]

    @property
    def protocol(self) -> str:
        return {1: "nested cross-validation", 2: "cross-validation", 3: "dev split"}[len(self.splits)]


def files_of(folder: str | Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """The files of the tasks ``names`` in a folder of SentEval's layout; ``UserError`` names missing ones.

    The folder is SentEval's ``data/downstream`` or the ``data`` above it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"--transfer_data: the folder {folder} does not exist")
    if (root / "downstream").is_dir():
        root = root / "downstream"
    missing = [file for name in names for file in FILES[name] if not (root / file).is_file()]
    if missing:
        raise UserError(
            f"--transfer_data: {root} lacks {', '.join(missing)}; add what is missing, or choose tasks by --tasks"
        )
    return {name: [root / file for file in FILES[name]] for name in names}


def read_transfer(name: str, files: Sequence[Path], folds: int) -> TransferTask:
    """One task from its files, in the order of ``FILES``; ``folds`` is what its examples must suffice for."""
    if name in ("SST2", "TREC", "MRPC"):
        read = {"SST2": _sst, "TREC": _trec, "MRPC": _mrpc}[name]
        names = ("train", "dev", "test") if len(files) == 3 else ("train", "test")
        splits = {split: read(file).sorted() for split, file in zip(names, files, strict=True)}
    else:
        both = Examples()
        for label, file in zip((1, 0), files, strict=True):
            lines = [_words(line) for _, line in _lines(file, "latin-1")]
            both.sentences += [(line,) for line in lines]
            both.labels += [label] * len(lines)
        splits = {"train": both.sorted()}
    task = TransferTask(name, splits)
    # Each of the inner training sets, too, must be large enough to be divided.
    least = {1: folds + 2, 2: folds, 3: 1}[len(splits)]
    counts = np.unique(splits["train"].labels, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < least:
        raise UserError(
            f"{name} needs at least two classes, and {least} training examples per class for {task.protocol}; "
            f"{' and '.join(map(str, files[: 3 - len(splits)] or files))} have {', '.join(map(str, counts))}"
        )
    return task


def score_transfer(task: TransferTask, vectors: dict[str, Tensor], folds: int = 10) -> dict[str, Any]:
    """SentEval's result of one task: ``devacc``, ``acc`` (and ``f1`` for pairs) × 100, ``ndev``, ``ntest``.

    ``devacc`` is the accuracy by which C was chosen. C comes from ``folds``-fold cross-validation on the training
    set, or from the dev split. A task without a test split is itself cross-validated, and C is chosen within the
    training part of each fold.
    """
    x, y = {}, {}
    for split, examples in task.splits.items():
        x[split], y[split] = _features(examples, vectors), np.asarray(examples.labels)
    if len(task.splits) == 1:
        outer = list(_folds(x["train"], y["train"], folds))
        with _progress(task.name, len(outer) * folds * len(GRID)) as bar:
            dev, test = [], []
            for fit, held in outer:
                fit_x, fit_y = x["train"][fit], y["train"][fit]
                c, accuracy = _choose(GRID, fit_x, fit_y, _folds(fit_x, fit_y, folds), bar.update)
                predicted = _fitted(c, fit_x, fit_y).predict(x["train"][held])
                dev.append(accuracy)
                test.append(_accuracy(predicted, y["train"][held]))
        count = len(y["train"])
        return {"devacc": _mean(dev), "acc": _mean(test), "ndev": count, "ntest": count}
    if "dev" in task.splits:
        grid, count = GRID, len(y["train"])
        all_x, all_y = np.concatenate([x["train"], x["dev"]]), np.concatenate([y["train"], y["dev"]])
        splits = iter([(np.arange(count), np.arange(count, len(all_y)))])
        steps = len(grid)
    else:
        grid, all_x, all_y = CROSS_VALIDATED_GRID, x["train"], y["train"]
        splits = _folds(all_x, all_y, folds)
        steps = folds * len(grid)
    with _progress(task.name, steps) as bar:
        c, accuracy = _choose(grid, all_x, all_y, splits, bar.update)
    predicted = _fitted(c, x["train"], y["train"]).predict(x["test"])
    result = {
        "devacc": accuracy,
        "acc": _accuracy(predicted, y["test"]),
        "ndev": len(y["dev"] if "dev" in y else y["train"]),
        "ntest": len(y["test"]),
    }
    if len(task.splits["train"].sentences[0]) == 2:
        result["f1"] = round(100 * float(f1_score(y["test"], predicted)), 2)
    return result


def _features(examples: Examples, vectors: dict[str, Tensor]) -> np.ndarray:
    """(N, D) for sentences u; (N, 2D) for pairs: |u − v| beside u ⊙ v. float64, which the solver works in."""
    sides = [
        np.stack([vectors[sentence].numpy() for sentence in side]).astype(np.float64)
        for side in zip(*examples.sentences, strict=True)
    ]
    return sides[0] if len(sides) == 1 else np.hstack([np.abs(sides[0] - sides[1]), sides[0] * sides[1]])


def _folds(x: np.ndarray, y: np.ndarray, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return StratifiedKFold(count, shuffle=True, random_state=SEED).split(x, y)


def _choose(
    grid: list[float],
    x: np.ndarray,
    y: np.ndarray,
    splits: Iterator[tuple[np.ndarray, np.ndarray]],
    advance: Callable[[], object],
) -> tuple[float, float]:
    """The C with the best mean accuracy over ``splits``, and that accuracy × 100; of equal ones the smallest C."""
    accuracies = []
    for fit, held in splits:
        model, row = _model(grid[0], warm_start=True), []  # each C starts from the weights of the one before
        for c in grid:
            model.set_params(C=c).fit(x[fit], y[fit])
            row.append(model.score(x[held], y[held]))
            advance()
        accuracies.append(row)
    means = np.round(100 * np.mean(accuracies, axis=0), 2)  # SentEval compares two decimals
    best = int(means.argmax())
    return grid[best], float(means[best])


def _model(c: float, warm_start: bool = False) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000, warm_start=warm_start)


def _fitted(c: float, x: np.ndarray, y: np.ndarray) -> LogisticRegression:
    return _model(c).fit(x, y)


def _accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return round(100 * float(np.mean(predicted == labels)), 2)


def _mean(values: list[float]) -> float:
    return round(float(np.mean(values)), 2)


def _progress(name: str, steps: int) -> tqdm:
    return tqdm(total=steps, desc=name, unit="fit", leave=False, disable=None)  # None: on terminals only


def _lines(file: Path, encoding: str) -> list[tuple[int, str]]:
    """A file's lines with their numbers, from 1; not cut at the further characters that ``splitlines`` takes."""
    try:
        with file.open(encoding=encoding) as opened:
            lines = [(number, line.rstrip("\n")) for number, line in enumerate(opened, 1)]
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8 ({error.reason}); save it as UTF-8") from None
    if not lines:
        raise UserError(f"{file} is empty")
    return lines


def _words(text: str) -> str:
    return " ".join(text.split())


def _sst(file: Path) -> Examples:
    result = Examples()
    for number, line in _lines(file, "utf-8"):
        text, _, label = line.strip().partition("\t")
        if label not in ("0", "1"):
            raise UserError(f"{file}, line {number}: a sentence, a tab and the label 0 or 1 are expected")
        result.sentences.append((_words(text),))
        result.labels.append(int(label))
    return result


def _trec(file: Path) -> Examples:
    result = Examples()
    for number, line in _lines(file, "latin-1"):
        label, _, rest = line.strip().partition(":")
        _, _, text = rest.partition(" ")
        if label not in TREC_CLASSES or not text:
            raise UserError(
                f"{file}, line {number}: CLASS:subclass and a question are expected, the class one of "
                f"{', '.join(TREC_CLASSES)}"
            )
        result.sentences.append((_words(text),))
        result.labels.append(TREC_CLASSES.index(label))
    return result


def _mrpc(file: Path) -> Examples:
    result = Examples()
    for number, line in _lines(file, "utf-8")[1:]:  # below the header
        cells = line.strip().split("\t")
        if len(cells) != 5 or cells[0] not in ("0", "1"):
            raise UserError(
                f"{file}, line {number}: five cells between tabs are expected, Quality (0 or 1), two ids and "
                "two sentences"
            )
        result.sentences.append((_words(cells[3]), _words(cells[4])))
        result.labels.append(int(cells[0]))
    if not result.labels:
        raise UserError(f"{file} has a header, but no pair below it")
    return result
