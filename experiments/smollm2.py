"""Trains SmolLM2, which never saw a contrastive loss, with SimCSE and GS-InfoNCE, and scores it before and after.

The grid: unsupervised on sentences and supervised on triplets with hard negatives; poolers avg and last; batches
of 64 and 256, which see equally many sentences; InfoNCE, GS-InfoNCE at λ = 1, and at the λ that makes noise a
tenth of the denominator; three seeds. ``python -m experiments.smollm2``; docs/study.md describes it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.cli import Parser
from bench.render import Table
from bench.results import describe
from simcse.errors import UserError, exit_cleanly
from simcse.files import replaced, write_text

BEGIN, END = "<!-- smollm2: begin (python -m experiments.smollm2) -->", "<!-- smollm2: end -->"
PICTURE = "smollm2.png"
NOISE = 3  # random directions per anchor, as in the paper's code
TENTH = 0.1  # of the denominator
BEFORE, INFO, ONE, SHARE = "before", "InfoNCE", "GS-InfoNCE, λ = 1", "GS-InfoNCE, a tenth noise"
LOSSES = {"infonce": INFO, "lambda1": ONE, "tenth": SHARE}
DATA = {"unsupervised": "wiki_sentences.txt.gz", "supervised": "nli_triplets.csv"}
LEARNING_RATES = {"unsupervised": 3e-5, "supervised": 5e-5}


@dataclass(frozen=True)
class Setting:
    """What all runs in one folder share."""

    model: str
    sentences: int  # rows that each training sees
    evaluations: int  # on STS-B dev; the best model is kept
    seven_tasks: bool  # False: STS-B dev alone is scored
    bf16: bool


@dataclass(frozen=True)
class Run:
    """One training, or with the loss ``before`` the model as it came."""

    data: str
    pooler: str
    batch: int
    loss: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.data}-{self.pooler}-{self.batch}-{self.loss}-{self.seed}.json"


def runs(args: argparse.Namespace) -> list[Run]:
    """The grid. Seeds are outermost, so that an interrupted study has all cells for the seeds it finished."""
    before = [Run("none", pooler, 0, BEFORE, 0) for pooler in args.poolers]
    # Of a setting λ = 1 comes before the tenth, whose λ follows from it.
    grid = product(
        args.seeds, args.data, args.poolers, args.batch, [loss for loss in LOSSES if loss in args.losses]
    )
    return before + [Run(data, pooler, batch, loss, seed) for seed, data, pooler, batch, loss in grid]


def noise_weight(run: Run, out: Path) -> float:
    """λ of a run: for ``tenth`` from the share of noise that the same run measured at λ = 1."""
    if run.loss != "tenth":
        return float(run.loss == "lambda1")
    file = out / Run(run.data, run.pooler, run.batch, "lambda1", run.seed).file
    share = json.loads(file.read_text(encoding="utf-8")).get("noise_share") if file.is_file() else None
    if not share:
        raise UserError(f"the λ of {run.file} follows from {file.name}, which is missing; add lambda1 to --losses")
    return TENTH / (1 - TENTH) * (1 - share) / share


def train(run: Run, setting: Setting, folder: str, source: Path, weight: float) -> dict[str, Any]:
    """Trains into ``folder``; the trajectory on STS-B dev and the mean share of noise."""
    from simcse.train import main

    steps = setting.sentences // run.batch
    flags = {
        "model_name_or_path": setting.model,
        "train_file": source / DATA[run.data],
        "sts_data": source / "sts_eval.tsv",
        "pooler_type": run.pooler,
        "dropout": 0.1,
        "num_noise": NOISE * run.batch if weight else 0,
        "noise_weight": weight or None,
        "max_seq_length": 32,
        "per_device_train_batch_size": run.batch,
        "mini_batch_size": 32,  # fixed: another size draws other dropout
        "max_steps": steps,
        "learning_rate": LEARNING_RATES[run.data],
        "seed": run.seed,
        "bf16": "true" if setting.bf16 else None,
        "eval_on_start": "false",
        "eval_steps": -(-steps // setting.evaluations),
        "logging_steps": max(1, steps // 20),
        "output_dir": folder,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    main([part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))])
    log = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    shares = [entry["noise_share"] for entry in log if "noise_share" in entry]
    path = [entry for entry in log if "eval_uniformity" in entry]
    return {"steps": steps, "noise_share": mean(shares) if shares else None, "trajectory": path}


def score(model: str, pooler: str, setting: Setting, source: Path) -> dict[str, Any]:
    """STS-B dev, the mean over the test splits, the geometry and the spectrum on the dev pairs."""
    import torch
    import torch.nn.functional as F

    from simcse.model import load_encoder
    from simcse.sts import cone, encode, geometry, read_sts, spearman, watched_pairs

    tasks = read_sts(source / "sts_eval.tsv")
    dev = watched_pairs(tasks)
    tests = [pairs for pairs in tasks if pairs.split == "test"] if setting.seven_tasks else []
    encoder, tokenizer = load_encoder(model, pooler)
    vectors = encode(encoder, tokenizer, [s for pairs in [dev, *tests] for s in pairs.sentences], progress=False)
    rows = F.normalize(torch.stack([vectors[s] for s in dict.fromkeys(dev.sentences)]).double(), dim=1)  # (S, D)
    values = torch.linalg.svdvals(rows)
    scores = {pairs.name: spearman(pairs, vectors) for pairs in tests}
    return {
        "dev": spearman(dev, vectors),
        "average": mean(scores.values()) if scores else None,
        "tasks": scores,
        **geometry(dev, vectors),
        **cone(dev, vectors),
        "spectrum": (values / values.sum()).tolist(),
    }


def do(run: Run, setting: Setting, out: Path, source: Path) -> None:
    """One run: nothing where its file is there; otherwise the file, written when all is measured."""
    file = out / run.file
    if file.is_file():
        return
    start = time.perf_counter()
    found: dict[str, Any] = {**asdict(run), "setting": asdict(setting), **describe("cpu")}
    if run.loss == BEFORE:
        found |= score(setting.model, run.pooler, setting, source)
    else:
        found["noise_weight"] = noise_weight(run, out)
        with tempfile.TemporaryDirectory() as folder:
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                found |= train(run, setting, folder, source, found["noise_weight"])
            found |= score(folder, run.pooler, setting, source)
    found["seconds"] = round(time.perf_counter() - start)
    write_text(file, json.dumps(found, indent=1) + "\n")
    print(f"{run.file.removesuffix('.json')}: STS-B dev {found['dev']:.2f}, {found['seconds']} s", flush=True)


# ------------------------------------------------------------------ the report


def read(out: Path, setting: Setting | None = None) -> list[dict[str, Any]]:
    """The runs in a folder; with ``setting``, ``UserError`` for one of another."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    for one in found:
        if setting is not None and one["setting"] != asdict(setting):
            raise UserError(f"{out} has runs of {one['setting']}, not of {asdict(setting)}; choose another --out")
    return found


def table(found: list[dict[str, Any]]) -> Table:
    """A line for each cell of the grid: mean and standard deviation over its seeds."""
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    order = [BEFORE, *LOSSES]
    for one in sorted(found, key=lambda one: (one["batch"], order.index(one["loss"]), one["seed"])):
        cells.setdefault((one["data"], one["pooler"], one["batch"], one["loss"]), []).append(one)
    lines = []
    for (data, pooler, batch, loss), some in sorted(cells.items(), key=lambda cell: (cell[0][1], cell[0][2])):
        shown = ["before training", "–", "–"] if loss == BEFORE else [data, LOSSES[loss], str(batch)]
        values = [
            _over_seeds([one.get(name) for one in some], form)
            for name, form in (
                ("noise_share", ".2g"),
                ("dev", ".2f"),
                ("average", ".2f"),
                ("alignment", ".4f"),
                ("uniformity", ".4f"),
                ("effective_rank", ".1f"),
            )
        ]
        lines.append([pooler, *shown, str(some[0].get("steps", "–")), str(len(some)), *values])
    measures = ["share of noise", "STS-B dev", "seven tasks", "alignment", "uniformity", "effective rank"]
    return Table(["pooler", "data", "loss", "batch", "steps", "seeds", *measures], lines, text_columns=3)


def _over_seeds(values: list[float | None], form: str) -> str:
    known = [x for x in values if x is not None]
    if not known:
        return "–"
    return f"{mean(known):{form}}" + (f" ± {stdev(known):{form}}" if len(known) > 1 else "")


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """The singular values before and after: for each pooler, one run of each kind of data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    poolers = sorted({one["pooler"] for one in found})
    lines = {"linewidth": 1.2, "markersize": 3}
    figure = Figure(figsize=(6.2 * len(poolers), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, pooler in zip(figure.subplots(1, len(poolers), squeeze=False)[0], poolers, strict=True):
        shown: dict[str, dict[str, Any]] = {}
        for one in found:
            if one["pooler"] == pooler and one["loss"] in (BEFORE, "infonce"):
                shown.setdefault("before training" if one["loss"] == BEFORE else one["data"], one)
        for (label, one), colour in zip(shown.items(), ("#3b528b", "#d95f02", "#1b9e77"), strict=False):
            values = one["spectrum"]
            text = f"{label}: effective rank {one['effective_rank']:.0f}, STS-B dev {one['dev']:.1f}"
            axes.plot(range(1, len(values) + 1), values, ".-", color=colour, label=text, **lines)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("index of the singular value")
        axes.set_ylabel("share in the sum of all")
        axes.set_title(f"SmolLM2, pooler {pooler}, sentences of STS-B dev")
        axes.legend(frameon=False, loc="lower left", fontsize="small")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    with replaced(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def block(found: list[dict[str, Any]], absent: list[Run], out: Path, base: Path) -> str:
    """The Markdown of the report: conditions, table, what was not run, figure."""
    import os

    one = found[0]
    setting, machine = one["setting"], one["machine"]
    head = (
        f"Measured on {machine['cpu']}, torch {one['versions']['torch']}, commit {one['commit']}: "
        f"{setting['sentences']:,} rows per training, {'bf16' if setting['bf16'] else 'fp32'}. Spearman × 100; "
        "mean ± standard deviation over seeds."
    )
    missing = "\n".join(
        [f"Not run: {len(absent)} of {len(absent) + len(found)} runs of the grid.\n", *_listed(absent)]
    )
    picture = f"![Singular values before and after training]({os.path.relpath(out / PICTURE, base)})"
    return "\n\n".join([head, table(found).markdown(), missing, picture])


def _listed(absent: list[Run]) -> list[str]:
    """A line of Markdown for each data, pooler and batch, with the losses and their seeds."""
    seeds: dict[tuple[str, str], dict[str, list[str]]] = {}
    for run in absent:
        place = f"{run.pooler}, batch {run.batch}" if run.batch else run.pooler
        seeds.setdefault((run.data, place), {}).setdefault(run.loss, []).append(str(run.seed))
    return [
        f"- before training, {place}"
        if data == "none"
        else f"- {data}, {place}: "
        + "; ".join(f"{loss}, seeds {', '.join(some)}" for loss, some in losses.items())
        for (data, place), losses in seeds.items()
    ]


def fill(page: Path, text: str) -> None:
    before = page.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or END not in before:
        raise UserError(f"{page} must hold the lines '{BEGIN}' and '{END}' once")
    head, rest = before.split(BEGIN)
    write_text(page, f"{head}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")


# ------------------------------------------------------------------ the command


def _parser() -> Parser:
    usage = "%(prog)s --source DIR [options]"
    parser = Parser(prog="python -m experiments.smollm2", usage=usage, description=__doc__.splitlines()[0])
    many: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--source", help="folder with wiki_sentences.txt.gz, nli_triplets.csv and sts_eval.tsv")
    parser.add_argument("--model", default="smollm2", help="decoder, as simcse.train takes it (default: smollm2)")
    parser.add_argument("--data", choices=list(DATA), default=list(DATA), **many)
    parser.add_argument("--poolers", choices=["avg", "last"], default=["avg", "last"], **many)
    parser.add_argument("--losses", choices=list(LOSSES), default=list(LOSSES), **many)
    parser.add_argument("--batch", type=int, default=[64, 256], **many)
    parser.add_argument("--seeds", type=int, default=[0, 1, 2], **many)
    parser.add_argument("--sentences", type=int, default=16384, help="rows per training (default: 16384)")
    parser.add_argument("--evaluations", type=int, default=4, help="on STS-B dev in a training (default: 4)")
    parser.add_argument("--dev_only", action="store_true", help="score STS-B dev without the seven test sets")
    parser.add_argument("--fp32", action="store_true", help="train in fp32 (default: bf16)")
    parser.add_argument(
        "--quick", action="store_true", help="the grid in small: 512 rows, one evaluation, one seed"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="folder; its runs are not repeated")
    parser.add_argument("--readme", type=Path, help="page whose block between the marks is replaced")
    parser.add_argument("--report", action="store_true", help="only make table and figure of --out anew")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    with exit_cleanly(parser.prog):
        args = parser.parse_args(argv)
        parser.check_positive(args, "sentences", "batch", "evaluations")
        if args.quick:
            args.sentences, args.evaluations, args.seeds, args.dev_only = 512, 1, args.seeds[:1], True
        if args.sentences < max(args.batch):
            parser.error(f"--sentences {args.sentences} is less than a batch of {max(args.batch)}; raise it")
        setting = Setting(args.model, args.sentences, args.evaluations, not args.dev_only, not args.fp32)
        args.out.mkdir(parents=True, exist_ok=True)
        wanted = runs(args)
        if not args.report:
            if not args.source:
                parser.error("--source is required: the folder with the data, $SIMCSE_DATA")
            read(args.out, setting)
            for run in wanted:
                do(run, setting, args.out, Path(args.source).expanduser())
        found = read(args.out)
        if not found:
            raise UserError(f"{args.out} has no runs; leave --report out to make some")
        draw(found, args.out / PICTURE)
        done = {file_of(one) for one in found}
        absent = [run for run in wanted if run.file not in done]
        text = block(found, absent, args.out, (args.readme or args.out).parent)
        if args.readme:
            fill(args.readme, text)
        print(text)


def file_of(one: dict[str, Any]) -> str:
    return Run(*(one[name] for name in ("data", "pooler", "batch", "loss", "seed"))).file


if __name__ == "__main__":
    main()
