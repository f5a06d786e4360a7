"""``python -m bench first-contact``: runs the steps within a budget, and keeps what it has in one JSON file.

Every item runs in a worker, so that a crash, a hang or a broken CUDA context does not end the run. The file is
replaced after every item; it lists all items from the start, those that are still to come as ``not run``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import torch

from bench.contact import table
from bench.contact.plan import STEPS, Item, items
from bench.registry import first_line
from bench.results import Document, Results, Row, describe
from bench.worker import Worker
from simcse import errors
from simcse.files import output_file, output_folder

JOB = "first-contact"
HELP = "first minutes on a GPU machine: versions, exactness, every kernel, whole calls"
BUDGET = 600.0  # seconds
SECONDS = 0.5  # that a candidate of a whole call is timed for
PROCESSES = 8  # that compile beside each other; each holds some 0.5 GiB of the GPU, and a call's memory
COMPILE_SHARE = 0.4  # of the budget: what is not compiled then, later steps compile
NO_FAULT = ("not run", "skipped", "ok")  # statuses that do not make the command fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listed = "; ".join(f"{step}: {text}" for step, text in STEPS.items())
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), metavar="STEP", help=f"only these ({listed})")
    text = f"seconds after which it stops; what remains is listed as not run (default: {BUDGET:g})"
    parser.add_argument("--budget", type=float, default=BUDGET, help=text)
    # Without defaults: the command ``python -m bench`` has these flags too, before the subcommand.
    text = "folder of first-contact.json (default: runs/bench/DATE-TIME); steps of the same commit there are kept"
    parser.add_argument("--out", default=argparse.SUPPRESS, help=text)
    text = "default: cuda where torch sees a GPU; cpu: tiny sizes, to try the command"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=argparse.SUPPRESS, help=text)


def main(argv: list[str] | None = None) -> None:
    parser = errors.Parser(prog=f"python -m bench {JOB}", description=f"{HELP[0].upper()}{HELP[1:]}.")
    add_arguments(parser)
    with errors.exit_cleanly(parser.prog):
        args = parser.parse_args(argv)
        args.command_line = [JOB, *(sys.argv[2:] if argv is None else argv)]
        run(parser, args)


def run(parser: errors.Parser, args: argparse.Namespace) -> None:
    """Runs the command; exits with status 1 where a correctness call failed, 130 where it was interrupted."""
    end = time.monotonic() + args.budget
    if not args.budget > 0:
        parser.error(f"--budget must be positive, not {args.budget}")
    device = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out, or install a CUDA build of torch")
    given = getattr(args, "out", None)
    folder = Path(given or Path("runs/bench") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    if output_folder("--out", str(folder)).is_dir():
        output_file("--out", str(folder / f"{JOB}.json"))
    steps = [step for step in STEPS if step in (args.steps or STEPS)]
    settings = {"budget": args.budget, "steps": steps, "seconds": SECONDS}
    command_line = " ".join(["python -m bench", *args.command_line])
    head = {"command": command_line, "device": device, "settings": settings, **describe("cpu")}
    contact = Contact(Results(JOB, folder, **head), items(device, steps), device, end)
    contact.keep_steps_of_before(steps)
    try:
        contact.run()
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted; what was measured is kept: {contact.results.path}", file=sys.stderr)
        raise SystemExit(130) from None
    print("\n".join(table.lines(json.loads(contact.results.path.read_text(encoding="utf-8")))))
    print(f"{contact.results.path}: all of it; python -m bench report {folder} prints the table again")
    if any(row["step"] == "correctness" and row["status"] not in NO_FAULT for row in contact.results.rows):
        raise SystemExit(1)


class Contact:
    """A run of items; ``end`` is the value of ``time.monotonic()`` at which it stops."""

    def __init__(self, results: Results, items: list[Item], device: str, end: float) -> None:
        self.results, self.items, self.device, self.end = results, items, device, end
        self.start = time.monotonic()
        self.before: list[Row] = []
        self.found: dict[tuple[str, str], list[Row]] = {
            (item.step, item.name): [{"step": item.step, "item": item.name, "status": "not run"}] for item in items
        }
        self.lock = threading.Lock()
        self.workers = [Worker(device=device)]
        self.stopped = False

    def keep_steps_of_before(self, steps: list[str]) -> None:
        """Keeps the rows of other steps that a run of the same commit and device left in the folder."""
        try:
            old: Document = json.loads(self.results.path.read_text(encoding="utf-8"))
            same = all(old[name] == self.results.document[name] for name in ("job", "commit", "device"))
            self.before = [row for row in old["rows"] if row["step"] not in steps] if same else []
        except (OSError, ValueError, KeyError, TypeError):
            return

    def run(self) -> None:
        compiled = [item for item in self.items if item.step == "compile"]
        first = [item for item in self.items if item.step == "versions"]
        rest = [item for item in self.items if item not in compiled + first]
        self._save()
        try:
            for item in first:
                self._do(item, self.workers[0], self.end)
            self._do_in_parallel(
                compiled, min(self.end, time.monotonic() + COMPILE_SHARE * (self.end - self.start))
            )
            for item in rest:
                self._do(item, self.workers[0], self.end)
        finally:
            self._stop()
        self.results.document["complete"] = all(row["status"] != "not run" for row in self.results.rows)
        self._save()

    def _do_in_parallel(self, items: list[Item], end: float) -> None:
        if not items:
            return
        waiting = iter(items)

        def work(worker: Worker) -> None:
            while True:
                with self.lock:
                    item = next(waiting, None)
                if item is None:
                    return
                self._do(item, worker, end)

        workers = [Worker(device=self.device) for _ in range(min(PROCESSES, os.cpu_count() or 1, len(items)))]
        self.workers += workers
        with ThreadPoolExecutor(len(workers)) as pool:
            try:
                for done in [pool.submit(work, worker) for worker in workers]:
                    done.result()
            except BaseException:
                self._stop()  # ends what the threads wait for
                raise
        for worker in workers:  # their memory is wanted
            worker.stop()

    def _stop(self) -> None:
        self.stopped = True
        for worker in self.workers:
            worker.stop()

    def _do(self, item: Item, worker: Worker, end: float) -> None:
        """Runs an item and records what it gives, or why it gives nothing."""
        start = time.monotonic()
        if self.stopped:
            return
        try:
            rows = list(self._rows(item, worker, end))
        except Exception as error:
            rows = [{"status": "failed", "reason": first_line(error)}]
        if self.stopped:
            return
        took = time.monotonic() - start
        with self.lock:
            self.found[item.step, item.name] = [{"step": item.step, "item": item.name, **row} for row in rows]
            self.found[item.step, item.name][0]["took"] = took
            said = table.summary(self.found[item.step, item.name])
            print(f"{time.monotonic() - self.start:5.0f} s  {item.step}  {item.name}: {said}", flush=True)
            self._save()

    def _rows(self, item: Item, worker: Worker, end: float) -> Iterator[Row]:
        if item.needs_gpu and self.device == "cpu":
            yield {"status": "skipped", "reason": "no CUDA device"}
            return
        if time.monotonic() >= end:
            yield {"status": "not run", "reason": "the time for it was over"}
            return
        running, last = {}, ""
        for event in worker.run(item.spec(SECONDS), item.limit, end):
            kind = event.pop("event")
            if kind == "start":
                running = event
            elif kind == "result":
                last = event["status"]
                yield event
            elif kind in ("failed", "died") and last in ("", "ok"):
                last = event["status"]
                if kind == "died" and time.monotonic() >= end:
                    event = {"status": "not run", "reason": "stopped when the time for it was over"}
                yield running | event
        if not last:
            yield {"status": "failed", "reason": "gave no result"}

    def _save(self) -> None:
        self.results.document["rows"] = self.before + [row for rows in self.found.values() for row in rows]
        self.results.save()
