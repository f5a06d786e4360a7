"""Do larger batches hurt unsupervised SimCSE, and does noise mend it? Trainings over batch, loss and seed.

Every training sees as many sentences; the same seed draws the same batches and the same dropout for every loss.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from bench.results import Results, Row

NOISE = 3  # random directions for each anchor, as in the paper's code
TENTH = 0.1  # of the denominator
BEFORE = "before training"
MASKED = "InfoNCE, duplicates masked"
ONE = "GS-InfoNCE, λ = 1"
SHARE = "GS-InfoNCE, a tenth noise"
LOSSES = ("InfoNCE", MASKED, ONE, SHARE)  # the last needs the share that the one before it measures
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
    mini_batch: int  # sentences that are embedded at a time
    evaluations: int  # on the dev pairs, of which the best is kept
    bf16: bool

    @property
    def settings(self) -> dict[str, Any]:
        """What has to be alike for two rows to stand in one table."""
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


def run(plan: Plan, found: Results, tell: Callable[[str], None], done: Callable[[Row], None]) -> None:
    """Trains and scores what ``found`` has no row of; λ of the share follows from the same seed at λ = 1."""
    there = {_key(row): row for row in found.rows}
    if (BEFORE, 0, 0, 0.0) not in there:
        tell(BEFORE)
        row = {"loss": BEFORE, "batch": 0, "seed": 0, "learning_rate": 0.0, **_attempt(_score, plan, plan.model)}
        found.add([row])
        done(row)
    # Seeds outermost: interrupted, a study has all of its cells for the seeds it finished.
    for seed, batch, rate, loss in product(plan.seeds, plan.batches, plan.learning_rates, LOSSES):
        key = (loss, batch, seed, rate)
        if key in there:
            continue
        tell(f"{loss}, batch {batch}, seed {seed}")
        weight = {ONE: 1.0, SHARE: _weight(there.get((ONE, batch, seed, rate)))}.get(loss, 0.0)
        row = {"loss": loss, "batch": batch, "seed": seed, "learning_rate": rate, "noise_weight": weight}
        if weight is None:
            row |= {"status": "skipped", "reason": f"no share was measured by {ONE}"}
        else:
            row |= _attempt(_train_and_score, plan, loss, batch, seed, rate, weight)
        there[key] = row
        found.add([row])
        done(row)


def _key(row: Row) -> tuple[str, int, int, float]:
    return row["loss"], row["batch"], row["seed"], row["learning_rate"]


def _weight(at_one: Row | None) -> float | None:
    """λ that makes noise a tenth of the denominator, from its share at λ = 1; None where that is not known."""
    share = (at_one or {}).get("noise_share")
    return TENTH / (1 - TENTH) * (1 - share) / share if share else None


def _attempt(work: Callable[..., Row], *args: Any) -> Row:
    """What the work gives; of a command line that gave up, its message."""
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
    except Exception as error:  # the others are still worth having
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
            "mini_batch_size": plan.mini_batch if batch > plan.mini_batch else None,
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
    """Every task of the graded pairs; ``average`` is of the test splits."""
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
    """Loss, batch and learning rate → the rows of all seeds that have a score, in order."""
    found: dict[tuple[str, int, float], list[Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["loss"], row["batch"], row["learning_rate"]), []).append(row)
    order = (BEFORE, *LOSSES)
    yield from sorted(found.items(), key=lambda item: (item[0][1], item[0][2], order.index(item[0][0])))
