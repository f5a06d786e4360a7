"""The table of first contact, from its rows: text for any terminal, without further packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench.contact.plan import STEPS
from bench.floor import FLOOR
from bench.results import Document, Row

KERNELS_SHOWN = 8  # of a call, the longest first
SHOWN_METRICS = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "Executed Ipc Active",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Registers Per Thread",
)
Cell = Callable[[Row], str]


def lines(document: Document) -> Iterator[str]:
    """Yields the lines of the whole table."""
    rows: list[Row] = document["rows"]
    machine = document.get("machine", {})
    yield f"first contact, {document['device']}, commit {document.get('commit')}, {document['started']}"
    for step in STEPS:
        found = [row for row in rows if row["step"] == step]
        if not found:
            continue
        yield ""
        yield f"== {step}: {STEPS[step]}"
        if step == "versions":
            yield from (f"{name}: {value}" for name, value in _facts(machine, found))
        reasons = {row.get("reason", "") for row in found}
        if all(row["status"] == "skipped" for row in found) and len(reasons) == 1:
            yield f"skipped: {reasons.pop()} ({len(found)} items)"
        else:
            yield from _aligned(_table(step, found))
    counts = {state: sum(row["status"] == state for row in rows) for state in ("ok", "skipped", "not run")}
    bad = [row for row in rows if row["status"] not in counts]
    yield ""
    yield ", ".join(f"{count} {state}" for state, count in counts.items()) + f", {len(bad)} without a result"


def summary(rows: list[Row]) -> str:
    """Returns one line on the rows of one item."""
    bad = [row for row in rows if row["status"] != "ok"]
    if bad:
        return "; ".join(
            f"{row.get('candidate', '')} {row['status']}: {row.get('reason', '')}".strip() for row in bad[:3]
        )
    first = rows[0]
    for column in ("errors", "seconds", "ms"):
        if column in first:
            return f"ok, {UNITS[column]}{CELLS[column](first)}"
    return "ok"


def _facts(machine: dict[str, Any], rows: list[Row]) -> Iterator[tuple[str, Any]]:
    for row in rows:
        machine = machine | row.get("machine", {})
        yield from row.get("versions", {}).items()
    yield from machine.items()


def _errors(row: Row) -> str:
    if "errors" not in row:
        return ""
    worst = max(row["errors"], key=lambda name: _number_or(row["errors"][name]))
    bound = f" of {row['bound']:.0e}" if "bound" in row else ""
    return f"{worst} {_number_or(row['errors'][worst]):.1e}{bound}"


def _number_or(x: float | None) -> float:
    return float("inf") if x is None or x != x else x


def _ms(row: Row) -> str:
    ms = row.get("ms", row["us"] / 1e3 if "us" in row else None)
    if isinstance(ms, dict):
        ms = ms.get("median", ms.get("wall"))
    return "" if ms is None else f"{ms:.4g}"


def _part(key: str, name: str, form: str = "{:.4g}") -> Cell:
    """Returns a cell of an entry of a field that is a dictionary."""

    def cell(row: Row) -> str:
        found = row.get(key)
        value = found.get(name) if isinstance(found, dict) else None
        return "" if value is None else form.format(value)

    return cell


def _plain(key: str, form: str = "{}") -> Cell:
    return lambda row: "" if row.get(key) is None else form.format(row[key])


CELLS: dict[str, Cell] = {
    "ms": _ms,
    "errors": _errors,
    "seconds": lambda row: " then ".join(f"{x:.2g} s" for x in row["seconds"]) if "seconds" in row else "",
}
UNITS = {"errors": "largest error of ", "seconds": "", "ms": "ms: "}
TFLOPS, GB_S = _plain("tflops", "{:.4g}"), _plain("gb_s", "{:.4g}")
WHAT: Cell = _plain("candidate")
COLUMNS: dict[str, dict[str, Cell]] = {
    "versions": {"what": WHAT, "ms": _ms, "TFLOP/s": TFLOPS, "GB/s": GB_S},
    "compile": {"first and second call": CELLS["seconds"]},
    "correctness": {"": lambda row: "pass" if row["status"] == "ok" else "FAIL", "largest error": _errors},
    "products": {
        "shapes": WHAT,
        "ms": _ms,
        "calls": _plain("calls"),
        "TFLOP/s": TFLOPS,
        "kernel": _plain("kernel"),
    },
    "launchers": {
        "launcher": WHAT,
        "variant": _plain("variant"),
        "calls": _plain("calls"),
        "ms": _ms,
        "TFLOP/s": TFLOPS,
        "GB/s": GB_S,
    },
    "calls": {
        "what": WHAT,
        "ms": _ms,
        "× floor": _plain("of_floor", "{:.3g}"),
        "TFLOP/s": TFLOPS,
        "calls": _plain("calls"),
        "MiB": _part("mib", "all", "{:.0f}"),
        "error": _errors,
    },
    "small": {
        "what": WHAT,
        "ms, host too": _part("ms", "wall"),
        "ms, device": _part("ms", "device"),
        "ms, graph": _part("ms", "graph"),
        "error": _errors,
    },
    "counters": {
        "kernel": lambda row: str(row.get("candidate", ""))[:60],
        **{name: _part("metrics", name, "{}") for name in SHOWN_METRICS},
    },
}


def _table(step: str, rows: list[Row]) -> list[list[str]]:
    """Returns a header and a line for each row; columns that say nothing are left out."""
    rows = [row for row in rows if "machine" not in row]
    floors = {row["item"]: row["ms"]["median"] for row in rows if step == "calls" and row.get("candidate") == FLOOR
              and row["status"] == "ok"}  # fmt: skip
    made, shown = [["item", *COLUMNS[step], ""]], 0
    for before, row in zip([None, *rows], rows, strict=False):
        same = before is not None and before["item"] == row["item"]
        shown = shown + 1 if same else 1
        if shown > KERNELS_SHOWN and row["item"].startswith("kernels"):
            continue
        if row["item"] in floors and "ms" in row:
            row = row | {"of_floor": row["ms"]["median"] / floors[row["item"]]}
        cells = [cell(row) for cell in COLUMNS[step].values()]
        state = "" if row["status"] == "ok" else row["status"]
        note = f"{state}: {row['reason']}" if state and row.get("reason") else state or row.get("reason", "")
        made.append(["" if same else row["item"], *cells, note])
    kept = [i for i in range(len(made[0])) if i == 0 or any(line[i] for line in made[1:])]
    return [[line[i] for i in kept] for line in made] if len(made) > 1 else []


def _aligned(table: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
