"""Pictures of results: time over N, memory over N, error by stage of training, share of the floor over D."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from bench.candidates import FLOOR
from bench.cases import REGIMES
from bench.results import Row
from bench.study import BEFORE, LOSSES, cells
from bench.tables import by_case, median, names_in
from simcse.files import replaced

# Ours in warm colours and thick, the usual ways dark, the others thin; the same in every picture.
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
    "liger": ("#bcbd22", "*", 1.2),
    "cce": ("#8c564b", "p", 1.2),
    "cce-exact": ("#5d3a32", "h", 1.2),
    "quack": ("#393b79", "d", 1.2),
    "inf-cl": ("#637939", "H", 1.2),
    "memeff": ("#843c39", "8", 1.2),
    "open-clip": ("#7b4173", "1", 1.2),
    "siglip-kernel": ("#aaaaaa", "2", 1.2),
}
REGIME_NAMES = {"random": "start", "cone": "narrow\ncone", "middle": "middle", "trained": "trained"}
REGIME_ORDER = ("cone", "random", "middle", "trained")


PRODUCTS = "floor: bare matrix products"


def draw(documents: dict[str, dict[str, Any]], folder: Path) -> list[Path]:
    """Writes every picture that the results hold something for; → the files."""
    jobs: dict[str, tuple[str, Callable[[list[Row]], Figure | None]]] = {
        "time.png": ("loss", time_over_n),
        "share.png": ("loss", share_over_d),
        "memory.png": ("memory", memory_over_n),
        "error.png": ("accuracy", error_over_regime),
        "study.png": ("study", score_over_batch),
    }
    made = []
    for file, (job, picture) in jobs.items():
        figure = picture(documents[job]["rows"]) if job in documents else None
        if figure is not None:
            FigureCanvasAgg(figure)
            with replaced(folder / file) as unfinished:
                figure.savefig(unfinished, dpi=120, format="png")
            made.append(folder / file)
    return made


def time_over_n(rows: list[Row]) -> Figure | None:
    def floor(found: dict[str, Row]) -> float | None:
        return median(found, FLOOR)

    return _over_n(rows, median, "milliseconds, forward + backward", floor, PRODUCTS)


def memory_over_n(rows: list[Row]) -> Figure | None:
    def value(found: dict[str, Row], name: str) -> float | None:
        return found[name]["mib"]["all"] if "mib" in found.get(name, {}) else None

    def floor(found: dict[str, Row]) -> float | None:
        measured = (row["mib"] for row in found.values() if "mib" in row)
        return next((mib["all"] - mib["beyond"] for mib in measured), None)

    return _over_n(rows, value, "MiB beyond the inputs", floor, "floor: gradients and normalised rows")


def _over_n(
    rows: list[Row],
    value: Callable[[dict[str, Row], str], float | None],
    label: str,
    floor: Callable[[dict[str, Row]], float | None],
    floor_label: str,
) -> Figure | None:
    """Log-log, a panel for each dtype, one-way, at the D that has the most N."""
    plain = {c: f for c, f in by_case(rows).items() if c.way == "one-way" and not c.noise and not c.negatives}
    panels = []
    for dtype in dict.fromkeys(c.dtype for c in plain):
        sizes: dict[int, int] = {}
        for case in plain:
            if case.dtype == dtype:
                sizes[case.D] = sizes.get(case.D, 0) + len(names_in([plain[case]]))
        D = max(sizes, key=lambda d: (sizes[d], d))
        cases = sorted((c for c in plain if (c.dtype, c.D) == (dtype, D)), key=lambda c: c.N)
        if len({c.N for c in cases}) > 1:
            panels.append((f"{dtype}, D = {D}", cases))
    if not panels:
        return None
    figure = Figure(figsize=(_width(len(panels)), 5.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = names_in(plain[c] for _, cases in panels for c in cases)
    for axes, (title, cases) in zip(all_axes, panels, strict=True):
        points = [(c.N, v) for c in cases if (v := floor(plain[c]))]
        if points:
            axes.plot(*zip(*points, strict=True), color="black", linestyle="--", linewidth=1.4)
        for name in names:
            points = [(c.N, v) for c in cases if (v := value(plain[c], name))]
            if points:
                axes.plot(*zip(*points, strict=True), **_look(name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        _axis(axes, "N, anchors in the batch", [c.N for c in cases])
        axes.set_title(title)
    all_axes[0].set_ylabel(label)
    _legend(figure, names, floor_label)
    return figure


def share_over_d(rows: list[Row]) -> Figure | None:
    """How much of a candidate's time the bare products alone take, at the N that has the most D."""
    plain = {c: f for c, f in by_case(rows).items() if c.way == "one-way" and not c.noise and not c.negatives}
    widths: dict[tuple[str, int], set[int]] = {}
    for c in plain:
        widths.setdefault((c.dtype, c.N), set()).add(c.D)
    panels = []
    for dtype in dict.fromkeys(c.dtype for c in plain):
        N = max((n for d, n in widths if d == dtype), key=lambda n: (len(widths[dtype, n]), n))
        cases = sorted((c for c in plain if (c.dtype, c.N) == (dtype, N)), key=lambda c: c.D)
        if len(cases) > 1:
            panels.append((f"{dtype}, N = {N}", cases))
    if not panels:
        return None
    figure = Figure(figsize=(_width(len(panels)), 5.2), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = names_in(plain[c] for _, cases in panels for c in cases)
    for axes, (title, cases) in zip(all_axes, panels, strict=True):
        axes.axhline(1, color="black", linestyle="--", linewidth=1.4)
        for name in names:
            points = [
                (c.D, f / m) for c in cases if (m := median(plain[c], name)) and (f := median(plain[c], FLOOR))
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **_look(name))
        axes.set_xscale("log")
        _axis(axes, "D, features", [c.D for c in cases])
        axes.set_title(title)
    all_axes[0].set_ylabel("share of the floor: time of the bare products / time")
    all_axes[0].set_ylim(0, max(1.15, all_axes[0].get_ylim()[1]))
    _legend(figure, names, PRODUCTS)
    return figure


def error_over_regime(rows: list[Row]) -> Figure | None:
    """Relative error of the anchors' gradient, a panel for each dtype."""
    found = {c: f for c, f in by_case(rows).items() if c.way == "one-way"}
    dtypes = list(dict.fromkeys(c.dtype for c in found))
    if not dtypes:
        return None
    regimes = [r for r in REGIME_ORDER if r in REGIMES and any(c.regime == r for c in found)]
    figure = Figure(figsize=(_width(len(dtypes)), 5.2), layout="constrained")
    all_axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    names = names_in(found.values())
    for axes, dtype in zip(all_axes, dtypes, strict=True):
        for place, name in enumerate(names):
            offset = 0.5 * (place / max(1, len(names) - 1) - 0.5)  # beside each other, not on top
            points = [
                (regimes.index(c.regime) + offset, f[name]["errors"]["dq"])
                for c, f in found.items()
                if c.dtype == dtype and "errors" in f.get(name, {})
            ]
            if points:
                axes.plot(
                    *zip(*sorted(points), strict=True), **_look(name) | {"linestyle": "none", "markersize": 7}
                )
        axes.set_yscale("log")
        axes.set_xticks(range(len(regimes)), [REGIME_NAMES[r] for r in regimes])
        for edge in range(1, len(regimes)):
            axes.axvline(edge - 0.5, color="0.85", linewidth=1)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_title(dtype)
        axes.set_xlabel("stage of training")
    all_axes[0].set_ylabel("‖error of dq‖ / ‖dq‖ against float64   (better ↓)")
    _legend(figure, names, None, lines=False)
    return figure


def score_over_batch(rows: list[Row]) -> Figure | None:
    """Mean over seeds, bars of one standard deviation, for each loss; a panel for each score."""
    names = {"dev": "dev split", "average": "mean of test splits"}
    found = dict(cells(rows))
    measured = [name for name in names if any(row.get(name) is not None for row in rows)]
    batches = sorted({batch for _, batch, _ in found if batch})
    if not measured or not batches:
        return None
    rates = sorted({rate for _, batch, rate in found if batch})
    figure = Figure(figsize=(_width(len(measured)), 5.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
        for (loss, rate), colour in zip(product(LOSSES, rates), _colours(len(rates)), strict=True):
            place = LOSSES.index(loss) - (len(LOSSES) - 1) / 2
            points = []
            for batch in batches:
                values = [row[name] for row in found.get((loss, batch, rate), []) if row.get(name) is not None]
                if values:
                    x = batch * 1.05**place  # beside each other, not on top
                    points.append((x, mean(values), stdev(values) if len(values) > 1 else 0.0))
            if points:
                label = loss if len(rates) == 1 else f"{loss}, {rate:g}"
                x, y, bars = zip(*points, strict=True)
                axes.errorbar(x, y, bars, label=label, color=colour, marker="o", capsize=3, linewidth=1.6)
        start = [row[name] for row in rows if row["loss"] == BEFORE and row.get(name) is not None]
        if start:
            axes.axhline(start[0], color="black", linestyle="--", linewidth=1.4, label=BEFORE)
        axes.set_xscale("log")
        _axis(axes, "sentences a batch", batches)
        axes.set_title(names[name])
    figure.axes[0].set_ylabel("Spearman × 100   (better ↑)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _colours(shades: int) -> list[tuple[float, float, float]]:
    """One for each loss, and lighter ones of it."""
    bases = [to_rgb(x) for x in ("#1f3b73", "#17becf", "#ff7f0e", "#d62728")]
    lighter = [0.6 * i / shades for i in range(shades)]
    return [(r + (1 - r) * w, g + (1 - g) * w, b + (1 - b) * w) for r, g, b in bases for w in lighter]


def _width(panels: int) -> float:
    return max(7.6, 5.2 * panels + 0.4)  # inches: the legend needs them


def _look(name: str) -> dict[str, Any]:
    colour, marker, width = STYLE.get(name, ("#555555", "+", 1.2))
    return {
        "gid": name,
        "color": colour,
        "marker": marker,
        "linewidth": width,
        "markersize": 4 + width,
        "zorder": 2 + width,
        "markeredgewidth": 0.8,
    }


def _axis(axes: Axes, label: str, ticks: Iterable[int]) -> None:
    axes.set_xlabel(label)
    axes.set_xticks(sorted(set(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x < 10_000 else f"{x / 1024:,.0f}k"))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)


def _legend(figure: Figure, names: list[str], floor: str | None, lines: bool = True) -> None:
    drawn = {line.get_gid() for axes in figure.axes for line in axes.lines}
    names = [name for name in names if name in drawn]
    handles = [Line2D([], [], label=n, **_look(n) | ({} if lines else {"linestyle": "none"})) for n in names]
    if floor is not None:
        handles.insert(0, Line2D([], [], color="black", linestyle="--", label=floor))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(3 if figure.get_figwidth() < 10 else 5, len(handles)),
        frameon=False,
    )
