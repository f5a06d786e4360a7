"""From the rows of results to tables; every number is formatted in one place, ``CELLS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields

from bench.cases import Case
from bench.floor import COPY, FLOOR
from bench.render import Table, number
from bench.results import Document, Row

HEADLINE_D = 768
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


def median(found: Found, name: str | None) -> float | None:
    """Returns milliseconds, None where there is no time."""
    return found[name]["ms"]["median"] if name and found.get(name, {}).get("status") == "ok" else None


def ours_in(found: Found) -> str | None:
    return next((name for name in OURS if found.get(name, {}).get("status") == "ok"), None)


def best_peer(found: Found, value: Callable[[Row], float]) -> str | None:
    """Returns the candidate with the least value that is neither ours, a naive loss, nor another loss."""
    names = [
        name
        for name, row in found.items()
        if row["status"] == "ok"
        and row.get("loss", "InfoNCE") == "InfoNCE"
        and not name.startswith(("ours", "naive"))
        and name not in (FLOOR, COPY)
    ]
    return min(names, key=lambda name: value(found[name]), default=None)


# ------------------------------------------------------------------ cells


def multiple(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}×" if a and b else ""


def spread(ms: dict[str, float]) -> str:
    return f"{number(ms['p20'])}–{number(ms['p80'])}"


def _over(name: str) -> Callable[[Row, Found], str]:
    return lambda row, found: multiple(row["ms"]["median"], median(found, name))


def _note(row: Row, found: Found) -> str:
    return "" if row.get("loss", "InfoNCE") == "InfoNCE" else f"another loss: {row['loss']}"


# job → column → the cell of a row, which raises KeyError where the row has no such number; the last is for notes
CELLS: dict[str, dict[str, Callable[[Row, Found], str]]] = {
    "loss": {
        "ms": lambda row, found: number(row["ms"]["median"]),
        "20–80 %": lambda row, found: spread(row["ms"]),
        "× floor": _over(FLOOR),
        "× naive": _over("naive"),
        "GFLOP/s": lambda row, found: number(1e3 * row["tflops"]),
        "error": lambda row, found: f"{max(row['errors'].values()):.0e}",
        "": _note,
    },
    "memory": {
        "MiB": lambda row, found: number(row["mib"]["all"]),
        "beyond gradients": lambda row, found: number(row["mib"]["beyond"]),
        "": _note,
    },
    "accuracy": {
        **{what: lambda row, found, what=what: f"{row['errors'][what]:.1e}" for what in ("loss", "dq", "dk")},
        "": _note,
    },
    "train": {
        "sentences per second": lambda row, found: number(row["sentences_per_second"]),
        "MiB beyond the model": lambda row, found: number(row["mib"]),
        "share of the loss in a step": lambda row, found: f"{100 * row['loss_share']:.2g} %",
        "": lambda row, found: "",
    },
}


def _status(row: Row) -> str:
    return SHORT.get(row["status"], row["status"])


def _cell(job: str, column: str, row: Row, found: Found) -> str:
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
            cells[0], cells[-1] = row["status"], row.get("reason", "")
        lines.append([name, *cells])
    return Table(["candidate", *CELLS[job]], lines)


def matrix(
    job: str, column: str, rows: Iterable[Row], more: dict[str, Callable[[Found], str]] | None = None
) -> Table:
    """Returns a line for each case with one column's cell of each candidate, ``more`` columns before them."""
    groups, more = by_case(rows), more or {}
    names = names_in(groups.values())

    def show(found: Found, name: str) -> str:
        row = found.get(name, {"status": "skipped"})
        if row["status"] == "ok":
            return _cell(job, column, row, found) or "ok"
        return _status(row)

    def label(case: Case) -> str:
        return f"{case.dtype} {case.mode} {case.regime}" if job == "accuracy" else case.label

    lines = [
        [label(case), *(make(found) for make in more.values()), *(show(found, name) for name in names)]
        for case, found in groups.items()
    ]
    return Table(["case", *more, *names], lines)


# ------------------------------------------------------------------ tables of one job


def ratios(rows: list[Row]) -> Table:
    """Returns ours in milliseconds, and as a multiple of the floor, the standard losses and the fastest peer."""
    lines = []
    for case, found in by_case(rows).items():
        name = ours_in(found)
        if name is None:
            continue
        ms, peer = median(found, name), best_peer(found, lambda row: row["ms"]["median"])
        against = [multiple(ms, median(found, other)) or "–" for other in (FLOOR, "naive", "naive-compile")]
        best = f"{multiple(ms, median(found, peer))} ({peer})" if peer else "–"
        lines.append([case.label, number(ms or 0), spread(found[name]["ms"]), *against, best])
    return Table(["case", "ours, ms", "20–80 %", "× floor", "× naive", "× compiled", "× fastest peer"], lines)


def growth(rows: list[Row], first: int = 2048) -> Table | None:
    """Returns time over N·M relative to that at ``first`` anchors, where one workspace serves several N."""
    series: dict[Case, list[tuple[Case, Found]]] = {}
    for case, found in by_case(row for row in rows if not row["noise"] and not row["negatives"]).items():
        if first <= case.N and ours_in(found):
            series.setdefault(case.at(first), []).append((case, found))
    lines = []
    for start, cases in series.items():
        if len(cases) < 2 or cases[0][0] != start:
            continue
        base = None
        for case, found in cases:
            row = found[ours_in(found) or ""]
            each = 1e6 * row["ms"]["median"] / case.N**2
            base = base or each
            share = multiple(row.get("of_floor"), 1) or "–"
            lines.append([case.label, number(row["ms"]["median"]), number(each), f"{each / base:.2f}", share])
    header = ["case", "ours, ms", "ns per entry of the matrix", f"relative to N={first}", "× floor"]
    return Table(header, lines) if lines else None


def training(rows: list[Row]) -> Table:
    columns, lines = [column for column in CELLS["train"] if column], []
    for row in rows:
        ok = row["status"] == "ok"
        cells = [_cell("train", column, row, {}) or "–" for column in columns]
        if row["status"] != "skipped":
            cells = cells if ok else [_status(row), *cells[1:]]
            lines.append([row["candidate"], row["dtype"], str(row["N"]), *cells])
    return Table(["trainer", "precision", "batch", *columns], lines, text_columns=2)


def settings(rows: list[Row]) -> Table:
    lines = [[r["search"], r["case"], r["setting"], number(r["ms"]["median"]), spread(r["ms"])] for r in rows]
    return Table(["search", "case", "setting", "ms", "20–80 %"], lines, text_columns=3)


def reasons(documents: dict[str, Document]) -> Table | None:
    """Returns, per candidate, the reason of each missing number and the count of its cases."""
    found: dict[tuple[str, ...], int] = {}
    for job, document in documents.items():
        for row in document["rows"]:
            if row.get("status", "ok") != "ok":
                key = (job, row.get("candidate") or row["loss"], row["status"], row.get("reason", ""))
                found[key] = found.get(key, 0) + 1
    lines = [[*key, str(count)] for key, count in found.items()]
    return Table(["job", "candidate", "result", "reason", "cases"], lines, text_columns=4) if lines else None


def disturbed(rows: list[Row]) -> str:
    """Returns a warning where the bare products' own times are far apart."""
    floors = [row["ms"] for row in rows if row["candidate"] == FLOOR and row["status"] == "ok"]
    wide = [ms for ms in floors if ms["p80"] > SPREAD * ms["p20"]]
    if not wide:
        return ""
    return (
        f"\n**Disturbed**: in {len(wide)} of {len(floors)} cases the bare products' own 80 % quantile is more "
        f"than {SPREAD} times their 20 % quantile. Run again with nothing else running.\n"
    )
