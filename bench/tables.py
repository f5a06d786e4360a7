"""Results as tables: for the terminal and for Markdown, from the same cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from rich import box
from rich.table import Table as RichTable

from bench.candidates import COPY, FLOOR
from bench.cases import Case
from bench.results import Row
from bench.study import cells

OURS = ("ours-triton", "ours-torch")  # the first that there is, is ours
SHORT = {"out of memory": "memory", "too slow": "slow", "skipped": "–"}
CASE_FIELDS = ("N", "D", "way", "dtype", "noise", "negatives", "regime")


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1  # to the left; the others, numbers, to the right

    def markdown(self) -> str:
        rule = ["---" if i < self.text_columns else "--:" for i in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def rich(self) -> RichTable:
        table = RichTable(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < self.text_columns else "right", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


def case_of(row: Row) -> Case:
    return Case(**{name: row[name] for name in CASE_FIELDS})


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    """Case → candidate → row, in the order of measurement."""
    found: dict[Case, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(case_of(row), {})[row["candidate"]] = row
    return found


def median(rows: dict[str, Row], name: str) -> float | None:
    """Milliseconds, None where there is no time."""
    return rows[name]["ms"]["median"] if rows.get(name, {}).get("status") == "ok" else None


def ours_in(rows: dict[str, Row]) -> str | None:
    return next((name for name in OURS if rows.get(name, {}).get("status") == "ok"), None)


def names_in(groups: Iterable[dict[str, Row]]) -> list[str]:
    """Candidates that gave more than a reason to be skipped, ours first."""
    found = dict.fromkeys(
        name for rows in groups for name, row in rows.items() if row["status"] != "skipped" and name != COPY
    )
    return sorted((n for n in found if n != FLOOR), key=lambda n: not n.startswith("ours"))


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


# ------------------------------------------------------------------ one case, on the terminal


def one_case(job: str, case: Case, rows: list[Row]) -> Table:
    found = {row["candidate"]: row for row in rows if row["status"] != "skipped"}
    make = {"loss": _times, "memory": _memories, "accuracy": _errors}[job]
    header, cells = make(found)
    title = case.label + (f" {case.regime}" if job == "accuracy" else "")
    lines = []
    for name, row in found.items():
        cell = cells(row)
        if row["status"] != "ok":
            cell[0] = row["status"]
            cell[-1] = row.get("reason", "")
        lines.append([name, *cell])
    return Table(title, ["candidate", *header], lines)


def _times(rows: dict[str, Row]) -> tuple[list[str], Any]:
    floor, naive = median(rows, FLOOR), median(rows, "naive")

    def cells(row: Row) -> list[str]:
        if row["status"] != "ok":
            return [""] * 7
        ms = row["ms"]
        error = max(row.get("errors", {}).values(), default=None)
        note = "" if row.get("loss", "InfoNCE") == "InfoNCE" else f"another loss: {row['loss']}"
        return [
            number(ms["median"]),
            f"{number(ms['p20'])}–{number(ms['p80'])}",
            f"{ms['median'] / floor:.2f}×" if floor else "",
            f"{ms['median'] / naive:.2f}×" if naive else "",
            number(1e3 * row["tflops"]) if "tflops" in row else "",
            f"{error:.0e}" if error is not None else "",
            note,
        ]

    return ["ms", "20–80 %", "of floor", "of naive", "GFLOP/s", "error", ""], cells


def _memories(rows: dict[str, Row]) -> tuple[list[str], Any]:
    def cells(row: Row) -> list[str]:
        return [number(row["mib"]["all"]), number(row["mib"]["beyond"]), ""] if "mib" in row else [""] * 3

    return ["MiB", "beyond gradients", ""], cells


def _errors(rows: dict[str, Row]) -> tuple[list[str], Any]:
    def cells(row: Row) -> list[str]:
        found = row.get("errors", {})
        return [*(f"{found[name]:.1e}" if name in found else "" for name in ("loss", "dq", "dk")), ""]

    return ["loss", "dq", "dk", ""], cells


# ------------------------------------------------------------------ many cases, for a report


def speed(title: str, rows: list[Row]) -> Table:
    """A case a line: the floor's milliseconds, and each candidate as a multiple of it."""
    groups = by_case(rows)
    names = names_in(groups.values())
    lines = []
    for case, found in groups.items():
        floor = median(found, FLOOR)
        cells = []
        for name in names:
            ms = median(found, name)
            cells.append(f"{ms / floor:.2f}×" if ms and floor else _status(found.get(name)))
        bare = median(found, COPY)
        copied = f"{bare / floor:.2f}×" if bare and floor else _status(found.get(COPY))
        lines.append([case.label, number(floor) if floor else _status(found.get(FLOOR)), copied, *cells])
    return Table(title, ["case", "floor, ms", "a copy", *names], lines)


def ratios(title: str, rows: list[Row]) -> Table:
    """A case a line: ours in milliseconds, and as a multiple of the floor, the usual ways and the best peer."""
    lines = []
    for case, found in by_case(rows).items():
        name = ours_in(found)
        if name is None:
            continue
        ms = found[name]["ms"]
        against = [median(found, other) for other in (FLOOR, "naive", "naive-compile")]
        peers = [(m, peer) for peer in found if (m := median(found, peer)) and not _known(peer, found[peer])]
        best = min(peers, default=None)
        lines.append(
            [
                case.label,
                number(ms["median"]),
                f"{number(ms['p20'])}–{number(ms['p80'])}",
                *(f"{ms['median'] / m:.2f}×" if m else "–" for m in against),
                f"{ms['median'] / best[0]:.2f}× ({best[1]})" if best else "–",
            ]
        )
    header = ["case", "ours, ms", "20–80 %", "× floor", "× naive", "× compiled", "× fastest peer"]
    return Table(title, header, lines)


def _known(name: str, row: Row) -> bool:
    return name in (FLOOR, COPY) or name.startswith(("ours", "naive")) or row.get("loss") != "InfoNCE"


def growth(title: str, rows: list[Row], first: int = 2048) -> Table | None:
    """Time over N·M relative to that at ``first`` anchors, where one workspace serves several N."""
    lines = []
    groups = by_case(row for row in rows if not row["noise"] and not row["negatives"])
    for case, found in groups.items():
        start = groups.get(Case(first, case.D, case.way, case.dtype, regime=case.regime), {})
        name = ours_in(found) or ""
        ms, base = median(found, name), median(start, name)
        largest = max(c.N for c in groups if (c.D, c.way, c.dtype) == (case.D, case.way, case.dtype))
        if not ms or not base or first > case.N or largest == first:
            continue
        relative = (ms / case.N**2) / (base / first**2)
        share = found[name].get("of_floor")
        of_floor = f"{share:.2f}×" if share else "–"
        lines.append([case.label, number(ms), number(1e6 * ms / case.N**2), f"{relative:.2f}", of_floor])
    header = ["case", "ours, ms", "ns for an entry of the matrix", f"relative to N={first}", "× floor"]
    return Table(title, header, lines) if lines else None


def memory(title: str, rows: list[Row]) -> Table:
    """A case a line: MiB beyond the inputs for each candidate, and what of ours is beyond gradients."""
    groups = by_case(rows)
    names = names_in(groups.values())
    lines = []
    for case, found in groups.items():
        name = next((n for n in OURS if "mib" in found.get(n, {})), None)
        cells = [
            number(found[n]["mib"]["all"]) if "mib" in found.get(n, {}) else _status(found.get(n)) for n in names
        ]
        lines.append([case.label, *cells, f"{found[name]['mib']['beyond']:.0f}" if name else "–"])
    return Table(title, ["case", *names, "ours beyond gradients"], lines)


def accuracy(title: str, rows: list[Row], what: str = "dq") -> Table:
    """A case a line: each candidate's relative error."""
    groups = by_case(rows)
    names = names_in(groups.values())
    lines = []
    for case, found in groups.items():
        cells = [
            f"{found[n]['errors'][what]:.1e}" if "errors" in found.get(n, {}) else _status(found.get(n))
            for n in names
        ]
        lines.append([f"{case.dtype} {case.way} {case.regime}", *cells])
    return Table(title, ["products, way, stage of training", *names], lines)


def train(title: str, rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        if row["status"] == "skipped":
            continue
        ok = row["status"] == "ok"
        mini = str(row["mini_batch"]) if row["way"].endswith(("mini batches", "cached-mnrl")) else "–"
        cells = [row["status"], "–", "–"]
        if ok:
            share = f"{100 * row['loss_share']:.2g} %" if "loss_share" in row else "–"
            cells = [number(row["sentences_per_second"]), number(row["mib"]), share]
        lines.append([row["way"], row["dtype"], str(row["batch"]), mini, *cells])
    sizes = ["sentences a second", "MiB beyond the model", "the loss alone, of a step"]
    header = ["trainer", "precision", "batch", "mini batch", *sizes]
    return Table(title, header, lines)


def study(title: str, rows: list[Row]) -> Table:
    """A loss and batch a line: mean and standard deviation over seeds."""
    lines = []
    for (loss, batch, rate), some in cells(rows):
        start = ["–", "–"] if not batch else [str(batch), f"{rate:g}"]
        share = _over_seeds([row.get("noise_share") for row in some], ".2g", spread=False)
        scores = [_over_seeds([row.get(name) for row in some], ".2f") for name in ("dev", "average")]
        shape = [_over_seeds([row.get(name) for row in some], ".4f") for name in ("alignment", "uniformity")]
        lines.append([loss, *start, str(len(some)), share, *scores, *shape])
    scored = ["dev, Spearman × 100", "mean of test splits", "alignment", "uniformity"]
    return Table(title, ["loss", "batch", "learning rate", "seeds", "share of noise", *scored], lines)


def _over_seeds(values: list[float | None], form: str, spread: bool = True) -> str:
    known = [x for x in values if x is not None]
    if not known:
        return "–"
    return f"{mean(known):{form}}" + (f" ± {stdev(known):{form}}" if spread and len(known) > 1 else "")


def _status(row: Row | None) -> str:
    return "–" if row is None else SHORT.get(row["status"], row["status"])
