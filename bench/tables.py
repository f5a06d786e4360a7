"""From the rows of results to tables; every number is formatted in one place, ``CELLS``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import fields

from bench.cases import Case
from bench.floor import COPY, FLOOR
from bench.render import Table, number
from bench.results import Document, Row

OURS = ("ours-triton", "ours-torch")  # the first one that was measured stands for this package
SHORT = {"out of memory": "memory", "too slow": "slow", "skipped": "–"}
SPREAD = 1.25  # of the floor's times: beyond it something else was running

Found = dict[str, Row]  # candidate → its row of one case


# ------------------------------------------------------------------ rows by case


def by_case(rows: Iterable[Row]) -> dict[Case, Found]:
    """Returns case → candidate → row, in the order of measurement."""
    found: dict[Case, Found] = {}
    for row in rows:
        case = Case(**{f.name: row[f.name] for f in fields(Case) if f.name in row})
        found.setdefault(case, {})[row["candidate"]] = row
    return found


def names_in(groups: Iterable[Found]) -> list[str]:
    """Returns the candidates that were not only skipped, ours first."""
    found = dict.fromkeys(name for rows in groups for name, row in rows.items() if row["status"] != "skipped")
    return sorted((n for n in found if n not in (FLOOR, COPY)), key=lambda n: not n.startswith("ours"))


def measured(found: Found, name: str | None, value: Callable[[Row], float]) -> float | None:
    """Returns the value of a candidate's row, None where it was not measured."""
    return value(found[name]) if name and found.get(name, {}).get("status") == "ok" else None


def ms(row: Row) -> float:
    return float(row["ms"]["median"])


def ours_in(found: Found) -> str | None:
    return next((name for name in OURS if found.get(name, {}).get("status") == "ok"), None)


def best_peer(found: Found, value: Callable[[Row], float]) -> str | None:
    """Returns the candidate with the least value that is neither ours, a naive loss, nor another loss."""
    names = [
        name
        for name, row in found.items()
        if row["status"] == "ok" and not _another(row) and not name.startswith(("ours", "naive", FLOOR, COPY))
    ]
    return min(names, key=lambda name: value(found[name]), default=None)


def _another(row: Row) -> str:
    return f"another loss: {row['loss']}" if row.get("loss", "InfoNCE") != "InfoNCE" else ""


# ------------------------------------------------------------------ cells


def multiple(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}×" if a and b else ""


def spread(times: dict[str, float]) -> str:
    return f"{number(times['p20'])}–{number(times['p80'])}"


# job → column → the cell of a row, which raises KeyError where the row has no such number; the last is for notes
CELLS: dict[str, dict[str, Callable[[Row, Found], str]]] = {
    "loss": {
        "ms": lambda row, found: number(ms(row)),
        "20–80 %": lambda row, found: spread(row["ms"]),
        "× floor": lambda row, found: multiple(ms(row), measured(found, FLOOR, ms)),
        "× naive": lambda row, found: multiple(ms(row), measured(found, "naive", ms)),
        "GFLOP/s": lambda row, found: number(1e3 * row["tflops"]),
        "error": lambda row, found: f"{max(row['errors'].values()):.0e}",
        "": lambda row, found: _another(row),
    },
    "memory": {
        "MiB": lambda row, found: number(row["mib"]["all"]),
        "beyond gradients": lambda row, found: number(row["mib"]["beyond"]),
        "": lambda row, found: _another(row),
    },
    "accuracy": {
        "loss": lambda row, found: f"{row['errors']['loss']:.1e}",
        "dq": lambda row, found: f"{row['errors']['dq']:.1e}",
        "dk": lambda row, found: f"{row['errors']['dk']:.1e}",
        "": lambda row, found: "",
    },
    "train": {
        "sentences per second": lambda row, found: number(row["sentences_per_second"]),
        "sentences at once": lambda row, found: str(row["at_once"]),
        "MiB beyond the model": lambda row, found: number(row["mib"]),
        "share of the loss in a step": lambda row, found: f"{100 * row['loss_share']:.2g} %",
        "": lambda row, found: "",
    },
}


def _cell(job: str, column: str, row: Row, found: Found) -> str:
    if row["status"] != "ok":
        return SHORT.get(row["status"], row["status"])
    try:
        return CELLS[job][column](row, found)
    except KeyError:  # not measured, or not for a bound
        return ""


def case_table(job: str, rows: list[Row]) -> Table:
    """Returns a line for each candidate of one case."""
    found = {row["candidate"]: row for row in rows if row["status"] != "skipped"}
    lines = []
    for name, row in found.items():
        cells = [_cell(job, column, row, found) for column in CELLS[job]]
        if row["status"] != "ok":
            cells = [row["status"], *[""] * (len(cells) - 2), row.get("reason", "")]
        lines.append([name, *cells])
    return Table(["candidate", *CELLS[job]], lines)


def matrix(
    job: str, column: str, rows: Iterable[Row], more: dict[str, Callable[[Found], str]] | None = None
) -> Table:
    """Returns a line for each case with one column's cell of each candidate, and ``more`` columns before them."""
    groups, more = by_case(rows), more or {}
    names = names_in(groups.values())
    lines = []
    for case, found in groups.items():
        label = f"{case.dtype} {case.mode} {case.regime}" if job == "accuracy" else case.label
        cells = [_cell(job, column, found.get(name, {"status": "skipped"}), found) for name in names]
        lines.append([label, *(make(found) for make in more.values()), *cells])
    return Table(["case", *more, *names], lines)


# ------------------------------------------------------------------ tables of one job


def ratios(rows: Iterable[Row]) -> Table:
    """Returns ours in milliseconds, and as a multiple of the floor, the standard losses and the fastest peer."""
    lines = []
    for case, found in by_case(rows).items():
        name, peer = ours_in(found), best_peer(found, ms)
        if name is None:
            continue
        time = ms(found[name])
        entry = 1e6 * time / (case.N * (case.N + case.noise + case.negatives))
        against = [multiple(time, measured(found, x, ms)) or "–" for x in (FLOOR, "naive", "naive-compile", peer)]
        against[-1] += f" ({peer})" if peer else ""
        lines.append([case.label, number(time), spread(found[name]["ms"]), number(entry), *against])
    compared = ["× floor", "× naive", "× compiled", "× fastest peer"]
    return Table(["case", "ours, ms", "20–80 %", "ns per entry", *compared], lines)


def training(rows: list[Row]) -> Table:
    columns = [column for column in CELLS["train"] if column]
    lines = [
        [row["candidate"], row["dtype"], str(row["N"]), *(_cell("train", c, row, {}) or "–" for c in columns)]
        for row in rows
        if row["status"] != "skipped"
    ]
    return Table(["trainer", "precision", "batch", *columns], lines, text_columns=2)


def settings(rows: list[Row]) -> Table:
    lines = [[r["search"], r["case"], r["setting"], number(ms(r)), spread(r["ms"])] for r in rows]
    return Table(["search", "case", "setting", "ms", "20–80 %"], lines, text_columns=3)


def reasons(documents: dict[str, Document]) -> Table | None:
    """Returns, per candidate, the reason of each missing number and the count of its cases."""
    found = Counter(
        (job, row.get("candidate") or row["loss"], row["status"], row.get("reason", ""))
        for job, document in documents.items()
        for row in document["rows"]
        if row.get("status", "ok") != "ok"
    )
    lines = [[*key, str(count)] for key, count in found.items()]
    return Table(["job", "candidate", "result", "reason", "cases"], lines, text_columns=4) if lines else None


def disturbed(rows: list[Row]) -> str:
    """Returns a warning where the bare products' own times are far apart."""
    floors = [row["ms"] for row in rows if row["candidate"] == FLOOR and row["status"] == "ok"]
    wide = [times for times in floors if times["p80"] > SPREAD * times["p20"]]
    if not wide:
        return ""
    return (
        f"\n**Disturbed**: in {len(wide)} of {len(floors)} cases the bare products' own 80 % quantile is more "
        f"than {SPREAD} times their 20 % quantile. Run again with nothing else running.\n"
    )
