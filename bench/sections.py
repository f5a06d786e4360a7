"""From the rows of results to sections: a table, and a picture where there is one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import tables
from bench.cases import Case
from bench.floor import COPY, FLOOR
from bench.render import Chart, Panel, Point, Table, beside, number
from bench.results import Document, Row
from bench.tables import HEADLINE_D, Found, by_case, median, multiple, names_in
from fused_infonce.testing import REGIMES

LARGEST_RATIO = 3.0  # to the naive loss, that is drawn
README_ROWS = 8
README_NAMES = ("ours-triton", "ours-torch", "naive", "st-mnrl", "st-cached-mnrl", "torch-linear-ce", "memeff")
README_SIZE = (4.4, 3.7)  # inches; at 200 dots per inch sharp at 420 pixels
PRODUCTS, UNAVOIDABLE = "bare products", "gradients and rows"
N_AXIS, STAGE = "N, anchors per batch", "stage of training"
IN_FP32 = "Under bf16, st-mnrl, st-cached-mnrl and pml-ntxent multiply in fp32, as their trainers do."


@dataclass
class Section:
    title: str
    table: Table
    chart: Chart | None = None
    note: str = ""
    short: Table | None = None  # stands for table and chart in a block without a name
    name: str = ""  # of its block
    unnamed: bool = True  # whether it stands in a block without a name


def make(documents: dict[str, Document]) -> Iterator[Section]:
    """Yields every section that there are results for."""
    for job, sections in SECTIONS.items():
        if job in documents:
            yield from sections(documents[job]["rows"])


# ------------------------------------------------------------------ panels


def plain_cases(rows: Iterable[Row]) -> dict[Case, Found]:
    """Returns the one-way cases in the middle of training, without noise and hard negatives."""
    return {c: f for c, f in by_case(rows).items() if c == Case(c.N, c.D, dtype=c.dtype)}


def panels(
    rows: list[Row], x: str, fixed: str, value: Callable[[Row, Found], float], base: str = "", **look: Any
) -> list[Panel]:
    """Returns a panel per dtype over the field ``x``, at the value of ``fixed`` that was measured most.

    ``base`` names the line of FLOOR. Points that are not positive or have no value (KeyError) are left out.
    """
    plain, made = plain_cases(rows), []
    for dtype in dict.fromkeys(c.dtype for c in plain):
        weights: Counter[int] = Counter()
        for case, found in plain.items():
            weights[getattr(case, fixed)] += len(names_in([found])) * (case.dtype == dtype)
        chosen = max(weights, key=lambda at: (weights[at], at))
        cases = [c for c in plain if (c.dtype, getattr(c, fixed)) == (dtype, chosen)]
        cases.sort(key=lambda c: getattr(c, x))
        names = ({base: FLOOR} if base else {}) | {name: name for name in names_in(plain[c] for c in cases)}
        lines: dict[str, list[Point]] = {line: [] for line in names}
        for case in cases:
            for line, name in names.items():
                row = plain[case].get(name, {"status": "skipped"})
                try:
                    y = value(row, plain[case]) if row["status"] == "ok" else 0.0
                except KeyError:
                    continue
                if y > 0:
                    lines[line].append((getattr(case, x), y))
        if len(cases) > 1:
            made.append(Panel(f"{dtype}, {fixed} = {chosen}", lines, **look))
    return made


def _milliseconds(row: Row, found: Found) -> float:
    return float(row["ms"]["median"])


def _over_naive(row: Row, found: Found) -> float:
    ratio = row["ms"]["median"] / found["naive"]["ms"]["median"]
    return ratio if ratio <= LARGEST_RATIO else 0.0


def _share_of_floor(row: Row, found: Found) -> float:
    return 1 / float(row["of_floor"])


def _memory_panels(rows: list[Row]) -> list[Panel]:
    floors = []  # rows for the chart only
    for case, found in by_case(rows).items():
        if measured := next((row["mib"] for row in found.values() if "mib" in row), None):
            mib = {"all": measured["all"] - measured["beyond"]}
            floors.append({**case.as_dict(), "candidate": FLOOR, "status": "ok", "mib": mib})
    return panels([*rows, *floors], "N", "D", lambda row, _: row["mib"]["all"], UNAVOIDABLE, y="peak memory, MiB")


def _stages(rows: list[Row]) -> list[str]:
    return [stage for stage in REGIMES if any(row["regime"] == stage for row in rows)]


def _error_panel(rows: list[Row], dtype: str) -> Panel:
    """Returns the error of dq by stage of training, one-way; the candidates stand beside each other."""
    stages, lines = _stages(rows), {}
    names = names_in(by_case(rows).values())
    for place, name in enumerate(names):
        points: list[Point] = [
            (stages.index(case.regime), max(found[name]["errors"]["dq"], 1e-16))
            for case, found in by_case(rows).items()
            if (case.dtype, case.mode) == (dtype, "one-way") and "errors" in found.get(name, {})
        ]
        lines[name] = beside(points, place, len(names))
    return Panel(f"{dtype} products", lines, "relative error of dq (↓ better)", mark=1.0)


# ------------------------------------------------------------------ sections of each job


def _loss(rows: list[Row]) -> Iterator[Section]:
    chart = None
    if over_n := panels(rows, "N", "D", _milliseconds, PRODUCTS, y="time, ms"):
        y = "time / time of naive"
        below = panels(rows, "N", "D", _over_naive, PRODUCTS, y=y, log_y=False, mark=1.0)
        chart = Chart(
            "time.png",
            "Time over N for every candidate, in ms and as a ratio to the naive loss",
            [*over_n, *below],
            N_AXIS,
            PRODUCTS,
            "Forward and backward. Above: ms, on logarithmic axes. Below: the ratio to the naive loss (1.0 is "
            f"dotted; ratios above {LARGEST_RATIO:g} are left out). {IN_FP32}",
            columns=len(over_n),
        )
    groups = by_case(rows)
    small = [row for case, found in groups.items() if case.label.count("τ") for row in found.values()]
    rest = [row for row in rows if row not in small]
    headline = [row for case, found in plain_cases(rows).items() if case.D == HEADLINE_D for row in found.values()]
    title = "Time of ours, forward and backward"
    note = "\nThe floor is the bare matrix products of the same shapes and dtype; below 1× ours is faster.\n"
    short = tables.ratios(headline or rest).first(README_ROWS)
    yield Section(title, tables.ratios(rest), chart, note + tables.disturbed(rows), short, "time")
    if small:
        title = "Time of ours at small temperatures"
        yield Section(title, tables.ratios(small), name="temperatures", unnamed=False)
    bounds = {
        "floor, ms": lambda found: number(median(found, FLOOR) or 0),
        "a copy": lambda found: multiple(median(found, COPY), median(found, FLOOR)) or "–",
    }
    chart = None
    y = "time of the bare products / time"
    if share := panels(rows, "D", "N", _share_of_floor, y=y, log_y=False, mark=1.0):
        alt, caption = "Share of the floor over D for every candidate", f"1.0: as fast as the products. {IN_FP32}"
        chart = Chart("share.png", alt, share, "D, features", caption=caption)
    table = tables.matrix("loss", "× floor", rows, bounds)
    yield Section("Every candidate as a multiple of the floor", table, chart, name="floor", unnamed=False)
    if grown := tables.growth(rows):
        yield Section("Growth with N at a constant workspace", grown, name="growth", unnamed=False)


def _memory(rows: list[Row]) -> Iterator[Section]:
    table = tables.matrix("memory", "MiB", rows)
    for line, found in zip(table.rows, by_case(rows).values(), strict=True):
        name = tables.ours_in(found)
        line.append(f"{found[name]['mib']['beyond']:.0f}" if name else "–")
    table.header.append("ours beyond gradients")
    chart = None
    if over_n := _memory_panels(rows):
        alt, caption = "Peak memory over N for every candidate", f"A line ends where memory did. {IN_FP32}"
        chart = Chart("memory.png", alt, over_n, N_AXIS, UNAVOIDABLE, caption)
    short = table.first(README_ROWS)
    yield Section("Peak memory beyond the inputs, MiB", table, chart, short=short, name="memory")


def _accuracy(rows: list[Row]) -> Iterator[Section]:
    one_way = [row for row in rows if row["mode"] == "one-way"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in one_way))
    chart = None
    if dtypes:
        chart = Chart(
            "error.png",
            "Error of the gradient at each stage of training for every candidate",
            [_error_panel(rows, dtype) for dtype in dtypes],
            STAGE,
            caption="‖error of dq‖ / ‖dq‖ against float64, one-way; at 1 (dotted) no digit of the gradient is "
            f"right. τ = 0.05, at retrieval 0.01. {IN_FP32}",
            ticks=_stages(rows),
        )
    short = tables.matrix("accuracy", "dq", [row for row in one_way if row["dtype"] in dtypes[-1:]] or rows)
    title = "Relative error of the anchors' gradient against float64"
    yield Section(
        title, tables.matrix("accuracy", "dq", rows), chart, short=short.first(README_ROWS), name="error"
    )
    title = "Relative error of the loss against float64"
    yield Section(title, tables.matrix("accuracy", "loss", rows), name="loss-error", unnamed=False)


def _train(rows: list[Row]) -> Iterator[Section]:
    short = tables.training([row for row in rows if row["dtype"] == rows[-1]["dtype"]]).first(README_ROWS)
    yield Section("Training steps", tables.training(rows), short=short, name="train")


def _tune(rows: list[Row]) -> Iterator[Section]:
    yield Section("Settings, the fastest first", tables.settings(rows), name="settings", unnamed=False)


SECTIONS: dict[str, Callable[[list[Row]], Iterator[Section]]] = {
    "loss": _loss,
    "memory": _memory,
    "accuracy": _accuracy,
    "train": _train,
    "tune": _tune,
}


def readme_charts(documents: dict[str, Document]) -> Iterator[Chart]:
    """Yields two pictures of one size: the gradient's error by stage of training, and peak memory by N."""

    def few(job: str, dtype: str) -> list[Row]:
        rows = documents.get(job, {"rows": []})["rows"]
        return [row for row in rows if row["candidate"] in README_NAMES and row["dtype"] == dtype]

    if rows := few("accuracy", "bf16"):
        alt = "Gradient error by stage of training"
        caption = (
            "Relative error of the gradient by stage of training, bf16; at the dotted line no digit is right. "
        )
        caption += "The losses st-mnrl and st-cached-mnrl multiply in fp32 here, as their trainer does."
        chart = Chart("readme-error.png", alt, [_error_panel(rows, "bf16")], STAGE, caption=caption)
        chart.ticks, chart.size = _stages(rows), README_SIZE
        yield chart
    if made := _memory_panels(few("memory", "fp32")):
        alt = "Peak memory by number of anchors"
        caption = (
            "Peak memory of the loss beyond its inputs, forward and backward, fp32; a line ends where memory did."
        )
        yield Chart("readme-memory.png", alt, made[:1], N_AXIS, UNAVOIDABLE, caption, size=README_SIZE)
