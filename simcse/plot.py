"""The path of an encoder through training: alignment against uniformity, a point an evaluation."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_path(points: list[dict[str, Any]], title: str, path: str | Path, best_step: int | None = None) -> None:
    """Write a PNG of ``points`` (each with ``step``, ``alignment``, ``uniformity``), joined by step.

    After Wang & Isola 2020 and the figure in SimCSE: both axes are better towards the lower left.
    """
    points = sorted(points, key=lambda point: point["step"])
    steps = [point["step"] for point in points]
    x = [point["uniformity"] for point in points]
    y = [point["alignment"] for point in points]

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(x, y, color="0.75", linewidth=1.5, zorder=1)
    dots = axes.scatter(x, y, c=steps, cmap="viridis", s=60, edgecolors="white", linewidths=0.8, zorder=2)
    colours = figure.colorbar(dots, ax=axes, label="step")
    colours.locator = MaxNLocator(integer=True)
    if best_step in steps:
        best = steps.index(best_step)
        ring = {"facecolors": "none", "edgecolors": "crimson", "linewidths": 1.6}
        axes.scatter(x[best], y[best], s=190, zorder=3, label=f"best checkpoint (step {best_step})", **ring)
        axes.legend(loc="best")
    for i, label, below in ((0, "before", True), (-1, "end", False)):
        axes.annotate(
            label, (x[i], y[i]), xytext=(0, -22 if below else 14), textcoords="offset points", ha="center"
        )
    axes.margins(0.16)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.set_xlabel("uniformity   (← better)")
    axes.set_ylabel("alignment   (better ↓)")
    axes.set_title(title)
    figure.savefig(path, dpi=150)
