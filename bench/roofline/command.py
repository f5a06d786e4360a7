"""``python -m bench roofline``: compiles a call's kernels for a GPU that is not here; prints predicted times."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cases import MODES, Case
from bench.render import Table
from bench.results import ROOT, describe
from bench.roofline.model import GPUS, Phase, assumptions, floor_ms, phases
from simcse import errors
from simcse.errors import UserError
from simcse.files import output_file, output_folder, write_text

JOB = "roofline"
HELP = "predicted time of a call on a GPU that need not be here, by phases, beside its bare products"
DTYPES = ("bf16", "fp16")  # whose products take the matrix units
BLOCK = re.compile(r"(<!-- roofline: begin \(.*?\) -->\n)(.*?)(<!-- roofline: end -->)", re.DOTALL)
HEADER = (
    "phase", "limit", "launches", "TFLOP", "GB", "instructions per tile", "of all warps, 10⁶",
    "predicted, ms", "measured, ms",
)  # fmt: skip
Document = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "; ".join(f"{name}: {gpu.name}, {gpu.target}" for name, gpu in GPUS.items())
    parser.add_argument("--gpu", choices=list(GPUS), nargs="+", default=["h100"], metavar="NAME", help=names)
    parser.add_argument("--n", type=int, default=32768, help="anchors (default: 32768)")
    parser.add_argument("--m", type=int, help="columns: N positives and M - N hard negatives (default: N)")
    parser.add_argument("--d", type=int, default=768, help="features (default: 768)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the products (default: bf16)")
    listed = f"{', '.join(MODES)} (default: all)"
    parser.add_argument("--mode", choices=MODES, nargs="+", default=list(MODES), metavar="NAME", help=listed)
    parser.add_argument("--json", action="store_true", help="print JSON with all figures and assumptions")
    # Without a default: the command ``python -m bench`` has this flag too, before the subcommand.
    parser.add_argument("--out", default=argparse.SUPPRESS, help=f"folder where {JOB}.json is written too")
    parser.add_argument(
        "--page", metavar="FILE", help="Markdown file whose block 'roofline' is filled with the tables"
    )


def run(parser: errors.Parser, args: argparse.Namespace) -> None:
    """Runs the command. Nothing is measured: every time that it prints is a prediction."""
    columns = args.n if args.m is None else args.m
    for name, value, least in (("n", args.n, 2), ("d", args.d, 1), ("m", columns, args.n)):
        if value < least:
            known = f"the {least} of --n, for every anchor has its positive" if name == "m" else str(least)
            parser.error(f"--{name} must be at least {known}, not {value}")
    if importlib.util.find_spec("triton") is None:
        parser.error(f"the kernels are compiled with Triton, which is not installed; {errors.install('triton')}")
    out = getattr(args, "out", None)
    if out and output_folder("--out", out).is_dir():
        output_file("--out", str(Path(out) / f"{JOB}.json"))
    page = read_page(Path(args.page)) if args.page else ""
    cases = [Case(args.n, args.d, mode, args.dtype, negatives=columns - args.n) for mode in args.mode]
    found = document([prediction(gpu, case, made) for gpu in args.gpu for case, made in launches(gpu, cases)])
    found["command"] = " ".join(["python -m bench", *args.command_line])
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        write_text(Path(out) / f"{JOB}.json", text)
    if args.page:
        write_text(args.page, filled(page, found))
    print(text if args.json else markdown(found), end="")


def launches(gpu: str, cases: list[Case]) -> list[tuple[Case, list[dict[str, Any]]]]:
    """Returns what the cases' calls launch on a GPU, from a process whose kernels are compiled for it."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]  # the fake device
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    command = [sys.executable, "-m", "bench.roofline.launches", gpu, *(json.dumps(c.as_dict()) for c in cases)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"the kernels of {cases[0].label} cannot be compiled for {GPUS[gpu].name}: {last}")
    found = list(zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for case, made in found:
        if any(launch.get("block") and not launch["step"] for launch in made):
            raise UserError(
                f"{case.label} is too small: so few products are made in fp32, without the matrix units "
                "that the model describes; choose a larger --n, --m or --d"
            )
    return found


def prediction(gpu: str, case: Case, made: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the phases of a call, their sum and its floor, from what it launches."""
    device, M = GPUS[gpu], case.N + case.negatives
    of_call = phases(made, device)
    return {
        "gpu": gpu,
        "case": case.as_dict(),
        "phases": [asdict(phase) | {"predicted_ms": _short(phase.predicted_ms)} for phase in of_call],
        "predicted_ms": _short(sum(phase.predicted_ms for phase in of_call)),
        "floor_products": case.flops // (2 * case.N * M * case.D),
        "floor_ms": _short(floor_ms(case.flops, case.N, M, case.D, device)),
    }


def document(predictions: list[dict[str, Any]]) -> Document:
    """Returns predictions with the figures that they rest on, and the versions that compiled."""
    known = describe("cpu")
    gpus = dict.fromkeys(one["gpu"] for one in predictions)
    rests_on = {gpu: {name: _short(x) for name, x in assumptions(GPUS[gpu]).items()} for gpu in gpus}
    head = {"job": JOB, "versions": known["versions"], "commit": known["commit"]}
    return {**head, "assumptions": rests_on, "predictions": predictions}


def _short(x: Any) -> Any:
    return float(f"{x:.4g}") if isinstance(x, float) else x


def markdown(found: Document) -> str:
    """Returns a table for each prediction; the last column is empty until there is a measurement."""
    parts = []
    for one in found["predictions"]:
        rows = [_row(Phase(**phase)) for phase in one["phases"]]
        blank = [""] * (len(HEADER) - 3)
        rows.append(["predicted call", *blank, f"{one['predicted_ms']:.3g}", ""])
        rows.append([f"floor: {one['floor_products']} bare products", *blank, f"{one['floor_ms']:.3g}", ""])
        rows.append(["predicted, × floor", *blank, f"{one['predicted_ms'] / one['floor_ms']:.2f}×", ""])
        title = f"**{GPUS[one['gpu']].name} ({GPUS[one['gpu']].target}), {Case(**one['case']).label}, predicted**"
        parts.append(f"{title}\n\n{Table(list(HEADER), rows, text_columns=2).markdown()}")
    return "\n".join(parts)


def _row(phase: Phase) -> list[str]:
    """Returns a line of the table; what a phase has none of is left empty."""
    counted = "" if phase.instructions is None else f"{phase.instructions / 1e6:,.0f}"
    sizes = [f"{phase.flops / 1e12:.2f}" if phase.flops else "", f"{phase.bytes / 1e9:.2f}"]
    cells = [phase.phase, phase.limit, str(phase.launches), *sizes, phase.per_tile, counted]
    return [*cells, f"{phase.predicted_ms:.3g}", ""]


def read_page(page: Path) -> str:
    """Returns its text; raises UserError unless it has one block."""
    text = output_file("--page", str(page)).read_text(encoding="utf-8") if page.is_file() else ""
    if len(BLOCK.findall(text)) != 1:
        begin, end = "<!-- roofline: begin (python -m bench roofline) -->", "<!-- roofline: end -->"
        raise UserError(f"--page {page} must be a file with one block between the lines '{begin}' and '{end}'")
    return text


def filled(page: str, found: Document) -> str:
    """Returns a page with the tables in its block."""
    return BLOCK.sub(lambda match: f"{match[1]}{markdown(found)}{match[3]}", page)
