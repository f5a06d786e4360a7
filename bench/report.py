"""The report: ``report.md`` and its pictures, and the blocks of pages that show the results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from os.path import relpath
from pathlib import Path

from bench import tables
from bench.charts import readme_charts
from bench.render import Chart, Section
from bench.results import Document
from bench.summary import sentences
from simcse.errors import UserError
from simcse.files import write_text

BEGIN, END = "<!-- bench: begin (python -m bench report) -->", "<!-- bench: end -->"
BLOCK = re.compile(r"(<!-- bench: begin (?:([a-z-]+) )?\(.*?\) -->\n)(.*?)" + END, re.DOTALL)
NAMES = {"machine", "summary", "pictures"}  # of blocks that are no section
NAMES |= {"time", "temperatures", "floor", "memory", "error", "loss-error", "train", "settings"}


def write(
    documents: dict[str, Document], made: Iterable[Section], folder: Path, pages: Iterable[Path] = ()
) -> None:
    """Writes the pictures and ``report.md``, and replaces the blocks of ``pages``."""
    made, pictures = list(made), list(readme_charts(documents))
    for chart in [*(section.chart for section in made if section.chart), *pictures]:
        chart.draw(folder)
    head, summary = "\n".join(_head(documents)), "".join(f"- {line}\n" for line in sentences(documents))
    parts = ["# Results\n", head, *([summary] if summary else [])]
    parts += [f"## {s.title}\n\n{s.markdown(folder, folder)}" for s in made]
    if reasons := tables.reasons(documents):
        parts.append(f"## What was left out, and why\n\n{reasons.markdown()}")
    write_text(folder / "report.md", "\n".join(parts))
    for page in pages:
        base = page.resolve().parent
        link = relpath((folder / "report.md").resolve(), base)
        shown = {s: f"**{s.title}**\n\n{s.markdown(folder, base)}" for s in made}
        blocks = {s.name: text for s, text in shown.items()}
        blocks |= {"machine": head, "summary": summary, "pictures": _side_by_side(pictures, folder, base)}
        also = f"All measurements, and why some are missing: [{link}]({link}).\n"
        blocks[""] = "\n".join([head, *shown.values(), also])
        write_text(page, BLOCK.sub(lambda match, blocks=blocks: _filled(match, blocks), read_page(page)))


def _filled(match: re.Match[str], blocks: dict[str, str]) -> str:
    begin, name, text = match.groups()
    return f"{begin}{blocks.get(name or '') or text}{END}"  # without results it stays as it is


def _side_by_side(charts: list[Chart], folder: Path, base: Path) -> str:
    images = [f'<img src="{chart.link(folder, base)}" alt="{chart.alt}" width="420">' for chart in charts]
    rows = (images, ["---"] * len(charts), [chart.caption for chart in charts])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) if charts else ""


def read_page(page: Path) -> str:
    """Returns its text; raises UserError unless it has blocks, and only such whose names are known."""
    text = page.read_text(encoding="utf-8")
    names = [name for _, name, _ in BLOCK.findall(text)]
    if not names or any(text.count(mark) != len(names) for mark in ("<!-- bench: begin", END)):
        raise UserError(f"{page} must hold the lines '{BEGIN}' and '{END}', as often and in this order")
    if unknown := set(names) - NAMES - {""}:
        raise UserError(f"{page} has a block named {min(unknown)}; known are {', '.join(sorted(NAMES))}")
    return text


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
        if left_out := document.get("left_out"):
            note += f" ({len(left_out)} cases left out for lack of time: {', '.join(left_out)})"
        origins.setdefault(origin, []).append(note)
    for origin, commands in origins.items():
        yield f"Measured on {origin}: {', '.join(dict.fromkeys(commands))}.\n"
