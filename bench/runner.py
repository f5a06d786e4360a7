"""Cases × candidates through the worker, a case at a time: whatever happens there becomes a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.candidates import COPY, FLOOR, Candidate
from bench.cases import Case
from bench.results import Results, Row
from bench.suites import Entry
from bench.worker import Worker

HOPELESS = ("out of memory", "too slow")  # at more rows too


class Runner:
    """Runs a job's cases; ``tell`` gets a line of progress, ``done`` the rows of each case."""

    def __init__(
        self,
        job: str,
        results: Results,
        candidates: dict[str, Candidate],
        *,
        device: str,
        seconds: float,
        limit: float,
        also: str | None,
        tell: Callable[[str], None],
        done: Callable[[Case, list[Row]], None],
    ) -> None:
        self.job, self.results, self.candidates = job, results, candidates
        self.device, self.seconds, self.limit = device, seconds, limit
        self.tell, self.done = tell, done
        self.worker = Worker(also, device)
        self.gave_up: dict[tuple[Any, ...], tuple[int, str]] = {}

    def run(self, entries: Iterable[Entry], only: tuple[str, ...] | None) -> None:
        try:
            for entry in entries:
                names = [
                    name
                    for name in entry.candidates or self.candidates
                    if name not in entry.without and (only is None or name in only) and name in self.candidates
                ]
                # Those that a test or a user adds, and those asked for by name, are in every case.
                names += [name for name in only or () if name not in names]
                for case in entry.cases:
                    self.tell(case.label)
                    rows = self._case(case, names)
                    self.results.add(rows)
                    self.done(case, rows)
        finally:
            self.worker.stop()
        self.results.close()

    def _case(self, case: Case, names: list[str]) -> list[Row]:
        rows: dict[str, Row] = {}

        def keep(name: str, facts: dict[str, Any]) -> None:
            facts.pop("event", None)
            rows[name] = {**case.as_dict(), "candidate": name, **facts}
            if facts["status"] in HOPELESS:
                self.gave_up[self._line(case, name)] = (case.N, facts["status"])

        def keep_rest(event: dict[str, Any]) -> None:
            for name in (FLOOR, *names):
                if name not in rows:
                    keep(name, dict(event))

        for name in (FLOOR, *names):
            at, status = self.gave_up.get(self._line(case, name), (case.N + 1, ""))
            if at <= case.N:
                event = {"status": status, "reason": f"{status} at N = {at} already"}
                keep(name, event)
        while todo := [name for name in names if name not in rows]:
            # On a CPU the peak of memory is the process's: one candidate for each.
            alone = self.job == "memory" and self.device == "cpu"
            some = todo[:1] if alone else todo
            running = None
            spec = {"job": self.job, "case": case.as_dict(), "candidates": some, "seconds": self.seconds}
            for event in self.worker.run(spec, self.limit):
                if event["event"] == "start":
                    running = event["candidate"]
                    self.tell(f"{case.label}  {running}")
                elif event["event"] == "result":
                    keep(event.pop("candidate"), event)
                elif event["event"] == "died" and running in some:
                    if running not in rows:
                        keep(running, event)
                elif event["event"] in ("died", "gave up"):  # outside of any candidate
                    keep_rest(event)
            if alone:
                self.worker.stop()
        bare = rows.get(FLOOR, {}).get("ms", {}).get("median")
        for name, row in rows.items():
            if bare and "ms" in row and name != FLOOR:
                row["of_floor"] = row["ms"]["median"] / bare
        return [rows[name] for name in (*names, FLOOR, COPY) if name in rows]

    @staticmethod
    def _line(case: Case, name: str) -> tuple[Any, ...]:
        return (name, case.D, case.way, case.dtype, case.noise > 0, case.negatives > 0)
