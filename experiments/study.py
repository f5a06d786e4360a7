"""Trains SimCSE over batch sizes, losses and seeds: do larger batches hurt, and does noise help?

Every training sees as many sentences; the same seed draws the same batches and the same dropout for every loss.
``python -m experiments.study``; docs/study.md describes it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from bench import report, results
from bench.cli import Parser, check_outputs, console, progress_bar, user_errors
from bench.render import Chart, Panel, Point, Section, Table, beside
from bench.results import Results, Row, describe
from bench.suites import dtypes_for
from simcse.errors import exit_cleanly

NOISE = 3  # random directions per anchor, as in the paper's code
TENTH = 0.1  # of the denominator
BEFORE = "before training"
MASKED = "InfoNCE, duplicates masked"
ONE = "GS-InfoNCE, λ = 1"
SHARE = "GS-InfoNCE, a tenth noise"
LOSSES = ("InfoNCE", MASKED, ONE, SHARE)  # the last one needs the share that the one before it measures
POOLER = "cls_before_pooler"


@dataclass(frozen=True)
class Plan:
    train_file: str | None
    sts_data: str | None
    model: str
    sentences: int  # that each training sees
    batches: list[int]
    seeds: list[int]
    learning_rates: list[float]
    mini_batch: int  # sentences embedded at once
    evaluations: int  # on the dev pairs; the best model is kept
    bf16: bool

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the settings that the rows of one table share."""
        files = {name: Path(getattr(self, name) or "shipped").name for name in ("train_file", "sts_data")}
        return files | {
            "model": self.model,
            "sentences": self.sentences,
            "evaluations": self.evaluations,
            "precision": "bf16" if self.bf16 else "fp32",
        }

    @property
    def trainings(self) -> int:
        return len(self.batches) * len(self.seeds) * len(self.learning_rates) * len(LOSSES)


def run(plan: Plan, found: Results, progress: Callable[[str], None], done: Callable[[Row], None]) -> None:
    """Trains and scores what ``found`` has no row of; λ of the share follows from the same seed at λ = 1."""
    there = {_key(row): row for row in found.rows}
    if (BEFORE, 0, 0, 0.0) not in there:
        progress(BEFORE)
        row = {"loss": BEFORE, "batch": 0, "seed": 0, "learning_rate": 0.0, **_attempt(_score, plan, plan.model)}
        found.add([row])
        done(row)
    # Seeds are outermost, so that an interrupted study has all of its cells for the seeds it finished.
    for seed, batch, rate, loss in product(plan.seeds, plan.batches, plan.learning_rates, LOSSES):
        key = (loss, batch, seed, rate)
        if key in there:
            continue
        progress(f"{loss}, batch {batch}, seed {seed}")
        weight = {ONE: 1.0, SHARE: _weight(there.get((ONE, batch, seed, rate)))}.get(loss, 0.0)
        row = {"loss": loss, "batch": batch, "seed": seed, "learning_rate": rate, "noise_weight": weight}
        if weight is None:
            row |= {"status": "skipped", "reason": f"{ONE} did not measure the share of noise"}
        else:
            row |= _attempt(_train_and_score, plan, loss, batch, seed, rate, weight)
        there[key] = row
        found.add([row])
        done(row)


def _key(row: Row) -> tuple[str, int, int, float]:
    return row["loss"], row["batch"], row["seed"], row["learning_rate"]


def _weight(at_one: Row | None) -> float | None:
    """Returns the λ that makes noise a tenth of the denominator, from its share at λ = 1 if that is known."""
    share = (at_one or {}).get("noise_share")
    return TENTH / (1 - TENTH) * (1 - share) / share if share else None


def _attempt(work: Callable[..., Row], *args: Any) -> Row:
    """Returns the row of ``work``, or the message of a command line that gave up."""
    said, complaints = io.StringIO(), io.StringIO()
    start = time.perf_counter()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaints):
            row = work(*args)
    except SystemExit as end:
        if end.code == 130:
            raise KeyboardInterrupt from None
        last = (complaints.getvalue().strip().splitlines() or ["no message"])[-1]
        return {"status": "failed", "reason": last[:200]}
    except Exception as error:  # the other trainings go on
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}
    return {"status": "ok", **row, "seconds": time.perf_counter() - start}


def _flags(flags: dict[str, Any]) -> list[str]:
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


def _train_and_score(plan: Plan, loss: str, batch: int, seed: int, rate: float, weight: float) -> Row:
    from simcse.train import main as train

    steps = plan.sentences // batch
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "model_name_or_path": plan.model,
            "train_file": plan.train_file,
            "sts_data": plan.sts_data,
            "pooler_type": POOLER,
            "num_noise": NOISE * batch if weight else 0,
            "noise_weight": weight or None,
            "mask_duplicates": "true" if loss == MASKED else None,
            "per_device_train_batch_size": batch,
            "mini_batch_size": plan.mini_batch if batch > plan.mini_batch else 0,
            "max_steps": steps,
            "learning_rate": rate,
            "seed": seed,
            "bf16": "true" if plan.bf16 else None,
            "eval_steps": -(-steps // plan.evaluations),
            "logging_steps": max(1, steps // 10),
            "output_dir": folder,
            "report_to": "none",
            "disable_tqdm": "true",
        }
        train(_flags(flags))
        state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
        shares = [entry["noise_share"] for entry in state["log_history"] if "noise_share" in entry]
        return {"noise_share": mean(shares) if shares else None, **_score(plan, folder)}


def _score(plan: Plan, model: str) -> Row:
    """Returns the score of every task of the graded pairs; ``average`` is over the test splits."""
    from simcse.evaluate import main as evaluate

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "scores.json")
        flags = {"model_name_or_path": model, "sts_data": plan.sts_data, "pooler": POOLER, "output_json": file}
        evaluate(_flags(flags))
        scores = json.loads(file.read_text(encoding="utf-8"))
    shape = {name: scores.pop(name) for name in ("alignment", "uniformity") if name in scores}
    dev = {name: value for name, value in scores.items() if name.endswith("-dev")}
    watched = dev.get("STSB-dev", next(iter(dev.values()), None))
    tests = [value for name, value in scores.items() if "-" not in name]
    return {"dev": watched, "average": mean(tests) if tests else None, **shape, "scores": scores}


def cells(rows: list[Row]) -> Iterator[tuple[tuple[str, int, float], list[Row]]]:
    """Yields loss, batch and learning rate with the rows of all seeds that have a score, in order."""
    found: dict[tuple[str, int, float], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["loss"], row["batch"], row["learning_rate"]), []).append(row)
    order = (BEFORE, *LOSSES)
    yield from sorted(found.items(), key=lambda item: (item[0][1], item[0][2], order.index(item[0][0])))


# ------------------------------------------------------------------ the report

SCORES = {"dev": "dev split", "average": "mean of test splits"}
# Of the losses in order, at the first learning rate; at others paler.
COLOURS = ("#1f3b73", "#17becf", "#ff7f0e", "#d62728", "#7a8bb0", "#8bdee6", "#ffbf86", "#ea9293")


def section(rows: list[Row]) -> Section:
    """Returns a line for each loss and batch: mean and standard deviation over seeds."""
    lines = []
    for (loss, batch, rate), some in cells(rows):
        start = ["–", "–"] if not batch else [str(batch), f"{rate:g}"]
        share = _over_seeds([row.get("noise_share") for row in some], ".2g", spread=False)
        scores = [_over_seeds([row.get(name) for row in some], ".2f") for name in SCORES]
        shape = [_over_seeds([row.get(name) for row in some], ".4f") for name in ("alignment", "uniformity")]
        lines.append([loss, *start, str(len(some)), share, *scores, *shape])
    scored = ["dev, Spearman × 100", "mean of test splits", "alignment", "uniformity"]
    table = Table(["loss", "batch", "learning rate", "seeds", "share of noise", *scored], lines)
    title = "Trainings on equally many sentences; mean ± standard deviation over seeds"
    return Section(title, table, chart(rows))


def _over_seeds(values: list[float | None], form: str, spread: bool = True) -> str:
    known = [x for x in values if x is not None]
    if not known:
        return "–"
    return f"{mean(known):{form}}" + (f" ± {stdev(known):{form}}" if spread and len(known) > 1 else "")


def chart(rows: list[Row]) -> Chart | None:
    """Draws the mean over seeds with bars of one standard deviation; a panel for each score."""
    found = dict(cells(rows))
    batches = sorted({batch for _, batch, _ in found if batch})
    rates = sorted({rate for _, batch, rate in found if batch})
    series = [(rate, loss) for rate in rates for loss in LOSSES]
    labels = [loss if len(rates) == 1 else f"{loss}, {rate:g}" for rate, loss in series]
    panels = []
    for name, title in SCORES.items():
        start = [row[name] for row in rows if row["loss"] == BEFORE and row.get(name) is not None]
        lines: dict[str, list[Point]] = {BEFORE: [(x, start[0]) for x in (-0.5, len(batches) - 0.5) if start]}
        for place, ((rate, loss), label) in enumerate(zip(series, labels, strict=True)):
            points: list[Point] = []
            for x, batch in enumerate(batches):
                values = [row[name] for row in found.get((loss, batch, rate), []) if row.get(name) is not None]
                if values:
                    points.append((x, mean(values), stdev(values) if len(values) > 1 else 0.0))
            lines[label] = beside(points, place, len(series))
        if any(lines[label] for label in labels):
            panels.append(Panel(title, lines, "Spearman × 100   (better ↑)", log_y=False))
    if not panels:
        return None
    alt, ticks = "Scores over the batch for every loss, with the spread over seeds", [str(b) for b in batches]
    style = {label: (COLOURS[i % len(COLOURS)], "o", 1.6) for i, label in enumerate(labels)}
    return Chart("study.png", alt, panels, "sentences per batch", BEFORE, ticks=ticks, share_y=False, style=style)


# ------------------------------------------------------------------ the command


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    with exit_cleanly(parser.prog):
        args = parser.parse_args(argv)
    parser.check_positive(args, "sentences", "batch", "learning_rate", "mini_batch", "evaluations")
    parser.check_file(args, "train_file", "one sentence per line")
    parser.check_file(args, "sts_data", "graded pairs")
    if args.sentences < max(args.batch):
        parser.error(f"--sentences {args.sentences} is less than one batch of {max(args.batch)}; raise it")
    folder = Path(args.out or Path("runs/study") / datetime.now().strftime("%Y%m%d-%H%M%S"))
    with user_errors(parser, folder, "the same command with --out {} goes on"):
        pages = [args.readme] if args.readme else []
        check_outputs(folder, ("study.json", "study.png", "report.md"), pages)
        if not args.report:
            _study(parser, args, folder, sys.argv[1:] if argv is None else argv)
        documents = {job: x for job, x in results.read(folder).items() if job == "study"}
        if not documents:
            parser.error(f"{folder} contains no study; leave --report out to run one")
        made = section(documents["study"]["rows"])
        report.write(documents, [made], folder, pages)
        console().print(made.rich())
        print(f"{folder}: study.json, study.png and report.md")


def _parser() -> Parser:
    parser = Parser(prog="python -m experiments.study", description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", help="sentences, as simcse.train takes them (default: the package's)")
    parser.add_argument("--sts_data", help="graded pairs, as simcse.evaluate takes them (default: the package's)")
    parser.add_argument("--model", default="minilm", help="encoder, as simcse.train takes it (default: minilm)")
    many: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    for flag, kind, default, text in (
        ("--sentences", int, 65536, "that every training sees"),
        ("--batch", int, [64, 256, 1024, 4096], "sentences per batch"),
        ("--seeds", int, [1, 2, 3], "that each training is repeated with"),
        ("--learning_rate", float, [3e-5], "of AdamW at its peak"),
        ("--mini_batch", int, 512, "sentences embedded at once"),
        ("--evaluations", int, 10, "during a training; the best model is kept"),
    ):
        several = many if isinstance(default, list) else {}
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(flag, type=kind, default=default, help=f"{text} (default: {shown})", **several)
    parser.add_argument("--out", help="folder; results in it are kept (default: runs/study/DATE-TIME)")
    parser.add_argument("--readme", type=Path, help="file whose section between the marks is replaced")
    parser.add_argument("--report", action="store_true", help="only make table and picture of --out anew")
    return parser


def _study(parser: Parser, args: argparse.Namespace, folder: Path, command_line: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the one that a training takes
    plan = Plan(
        train_file=args.train_file,
        sts_data=args.sts_data,
        model=args.model,
        sentences=args.sentences,
        batches=sorted(args.batch),
        seeds=args.seeds,
        learning_rates=args.learning_rate,
        mini_batch=args.mini_batch,
        evaluations=args.evaluations,
        bf16="bf16" in dtypes_for(device),
    )
    before = results.read(folder).get("study", {"rows": []})
    if before["rows"] and before["study"] != plan.settings:
        parser.error(f"{folder} holds a study of {before['study']}, not of {plan.settings}; choose another --out")
    command = " ".join(["python -m experiments.study", *command_line])
    found = Results("study", folder, command=command, device=device, **describe(device), study=plan.settings)
    found.rows.extend(row for row in before["rows"] if row["status"] == "ok")
    out = console()
    with progress_bar(out, 1 + plan.trainings) as update:

        def done(row: Row) -> None:
            scores = " ".join(f"{name} {row[name]:.2f}" for name in SCORES if row.get(name) is not None)
            text = scores if row["status"] == "ok" else f"{row['status']} ({row['reason']})"
            out.print(f"{row['loss']}, batch {row['batch']}, seed {row['seed']}: {text}", highlight=False)
            update(advance=1)

        run(plan, found, update, done)
    found.close()


if __name__ == "__main__":
    main()
