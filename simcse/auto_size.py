"""``--mini_batch_size auto`` of a run: who measures, on which rows, and what is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from simcse.mini_batches import UNMEASURED, MiniBatches, choose
from simcse.runs import Run

if TYPE_CHECKING:
    from simcse.trainer import SimCSETrainer


def choose_mini_batches(trainer: SimCSETrainer) -> None:
    """Takes the resumed run's size, else the fastest on rank 0, measured before the model is wrapped."""
    before = Run.read(trainer.resumed) if trainer.resumed is not None else None
    size = before.settings.get("mini_batch_size") if before else None
    if trainer.is_fsdp_enabled:
        plan = MiniBatches(UNMEASURED if size is None else size)
    elif trainer.args.torch_compile:
        plan = MiniBatches(size or 0)  # of few shapes: each one is compiled
    else:
        plan = _measure(trainer, size) if trainer.is_world_process_zero() else MiniBatches()
        if trainer.args.world_size > 1:
            plan = broadcast_object_list([plan])[0]
    trainer.model.mini_batches = plan
    if trainer.is_world_process_zero():
        rows = trainer.views * trainer.args.train_batch_size
        number = f"{plan.size} of {rows}" if 0 < plan.size < rows else f"all {rows}"
        tqdm.write(f"embeds   {number} sentences at once (--mini_batch_size {plan.size})")


def _measure(trainer: SimCSETrainer, size: int | None) -> MiniBatches:
    rows = trainer.train_dataset
    spread = rows[:: len(rows) // trainer.args.train_batch_size][: trainer.args.train_batch_size]
    inputs = trainer.data_collator(spread)
    inputs.pop("ids", None)
    inputs = {name: x.to(trainer.args.device) for name, x in inputs.items()}
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.model.train()
    on_gpu = trainer.args.device.type == "cuda"
    with torch.random.fork_rng([trainer.args.device] if on_gpu else []), trainer.accelerator.autocast():
        if trainer.options.do_mlm:
            inputs |= trainer._mask(inputs)
            trainer._draws = None
        return choose(trainer.model.embed, inputs, parameters, size)
