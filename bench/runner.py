"""Runs cases × candidates in the worker, one case at a time; every outcome becomes a row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from bench.floor import COPY, FLOOR
from bench.results import Results, Row
from bench.suites import Entry
from bench.worker import Worker

GIVE_UP = ("out of memory", "too slow")  # these results hold at more rows too


class Runner:
    """Runs a job's cases; ``progress`` gets a line of text, ``done`` the rows of each case."""

    def __init__(
        self,
        results: Results,
        candidates: Iterable[str],
        *,
        also: str | None,
        progress: Callable[[str], None],
        done: Callable[[Any, list[Row]], None],
        end: float = math.inf,
    ) -> None:
        """``end``: of ``time.monotonic()``; cases that would begin after it are left out, and are named."""
        head = results.document
        self.job, self.device, self.settings = head["job"], head["device"], head["settings"]
        self.results, self.candidates = results, list(candidates)
        self.progress, self.done, self.end = progress, done, end
        self.worker = Worker(also, self.device, silent=self.job == "train")
        self.gave_up: dict[tuple[Any, ...], tuple[int, str]] = {}
        # On a CPU the peak of memory is that of the process, so each candidate has its own.
        self.isolated = self.job == "train" or (self.job == "memory" and self.device == "cpu")
        self.bounds = (FLOOR, COPY) if self.job == "loss" else ()

    def run(self, entries: Iterable[Entry], only: tuple[str, ...] | None) -> None:
        try:
            for entry in entries:
                names = [
                    name
                    for name in entry.candidates or self.candidates
                    if name not in entry.without and (only is None or name in only) and name in self.candidates
                ]
                names += [name for name in only or () if name not in names]  # the ones asked for run in every case
                for case in entry.cases:
                    if time.monotonic() >= self.end:
                        self.results.document.setdefault("left_out", []).append(case.label)
                        continue
                    self.progress(case.label)
                    rows = self._case(case, names)
                    self.results.add(rows)
                    self.done(case, rows)
        finally:
            self.worker.stop()
        self.results.close()

    def _case(self, case: Any, names: list[str]) -> list[Row]:
        rows: dict[str, Row] = {}

        def keep(name: str, facts: dict[str, Any]) -> None:
            rows[name] = {**case.as_dict(), "candidate": name, **facts}
            if facts["status"] in GIVE_UP:
                self.gave_up[_series(case, name)] = (case.N, facts["status"])

        for name in (*self.bounds, *names):
            N, status = self.gave_up.get(_series(case, name), (case.N + 1, ""))
            if N <= case.N:
                keep(name, {"status": status, "reason": f"{status} at N = {N} already"})
        while todo := [name for name in names if name not in rows]:
            some, running = todo[:1] if self.isolated else todo, None
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
                    for name in (*self.bounds[:1], *(some if self.isolated else names)):
                        if name not in rows:
                            keep(name, dict(event))
            if self.isolated:
                self.worker.stop()
        floor = rows.get(FLOOR, {}).get("ms", {}).get("median")
        for name, row in rows.items():
            if floor and "ms" in row and name != FLOOR:
                row["of_floor"] = row["ms"]["median"] / floor
        return [rows[name] for name in (*names, *self.bounds) if name in rows]


def _series(case: Any, name: str) -> tuple[Any, ...]:
    """Returns what cases of growing N have in common."""
    facts = {key: value for key, value in case.as_dict().items() if key != "N"}
    for key in ("noise", "negatives"):  # in proportion to N
        if key in facts:
            facts[key] = facts[key] > 0
    return (name, *facts.values())
