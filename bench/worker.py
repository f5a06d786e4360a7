"""The process that measures, and the handle on it: what crashes, hangs or is killed there ends nothing here.

A job is a line of JSON on standard input, what comes of it lines of JSON on standard output: ``start`` names the
candidate that is about to run, ``result`` is a row of the results, ``alive`` a sign of life, ``end`` the last.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from bench.cases import Case

ROOT = Path(__file__).parents[1]
Event = dict[str, Any]


class Worker:
    """A process for jobs, made when it is first needed and made anew after a crash."""

    def __init__(self, also: str | None = None, device: str = "cpu") -> None:
        self.also, self.device = also, device
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()

    def run(self, job: dict[str, Any], limit: float) -> Iterator[Event]:
        """The events of a job. The last may be ``died``, with the reason: a crash, or ``limit`` seconds
        without a sign of life.
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
                line = self.lines.get(timeout=limit)
            except queue.Empty:
                self.stop()
                yield {"event": "died", "status": "too slow", "reason": f"stopped after {limit:g} s"}
                return
            if line is None:
                yield {"event": "died", **_why(self.stop())}
                return
            event = json.loads(line)
            if event["event"] == "end":
                return
            yield event

    def stop(self) -> int:
        """Ends the process; its exit status, negative for a signal."""
        if self.process is None:
            return 0
        process, self.process = self.process, None
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait()

    def _start(self) -> None:
        command = [sys.executable, "-m", "bench.worker", self.device, self.also or ""]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(self.device),
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        self.lines = queue.Queue()
        threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True).start()


def environment(device: str) -> dict[str, str]:
    """For a process that measures on a device: on the CPU no GPU is seen, by any candidate."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}


def _read(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _why(code: int) -> dict[str, str]:
    if code == -signal.SIGKILL:
        return {"status": "out of memory", "reason": "killed by SIGKILL, as Linux does when memory is gone"}
    if code < 0:
        return {"status": "crashed", "reason": f"killed by {signal.Signals(-code).name}"}
    return {"status": "crashed", "reason": f"exit status {code}"}


def alone(job: str, case: Case, candidate: str, device: str = "cpu", limit: float = 300) -> Event:
    """The result of one candidate in a process of its own."""
    worker = Worker(device=device)
    spec = {"job": job, "case": case.as_dict(), "candidates": [candidate], "seconds": 0.0}
    try:
        for event in worker.run(spec, limit):
            if event["event"] != "start" and event.get("candidate", candidate) == candidate:
                return event
    finally:
        worker.stop()
    raise AssertionError("a job ends with a result")


# ------------------------------------------------------------------ inside of the process


def main() -> None:
    # Whatever a library prints goes to standard error: standard output is for events.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device, also = sys.argv[1:3]
    if device == "cpu":
        limit_memory()

    def tell(event: str, **facts: Any) -> None:
        out.write(json.dumps({"event": event, **facts}) + "\n")
        out.flush()

    from bench import accuracy, gate, memory, timing
    from bench.candidates import load

    jobs = {"loss": timing.time_all, "memory": memory.peak, "accuracy": accuracy.all_errors}
    known = load(also)
    for line in sys.stdin:
        job = json.loads(line)
        candidates = [known[name] for name in job["candidates"]]
        try:
            for event, facts in jobs[job["job"]](Case(**job["case"]), candidates, device, job["seconds"]):
                tell(event, **facts)
                if facts.get("status", "ok") != "ok":
                    _clean_up(device)
        except Exception as error:
            tell("gave up", **gate.outcome(error))
        _clean_up(device)
        tell("end")


def _clean_up(device: str) -> None:
    gc.collect()
    if device == "cuda":
        import torch

        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a kernel broke the context: a new process for the rest
            raise SystemExit(1) from error


def limit_memory() -> None:
    """Allocations fail where memory ends: an error that says so, not a machine that swaps or kills."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            limit = int(line.split()[1]) * 1024 * 9 // 10
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
