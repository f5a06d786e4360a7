"""The tables and files of ``simcse evaluate``."""

import json
import math
from pathlib import Path
from typing import Any

from simcse.files import write_text
from simcse.sts import Pairs

# The columns of the reference's tables. Its names of two STS tasks differ from those in the data.
STS_TASKS = {
    **{f"STS{year}": f"STS{year}" for year in range(12, 17)},
    "STSB": "STSBenchmark",
    "SICKR": "SICKRelatedness",
}
TRANSFER_TASKS = ("MR", "CR", "SUBJ", "MPQA", "SST2", "TREC", "MRPC")


def sts_rows(tasks: list[Pairs], measured: dict[str, Any]) -> list[tuple[str, ...]]:
    """The three aggregates are shown where a task has several subsets; otherwise they are the same number."""
    rows: list[tuple[str, ...]] = [
        ("task", "pairs", "Spearman × 100", "mean", "wmean", "Pearson × 100", "mean", "wmean")
    ]
    for pairs in tasks:
        cells = [
            f"{value:.2f}" if kind == "all" or len(measured[pairs.name]["subsets"]) > 1 else ""
            for measure in ("spearman", "pearson")
            for kind, value in measured[pairs.name]["all"][measure].items()
        ]
        rows.append((pairs.name, f"{len(pairs.scores):,}", *cells))
    tests = [measured[pairs.name]["all"] for pairs in tasks if pairs.split == "test"]
    if len(tests) > 1:
        means = [
            f"{sum(test[measure][kind] for test in tests) / len(tests):.2f}"
            for measure in ("spearman", "pearson")
            for kind in ("all", "mean", "wmean")
        ]
        rows.append(("mean of test splits", "", *means))
    return rows


def transfer_rows(tasks: list[Any], results: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("task", "protocol", "test examples", "dev accuracy", "test accuracy", "F1")]
    for task in tasks:
        result = results[task.name]
        f1 = f"{result['f1']:.2f}" if "f1" in result else ""
        accuracies = (f"{result['devacc']:.2f}", f"{result['acc']:.2f}", f1)
        rows.append((task.name, task.protocol, f"{result['ntest']:,}", *accuracies))
    return rows


def add_row_of_averages(
    tables: list[list[tuple[str, ...]]], notes: list[str], names: dict[str, str], scores: dict[str, float]
) -> None:
    """The reference's table: a column for each task (title → name in ``scores``), and their average."""
    there = {title: scores[name] for title, name in names.items() if name in scores}
    if len(there) < 2:
        return
    average = sum(there.values()) / len(there)
    tables.append([(*there, "Avg."), (*(f"{value:.2f}" for value in there.values()), f"{average:.2f}")])
    absent = [title for title in names if title not in there]
    if absent:
        notes.append(f"Avg. is that of {', '.join(there)}; {', '.join(absent)} were not scored")


def write_json(name: str, values: dict[str, Any]) -> None:
    write_text(Path(name).expanduser(), json.dumps(_numbers(values), indent=2) + "\n")


def _numbers(value: Any) -> Any:
    """Floats with four decimals; null for NaN, which JSON lacks, where a correlation is undefined."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 4)
    return value
