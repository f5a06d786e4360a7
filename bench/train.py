"""Steps of the trainers: sentences per second and peak memory, ours against sentence-transformers'.

All take the same encoder, sentences, batch, length, precision and optimiser, for unsupervised SimCSE, where a
sentence is its own positive. Each training runs in a process of its own. Ours chooses its mini batches by itself;
for sentence-transformers' cached loss, which cannot, the fastest size is searched before the training.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.candidates import load
from bench.cases import Case, make_batch, run_step
from bench.measure import MIB, Event, Facts, clock_for, each, summary
from bench.registry import Unsupported
from fused_infonce.testing import begin_peak, process_memory
from simcse.errors import UserError

WARM_UP = 1  # steps that are not timed
LOSS_CALLS = 5  # of the loss by itself
LENGTH = 32  # tokens per sentence
LEARNING_RATE = 3e-5
CACHED_SIZES = (32, 64, 128)  # mini batches that are tried for st-cached-mnrl, whose default is 32


@dataclass(frozen=True)
class TrainCase:
    """One training; ``Runner`` treats it as a case of a loss."""

    N: int  # sentences per batch
    dtype: str = "fp32"
    steps: int = 3  # that are timed
    model: str = "minilm"
    train_file: str | None = None

    @property
    def label(self) -> str:
        return f"{self.dtype} batch {self.N}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Trainer:
    name: str
    make: Callable[[TrainCase, list[str], Path, str], Any]  # of case, sentences, folder and device
    loss: str = ""  # the candidate that computes its loss; "": ours


def train(case: TrainCase, trainers: list[Trainer], device: str, seconds: float) -> Iterator[Event]:
    """Measures each trainer's steps, its peak memory, and the share that the loss has of a step."""

    def work(trainer: Trainer) -> Facts:
        with tempfile.TemporaryDirectory() as folder:
            made = trainer.make(case, _sentences(case), Path(folder), device)
            clock = _clock(device)
            made.add_callback(clock)
            before = torch.cuda.memory_allocated() if device == "cuda" else begin_peak()
            made.train()
            peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")
        ms = summary(clock.milliseconds[WARM_UP:])
        found = {"ms": ms, "sentences_per_second": 1e3 * case.N / ms["median"], "mib": (peak - before) / MIB}
        found["at_once"] = _at_once(made, case)
        with contextlib.suppress(Exception):  # the steps are measured even if this fails
            found["loss_share"] = _milliseconds_of_loss(case, trainer, made.model, device) / ms["median"]
        return found

    yield from each(trainers, work)


def _at_once(made: Any, case: TrainCase) -> int:
    """Returns how many sentences a trainer embedded at once."""
    if hasattr(made.model, "mini_batches"):
        return made.model.mini_batches.size or 2 * case.N  # both views of the batch
    return getattr(made.loss, "mini_batch_size", case.N)  # the views one after the other


def _milliseconds_of_loss(case: TrainCase, trainer: Trainer, model: Any, device: str) -> float:
    """Returns the median milliseconds of the loss on vectors of a batch, forward and backward."""
    D = model.get_embedding_dimension() if trainer.loss else model.encoder.config.hidden_size
    one = Case(case.N, D, dtype=case.dtype)
    loss = load()[trainer.loss or ("ours-triton" if device == "cuda" else "ours-torch")].loss_for(one)
    batch, clock = make_batch(one, device), clock_for(device)
    run_step(loss, batch, one, device)
    return statistics.median(clock(lambda: run_step(loss, batch, one, device)) for _ in range(LOSS_CALLS))


def _sentences(case: TrainCase) -> list[str]:
    """Returns as many sentences as the steps take, repeated where the file has fewer."""
    from simcse.collator import packaged_file
    from simcse.readers import read_table

    some = [row[0] for row in read_table(case.train_file or packaged_file("sentences.txt")).rows]
    count = case.N * (WARM_UP + case.steps)
    return (some * -(-count // len(some)))[:count]


def _common(case: TrainCase, folder: Path) -> dict[str, Any]:
    """Returns the training arguments that both libraries take."""
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": case.N,
        "max_steps": WARM_UP + case.steps,
        "learning_rate": LEARNING_RATE,
        "bf16": case.dtype == "bf16",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _simcse(mini_batch: str, case: TrainCase, sentences: list[str], folder: Path, device: str) -> Any:
    from simcse.train import prepare

    file = folder / "sentences.txt"
    file.write_text("\n".join(sentences), encoding="utf-8")
    flags = _common(case, folder) | {
        "train_file": file,
        "model_name_or_path": case.model,
        "pooler_type": "cls_before_pooler",
        "num_noise": 0,
        "max_seq_length": LENGTH,
        "eval_strategy": "no",
        "mini_batch_size": mini_batch,
    }
    try:
        return prepare([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    except UserError as error:
        raise Unsupported(str(error)) from None


def _sentence_transformers(cached: bool, case: TrainCase, sentences: list[str], folder: Path, device: str) -> Any:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    from simcse.model import load_encoder

    encoder, tokenizer = load_encoder(case.model, "cls_before_pooler")
    place = folder / "model"
    encoder.backbone.save_pretrained(place)
    tokenizer.save_pretrained(place)
    transformer = Transformer(str(place), max_seq_length=LENGTH)
    pooling = Pooling(encoder.config.hidden_size, pooling_mode="cls")
    model = SentenceTransformer(modules=[transformer, pooling], device=None if device == "cuda" else "cpu")
    loss = losses.MultipleNegativesRankingLoss(model)
    if cached:
        size = _fastest_mini_batch(model, sentences[: case.N], case, device)
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=size)
    args = SentenceTransformerTrainingArguments(
        **_common(case, folder), use_cpu=device == "cpu", dataloader_drop_last=True
    )
    pairs = Dataset.from_dict({"anchor": sentences, "positive": sentences})
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss)


def _fastest_mini_batch(model: Any, sentences: list[str], case: TrainCase, device: str) -> int:
    """Returns the size of CACHED_SIZES at which gradient caching takes the least time for each sentence."""
    from sentence_transformers.util import batch_to_device

    clock = clock_for(device)

    def step(size: int) -> None:
        tokens = batch_to_device(model.preprocess(sentences[:size]), model.device)
        with torch.autocast(device, torch.bfloat16, enabled=case.dtype == "bf16"):
            with torch.no_grad():
                model(dict(tokens))
            model(tokens)["sentence_embedding"].sum().backward()

    sizes = [size for size in CACHED_SIZES if size < case.N] or [case.N]
    step(sizes[-1])  # the first call of a process is slower
    best = min(sizes, key=lambda size: min(clock(lambda: step(size)) for _ in range(2)) / size)
    model.zero_grad()
    return best


def _clock(device: str) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Records the milliseconds from the end of one step to the next: encoder, loss, optimiser and loading."""

        def __init__(self) -> None:
            self.milliseconds: list[float] = []
            self.last: float | None = None

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.milliseconds.append(1e3 * (now - (self.last or now)))
            self.last = now

    return Clock()


TRAINERS = {
    trainer.name: trainer
    for trainer in (
        Trainer("simcse.train", functools.partial(_simcse, "auto")),
        Trainer("simcse.train --mini_batch_size 0", functools.partial(_simcse, "0")),
        Trainer("st-mnrl", functools.partial(_sentence_transformers, False), "st-mnrl"),
        Trainer("st-cached-mnrl", functools.partial(_sentence_transformers, True), "st-cached-mnrl"),
    )
}
