"""Runs cases × candidates in the worker, one case at a time; every outcome becomes a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.cases import Case
from bench.floor import COPY, FLOOR
from bench.registry import Candidate
from bench.results import Results, Row
from bench.suites import Entry
from bench.worker import Worker

GIVE_UP = ("out of memory", "too slow")  # holds at more rows too


class Runner:
    """Runs a job's cases; ``progress`` gets a line of text, ``done`` the rows of each case."""

    def __init__(
        self,
        results: Results,
        candidates: dict[str, Candidate],
        *,
        also: str | None,
        progress: Callable[[str], None],
        done: Callable[[Case, list[Row]], None],
    ) -> None:
        head = results.document
        self.job, self.device, self.settings = head["job"], head["device"], head["settings"]
        self.results, self.candidates = results, candidates
        self.progress, self.done = progress, done
        self.worker = Worker(also, self.device)
        self.gave_up: dict[tuple[Any, ...], tuple[int, str]] = {}

    def run(self, entries: Iterable[Entry], only: tuple[str, ...] | None) -> None:
        try:
            for entry in entries:
                names = [
                    name
                    for name in entry.candidates or self.candidates
                    if name not in entry.without and (only is None or name in only) and name in self.candidates
                ]
                names += [name for name in only or () if name not in names]  # those asked for run in every case
                for case in entry.cases:
                    self.progress(case.label)
                    rows = self._case(case, names)
                    self.results.add(rows)
                    self.done(case, rows)
        finally:
            self.worker.stop()
        self.results.close()

    def _case(self, case: Case, names: list[str]) -> list[Row]:
        rows: dict[str, Row] = {}

        def keep(name: str, facts: dict[str, Any]) -> None:
            rows[name] = {**case.as_dict(), "candidate": name, **facts}
            if facts["status"] in GIVE_UP:
                self.gave_up[_series(case, name)] = (case.N, facts["status"])

        for name in (FLOOR, *names):
            N, status = self.gave_up.get(_series(case, name), (case.N + 1, ""))
            if N <= case.N:
                keep(name, {"status": status, "reason": f"{status} at N = {N} already"})
        while todo := [name for name in names if name not in rows]:
            # On a CPU the peak of memory is that of the process, so each candidate has its own.
            isolated = self.job == "memory" and self.device == "cpu"
            some, running = todo[:1] if isolated else todo, None
            spec = {"job": self.job, "case": case.as_dict(), "candidates": some} | self.settings
            for event in self.worker.run(spec, self.settings["limit"]):
                kind = event.pop("event")
                if kind == "start":
                    running = event["candidate"]
                    self.progress(f"{case.label}  {running}")
                elif kind == "result":
                    keep(event.pop("candidate"), event)
                elif kind == "died" and running in some:
                    if running not in rows:
                        keep(running, event)
                elif kind in ("died", "failed"):  # outside of any candidate
                    for name in (FLOOR, *names):
                        if name not in rows:
                            keep(name, dict(event))
            if isolated:
                self.worker.stop()
        floor = rows.get(FLOOR, {}).get("ms", {}).get("median")
        for name, row in rows.items():
            if floor and "ms" in row and name != FLOOR:
                row["of_floor"] = row["ms"]["median"] / floor
        return [rows[name] for name in (*names, FLOOR, COPY) if name in rows]


def _series(case: Case, name: str) -> tuple[Any, ...]:
    """What is alike in cases of growing N."""
    return (name, case.D, case.mode, case.dtype, case.noise > 0, case.negatives > 0, case.regime)
