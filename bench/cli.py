"""``python -m bench``: all benchmarks, or one of them, and the report."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import report, results, sections, suites, tables, tune
from bench.candidates import load
from bench.cases import DTYPES, MODES, PUBLISHED
from bench.contact import command as first_contact
from bench.contact import table as first_contact_table
from bench.registry import Candidate
from bench.results import ROOT, Results, Row, describe
from bench.roofline import command as roofline
from bench.runner import Runner
from bench.summary import sentences
from bench.train import TRAINERS
from fused_infonce.testing import REGIMES
from simcse import errors
from simcse.files import output_file, output_folder

JOBS = {
    "loss": "time of the loss, forward and backward, against bare matrix products and other implementations",
    "memory": "peak memory of the loss beyond its inputs",
    "accuracy": "error of loss and gradients against float64 at several stages of training",
    "train": "steps of simcse.train against those of sentence-transformers' trainer",
    "tune": "the fastest settings on this machine, and where to put them",
}
OWN_COMMANDS = {command.JOB: command for command in (first_contact, roofline)}  # that are no jobs of ``Runner``
# What ``python -m bench`` measures without a subcommand → minutes on 2 cores, by which --budget is divided.
MEASURED = {"loss": 10, "memory": 6, "accuracy": 2, "train": 12}
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")  # show what is in RESULTS
EPILOG = """\
examples:
  python -m bench --quick                      all of it on small sizes, within 5 minutes on 2 cores
  python -m bench --out bench/results --budget 30   what README and docs show, in half an hour
  python -m bench loss --n 4096 --d 768 --dtype bf16 --candidates ours-torch naive st-mnrl
  python -m bench loss --also my_losses.py     your own loss beside the others (see docs/benchmarks.md)
  python -m bench first-contact --out DIR      what to run first on a GPU machine
  python -m bench roofline --gpu h100          times that counting predicts, without a GPU
  python -m bench report                       tables and pictures of bench/results, README and docs anew
"""
PAGE: dict[str, Any] = {
    "type": Path,
    "action": "append",
    "metavar": "FILE",
    "help": "Markdown file whose marked blocks are replaced by the results; may be given several times",
}
LIMITS = {"quick": 60.0, "standard": 120.0, "paper": 600.0}  # seconds without a sign of life
TRAINING_LIMIT = 1800.0  # seconds of one training, which gives no sign of life


class Parser(errors.Parser):
    """Checks that values are positive and that files exist."""

    def check_positive(self, args: argparse.Namespace, *names: str) -> None:
        for name in names:
            value = getattr(args, name, None)
            for x in value if isinstance(value, list) else [value]:
                if x is not None and not x > 0:
                    self.error(f"--{name} must be positive, not {x}")

    def check_file(self, args: argparse.Namespace, name: str, content: str) -> None:
        file = getattr(args, name, None)
        if file and not Path(file).is_file():
            self.error(f"--{name} {file} does not exist; give a file of {content}")


class _Console(Console):
    """Prints text as it is, not as markup: reasons and file names have brackets."""

    def on_broken_pipe(self) -> None:
        raise  # the error at hand: exit_cleanly ends the command


def console() -> Console:
    width = None if sys.stdout.isatty() else 160
    # The file is named because the standard output may be redirected while a progress bar is shown.
    return _Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar(out: Console, total: int | None) -> Iterator[Callable[..., None]]:
    """Gives a function of a description; it counts on with ``advance=1``."""
    text = TextColumn("{task.description}", markup=False)
    count = TextColumn("{task.completed}/{task.total}")
    with Progress(text, BarColumn(), count, TimeElapsedColumn(), console=out, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda text=None, advance=0: progress.update(task, description=text, advance=advance)


@contextmanager
def user_errors(parser: Parser, folder: Path, remedy: str) -> Iterator[None]:
    """Ends a command as ``exit_cleanly`` does, and says what an interruption leaves."""
    with errors.exit_cleanly(parser.prog):
        try:
            yield
        except KeyboardInterrupt:
            kept = f"what was measured is kept: {remedy.format(folder)}"
            print(f"\n{parser.prog}: interrupted; {kept}", file=sys.stderr)
            raise SystemExit(130) from None


def check_outputs(folder: Path, names: Iterable[str], pages: Iterable[Path]) -> None:
    """Raises UserError where a result could not be written."""
    for page in pages:
        report.read_page(page)
        output_file("--readme", str(page))
    if output_folder("--out", str(folder)).is_dir():
        for name in names:
            output_file("--out", str(folder / name))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with errors.exit_cleanly(parser.prog):
        args = parser.parse_args(argv)
    args.command_line = sys.argv[1:] if argv is None else argv
    if args.job in OWN_COMMANDS:
        with errors.exit_cleanly(parser.prog):
            OWN_COMMANDS[args.job].run(parser, args)
        return
    made = args.folder if args.job == "report" else args.out
    folder = Path(made or Path("runs/bench") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    pages = args.readme or (PAGES if folder.resolve() == RESULTS else ())
    with user_errors(parser, folder, "python -m bench report {} makes its tables"):
        if args.job != "report":
            check_outputs(folder, (*(f"{job}.json" for job in JOBS), "report.md"), pages)
            known = _check(parser, args)
            start, out = time.monotonic(), console()
            for job, end in _ends(args, start):
                out.rule(f"{job}: {JOBS[job]}")
                found = Results(job, folder, **_head(args, known))
                if job == "tune":
                    _tune(args, found, out)
                else:
                    _measure(args, found, known, out, end)
                out.print(f"{job}: {found.document['minutes']:.1f} minutes", style="dim")
        documents = results.read(folder) if folder.is_dir() else {}
        if contact := documents.pop(first_contact.JOB, None):
            print("\n".join(first_contact_table.lines(contact)))
            if not documents:
                return
        if not documents:
            parser.error(f"{folder} contains no results; python -m bench --out {folder} makes them")
        report.write(documents, sections.make(documents), folder, pages)
        for sentence in sentences(documents):
            print(sentence)
        print(f"{folder}: results (.json), pictures (.png) and all tables (report.md)")


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m bench",
        description="Measures time, memory and accuracy of the loss on this machine, against bare\n"
        "matrix products and other implementations. Without a subcommand: loss, memory,\n"
        "accuracy and train, then the report.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common()],
    )
    common = _common(argument_default=argparse.SUPPRESS)  # what stands before a subcommand holds for it
    cases = argparse.ArgumentParser(add_help=False)
    cases.add_argument("--n", type=int, nargs="+", help="anchors, instead of the suite's cases")
    cases.add_argument("--d", type=int, nargs="+", help="features (default: 768)")
    for flag, choices, text in (
        ("--dtype", DTYPES, "of the products (default: those that the machine multiplies without emulation)"),
        ("--mode", (*MODES, *PUBLISHED), "default: one-way"),
        ("--regime", REGIMES, "stage of training (default: middle; accuracy: all)"),
    ):
        listed = f"{', '.join(choices)}: {text}"
        cases.add_argument(flag, choices=list(choices), nargs="+", metavar="NAME", help=listed)
    cases.add_argument("--temperature", type=float, nargs="+", help="default: the stage's own")
    cases.add_argument("--candidates", nargs="+", metavar="NAME", help="only these")
    jobs = parser.add_subparsers(dest="job", metavar="SUBCOMMAND", parser_class=Parser)
    for job, text in JOBS.items():
        parents = [common, cases] if job in ("loss", "memory", "accuracy") else [common]
        made = jobs.add_parser(job, parents=parents, help=text, description=text[0].upper() + text[1:] + ".")
        if job == "train":
            made.add_argument("--train_file", help="text, one sentence per line (default: the package's)")
            made.add_argument("--model", help="encoder, as simcse.train takes it (default: minilm)")
            made.add_argument("--batch", type=int, nargs="+", help="sentences per batch, instead of the suite's")
            made.add_argument("--steps", type=int, help="timed steps, instead of the suite's")
    for job, command in OWN_COMMANDS.items():
        command.add_arguments(jobs.add_parser(job, help=command.HELP, description=f"{command.HELP}."))
    found = jobs.add_parser("report", help="tables and pictures of results", description="Tables and pictures.")
    found.add_argument("folder", nargs="?", default=str(RESULTS), help="default: bench/results of the checkout")
    found.add_argument("--readme", default=argparse.SUPPRESS, **PAGE)
    of_jobs = {action.dest for one in jobs.choices.values() for action in one._actions}
    of_jobs -= {"folder", *(action.dest for action in common._actions)}
    parser.set_defaults(suite="standard", **dict.fromkeys(of_jobs))
    return parser


def _common(**kind: Any) -> argparse.ArgumentParser:
    """Returns the flags of every job."""
    common = argparse.ArgumentParser(add_help=False, **kind)
    size = common.add_mutually_exclusive_group()
    size.add_argument("--suite", choices=suites.SUITES, help="default: standard")
    size.add_argument("--quick", dest="suite", action="store_const", const="quick", help="small sizes")
    common.add_argument("--also", metavar="FILE", help="a Python file with more candidates")
    common.add_argument("--readme", **PAGE)
    common.add_argument("--out", help="folder for the results (default: runs/bench/DATE-TIME)")
    common.add_argument("--seconds", type=float, help="time given to each candidate, at least 5 turns")
    common.add_argument("--budget", type=float, metavar="MINUTES", help="no case begins after this time")
    common.add_argument("--limit", type=float, help="seconds after which one run is given up as too slow")
    common.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    return common


def _ends(args: argparse.Namespace, start: float) -> Iterator[tuple[str, float]]:
    """Yields the jobs, and when each has to end: a job's share of what is left of the budget."""
    shares = {args.job: 1} if args.job else MEASURED
    for place, job in enumerate(shares):
        now, left = time.monotonic(), list(shares.values())[place:]
        budget = start + 60 * args.budget - now if args.budget else math.inf
        yield job, now + budget * left[0] / sum(left)


def _check(parser: Parser, args: argparse.Namespace) -> dict[str, Candidate]:
    """Fills in the device and the seconds. Returns the candidates."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out, or install a CUDA build of torch")
    parser.check_positive(args, "budget", "seconds", "limit", "steps", "n", "d", "batch", "temperature")
    parser.check_file(args, "train_file", "one sentence per line")
    try:
        known = load(args.also)
    except Exception as error:
        parser.error(f"--also {args.also} cannot be run: {type(error).__name__}: {error}")
    for name in args.candidates or ():
        if name not in known:
            parser.error(f"--candidates {name} is unknown; known are {', '.join(known)}")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.seconds = args.seconds or suites.SECONDS[args.suite]
    return known


def _head(args: argparse.Namespace, known: dict[str, Candidate]) -> dict[str, Any]:
    # Kernels compile and tune themselves on a GPU.
    limit = args.limit or LIMITS[args.suite if args.device == "cpu" else "paper"]
    return {
        "command": " ".join(["python -m bench", *args.command_line]),
        "suite": args.suite,
        "device": args.device,
        "settings": {"seconds": args.seconds, "limit": limit},
        **describe(args.device, known.values()),
    }


def _measure(
    args: argparse.Namespace, found: Results, known: dict[str, Candidate], out: Console, end: float
) -> None:
    job = found.document["job"]
    if job != "accuracy" and not args.dtype and "bf16" not in suites.dtypes_for(args.device):
        out.print("this CPU has no bf16 instructions: fp32 only (--dtype bf16 emulates it)", style="dim")
    if job == "train" and not args.limit:
        found.document["settings"]["limit"] = TRAINING_LIMIT
    entries = list(_entries(job, args))
    reported: set[tuple[str, str]] = set()
    with progress_bar(out, sum(len(entry.cases) for entry in entries)) as update:

        def done(case: Any, rows: list[Row]) -> None:
            out.print(tables.case_table(job, rows).rich(case.label))
            for row in rows:
                news = (row["candidate"], row.get("reason", ""))
                if row["status"] == "skipped" and news not in reported:
                    reported.add(news)
                    out.print(f"skipped   {': '.join(news)}", style="dim", highlight=False)
            update(advance=1)

        also = str(Path(args.also).resolve()) if args.also else None
        only = tuple(args.candidates) if args.candidates else None
        names = TRAINERS if job == "train" else known
        Runner(found, names, also=also, progress=update, done=done, end=end).run(entries, only)
    if left_out := found.document.get("left_out"):
        out.print(f"left out for lack of time: {', '.join(left_out)}")


def _entries(job: str, args: argparse.Namespace) -> Iterator[suites.Entry]:
    """Yields the suite's cases, or those that the arguments describe."""
    own = list(getattr(suites, job)(args.suite, args.device))
    if job == "train":
        file = str(Path(args.train_file).resolve()) if args.train_file else None
        for entry in own:
            batches = sorted(args.batch or {case.N for case in entry.cases})
            by_dtype = {case.dtype: case for case in entry.cases}.values()
            changed = {"train_file": file, "model": args.model or "minilm"}
            changed |= {"steps": args.steps} if args.steps else {}
            yield suites.Entry(tuple(replace(case, N=N, **changed) for case in by_dtype for N in batches))
    elif args.n or args.d or args.dtype or args.mode or args.regime or args.temperature:
        yield suites.Entry(
            suites.grid(
                sorted(args.n or [1024]),
                args.d or [768],
                args.dtype or suites.dtypes_for(args.device),
                args.mode or ["one-way"],
                regimes=args.regime or (REGIMES if job == "accuracy" else ["middle"]),
                temperatures=args.temperature or [0.0],
            )
        )
    else:
        yield from own


def _tune(args: argparse.Namespace, found: Results, out: Console) -> None:
    with progress_bar(out, None) as update:
        for advice in tune.run(found, args.suite, args.device, update):
            out.print(advice, highlight=False)
    for one in sections.make({"tune": found.document}):
        out.print(one.rich())
