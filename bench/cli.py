"""``python -m bench``: every benchmark, or one of them, and the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from bench import plots, report, results, study, suites, tables, train, tune
from bench.candidates import Candidate, load
from bench.cases import DTYPES, REGIMES, WAYS, Case
from bench.machine import describe
from bench.results import Results, Row
from bench.runner import Runner
from bench.suites import Entry
from simcse.errors import Parser, exit_cleanly
from simcse.files import output_file, output_folder, write_text

JOBS = {
    "loss": "time of the loss, forward and backward, against bare matrix products and what else there is",
    "memory": "peak memory of the loss beyond its inputs",
    "accuracy": "error of loss and gradients against float64 at four stages of training",
    "train": "steps of simcse.train against those of sentence-transformers' trainer",
    "tune": "the fastest settings on this machine, and where to put them",
    "study": "trainings over batch, loss and seed: do larger batches hurt, and does noise mend it",
}
MEASURED = ("loss", "memory", "accuracy", "train")  # by a bare ``python -m bench``
EPILOG = """\
examples:
  python -m bench --quick                      all of it on small sizes, within 5 minutes on 2 cores
  python -m bench --out bench/results --readme README.md    what the README shows (an hour on 2 cores)
  python -m bench loss --n 4096 --d 768 --dtype bf16 --candidates ours-torch naive st-mnrl
  python -m bench loss --also my_losses.py     your own loss beside the others (see docs/benchmarks.md)
  python -m bench study --train_file wiki.txt.gz --sts_data sts.tsv --out runs/study    run again, it goes on
  python -m bench report bench/results         tables and pictures anew
"""
LONGEST_TRAINING = 1800.0  # seconds
LIMITS = {"quick": 30.0, "standard": 120.0, "paper": 600.0}  # seconds without a sign of life


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    with exit_cleanly(parser.prog):
        args = parser.parse_args(argv)
    args.command_line = sys.argv[1:] if argv is None else argv
    with exit_cleanly(parser.prog):
        _run(parser, args)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    console = make_console()
    folder = Path(getattr(args, "out", None) or Path("runs/bench") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    try:
        if args.job == "report":
            _report(parser, Path(args.folder), args.readme)
            return
        _check(parser, args)
        _check_outputs(folder)
        known = _load(parser, args.also)
        for job in [args.job] if args.job else MEASURED:
            console.rule(f"{job}: {JOBS[job]}")
            if job == "train":
                _train(args, folder, known, console)
            elif job == "tune":
                _tune(args, folder, known, console)
            elif job == "study":
                _study(parser, args, folder, known, console)
            else:
                _measure(parser, job, args, folder, known, console)
        _report(parser, folder, args.readme)
    except KeyboardInterrupt:
        kept = f"what was measured is kept: python -m bench report {folder} makes its tables"
        print(f"\n{parser.prog}: interrupted; {kept}", file=sys.stderr)
        raise SystemExit(130) from None


class _Console(Console):
    """Text as it is, not as markup: reasons and file names have brackets."""

    def on_broken_pipe(self) -> None:
        raise  # the error at hand: exit_cleanly ends the command


def make_console() -> Console:
    width = None if sys.stdout.isatty() else 160
    # The file is named, or progress would follow the standard output that a study takes from its trainings.
    return _Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m bench",
        description="How fast, how lean, how exact: on this machine, against the machine and what\n"
        "else there is. Without a subcommand: loss, memory, accuracy and train, then the\nreport.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    size = common.add_mutually_exclusive_group()
    size.add_argument("--suite", choices=suites.SUITES, default=argparse.SUPPRESS, help="default: standard")
    size.add_argument(
        "--quick", dest="suite", action="store_const", const="quick", default=argparse.SUPPRESS, help="small sizes"
    )
    also = {"metavar": "FILE", "help": "a Python file with more candidates", "default": argparse.SUPPRESS}
    common.add_argument("--also", **also)  # type: ignore[arg-type]
    for flag, kind, text in (
        ("--readme", Path, "file whose section between the marks is replaced by the results"),
        ("--out", str, "folder for the results (default: runs/bench/DATE-TIME)"),
        ("--seconds", float, "that each candidate is timed for, at least 5 runs"),
        ("--limit", float, "seconds after which one run is given up as too slow"),
    ):
        common.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text)
    device = {"choices": ("cpu", "cuda"), "help": "default: cuda where there is one", "default": argparse.SUPPRESS}
    common.add_argument("--device", **device)  # type: ignore[arg-type]
    cases = argparse.ArgumentParser(add_help=False)
    cases.add_argument("--n", type=int, nargs="+", help="anchors, instead of the suite's cases")
    cases.add_argument("--d", type=int, nargs="+", help="features (default: 768)")
    cases.add_argument(
        "--dtype",
        choices=list(DTYPES),
        nargs="+",
        metavar="DTYPE",
        help=f"of the products: {', '.join(DTYPES)} (default: what the machine has)",
    )
    cases.add_argument(
        "--way", choices=WAYS, nargs="+", metavar="WAY", help=f"{', '.join(WAYS)} (default: one-way)"
    )
    cases.add_argument("--candidates", nargs="+", metavar="NAME", help="only these")
    jobs = parser.add_subparsers(dest="job", metavar="SUBCOMMAND")
    for job, text in JOBS.items():
        parents = [common, cases] if job in ("loss", "memory", "accuracy") else [common]
        made = jobs.add_parser(job, parents=parents, help=text, description=text[0].upper() + text[1:] + ".")
        if job == "train":
            made.add_argument("--train_file", help="sentences, one a line (default: those in the package)")
            made.add_argument("--model", default="minilm", help="encoder, as simcse.train takes it")
            made.add_argument("--batch", type=int, nargs="+", help="sentences a batch, instead of the suite's")
            made.add_argument("--steps", type=int, help="that are timed, instead of the suite's")
        if job == "study":
            _study_flags(made)
    found = jobs.add_parser("report", help="tables and pictures of results", description="Tables and pictures.")
    found.add_argument("folder", nargs="?", default="bench/results", help="default: %(default)s")
    text = "file whose section between the marks is replaced by the results"
    found.add_argument("--readme", type=Path, default=argparse.SUPPRESS, help=text)
    # Before and after the subcommand: python -m bench --quick, python -m bench loss --quick.
    for action in common._actions:
        if action.dest != "help":
            parser._add_action(action)
    defaults = {"suite": "standard"} | dict.fromkeys(("also", "out", "seconds", "limit", "device", "readme"))
    parser.set_defaults(**defaults)
    return parser


def _study_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument("--train_file", help="sentences, as simcse.train takes them (default: those in the package)")
    made.add_argument("--sts_data", help="graded pairs, as simcse.evaluate takes them (default: the package's)")
    made.add_argument("--model", default="minilm", help="encoder, as simcse.train takes it (default: %(default)s)")
    for flag, kind, default, text in (
        ("--sentences", int, 65536, "that every training sees"),
        ("--batch", int, [64, 256, 1024, 4096], "sentences a batch"),
        ("--seeds", int, [1, 2, 3], "that each training is repeated with"),
        ("--learning_rate", float, [3e-5], "of AdamW at its peak"),
        ("--mini_batch", int, 512, "sentences that are embedded at a time"),
        ("--evaluations", int, 10, "during a training, of which the best is kept"),
    ):
        several = "+" if isinstance(default, list) else None
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        made.add_argument(flag, type=kind, nargs=several, default=default, help=f"{text} (default: {shown})")


def _load(parser: argparse.ArgumentParser, also: str | None) -> dict[str, Candidate]:
    try:
        return load(also)
    except Exception as error:
        parser.error(f"--also {also} cannot be run: {type(error).__name__}: {error}")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: torch sees no CUDA device here; leave it out, or install a CUDA build of torch"
        )
    for name in ("seconds", "limit", "steps", "sentences", "mini_batch", "evaluations"):
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be positive, not {value}")
    for name in ("n", "d", "batch", "learning_rate"):
        values = getattr(args, name, None)
        if values and not min(values) > 0:
            parser.error(f"--{name} must be positive, not {min(values)}")
    for name, text in (("train_file", "sentences, one a line"), ("sts_data", "graded pairs")):
        file = getattr(args, name, None)
        if file and not Path(file).is_file():
            parser.error(f"--{name}: the file {file} does not exist; give one of {text}")
    if args.job == "study" and args.device == "cpu" and torch.cuda.is_available():
        parser.error("--device cpu: trainings take the GPU that torch sees; hide it with CUDA_VISIBLE_DEVICES=")
    if args.job == "study" and args.sentences < max(args.batch):
        parser.error(f"--sentences {args.sentences}: fewer than a batch of {max(args.batch)}; raise it")
    if args.readme is not None:
        report.around_marks(args.readme)
        output_file("--readme", str(args.readme))


def _check_outputs(folder: Path) -> None:
    if output_folder("--out", str(folder)).is_dir():
        for name in (*(f"{job}.json" for job in JOBS), *report.PICTURES, "report.md"):
            output_file("--out", str(folder / name))


def _device(args: argparse.Namespace) -> str:
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _results(
    job: str, args: argparse.Namespace, folder: Path, known: dict[str, Candidate], **more: Any
) -> Results:
    device = _device(args)
    limit = args.limit or (LIMITS[args.suite] if device == "cpu" else LIMITS["paper"])  # kernels compile, and tune
    settings = {"seconds": args.seconds or suites.SECONDS[args.suite], "limit": limit}
    command = "python -m bench " + " ".join(args.command_line)
    facts = {"suite": args.suite, "device": device, "settings": settings | more}
    return Results(job, folder, command=command, **facts, **describe(device, known))


def _measure(
    parser: argparse.ArgumentParser,
    job: str,
    args: argparse.Namespace,
    folder: Path,
    known: dict[str, Candidate],
    console: Console,
) -> None:
    only = tuple(getattr(args, "candidates", None) or ()) or None
    for name in only or ():
        if name not in known:
            parser.error(f"--candidates {name} is unknown; known are {', '.join(known)}")
    if job != "accuracy" and not getattr(args, "dtype", None) and "bf16" not in suites.dtypes_for(_device(args)):
        console.print("this CPU has no bf16 instructions: fp32 alone (--dtype bf16 emulates it)", style="dim")
    entries = list(_entries(parser, job, args))
    total = sum(len(entry.cases) for entry in entries)
    told: set[tuple[str, str]] = set()
    found = _results(job, args, folder, known)
    with _progress(console) as progress:
        task = progress.add_task(job, total=total)

        def done(case: Case, rows: list[Row]) -> None:
            console.print(tables.one_case(job, case, rows).rich())
            reasons: dict[str, list[str]] = {}
            for row in rows:
                news = (row["candidate"], row.get("reason", ""))
                if row["status"] == "skipped" and news not in told:
                    told.add(news)
                    reasons.setdefault(news[1], []).append(news[0])
            if reasons:
                text = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
                console.print(f"skipped   {text}", style="dim", highlight=False)
            progress.advance(task)

        Runner(
            job,
            found,
            known,
            device=_device(args),
            seconds=found.document["settings"]["seconds"],
            limit=found.document["settings"]["limit"],
            also=str(Path(args.also).resolve()) if args.also else None,
            tell=lambda text: progress.update(task, description=text),
            done=done,
        ).run(entries, only)


def _entries(parser: argparse.ArgumentParser, job: str, args: argparse.Namespace) -> Iterator[Entry]:
    own = {name: getattr(args, name, None) for name in ("n", "d", "dtype", "way")}
    if not any(own.values()):
        yield from getattr(suites, job)(args.suite, _device(args))
        return
    grid = suites.grid(
        sorted(own["n"] or [1024]),
        own["d"] or [768],
        own["dtype"] or suites.dtypes_for(_device(args)),
        own["way"] or ["one-way"],
    )
    if job == "accuracy":
        grid = tuple(Case(c.N, c.D, c.way, c.dtype, regime=r) for c, r in product(grid, REGIMES))
    yield Entry(grid)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _train(args: argparse.Namespace, folder: Path, known: dict[str, Candidate], console: Console) -> None:
    device = _device(args)
    plan = suites.train(args.suite, device)
    file = getattr(args, "train_file", None)
    spec = {
        "model": getattr(args, "model", "minilm"),
        "train_file": str(Path(file).resolve()) if file else None,
        "steps": getattr(args, "steps", None) or plan.steps,
        "mini_batch": plan.mini_batch,
        "device": device,
    }
    batches = sorted(getattr(args, "batch", None) or plan.batches)
    found = _results("train", args, folder, known, **spec)
    # fp16 needs a loss scaler, and a CPU without bf16 emulates it.
    dtypes = [name for name in suites.dtypes_for(device) if name != "fp16"]
    gave_up: dict[tuple[str, str], str] = {}
    with _progress(console) as progress:
        task = progress.add_task("train", total=len(batches) * len(train.WAYS) * len(dtypes))
        for dtype, batch, way in product(dtypes, batches, train.WAYS):
            one = {"way": way, "batch": batch, "dtype": dtype}
            progress.update(task, description=f"train  {dtype}, batch {batch}  {way}")
            if (way, dtype) in gave_up:
                row = spec | one | {"status": gave_up[way, dtype], "reason": "at a smaller batch already"}
            else:
                row = train.measure(spec | one, LONGEST_TRAINING)
            if row["status"] in ("out of memory", "too slow", "skipped"):
                gave_up[way, dtype] = row["status"]
            found.add([row])
            if row["status"] != "ok":
                console.print(f"{way}, {dtype}, batch {batch}: {row['status']} ({row['reason']})", style="dim")
            progress.advance(task)
    found.close()
    console.print(tables.train("steps of training", found.rows).rich())


def _tune(args: argparse.Namespace, folder: Path, known: dict[str, Candidate], console: Console) -> None:
    device = _device(args)
    found = _results("tune", args, folder, known)
    clock = tune.clock_for(device)
    for (N, D), dtype in product(suites.TUNE[args.suite], suites.dtypes_for(device)):
        case = Case(N, D, dtype=dtype)
        for one in tune.searches(case, device):
            ranked: list[Any] = []
            with _progress(console) as progress:
                task = progress.add_task(f"{case.label}  {one.what}", total=tune.ROUNDS)
                for turn, found_so_far in tune.search(one.settings, one.step, clock):
                    progress.update(task, completed=turn)
                    ranked = found_so_far
            if not ranked:
                console.print(f"{case.label}: no {one.what} of {one.settings} could be run")
                continue
            found.add([{"search": one.what, "case": case.label, "setting": str(s), "ms": ms} for s, ms in ranked])
            lines = [
                [str(s), tables.number(ms["median"]), f"{tables.number(ms['p20'])}–{tables.number(ms['p80'])}"]
                for s, ms in ranked
            ]
            console.print(tables.Table(case.label, [one.what, "ms", "20–80 %"], lines).rich())
            console.print(f"put {one.what} = {ranked[0][0]} into {one.where}\n")
    found.close()


def _study(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    folder: Path,
    known: dict[str, Candidate],
    console: Console,
) -> None:
    device = _device(args)
    plan = study.Plan(
        train_file=args.train_file,
        sts_data=args.sts_data,
        model=args.model,
        sentences=args.sentences,
        batches=sorted(args.batch),
        seeds=args.seeds,
        learning_rates=args.learning_rate,
        mini_batch=args.mini_batch,
        evaluations=args.evaluations,
        bf16="bf16" in suites.dtypes_for(device),
    )
    before = results.read(folder).get("study", {"rows": []})
    if before["rows"] and before["study"] != plan.settings:
        parser.error(f"{folder} holds a study of {before['study']}, not of {plan.settings}; choose another --out")
    found = _results("study", args, folder, known)
    found.document["study"] = plan.settings
    found.rows.extend(row for row in before["rows"] if row["status"] == "ok")
    with _progress(console) as progress:
        task = progress.add_task("study", total=1 + plan.trainings)

        def done(row: Row) -> None:
            scores = " ".join(
                f"{name} {row[name]:.2f}" for name in ("dev", "average") if row.get(name) is not None
            )
            told = scores if row["status"] == "ok" else f"{row['status']} ({row['reason']})"
            console.print(f"{row['loss']}, batch {row['batch']}, seed {row['seed']}: {told}", highlight=False)
            progress.advance(task)

        study.run(plan, found, lambda text: progress.update(task, description=text), done)
    found.close()
    console.print(tables.study("the same number of sentences", found.rows).rich())


def _report(parser: argparse.ArgumentParser, folder: Path, readme: Path | None) -> None:
    documents = results.read(folder) if folder.is_dir() else {}
    if not documents:
        parser.error(f"{folder} contains no results; python -m bench --out {folder} makes them")
    output_file("report", str(folder / "report.md"))
    plots.draw(documents, folder)
    text = report.whole(documents, folder)
    write_text(folder / "report.md", text)
    if readme is not None:
        report.put_between_marks(readme, report.section(documents, folder, readme))
    print(f"{folder}: results (.json), pictures (.png) and all tables (report.md)")
