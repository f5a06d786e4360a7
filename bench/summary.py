"""What the results say, in three sentences: how much faster, leaner and more exact, and than what."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.cases import Case
from bench.charts import plain_cases
from bench.render import number
from bench.results import Document, Row
from bench.tables import Found, best_peer, by_case, measured, ms, ours_in

HEADLINE_D = 768
STANDARD = {"naive": "the standard loss", "naive-compile": "its compiled form"}


def sentences(documents: dict[str, Document]) -> list[str]:
    """Returns a sentence for each of time, memory and accuracy that there are results for."""
    makers = {"loss": _faster, "memory": _leaner, "accuracy": _more_exact}
    made = [make(documents[job]["rows"]) for job, make in makers.items() if job in documents]
    return [sentence for sentence in made if sentence]


def _compared(groups: dict[Case, Found], value: Callable[[Row], float]) -> Iterator[tuple[Case, Found]]:
    """Yields the one-way cases with numbers of ours and of naive, the largest last."""
    for case, found in sorted(groups.items(), key=lambda item: (item[0].D == HEADLINE_D, item[0].N)):
        plain = (case.mode, case.noise, case.negatives) == ("one-way", 0, 0)
        if plain and ours_in(found) and (measured(found, "naive", value) or 0) > 0:
            yield case, found


def _against(found: Found, value: Callable[[Row], float], better: str, worse: str) -> str:
    """Returns "2.0 times faster than the standard loss and ..." for naive, its compiled form and the best peer."""
    peer = best_peer(found, value)
    others = STANDARD | ({peer: f"the best other candidate, {peer}"} if peer else {})
    ours, parts = value(found[ours_in(found) or ""]), []
    for name, called in others.items():
        theirs = measured(found, name, value)
        if theirs and ours > 0:
            ratio, word = (theirs / ours, better) if theirs >= ours else (ours / theirs, worse)
            parts.append(f"{ratio:,.{0 if ratio >= 10 else 2}f} times {word} than {called}")
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def _faster(rows: list[Row]) -> str:
    cases = list(_compared(plain_cases(rows), ms))
    if not cases:
        return ""
    case, found = cases[-1]
    name = ours_in(found) or ""
    text = f"Time: {name} takes {number(ms(found[name]))} ms for {_size(case)}, "
    text += _against(found, ms, "faster", "slower")
    small, others = next((c, f) for c, f in cases if (c.D, c.dtype) == (case.D, case.dtype))
    if small.N < case.N:
        text += f"; for {small.N:,} pairs it is " + _against(others, ms, "faster", "slower")
    return text + "."


def _leaner(rows: list[Row]) -> str:
    def mib(row: Row) -> float:
        return float(row["mib"]["all"])

    groups = by_case(rows)
    cases = list(_compared(groups, mib))
    if not cases:
        return ""
    case, found = cases[-1]
    name = ours_in(found) or ""
    text = f"Memory: {name} needs {number(mib(found[name]))} MiB beyond the inputs for {_size(case)}, "
    text += _against(found, mib, "less", "more")
    for larger, f in groups.items():
        needed, naive = measured(f, ours_in(f), mib), f.get("naive", {})
        if needed and larger.N > case.N and larger.at(case.N) == case and naive.get("status") == "out of memory":
            text += (
                f"; for {larger.N:,} pairs it needs {number(needed)} MiB, and the standard one runs out of memory"
            )
            break
    return text + "."


def _more_exact(rows: list[Row]) -> str:
    def error(row: Row) -> float:
        return float(row["errors"]["dq"])

    cases = [(c, f) for c, f in _compared(by_case(rows), error) if c.regime == "trained"]
    if not cases:
        return ""
    case, found = next(((c, f) for c, f in cases if c.dtype == "bf16"), cases[-1])
    name = ours_in(found) or ""
    text = f"Accuracy: the gradient of {name} for {_size(case)} at the stage *trained* has a relative error of "
    return text + f"{error(found[name]):.1e}, " + _against(found, error, "smaller", "larger") + "."


def _size(case: Case) -> str:
    return f"{case.N:,} pairs of {case.D} features in {case.dtype}"
