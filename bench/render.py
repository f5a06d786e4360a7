"""Tables and charts, and how they look on the terminal, in Markdown and as pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from os.path import relpath
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from rich import box
from rich.table import Table as RichTable

from simcse.files import replaced

# Colour, marker and line width: ours warm and thick, the standard implementations dark, the others thin.
STYLE = {
    "ours-triton": ("#d62728", "o", 2.4),
    "ours-torch": ("#ff7f0e", "s", 2.4),
    "ours-two-sweeps": ("#e377c2", "D", 1.4),
    "ours-reference": ("#c7a17a", "P", 1.4),
    "naive": ("#1f3b73", "o", 1.8),
    "naive-compile": ("#4c78a8", "s", 1.8),
    "simcse-broadcast": ("#7f7f7f", "^", 1.2),
    "st-mnrl": ("#2ca02c", "v", 1.2),
    "st-cached-mnrl": ("#98c379", "<", 1.2),
    "pml-ntxent": ("#9467bd", ">", 1.2),
    "info-nce-pytorch": ("#17becf", "X", 1.2),
    "torch-linear-ce": ("#b5179e", "P", 1.2),
    "liger": ("#bcbd22", "*", 1.2),
    "cce": ("#8c564b", "p", 1.2),
    "cce-exact": ("#5d3a32", "h", 1.2),
    "quack": ("#393b79", "d", 1.2),
    "inf-cl": ("#637939", "H", 1.2),
    "memeff": ("#843c39", "8", 1.2),
    "open-clip": ("#7b4173", "1", 1.2),
}
HIDDEN = 0.03  # relative difference of two lines that look like one
LABEL_GAP = 0.05  # between the names of two lines, in heights of a panel

Point = tuple[float, ...]  # x, y and, where there is one, the spread of y


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]
    text_columns: int = 1  # aligned to the left; the others hold numbers

    def markdown(self) -> str:
        rule = ["---" if i < self.text_columns else "--:" for i in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def rich(self, title: str) -> RichTable:
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < self.text_columns else "right", no_wrap=i == 0)
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(eq=False)
class Section:
    """What is shown of results: a table, with a picture and a note where there are some."""

    title: str
    table: Table
    chart: Chart | None = None
    note: str = ""
    name: str = ""  # of its block in pages

    def markdown(self, folder: Path, base: Path) -> str:
        """Returns table, note and picture; pictures are in ``folder``, and linked from ``base``."""
        text = self.table.markdown() + self.note
        if self.chart:
            text += f"\n![{self.chart.alt}]({self.chart.link(folder, base)})\n"
            text += f"\n*{self.chart.caption}*\n" if self.chart.caption else ""
        return text

    def rich(self) -> RichTable:
        return self.table.rich(self.title)


@dataclass
class Panel:
    title: str
    lines: dict[str, list[Point]]
    y: str = ""
    log_y: bool = True
    mark: float | None = None  # a horizontal line


@dataclass
class Chart:
    """Panels in rows. The line named ``baseline`` is dashed and black.

    Over numbers, lines are named at their ends; over ``ticks``, the names of x = 0, 1, …, by a legend.
    """

    file: str
    alt: str  # text for readers without the picture
    panels: list[Panel]
    x: str
    baseline: str | None = None
    caption: str = ""
    ticks: list[str] = field(default_factory=list)
    share_y: bool = True  # among the panels of a row
    style: dict[str, tuple[str, str, float]] = field(default_factory=lambda: STYLE)
    size: tuple[float, float] | None = None  # inches

    def draw(self, folder: Path) -> Path:
        columns = min(2, len(self.panels))
        rows = -(-len(self.panels) // columns)
        size = self.size or (max(7.6, 5.6 * columns), 1.2 + 4.0 * rows)
        figure = Figure(figsize=size, layout="constrained")
        share = "row" if self.share_y else False
        grid = figure.subplots(rows, columns, sharey=share, squeeze=False)
        shown = list(zip(grid.flat, self.panels, strict=False))
        for index, (axes, panel) in enumerate(shown):
            self._panel(axes, panel)
            if index % columns == 0 or not self.share_y:
                axes.set_ylabel(panel.y)
            if index >= len(shown) - columns:
                axes.set_xlabel(self.x)
        for axes, panel in shown:  # once the shared limits are known
            if not panel.log_y and panel.mark is not None:
                axes.set_ylim(0, max(1.15 * panel.mark, axes.get_ylim()[1]))
            if not self.ticks:
                self._name_ends(axes, panel)
        if self.ticks:
            self._legend(figure, 2 if self.size else 5)
        FigureCanvasAgg(figure)
        with replaced(folder / self.file) as unfinished:
            figure.savefig(unfinished, dpi=200 if self.size else 120, format="png", facecolor="white")
        return folder / self.file

    def link(self, folder: Path, base: Path) -> str:
        return relpath((folder / self.file).resolve(), base.resolve())

    def _panel(self, axes: Axes, panel: Panel) -> None:
        axes.set_title(panel.title, fontsize="medium")
        axes.set_axisbelow(True)
        axes.grid(color="0.92", axis="y" if self.ticks else "both")
        for name, points in panel.lines.items():
            if points:
                x, y, *spread = zip(*points, strict=True)
                axes.errorbar(x, y, *spread, capsize=3, **self._look(name))
        if panel.mark is not None:
            axes.axhline(panel.mark, color="black", linestyle=":", linewidth=1)
        if panel.log_y:
            axes.set_yscale("log")
            if axes.get_ylim()[0] > 1e-3:  # milliseconds and MiB; errors keep their powers of ten
                axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        if self.ticks:
            axes.set_xticks(range(len(self.ticks)), self.ticks)
            for edge in range(1, len(self.ticks)):
                axes.axvline(edge - 0.5, color="0.85", linewidth=1)
            return
        axes.set_xscale("log")
        ticks = sorted({round(point[0], 6) for points in panel.lines.values() for point in points})
        close = any(b < 1.5 * a for a, b in pairwise(ticks))
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))
        axes.tick_params(axis="x", labelsize="small", rotation=30 if close else 0)

    def _name_ends(self, axes: Axes, panel: Panel) -> None:
        """Names each line right of its last point, beside the panel where this is the last of all."""
        to_axes = axes.transData + axes.transAxes.inverted()
        ends: dict[float, list[tuple[float, list[str]]]] = {}  # place of the last point → height and names
        for names in _together(panel.lines):
            x, height = to_axes.transform(panel.lines[names[0]][-1][:2])
            ends.setdefault(round(x, 4), []).append((height, names))
        gap = LABEL_GAP * (1.3 if self.size else 1)
        for x, labels in ends.items():
            labels.sort()
            right = 1.04 if x == max(ends) else x + 0.04
            for place, (height, names) in zip(_apart([h for h, _ in labels], gap), labels, strict=True):
                colour = self._look(names[0])["color"]
                leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
                leader["relpos"] = (0, 0.5)  # it begins at the left of the name
                axes.annotate(
                    ", ".join(names), (x, height), (right, place), "axes fraction", va="center",
                    fontsize="small", color=colour, arrowprops=leader, annotation_clip=False,
                )  # fmt: skip

    def _legend(self, figure: Figure, columns: int) -> None:
        names = dict.fromkeys(name for panel in self.panels for name, points in panel.lines.items() if points)
        handles = [Line2D([], [], label=name, **self._look(name)) for name in names]
        columns = max(1, min(columns, len(names)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")

    def _look(self, name: str) -> dict[str, Any]:
        if name == self.baseline:
            return {"color": "black", "linestyle": "--", "linewidth": 1.4}
        colour, marker, width = self.style.get(name.split(",")[0], ("#555555", "+", 1.2))
        line = {"linestyle": "none"} if self.ticks else {"linewidth": width}
        return {"color": colour, "marker": marker, "markersize": 4 + width, "zorder": 2 + width, **line}


def _together(lines: dict[str, list[Point]]) -> list[list[str]]:
    """Returns the names of the lines; those that hide each other at every point are one list."""
    groups: list[list[str]] = []
    for name, points in lines.items():
        for group in groups:
            other = lines[group[0]]
            if len(other) == len(points) and all(
                a[0] == b[0] and abs(a[1] - b[1]) < HIDDEN * a[1] for a, b in zip(points, other, strict=True)
            ):
                group.append(name)
                break
        else:
            groups += [[name]] if points else []
    return groups


def _apart(heights: list[float], gap: float) -> list[float]:
    """Returns ascending heights within 0 to 1, moved as little as makes them ``gap`` apart."""

    def lowest(group: list[float]) -> float:
        height = gap * (len(group) - 1)
        return max(0.0, min(sum(group) / len(group) - height / 2, 1 - height))

    groups: list[list[float]] = []  # of heights that touch, each group centred where it was
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and lowest(groups[-1]) < lowest(groups[-2]) + gap * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [lowest(group) + gap * i for group in groups for i in range(len(group))]


def _plain(x: float, _: int) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:g}"


def number(x: float) -> str:
    """Returns three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def beside(points: Iterable[Point], place: int, count: int) -> list[Point]:
    """Moves the points of one of ``count`` series along x, so that they do not cover each other."""
    offset = 0.5 * (place / max(1, count - 1) - 0.5)
    return sorted((x + offset, *y) for x, *y in points)
