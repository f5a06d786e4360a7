"""Results of a folder as Markdown: all of it in ``report.md``, the heart of it between two marks of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from os.path import relpath
from pathlib import Path
from typing import Any

from bench import tables
from bench.candidates import FLOOR
from bench.results import Row
from bench.tables import Table
from simcse.errors import UserError
from simcse.files import write_text

BEGIN, END = "<!-- bench: begin (python -m bench report) -->", "<!-- bench: end -->"
HEADLINE_D = 768
SPREAD = 1.25  # of the floor's times: beyond it something else was running

PICTURES = {
    "time.png": "Time over N for every candidate, the bare matrix products as a dashed line",
    "share.png": "Share of the floor over D for every candidate",
    "memory.png": "Peak memory over N for every candidate",
    "error.png": "Error of the gradient at four stages of training for every candidate",
    "study.png": "Scores over the batch for every loss, with the spread over seeds",
}


def whole(documents: dict[str, dict[str, Any]], folder: Path) -> str:
    """Every table, and why a candidate is missing."""
    parts = ["# Results\n", *_head(documents)]
    for title, picture, text in _sections(documents, everything=True):
        parts += [f"## {title}\n", text, _image(picture, folder, folder)]
    if reasons := _reasons(documents):
        parts += ["## What was left out, and why\n", reasons]
    return "\n".join(part for part in parts if part)


def section(documents: dict[str, dict[str, Any]], folder: Path, file: Path) -> str:
    """The part of a README: what decides, and the pictures."""
    parts = list(_head(documents))
    for title, picture, text in _sections(documents, everything=False):
        parts += [f"**{title}**\n", text, _image(picture, folder, file.resolve().parent)]
    link = relpath((folder / "report.md").resolve(), file.resolve().parent)
    parts.append(f"Everything measured, and why something is missing: [{link}]({link}).\n")
    return "\n".join(part for part in parts if part)


def around_marks(file: Path) -> tuple[str, str]:
    """What stands before and after the part to replace; UserError where the marks are not there, once each."""
    content = file.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise UserError(f"{file} must hold the lines '{BEGIN}' and '{END}' once each, in this order")
    return content.split(BEGIN)[0], content.split(END)[1]


def put_between_marks(file: Path, text: str) -> None:
    before, after = around_marks(file)
    write_text(file, f"{before}{BEGIN}\n{text.rstrip()}\n{END}{after}")


def _head(documents: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A line for each machine and commit that the results come from."""
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


def _sections(documents: dict[str, dict[str, Any]], everything: bool) -> Iterator[tuple[str, str | None, str]]:
    """Title, picture and Markdown of each part that there are results for."""
    rows: dict[str, list[Row]] = {job: document["rows"] for job, document in documents.items()}
    if "loss" in rows:
        some = rows["loss"] if everything else _headline(rows["loss"])
        floor = "the floor is the bare matrix products of the same shapes and dtype"
        text = tables.ratios("", some).markdown() + _disturbed(rows["loss"])
        yield f"Speed of ours, forward + backward; {floor}", "time.png", text
        if everything:
            yield "Every candidate as a multiple of the floor", "share.png", tables.speed("", some).markdown()
        grown = tables.growth("", rows["loss"])
        if grown is not None:
            yield "Growth with N at a constant workspace", None, grown.markdown()
    builders: dict[str, tuple[str, str | None, Callable[[str, list[Row]], Table]]] = {
        "memory": ("Memory beyond the inputs, MiB", "memory.png", tables.memory),
        "accuracy": ("Relative error of the anchors' gradient against float64", "error.png", tables.accuracy),
        "train": ("Training steps", None, tables.train),
        "study": (
            "Trainings on equally many sentences; mean ± standard deviation over seeds",
            "study.png",
            tables.study,
        ),
    }
    for job, (title, picture, build) in builders.items():
        if job in rows:
            some = rows[job]
            if job == "accuracy" and not everything:
                some = [row for row in some if row["way"] == "one-way"]
            yield title, picture, build("", some).markdown()
    if everything and "accuracy" in rows:
        table = tables.accuracy("", rows["accuracy"], "loss")
        yield "Relative error of the loss against float64", None, table.markdown()
    if everything and "tune" in rows:
        lines = [
            [r["search"], r["case"], str(r["setting"]), tables.number(r["ms"]["median"])] for r in rows["tune"]
        ]
        table = Table("", ["search", "case", "setting", "ms"], lines, text_columns=2)
        yield "Settings, the fastest first", None, table.markdown()


def _disturbed(rows: list[Row]) -> str:
    """A warning where the bare products' own times are far apart."""
    floors = [row["ms"] for row in rows if row["candidate"] == FLOOR and row["status"] == "ok"]
    wide = [ms for ms in floors if ms["p80"] > SPREAD * ms["p20"]]
    if not wide:
        return ""
    return (
        f"\n**Disturbed**: in {len(wide)} of {len(floors)} cases the bare products' own 80 % quantile is more "
        f"than {SPREAD} times their 20 % quantile. Run again with nothing beside it.\n"
    )


def _headline(rows: list[Row]) -> list[Row]:
    some = [row for row in rows if row["D"] == HEADLINE_D]
    return some or rows


def _image(picture: str | None, folder: Path, base: Path) -> str:
    if picture is None or not (folder / picture).is_file():
        return ""
    return f"![{PICTURES[picture]}]({relpath((folder / picture).resolve(), base.resolve())})\n"


def _reasons(documents: dict[str, dict[str, Any]]) -> str:
    """Candidate → why there is no number, and in how many cases."""
    found: dict[tuple[str, str, str, str], int] = {}
    for job, document in documents.items():
        for row in document["rows"]:
            if row.get("status", "ok") != "ok":
                name = row.get("candidate") or row.get("way") or row["loss"]
                key = (job, name, row["status"], row.get("reason", ""))
                found[key] = found.get(key, 0) + 1
    lines = [[*key, str(count)] for key, count in found.items()]
    if not lines:
        return ""
    return Table("", ["job", "candidate", "result", "reason", "cases"], lines, text_columns=4).markdown()
