"""From the rows of results to sections of a table and a chart, for the terminal, for Markdown and as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from os.path import relpath
from pathlib import Path

from bench.cases import Case
from bench.floor import COPY, FLOOR
from bench.render import Chart, Panel, Point, Table, beside, number
from bench.results import Document, Row
from fused_infonce.testing import REGIMES
from simcse.errors import UserError
from simcse.files import write_text

BEGIN, END = "<!-- bench: begin (python -m bench report) -->", "<!-- bench: end -->"
HEADLINE_D = 768
SPREAD = 1.25  # of the floor's times: beyond it something else was running
OURS = ("ours-triton", "ours-torch")  # the first one that was measured stands for this package
SHORT = {"out of memory": "memory", "too slow": "slow", "skipped": "–"}
PRODUCTS = "floor: bare matrix products"

Found = dict[str, Row]  # candidate → its row of one case


@dataclass
class Section:
    title: str
    table: Table
    chart: Chart | None = None
    note: str = ""
    in_readme: bool = True
    short: Table | None = None  # stands in a README instead of ``table``


# ------------------------------------------------------------------ the documents


def sections(documents: dict[str, Document]) -> Iterator[Section]:
    """Yields every section that there are results for."""
    for job, make in SECTIONS.items():
        if job in documents:
            yield from make(documents[job]["rows"])


def write(documents: dict[str, Document], made: Iterable[Section], folder: Path, readme: Path | None) -> None:
    """Writes the pictures and ``report.md``, and replaces the part of ``readme`` between its marks."""
    made = list(made)
    for section in made:
        if section.chart:
            section.chart.draw(folder)
    head = "\n".join(_head(documents))
    parts = [f"## {s.title}\n\n{s.table.markdown()}{s.note}{_image(s.chart, folder, folder)}" for s in made]
    if reasons := _reasons(documents):
        parts.append(f"## What was left out, and why\n\n{reasons.markdown()}")
    write_text(folder / "report.md", "\n".join(["# Results\n", head, *parts]))
    if readme is None:
        return
    before, after = around_marks(readme)
    base = readme.resolve().parent
    parts = [
        f"**{s.title}**\n\n{(s.short or s.table).markdown()}{s.note}{_image(s.chart, folder, base)}"
        for s in made
        if s.in_readme
    ]
    link = relpath((folder / "report.md").resolve(), base)
    parts.append(f"All measurements, and why some are missing: [{link}]({link}).")
    text = "\n".join([head, *parts])
    write_text(readme, f"{before}{BEGIN}\n{text}\n{END}{after}")


def around_marks(file: Path) -> tuple[str, str]:
    """Returns the text before and after the part to replace; raises UserError unless both marks occur once."""
    content = file.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise UserError(f"{file} must hold the lines '{BEGIN}' and '{END}' once each, in this order")
    return content.split(BEGIN)[0], content.split(END)[1]


def _head(documents: dict[str, Document]) -> Iterator[str]:
    """Yields a line for each machine and commit that the results come from."""
    origins: dict[str, list[str]] = {}
    for job, document in documents.items():
        machine, versions = document["machine"], document["versions"]
        place = f"{machine['cpu']} ({machine['capability']})"
        if "gpu" in machine:
            place = f"{machine['gpu']} (driver, clock, power: {machine['driver, clock, power']})"
        origin = (
            f"{place}, {machine['threads']} threads, torch {versions['torch']}, Python {versions['python']}, "
            f"commit {document['commit']}, {document['started'][:10]}"
        )
        note = f"`{document.get('command', job)}`{'' if document['complete'] else ' (interrupted)'}"
        origins.setdefault(origin, []).append(note)
    for origin, jobs in origins.items():
        yield f"Measured on {origin}: {', '.join(jobs)}.\n"


def _image(chart: Chart | None, folder: Path, base: Path) -> str:
    if chart is None:
        return ""
    return f"\n![{chart.alt}]({relpath((folder / chart.file).resolve(), base.resolve())})\n"


def _reasons(documents: dict[str, Document]) -> Table | None:
    """Returns, per candidate, the reason of each missing number and the count of its cases."""
    found: dict[tuple[str, ...], int] = {}
    for job, document in documents.items():
        for row in document["rows"]:
            if row.get("status", "ok") != "ok":
                name = row.get("candidate") or row.get("trainer") or row["loss"]
                key = (job, name, row["status"], row.get("reason", ""))
                found[key] = found.get(key, 0) + 1
    lines = [[*key, str(count)] for key, count in found.items()]
    return Table(["job", "candidate", "result", "reason", "cases"], lines, text_columns=4) if lines else None


# ------------------------------------------------------------------ rows by case


def by_case(rows: Iterable[Row]) -> dict[Case, Found]:
    """Returns case → candidate → row, in the order of measurement."""
    found: dict[Case, Found] = {}
    for row in rows:
        case = Case(**{f.name: row[f.name] for f in fields(Case)})
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


def _multiple(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}×" if a and b else ""


def _range(ms: dict[str, float]) -> str:
    return f"{number(ms['p20'])}–{number(ms['p80'])}"


def _status(row: Row | None) -> str:
    return "–" if row is None else SHORT.get(row["status"], row["status"])


# ------------------------------------------------------------------ one case, on the terminal


def _other_loss(row: Row, found: Found) -> str:
    return "" if row["loss"] == "InfoNCE" else f"another loss: {row['loss']}"


# job → column → the cell of a row
COLUMNS: dict[str, dict[str, Callable[[Row, Found], str]]] = {
    "loss": {
        "ms": lambda row, found: number(row["ms"]["median"]),
        "20–80 %": lambda row, found: _range(row["ms"]),
        "of floor": lambda row, found: _multiple(row["ms"]["median"], median(found, FLOOR)),
        "of naive": lambda row, found: _multiple(row["ms"]["median"], median(found, "naive")),
        "GFLOP/s": lambda row, found: number(1e3 * row["tflops"]),
        "error": lambda row, found: f"{max(row['errors'].values()):.0e}",
        "": _other_loss,
    },
    "memory": {
        "MiB": lambda row, found: number(row["mib"]["all"]),
        "beyond gradients": lambda row, found: number(row["mib"]["beyond"]),
        "": lambda row, found: "",
    },
    "accuracy": {
        **{what: lambda row, found, what=what: f"{row['errors'][what]:.1e}" for what in ("loss", "dq", "dk")},
        "": lambda row, found: "",
    },
}


def case_table(job: str, rows: list[Row]) -> Table:
    """Returns a line for each candidate of one case."""
    found = {row["candidate"]: row for row in rows if row["status"] != "skipped"}
    lines = []
    for name, row in found.items():
        cells = []
        for make in COLUMNS[job].values():
            try:
                cells.append(make(row, found))
            except KeyError:  # no number: not measured, or not for a bound
                cells.append("")
        if row["status"] != "ok":
            cells[0], cells[-1] = row["status"], row.get("reason", "")
        lines.append([name, *cells])
    return Table(["candidate", *COLUMNS[job]], lines)


# ------------------------------------------------------------------ sections of each job


def matrix(first: str, rows: Iterable[Row], label: Callable[[Case], str], cell: Callable[[Row], str]) -> Table:
    """Returns a line for each case and a column for each candidate."""
    groups = by_case(rows)
    names = names_in(groups.values())

    def show(row: Row | None) -> str:
        return cell(row) if row and row["status"] == "ok" else _status(row)

    lines = [[label(case), *(show(found.get(name)) for name in names)] for case, found in groups.items()]
    return Table([first, *names], lines)


def _beside_label(table: Table, header: list[str], columns: list[list[str]]) -> Table:
    """Inserts columns behind the first one."""
    rows = [[row[0], *more, *row[1:]] for row, more in zip(table.rows, columns, strict=True)]
    return Table([table.header[0], *header, *table.header[1:]], rows)


def panels(rows: list[Row], x: str, fixed: str, value: Callable[[Row], float], base: str = "") -> list[Panel]:
    """Returns a panel per dtype over the field ``x``, at the value of ``fixed`` that was measured most.

    Of one-way cases in the middle of training, without noise and hard negatives; ``base`` names the line of FLOOR.
    """
    plain = {
        c: f
        for c, f in by_case(rows).items()
        if (c.mode, c.noise, c.negatives, c.regime) == ("one-way", 0, 0, "middle")
    }
    made = []
    for dtype in dict.fromkeys(c.dtype for c in plain):
        weights: dict[int, int] = {}
        for case in plain:
            if case.dtype == dtype:
                at = getattr(case, fixed)
                weights[at] = weights.get(at, 0) + len(names_in([plain[case]]))
        chosen = max(weights, key=lambda at: (weights[at], at))
        cases = [c for c in plain if (c.dtype, getattr(c, fixed)) == (dtype, chosen)]
        cases.sort(key=lambda c: getattr(c, x))
        names = {base: FLOOR} if base else {}
        names |= {name: name for name in names_in(plain[c] for c in cases)}
        lines: dict[str, list[Point]] = {
            line: [
                (getattr(c, x), value(plain[c][name]))
                for c in cases
                if plain[c].get(name, {}).get("status") == "ok"
            ]
            for line, name in names.items()
        }
        if len(cases) > 1:
            made.append(Panel(f"{dtype}, {fixed} = {chosen}", lines))
    return made


def _loss(rows: list[Row]) -> Iterator[Section]:
    def time(row: Row) -> float:
        return row["ms"]["median"]  # type: ignore[no-any-return]

    over_n = panels(rows, "N", "D", time, PRODUCTS)
    title = "Speed of ours, forward + backward; the floor is the bare matrix products of the same shapes and dtype"
    chart = None
    if over_n:
        alt = "Time over N for every candidate, the bare matrix products as a dashed line"
        y = "milliseconds, forward + backward"
        chart = Chart("time.png", alt, over_n, "N, anchors in the batch", y, PRODUCTS)
    headline = [row for row in rows if row["D"] == HEADLINE_D]
    yield Section(title, ratios(rows), chart, disturbed(rows), short=ratios(headline or rows))
    groups = by_case(rows)
    floors = [median(found, FLOOR) for found in groups.values()]
    bounds = [
        [number(ms) if ms else _status(found.get(FLOOR)), _multiple(median(found, COPY), ms) or "–"]
        for ms, found in zip(floors, groups.values(), strict=True)
    ]
    speed = matrix("case", rows, lambda c: c.label, lambda r: f"{r['of_floor']:.2f}×" if "of_floor" in r else "ok")
    share = panels([r for r in rows if "of_floor" in r], "D", "N", lambda row: 1 / row["of_floor"])
    for panel in share:
        ends = [point[0] for points in panel.lines.values() for point in points]
        panel.lines = {PRODUCTS: [(min(ends), 1.0), (max(ends), 1.0)], **panel.lines}
    chart = None
    if share:
        alt, y = "Share of the floor over D for every candidate", "time of the bare products / time"
        chart = Chart("share.png", alt, share, "D, features", y, PRODUCTS, log_y=False)
    title = "Every candidate as a multiple of the floor"
    yield Section(title, _beside_label(speed, ["floor, ms", "a copy"], bounds), chart, in_readme=False)
    if grown := growth(rows):
        yield Section("Growth with N at a constant workspace", grown)


def ratios(rows: list[Row]) -> Table:
    """Returns ours in milliseconds, and as a multiple of the floor, the standard losses and the fastest peer."""
    lines = []
    for case, found in by_case(rows).items():
        name = ours_in(found)
        if name is None:
            continue
        ms = median(found, name)
        against = [_multiple(ms, median(found, other)) or "–" for other in (FLOOR, "naive", "naive-compile")]
        peers = [(m, peer) for peer in found if (m := median(found, peer)) and _is_peer(peer, found[peer])]
        best = f"{_multiple(ms, min(peers)[0])} ({min(peers)[1]})" if peers else "–"
        lines.append([case.label, number(ms or 0), _range(found[name]["ms"]), *against, best])
    return Table(["case", "ours, ms", "20–80 %", "× floor", "× naive", "× compiled", "× fastest peer"], lines)


def _is_peer(name: str, row: Row) -> bool:
    return name not in (FLOOR, COPY) and not name.startswith(("ours", "naive")) and row.get("loss") == "InfoNCE"


def growth(rows: list[Row], first: int = 2048) -> Table | None:
    """Returns time over N·M relative to that at ``first`` anchors, where one workspace serves several N."""
    lines = []
    groups = by_case(row for row in rows if not row["noise"] and not row["negatives"])
    for case, found in groups.items():
        start = groups.get(Case(first, case.D, case.mode, case.dtype, regime=case.regime), {})
        name = ours_in(found)
        ms, base = median(found, name), median(start, name)
        alike = [
            c.N for c in groups if (c.D, c.mode, c.dtype, c.regime) == (case.D, case.mode, case.dtype, case.regime)
        ]
        if not ms or not base or first > case.N or max(alike) == first:
            continue
        relative = (ms / case.N**2) / (base / first**2)
        share = _multiple(found[name or ""].get("of_floor"), 1) or "–"
        lines.append([case.label, number(ms), number(1e6 * ms / case.N**2), f"{relative:.2f}", share])
    header = ["case", "ours, ms", "ns per entry of the matrix", f"relative to N={first}", "× floor"]
    return Table(header, lines) if lines else None


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


def _memory(rows: list[Row]) -> Iterator[Section]:
    table = matrix("case", rows, lambda case: case.label, lambda row: number(row["mib"]["all"]))
    groups = by_case(rows)
    for line, found in zip(table.rows, groups.values(), strict=True):
        name = ours_in(found)
        line.append(f"{found[name]['mib']['beyond']:.0f}" if name else "–")
    table.header.append("ours beyond gradients")
    base = "floor: gradients and normalised rows"
    unavoidable = []  # rows of the floor, for the chart alone
    for case, found in groups.items():
        if measured := next((row["mib"] for row in found.values() if "mib" in row), None):
            facts = {"status": "ok", "mib": {"all": measured["all"] - measured["beyond"]}}
            unavoidable.append({**case.as_dict(), "candidate": FLOOR, **facts})
    over_n = panels([*rows, *unavoidable], "N", "D", lambda row: row["mib"]["all"], base)
    for panel in over_n:  # a logarithmic axis has no zero
        panel.lines = {name: [p for p in points if p[1] > 0] for name, points in panel.lines.items()}
    alt, x = "Peak memory over N for every candidate", "N, anchors in the batch"
    chart = Chart("memory.png", alt, over_n, x, "MiB beyond the inputs", base) if over_n else None
    yield Section("Memory beyond the inputs, MiB", table, chart)


REGIME_NAMES = {"cone": "narrow\ncone", "random": "start", "middle": "middle", "trained": "trained"}
REGIME_NAMES |= {"retrieval": "retrieval\nτ = 0.01"}


def _accuracy(rows: list[Row]) -> Iterator[Section]:
    one_way = {case: found for case, found in by_case(rows).items() if case.mode == "one-way"}
    regimes = [r for r in REGIME_NAMES if r in REGIMES and any(case.regime == r for case in one_way)]
    made = []
    for dtype in dict.fromkeys(case.dtype for case in one_way):
        lines: dict[str, list[Point]] = {}
        names = names_in(one_way.values())
        for place, name in enumerate(names):
            points: list[Point] = [
                (regimes.index(case.regime), found[name]["errors"]["dq"])
                for case, found in one_way.items()
                if case.dtype == dtype and "errors" in found.get(name, {})
            ]
            lines[name] = beside(points, place, len(names))
        made.append(Panel(dtype, lines))
    chart = None
    if made:
        alt, y = (
            "Error of the gradient in each regime for every candidate",
            "‖error of dq‖ / ‖dq‖ against float64 (better ↓)",
        )
        ticks = [REGIME_NAMES[r] for r in regimes]
        chart = Chart("error.png", alt, made, "stage of training", y, ticks=ticks)

    def table(what: str, some: list[Row]) -> Table:
        first = "products, mode, stage of training"
        return matrix(
            first, some, lambda c: f"{c.dtype} {c.mode} {c.regime}", lambda r: f"{r['errors'][what]:.1e}"
        )

    title = "Relative error of the anchors' gradient against float64"
    short = table("dq", [row for row in rows if row["mode"] == "one-way"])
    yield Section(title, table("dq", rows), chart, short=short)
    yield Section("Relative error of the loss against float64", table("loss", rows), in_readme=False)


def _train(rows: list[Row]) -> Iterator[Section]:
    lines = []
    for row in rows:
        if row["status"] == "skipped":
            continue
        mini = str(row["mini_batch"]) if row["trainer"].endswith(("mini batches", "cached-mnrl")) else "–"
        cells = [row["status"], "–", "–"]
        if row["status"] == "ok":
            share = f"{100 * row['loss_share']:.2g} %" if "loss_share" in row else "–"
            cells = [number(row["sentences_per_second"]), number(row["mib"]), share]
        lines.append([row["trainer"], row["dtype"], str(row["batch"]), mini, *cells])
    sizes = ["sentences per second", "MiB beyond the model", "share of the loss in a step"]
    yield Section("Training steps", Table(["trainer", "precision", "batch", "mini batch", *sizes], lines))


def _tune(rows: list[Row]) -> Iterator[Section]:
    lines = [[r["search"], r["case"], r["setting"], number(r["ms"]["median"]), _range(r["ms"])] for r in rows]
    table = Table(["search", "case", "setting", "ms", "20–80 %"], lines, text_columns=2)
    yield Section("Settings, the fastest first", table, in_readme=False)


SECTIONS: dict[str, Callable[[list[Row]], Iterator[Section]]] = {
    "loss": _loss,
    "memory": _memory,
    "accuracy": _accuracy,
    "train": _train,
    "tune": _tune,
}
