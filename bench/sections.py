"""From the rows of results to sections, which the terminal, ``report.md`` and other pages show."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench import charts, tables
from bench.floor import COPY, FLOOR
from bench.render import Section, number
from bench.results import Document
from bench.tables import by_case, measured, ms, multiple


def make(documents: dict[str, Document]) -> Iterator[Section]:
    """Yields every section that there are results for."""
    for job, sections in SECTIONS.items():
        if job in documents:
            yield from sections(documents[job])


def _loss(document: Document) -> Iterator[Section]:
    rows = document["rows"]
    small = [row for case, found in by_case(rows).items() if "τ" in case.label for row in found.values()]
    usual = tables.ratios(row for row in rows if row not in small)
    note = (
        "\nThe floor is the bare matrix products of the same shapes and dtype; below 1× ours is faster. An entry "
        "is one of the N·(N + M + H) similarities.\n"
    )
    chart = charts.time_by_size(document)
    yield Section("Time of ours, forward and backward", usual, chart, note + tables.disturbed(rows), "time")
    if small:
        yield Section("Time of ours at small temperatures", tables.ratios(small), name="temperatures")
    bounds = {
        "floor, ms": lambda found: number(measured(found, FLOOR, ms) or 0),
        "a copy": lambda found: multiple(measured(found, COPY, ms), measured(found, FLOOR, ms)) or "–",
    }
    table = tables.matrix("loss", "× floor", rows, bounds)
    chart = charts.share_by_features(document)
    yield Section("Every candidate as a multiple of the floor", table, chart, name="floor")


def _memory(document: Document) -> Iterator[Section]:
    table = tables.matrix("memory", "MiB", document["rows"])
    for line, found in zip(table.rows, by_case(document["rows"]).values(), strict=True):
        beyond = measured(found, tables.ours_in(found), lambda row: row["mib"]["beyond"])
        line.append("–" if beyond is None else f"{beyond:.0f}")
    table.header.append("ours beyond gradients")
    chart = charts.memory_by_size(document)
    yield Section("Peak memory beyond the inputs, MiB", table, chart, name="memory")


def _accuracy(document: Document) -> Iterator[Section]:
    chart = charts.error_by_stage(document)
    for title, column, picture, name in (
        ("Relative error of the anchors' gradient against float64", "dq", chart, "error"),
        ("Relative error of the loss against float64", "loss", None, "loss-error"),
    ):
        yield Section(title, tables.matrix("accuracy", column, document["rows"]), picture, name=name)


def _train(document: Document) -> Iterator[Section]:
    yield Section("Training steps", tables.training(document["rows"]), name="train")


def _tune(document: Document) -> Iterator[Section]:
    yield Section("Settings, the fastest first", tables.settings(document["rows"]), name="settings")


SECTIONS: dict[str, Callable[[Document], Iterator[Section]]] = {
    "loss": _loss,
    "memory": _memory,
    "accuracy": _accuracy,
    "train": _train,
    "tune": _tune,
}
