"""From the rows of results to pictures: time and memory by size, and the gradient's error by stage of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.cases import Case
from bench.floor import FLOOR
from bench.render import Chart, Panel, Point, beside
from bench.results import Document, Row
from bench.tables import Found, by_case, ms, names_in
from fused_infonce.testing import REGIMES

LARGEST_RATIO = 3.0  # to the naive loss, that is drawn
SMALLEST_ERROR = 1e-16  # that is drawn, for a logarithmic axis has no 0
README_NAMES = ("ours-triton", "ours-torch", "naive", "st-mnrl", "st-cached-mnrl", "torch-linear-ce", "memeff")
README_SIZE = (4.4, 3.7)  # inches; at 200 dots per inch sharp at 420 pixels
PRODUCTS, UNAVOIDABLE = "bare products", "gradients and rows"
N_AXIS, STAGE = "N, anchors per batch", "stage of training"
PEERS_IN_FP32 = "Under bf16, st-mnrl, st-cached-mnrl and pml-ntxent multiply in fp32, as their trainers do."
OURS_IN_FP32 = " So does ours on this CPU, which multiplies fp32 faster than bf16."


def time_by_size(document: Document) -> Chart | None:
    """Draws, for each dtype, milliseconds on logarithmic axes and beside them the ratio to the naive loss."""
    rows = document["rows"]
    times = _panels(rows, "N", "D", lambda row, _: ms(row), PRODUCTS, y="time, ms")
    look = {"y": "time / time of naive", "log_y": False, "mark": 1.0}
    ratios = _panels(rows, "N", "D", _over_naive, PRODUCTS, **look)
    if not times:
        return None
    return Chart(
        "time.png",
        "Time over N for every candidate, in ms and as a ratio to the naive loss",
        [panel for pair in zip(times, ratios, strict=True) for panel in pair],
        N_AXIS,
        PRODUCTS,
        "Forward and backward. Left: ms, on logarithmic axes. Right: the ratio to the naive loss on a linear axis "
        f"(1.0 is dotted; ratios above {LARGEST_RATIO:g} are left out). {_in_fp32(document)}",
        share_y=False,
    )


def share_by_features(document: Document) -> Chart | None:
    y = "time of the bare products / time"
    share = _panels(document["rows"], "D", "N", lambda row, _: 1 / row["of_floor"], y=y, log_y=False, mark=1.0)
    alt = "Share of the floor over D for every candidate"
    caption = f"1.0 (dotted): as fast as the products. {_in_fp32(document)}"
    return Chart("share.png", alt, share, "D, features per row", caption=caption) if share else None


def memory_by_size(document: Document) -> Chart | None:
    made = _memory_panels(document["rows"])
    alt = "Peak memory over N for every candidate"
    caption = f"Beyond the inputs, on logarithmic axes. A line ends where memory did. {_in_fp32(document)}"
    return Chart("memory.png", alt, made, N_AXIS, UNAVOIDABLE, caption) if made else None


def error_by_stage(document: Document) -> Chart | None:
    rows = [row for row in document["rows"] if row["mode"] == "one-way"]
    panels = [_error_panel(rows, dtype) for dtype in dict.fromkeys(row["dtype"] for row in rows)]
    alt = "Error of the gradient at each stage of training for every candidate"
    caption = "‖error of dq‖ / ‖dq‖ against float64, one-way; at 1 (dotted) no digit of the gradient is right. "
    caption += f"τ = 0.05, at retrieval 0.01. {PEERS_IN_FP32}"
    return Chart("error.png", alt, panels, STAGE, caption=caption, ticks=_stages(rows)) if panels else None


def readme_charts(documents: dict[str, Document]) -> Iterator[Chart]:
    """Yields two pictures of one size: the gradient's error by stage of training, and peak memory by N."""

    def few(job: str, dtype: str) -> list[Row]:
        rows = documents.get(job, {"rows": []})["rows"]
        return [row for row in rows if row["candidate"] in README_NAMES and row["dtype"] == dtype]

    if rows := few("accuracy", "bf16"):
        alt = "Gradient error by stage of training"
        caption = "Relative error of the gradient by stage of training, bf16; at 1 (dotted) no digit is right."
        caption += " The losses st-mnrl and st-cached-mnrl multiply in fp32 here, as their trainer does."
        chart = Chart("readme-error.png", alt, [_error_panel(rows, "bf16")], STAGE, caption=caption)
        chart.ticks, chart.size = _stages(rows), README_SIZE
        yield chart
    if made := _memory_panels(few("memory", "fp32")):
        alt = "Peak memory by number of anchors"
        caption = (
            "Peak memory of the loss beyond its inputs, forward and backward, fp32; a line ends where memory did."
        )
        yield Chart("readme-memory.png", alt, made[:1], N_AXIS, UNAVOIDABLE, caption, size=README_SIZE)


# ------------------------------------------------------------------ panels


def plain_cases(rows: Iterable[Row]) -> dict[Case, Found]:
    """Returns the one-way cases in the middle of training, without noise and hard negatives."""
    return {c: f for c, f in by_case(rows).items() if c == Case(c.N, c.D, dtype=c.dtype)}


def _in_fp32(document: Document) -> str:
    """Says what is computed in fp32 although the dtype is bf16."""
    ours = document["device"] == "cpu" and not document["machine"].get("half_products", True)
    return PEERS_IN_FP32 + OURS_IN_FP32 * ours


def _over_naive(row: Row, found: Found) -> float:
    ratio = ms(row) / ms(found["naive"])
    return ratio if ratio <= LARGEST_RATIO else 0.0


def _panels(
    rows: list[Row], x: str, fixed: str, value: Callable[[Row, Found], float], base: str = "", **look: Any
) -> list[Panel]:
    """Returns a panel per dtype over the field ``x``, at the value of ``fixed`` that was measured most.

    ``base`` names the line of FLOOR. Points that are not positive or have no value (KeyError) are left out.
    """
    plain, made = plain_cases(rows), []
    for dtype in dict.fromkeys(c.dtype for c in plain):
        weights: Counter[int] = Counter()
        for case, found in plain.items():
            weights[getattr(case, fixed)] += len(names_in([found])) * (case.dtype == dtype)
        chosen = max(weights, key=lambda at: (weights[at], at))
        cases = [c for c in plain if (c.dtype, getattr(c, fixed)) == (dtype, chosen)]
        cases.sort(key=lambda c: getattr(c, x))
        names = ({base: FLOOR} if base else {}) | {name: name for name in names_in(plain[c] for c in cases)}
        lines: dict[str, list[Point]] = {line: [] for line in names}
        for case in cases:
            for line, name in names.items():
                row = plain[case].get(name, {"status": "skipped"})
                try:
                    y = value(row, plain[case]) if row["status"] == "ok" else 0.0
                except KeyError:
                    continue
                if y > 0:
                    lines[line].append((getattr(case, x), y))
        if len(cases) > 1:
            made.append(Panel(f"{dtype}, {fixed} = {chosen:,}", lines, **look))
    return made


def _memory_panels(rows: list[Row]) -> list[Panel]:
    floors = []  # rows for the chart only
    for case, found in by_case(rows).items():
        if measured := next((row["mib"] for row in found.values() if "mib" in row), None):
            mib = {"all": measured["all"] - measured["beyond"]}
            floors.append({**case.as_dict(), "candidate": FLOOR, "status": "ok", "mib": mib})
    return _panels([*rows, *floors], "N", "D", lambda row, _: row["mib"]["all"], UNAVOIDABLE, y="peak memory, MiB")


def _stages(rows: list[Row]) -> list[str]:
    return [stage for stage in REGIMES if any(row["regime"] == stage for row in rows)]


def _error_panel(rows: list[Row], dtype: str) -> Panel:
    """Returns the error of dq by stage of training, one-way; the candidates stand beside each other."""
    stages, lines, groups = _stages(rows), {}, by_case(rows)
    names = names_in(groups.values())
    for place, name in enumerate(names):
        points: list[Point] = [
            (stages.index(case.regime), max(found[name]["errors"]["dq"], SMALLEST_ERROR))
            for case, found in groups.items()
            if (case.dtype, case.mode) == (dtype, "one-way") and "errors" in found.get(name, {})
        ]
        lines[name] = beside(points, place, len(names))
    return Panel(f"{dtype} products", lines, "relative error of dq (↓ better)", mark=1.0)
