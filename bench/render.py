"""Tables and charts, and how they look on the terminal, in Markdown and as pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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
    "siglip-kernel": ("#aaaaaa", "2", 1.2),
}

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


@dataclass
class Panel:
    title: str
    lines: dict[str, list[Point]]


@dataclass
class Chart:
    """Panels side by side. The line named ``baseline`` is dashed and black."""

    file: str
    alt: str  # text for readers without the picture
    panels: list[Panel]
    x: str
    y: str
    baseline: str | None = None
    log_y: bool = True
    share_y: bool = True
    ticks: list[str] = field(default_factory=list)  # names of x = 0, 1, …; without them x is logarithmic
    style: dict[str, tuple[str, str, float]] = field(default_factory=lambda: STYLE)

    def draw(self, folder: Path) -> Path:
        width = max(7.6, 5.2 * len(self.panels) + 0.4)  # inches, so that the legend fits
        figure = Figure(figsize=(width, 5.6), layout="constrained")
        all_axes = figure.subplots(1, len(self.panels), sharey=self.share_y, squeeze=False)[0]
        for axes, panel in zip(all_axes, self.panels, strict=True):
            for name, points in panel.lines.items():
                if points:
                    x, y, *spread = zip(*points, strict=True)
                    axes.errorbar(x, y, *spread, capsize=3, **self._look(name))
            axes.set_title(panel.title)
            axes.set_xlabel(self.x)
            axes.set_axisbelow(True)
            self._x_axis(axes, panel)
        for axes in all_axes[: 1 if self.share_y else None]:
            if self.log_y:
                axes.set_yscale("log")
            elif self.share_y:
                axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
        all_axes[0].set_ylabel(self.y)
        names = dict.fromkeys(name for panel in self.panels for name, points in panel.lines.items() if points)
        columns = min(3 if width < 10 else 5, len(names))
        handles = [Line2D([], [], label=name, **self._look(name)) for name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=max(1, columns), frameon=False)
        FigureCanvasAgg(figure)
        with replaced(folder / self.file) as unfinished:
            figure.savefig(unfinished, dpi=120, format="png")
        return folder / self.file

    def _look(self, name: str) -> dict[str, Any]:
        if name == self.baseline:
            return {"color": "black", "linestyle": "--", "linewidth": 1.4}
        colour, marker, width = self.style.get(name, ("#555555", "+", 1.2))
        line = {"linestyle": "none"} if self.ticks else {"linewidth": width}
        return {"color": colour, "marker": marker, "markersize": 4 + width, "zorder": 2 + width, **line}

    def _x_axis(self, axes: Axes, panel: Panel) -> None:
        axes.grid(color="0.92", axis="y" if self.ticks else "both")
        if self.ticks:
            axes.set_xticks(range(len(self.ticks)), self.ticks)
            for edge in range(1, len(self.ticks)):
                axes.axvline(edge - 0.5, color="0.85", linewidth=1)
            return
        axes.set_xscale("log")
        axes.set_xticks(sorted({round(point[0]) for points in panel.lines.values() for point in points}))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))


def _thousands(x: float, _: int) -> str:
    return f"{x:,.0f}" if x < 10_000 else f"{x / 1024:,.0f}k"


def number(x: float) -> str:
    """Three digits."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def beside(points: Iterable[Point], place: int, count: int) -> list[Point]:
    """Moves the points of one of ``count`` series along x, so that they do not cover each other."""
    offset = 0.5 * (place / max(1, count - 1) - 0.5)
    return sorted((x + offset, *y) for x, *y in points)
