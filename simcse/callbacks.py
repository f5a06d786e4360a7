"""What Trainer calls beside the training: its log lines, and dropout of each process."""

import logging
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState

from simcse.report import log_line


class ProgressBar(ProgressCallback):
    """Trainer's progress bar, without its log lines."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class LogLines(TrainerCallback):
    """A line of plain text for each thing that Trainer logs."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            tqdm.write(log_line(logs, state.global_step, state.max_steps))


class OnlyOurs(logging.Filter):
    """Without transformers' lines about a resume: shares of steps beside counts of them, and paths of another day.

    What differs from the checkpoint is compared in ``simcse.runs``, which also finds the best checkpoint.
    """

    HIDDEN = ("arguments do not match the ones in the `trainer_state.json`", "The best checkpoint ")

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in self.HIDDEN)


class PerRankDropout(TrainerCallback):
    """Every process draws its own dropout; the order of the data is drawn before, alike."""

    def on_train_begin(self, args: Any, *_: Any, **__: Any) -> None:
        if args.process_index:
            torch.manual_seed(args.seed + 1_000_003 * args.process_index)


for _name in ("transformers.trainer", "transformers.trainer_utils"):
    logging.getLogger(_name).addFilter(OnlyOurs())
