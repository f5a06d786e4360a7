"""Plots: the path of training in the alignment-uniformity plane, cosines by grade, and the spectrum."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from simcse.files import replaced


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
    ends = ((0, "before", True), (-1, "end", False)) if len(points) > 1 else ()
    for i, label, below in ends:
        axes.annotate(
            label,
            (x[i], y[i]),
            xytext=(0, -24 if below else 16),  # clear of the ring, which has a radius of 8 points
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            zorder=4,  # over the path and the ring
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )
    axes.margins(0.16)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.set_xlabel("uniformity   (← better)")
    axes.set_ylabel("alignment   (better ↓)")
    axes.set_title(title)
    _write(figure, path)


def plot_densities(cosines: Sequence[float], grades: Sequence[float], title: str, path: str | Path) -> None:
    """Write a PNG: the distribution of the pairs' cosines in each fifth of the range of grades.

    After figure 3 in SimCSE. Grades that tell apart have curves apart.
    """
    cosines, grades = np.asarray(cosines), np.asarray(grades)
    edges = np.linspace(grades.min(), grades.max(), 6)
    figure, axes = _figure()
    bins = np.linspace(cosines.min(), max(cosines.max(), cosines.min() + 1e-6), 41)
    colours = ["#440154", "#3b528b", "#21918c", "#5ec962", "#d9b400"]
    for i, (low, high) in enumerate(pairwise(edges)):
        inside = (grades >= low) & ((grades < high) if i < 4 else (grades <= high))
        if inside.sum() < 2:
            continue
        density, _ = np.histogram(cosines[inside], bins, density=True)
        smooth = np.convolve(density, np.array([1, 2, 3, 2, 1]) / 9, mode="same")
        label = f"grade {low:.1f} to {high:.1f} ({inside.sum():,} pairs)"
        axes.plot((bins[1:] + bins[:-1]) / 2, smooth, color=colours[i], linewidth=1.8, label=label)
    axes.set_xlabel("cosine similarity")
    axes.set_ylabel("density")
    if axes.lines:
        axes.legend(loc="upper left", frameon=False)
    _save(figure, axes, title, path)


def plot_spectrum(values: Sequence[float], title: str, path: str | Path) -> None:
    """Write a PNG: the singular values of the sentence matrix, the largest 1; a steep fall is anisotropy."""
    values = np.asarray(values) / max(values)
    figure, axes = _figure()
    axes.plot(np.arange(1, len(values) + 1), values, color="#3b528b", linewidth=1.8)
    axes.set_yscale("log")
    axes.set_ylim(max(values.min(), 1e-4) / 1.5, 1.5)
    axes.set_xlabel("index")
    axes.set_ylabel("singular value / the largest")
    _save(figure, axes, title, path)


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, axes: Any, title: str, path: str | Path) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.set_title(title)
    _write(figure, path)


def _write(figure: Figure, path: str | Path) -> None:
    with replaced(path) as unfinished:
        figure.savefig(unfinished, dpi=150, format="png")


def heat_map(cosines: np.ndarray, sentences: Sequence[str]) -> Figure:
    """The cosines (K, K) of K sentences with each other, as colours, and as numbers where there is room."""
    count = len(sentences)
    size = max(3.6, min(11.0, 1.0 + 0.5 * count))
    figure = Figure(figsize=(size + 4, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Not aspect="equal": the layout then takes two passes to make room for the labels, and a file is one.
    image = axes.imshow(cosines, cmap="viridis", vmin=min(0.0, float(cosines.min())), vmax=1, aspect="auto")
    figure.colorbar(image, ax=axes, label="cosine similarity")
    labels = [f"{i}  {_shortened(sentence, 40)}" for i, sentence in enumerate(sentences, 1)]
    axes.set_yticks(range(count), labels, parse_math=False)  # a sentence may hold dollar signs
    axes.set_xticks(range(count), [str(i) for i in range(1, count + 1)])
    axes.tick_params(length=0, labelsize=10 if count <= 20 else 7)
    if count <= 15:
        for (i, j), value in np.ndenumerate(cosines):
            colour = "black" if image.norm(value) > 0.6 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    return figure


def sentence_maps(maps: dict[str, np.ndarray], sentences: Sequence[str]) -> Figure:
    """For each title its points (S, 2), one per sentence, side by side on the same scale."""
    figure = Figure(figsize=(6.4 * len(maps), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    extent = 1.1 * max(float(np.abs(points).max()) for points in maps.values()) or 1.0
    for i, (title, points) in enumerate(maps.items(), 1):
        axes = figure.add_subplot(1, len(maps), i)
        axes.scatter(
            points[:, 0], points[:, 1], s=26, color="#3b528b", alpha=0.7, edgecolors="white", linewidths=0.5
        )
        if len(sentences) <= 25:
            for point, sentence in zip(points, sentences, strict=True):
                left = point[0] > 0  # so that no label leaves the picture
                axes.annotate(
                    _shortened(sentence, 24), point, xytext=(-4 if left else 4, 3), textcoords="offset points",
                    ha="right" if left else "left", fontsize=7, color="0.3", parse_math=False,
                )  # fmt: skip
        axes.set_xlim(-extent, extent)
        axes.set_ylim(-extent, extent)
        axes.set_aspect("equal")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second principal component")
        axes.set_title(title, parse_math=False)
    return figure


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
