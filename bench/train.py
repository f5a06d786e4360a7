"""Steps of the trainers: sentences per second and peak memory, ours against sentence-transformers'.

Both take the same encoder, sentences, batch, length, precision and optimiser, for unsupervised SimCSE, where a
sentence is its own positive. Each run is a process of its own: ``python -m bench.train '{...}'`` prints its row.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from bench.results import ROOT, Results, Row
from bench.runner import GIVE_UP
from bench.worker import environment
from simcse.errors import exit_cleanly

WARM_UP = 1  # steps that are not timed
LOSS_CALLS = 5  # of the loss alone
LENGTH = 32  # tokens per sentence
LEARNING_RATE = 3e-5
LIMIT_SECONDS = 1800.0  # of one training
# trainer → whether it splits the encoder's pass into mini batches
TRAINERS = {"simcse.train": False, "st-mnrl": False, "simcse.train, mini batches": True, "st-cached-mnrl": True}


def run(
    found: Results, spec: dict[str, Any], dtypes: list[str], batches: list[int], progress: Callable[[str], None]
) -> None:
    """Measures every trainer; one that ran out of memory or time is not tried at larger batches."""
    gave_up: dict[tuple[str, str], str] = {}
    for dtype, batch, trainer in product(dtypes, batches, TRAINERS):
        one = spec | {"trainer": trainer, "batch": batch, "dtype": dtype}
        progress(f"train  {dtype}, batch {batch}  {trainer}")
        if (trainer, dtype) in gave_up:
            row = one | {"status": gave_up[trainer, dtype], "reason": "already at a smaller batch"}
        else:
            row = measure(one, LIMIT_SECONDS)
        if row["status"] in (*GIVE_UP, "skipped"):
            gave_up[trainer, dtype] = row["status"]
        found.add([row])
    found.close()


def measure(spec: dict[str, Any], limit: float) -> Row:
    """Returns the row of one trainer, batch and precision, measured in a fresh process."""
    command = [sys.executable, "-m", "bench.train", json.dumps(spec)]
    try:
        env = environment(spec["device"])
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=limit, env=env)
    except subprocess.TimeoutExpired:
        return {**spec, "status": "too slow", "reason": f"stopped after {limit:g} s"}
    if out.returncode == 0:
        return {**spec, **json.loads(out.stdout.splitlines()[-1])}
    if out.returncode == -9:
        return {**spec, "status": "out of memory", "reason": "killed by SIGKILL"}
    last = (out.stderr.strip().splitlines() or ["no message"])[-1]
    return {**spec, "status": "failed", "reason": f"exit status {out.returncode}: {last[:200]}"}


# ------------------------------------------------------------------ inside of the process


def child(spec: dict[str, Any]) -> Row:
    import torch

    from bench.gate import outcome
    from bench.measure import MIB, summary
    from bench.worker import limit_memory
    from fused_infonce.testing import begin_peak, process_memory

    on_gpu = spec["device"] == "cuda"
    if not on_gpu:
        limit_memory()
    with tempfile.TemporaryDirectory() as folder:
        try:
            make = _simcse if spec["trainer"].startswith("simcse.train") else _sentence_transformers
            trainer = make(spec, _sentences(spec), Path(folder))
            clock = _clock(on_gpu)
            trainer.add_callback(clock)
            before = torch.cuda.memory_allocated() if on_gpu else begin_peak()
            trainer.train()
        except Exception as error:
            return outcome(error)
        peak = torch.cuda.max_memory_allocated() if on_gpu else process_memory("VmHWM")
    ms = summary(clock.milliseconds[WARM_UP:])
    found = {
        "status": "ok",
        "ms": ms,
        "sentences_per_second": 1e3 * spec["batch"] / ms["median"],
        "mib": (peak - before) / MIB,
    }
    with contextlib.suppress(Exception):  # the steps are measured even if this fails
        found["loss_share"] = _loss_alone(spec, trainer.model) / ms["median"]
    return found


def _loss_alone(spec: dict[str, Any], model: Any) -> float:
    """Returns the median milliseconds of the loss on vectors of a batch, forward and backward."""
    from bench.candidates import load
    from bench.cases import Case, make_batch, run_step
    from bench.measure import clock_for

    ours = spec["trainer"].startswith("simcse.train")
    D = model.encoder.config.hidden_size if ours else model.get_embedding_dimension()
    case, known = Case(spec["batch"], D, dtype=spec["dtype"]), load()
    name = ("ours-triton" if spec["device"] == "cuda" else "ours-torch") if ours else spec["trainer"]
    loss = known[name].loss_for(case)
    batch, clock = make_batch(case, spec["device"]), clock_for(spec["device"])
    run_step(loss, batch, case, spec["device"])
    return statistics.median(clock(lambda: run_step(loss, batch, case, spec["device"])) for _ in range(LOSS_CALLS))


def _sentences(spec: dict[str, Any]) -> list[str]:
    """Returns as many sentences as the steps take, repeated where the file has fewer."""
    from simcse.dataset import shipped
    from simcse.table import read_table

    some = [row[0] for row in read_table(spec["train_file"] or shipped("sentences.txt")).rows]
    count = spec["batch"] * (WARM_UP + spec["steps"])
    return (some * -(-count // len(some)))[:count]


def _simcse(spec: dict[str, Any], sentences: list[str], folder: Path) -> Any:
    from bench.registry import Unsupported
    from simcse.errors import UserError
    from simcse.train import prepare

    file = folder / "sentences.txt"
    file.write_text("\n".join(sentences), encoding="utf-8")
    flags = {
        "train_file": file,
        "model_name_or_path": spec["model"],
        "pooler_type": "cls_before_pooler",
        "num_noise": 0,
        "per_device_train_batch_size": spec["batch"],
        "max_steps": WARM_UP + spec["steps"],
        "max_seq_length": LENGTH,
        "learning_rate": LEARNING_RATE,
        "output_dir": folder / "run",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": "true",
        "bf16": "true" if spec["dtype"] == "bf16" else "false",
    }
    if TRAINERS[spec["trainer"]]:
        flags["mini_batch_size"] = spec["mini_batch"]
    try:
        return prepare([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    except UserError as error:
        raise Unsupported(str(error)) from None


def _sentence_transformers(spec: dict[str, Any], sentences: list[str], folder: Path) -> Any:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from simcse.model import load_encoder

    encoder, tokenizer = load_encoder(spec["model"], "cls_before_pooler")
    place = folder / "model"
    encoder.backbone.save_pretrained(place)
    tokenizer.save_pretrained(place)
    transformer = Transformer(str(place), max_seq_length=LENGTH)
    model = SentenceTransformer(
        modules=[transformer, Pooling(encoder.config.hidden_size, pooling_mode="cls")],
        device=None if spec["device"] == "cuda" else "cpu",
    )
    if TRAINERS[spec["trainer"]]:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=spec["mini_batch"])
    else:
        loss = MultipleNegativesRankingLoss(model)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=spec["batch"],
        max_steps=WARM_UP + spec["steps"],
        learning_rate=LEARNING_RATE,
        bf16=spec["dtype"] == "bf16",
        use_cpu=spec["device"] == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
    )
    pairs = Dataset.from_dict({"anchor": sentences, "positive": sentences})
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)


def _clock(on_gpu: bool) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Records the milliseconds from the end of one step to the next: encoder, loss, optimiser and loading."""

        def __init__(self) -> None:
            self.milliseconds: list[float] = []
            self.last: float | None = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.milliseconds.append(1e3 * (now - (self.last or now)))
            self.last = now

    return Clock()


if __name__ == "__main__":
    with exit_cleanly("bench.train"):
        found = child(json.loads(sys.argv[1]))
        print()
        print(json.dumps(found))
