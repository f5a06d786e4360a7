"""What the results say, in sentences: how much faster, leaner and more exact, against whom, and at which size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.cases import Case
from bench.render import number
from bench.results import Document, Row
from bench.tables import HEADLINE_D, Found, best_peer, by_case, ours_in


def sentences(documents: dict[str, Document]) -> list[str]:
    """Returns a sentence for each of time, memory and accuracy that there are results for."""
    makers = {"loss": _faster, "memory": _leaner, "accuracy": _more_exact}
    made = [make(by_case(documents[job]["rows"])) for job, make in makers.items() if job in documents]
    return [sentence for sentence in made if sentence]


def _compared(groups: dict[Case, Found], value: Callable[[Row], float]) -> Iterator[tuple[Case, Found]]:
    """Yields the one-way cases with numbers of ours and of naive, the largest last."""
    for case, found in sorted(groups.items(), key=lambda item: (item[0].D == HEADLINE_D, item[0].N)):
        plain = (case.mode, case.noise, case.negatives) == ("one-way", 0, 0)
        if plain and ours_in(found) and found.get("naive", {}).get("status") == "ok" and value(found["naive"]) > 0:
            yield case, found


def _against(found: Found, value: Callable[[Row], float], words: tuple[str, str], form: str) -> str:
    """Returns "2× faster than naive (3 ms) and ..." for naive, its compiled form and the best other package."""
    ours = value(found[ours_in(found) or ""])
    compiled = found.get("naive-compile", {}).get("status") == "ok"
    others = ["naive", *(["naive-compile"] if compiled else []), best_peer(found, value)]
    parts = []
    for name in others:
        if name and (theirs := value(found[name])) > 0 and ours > 0:
            ratio, word = (theirs / ours, words[0]) if theirs >= ours else (ours / theirs, words[1])
            best = "the best other candidate, " if name == others[-1] else ""
            parts.append(f"{ratio:,.{0 if ratio >= 10 else 2}f}× {word} than {best}{name} ({form.format(theirs)})")
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _faster(groups: dict[Case, Found]) -> str:
    def ms(row: Row) -> float:
        return float(row["ms"]["median"])

    usual = {c: f for c, f in groups.items() if c.regime == "middle" and c == Case(c.N, c.D, dtype=c.dtype)}
    cases = list(_compared(usual, ms))
    if not cases:
        return ""
    case, found = cases[-1]
    small, others = next((c, f) for c, f in cases if (c.D, c.dtype) == (case.D, case.dtype))
    name = ours_in(found) or ""
    text = f"Time: at {_size(case)} {name} takes {number(ms(found[name]))} ms, "
    text += _against(found, ms, ("faster", "slower"), "{:,.3g} ms")
    if small.N < case.N:
        text += f"; at N = {small.N:,} it is " + _against(others, ms, ("faster", "slower"), "{:,.3g} ms")
    return text + "."


def _leaner(groups: dict[Case, Found]) -> str:
    def mib(row: Row) -> float:
        return float(row["mib"]["all"])

    cases = list(_compared(groups, mib))
    if not cases:
        return ""
    case, found = cases[-1]
    name = ours_in(found) or ""
    text = f"Memory: at {_size(case)} {name} needs {number(mib(found[name]))} MiB beyond the inputs, "
    text += _against(found, mib, ("less", "more"), "{:,.0f} MiB")
    beyond = [
        (c, f) for c, f in groups.items() if c.N > case.N and c.at(case.N) == case
        and f.get("naive", {}).get("status") == "out of memory" and ours_in(f)
    ]  # fmt: skip
    if beyond:
        larger, f = beyond[-1]
        text += (
            f"; at N = {larger.N:,} it needs {number(mib(f[ours_in(f) or '']))} MiB, and naive runs out of memory"
        )
    return text + "."


def _more_exact(groups: dict[Case, Found]) -> str:
    def error(row: Row) -> float:
        return float(row["errors"]["dq"])

    cases = [(c, f) for c, f in _compared(groups, error) if c.regime == "trained"]
    if not cases:
        return ""
    case, found = next(((c, f) for c, f in cases if c.dtype == "bf16"), cases[-1])
    name = ours_in(found) or ""
    text = f"Accuracy: at the stage trained, {_size(case)}, the gradient of {name} has a relative error of "
    text += f"{error(found[name]):.1e}, " + _against(found, error, ("smaller", "larger"), "{:.1e}")
    return text + "."


def _size(case: Case) -> str:
    return f"N = {case.N:,}, D = {case.D} in {case.dtype}"
