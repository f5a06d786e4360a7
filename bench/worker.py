"""The process that measures, and the handle on it: a crash, a hang or a kill there does not end the run.

A job is one line of JSON on standard input: the name of a generator in ``bench.measure``, or ``module:name``, and
its arguments. Its events are lines of JSON on standard output: ``start`` names a
candidate that is about to run, ``result`` is a row of the results, ``alive`` a sign of life; ``end`` comes last.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bench.results import ROOT

Event = dict[str, Any]


class Worker:
    """A process that runs jobs. It is started at the first job, and again after a crash."""

    def __init__(self, also: str | None = None, device: str = "cpu", silent: bool = False) -> None:
        self.also, self.device, self.silent = also, device, silent
        self.process: subprocess.Popen[str] | None = None
        self.reader: threading.Thread | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()

    def run(self, job: dict[str, Any], limit: float, end: float = math.inf) -> Iterator[Event]:
        """Yields the events of a job.

        The last may be ``died``, with the reason: a crash, or ``limit`` seconds without a sign of life, or
        ``time.monotonic()`` has reached ``end``.
        """
        if self.process is None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        while True:
            try:
                wait = min(limit, end - time.monotonic())
                line = self.lines.get(timeout=max(0.0, wait))
            except queue.Empty:
                self.stop()
                yield {"event": "died", "status": "too slow", "reason": f"stopped after {max(0.0, wait):.3g} s"}
                return
            if line is None:
                yield {"event": "died", **_why(self.stop())}
                return
            event = json.loads(line)
            if event["event"] == "end":
                return
            yield event

    def stop(self) -> int:
        """Ends the process and closes its pipes. Returns its exit status, negative for a signal."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        assert process.stdin is not None
        assert process.stdout is not None
        assert self.reader is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        status = process.wait()
        self.reader.join(timeout=1)  # at the end of the file, unless a grandchild holds the pipe open
        if not self.reader.is_alive():
            process.stdout.close()
        return status

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", self.device, self.also or ""],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self.silent else None,  # trainers print
            text=True,
            cwd=ROOT,
            # On the CPU no candidate sees a GPU.
            env={**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})},
            start_new_session=True,  # Ctrl-C reaches the parent only, which ends this process
        )
        self.lines = queue.Queue()
        self.reader = threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True)
        self.reader.start()


def _read(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _why(code: int) -> dict[str, str]:
    if code == -signal.SIGKILL:
        return {"status": "out of memory", "reason": "killed by SIGKILL, as Linux does when memory is exhausted"}
    if code < 0:
        return {"status": "crashed", "reason": f"killed by {signal.Signals(-code).name}"}
    return {"status": "crashed", "reason": f"exit status {code}"}


# ------------------------------------------------------------------ inside of the process


def main() -> None:
    # Libraries may print: their output goes to standard error, because standard output is for events.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        _serve(out, *sys.argv[1:3])


def _serve(out: TextIO, device: str, also: str) -> None:
    if device == "cpu":
        limit_memory()

    def report(event: str, **facts: Any) -> None:
        out.write(json.dumps({"event": event, **facts}) + "\n")
        out.flush()

    from bench import measure, train
    from bench.candidates import load
    from bench.cases import Case
    from bench.gate import outcome

    losses: dict[str, Any] = load(also)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["job"] == "train":
                run, case, known = train.train, train.TrainCase(**job["case"]), train.TRAINERS
            else:
                module, _, name = job["job"].rpartition(":")
                run = getattr(importlib.import_module(module) if module else measure, name)
                case, known = Case(**job["case"]), losses
            candidates = [known[name] for name in job["candidates"]]
            for event, facts in run(case, candidates, device, job["seconds"], **job.get("more", {})):
                report(event, **facts)
                if facts.get("status", "ok") != "ok":
                    _clean_up(device)
        except Exception as error:
            report("failed", **outcome(error))
        _clean_up(device)
        report("end")


def _clean_up(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a kernel broke the context: the rest needs a new process
            raise SystemExit(1) from error


def limit_memory() -> None:
    """Makes allocations fail where memory ends, so that the machine neither swaps nor kills other processes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limit = int(line.split()[1]) * 1024 * 9 // 10
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
