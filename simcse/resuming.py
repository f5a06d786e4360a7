"""Which checkpoint a run goes on from, and whether it can: whole, and of the same settings."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from simcse.errors import UserError
from simcse.runs import CHECKPOINT, RUN_FILE, STATE_FILE, Run, numbered, owner, step_of
from simcse.storage import reading

START_AGAIN = "start a new run from its weights: --model_name_or_path {} without --resume_from_checkpoint"
SCHEDULE = ("num_train_epochs", "max_steps")  # settings that may change at a resume
Warn = Callable[[str], None]


def find_checkpoint(output: Path, given: str, warn: Warn) -> Path:
    """The folder that ``--resume_from_checkpoint`` means; ``true`` is the run's latest in ``output``."""
    if given.lower() != "true":
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"--resume_from_checkpoint {given}: there is no such folder with a {STATE_FILE}")
        if not CHECKPOINT.fullmatch(folder.resolve().name):
            raise UserError(f"--resume_from_checkpoint {given} is not a checkpoint: give a folder checkpoint-STEP")
        return folder if CHECKPOINT.fullmatch(folder.name) else folder.resolve()
    run = Run.read(output)
    folders = numbered(output)
    if run is None:
        owners = {run_id for folder in folders if (run_id := owner(folder))}
        if len(owners) > 1:
            raise UserError(
                f"--resume_from_checkpoint true: {output} has no {RUN_FILE}, and checkpoints of {len(owners)} "
                "runs; give the folder of one checkpoint"
            )
        run = Run(owners.pop(), {}) if owners else None
    own = run.checkpoints(output) if run else []
    if not own and folders:
        return folders[-1]  # which says what is wrong with it
    if not own:
        raise UserError(f"--resume_from_checkpoint true: {output} holds no checkpoint of its run")
    for folder in folders:
        if step_of(folder) > step_of(own[-1]):
            if owner(folder) is None:
                raise UserError(
                    f"--resume_from_checkpoint true: {folder / RUN_FILE} is missing or damaged, so {folder.name} "
                    f"may be the latest of this run; to go on from {own[-1]}, give that folder"
                )
            warn(f"{folder} is of another run, or of steps that this one went back behind, and is not resumed")
    return own[-1]


def check_checkpoint(folder: Path, required: list[str]) -> TrainerState:
    """The state of Trainer in a checkpoint of which each of the ``required`` files is there and can be read."""
    for name in (RUN_FILE, STATE_FILE, *required):
        file = folder / name
        if not os.path.lexists(file):
            raise UserError(
                f"{folder} cannot be resumed: {name} is missing; resume another checkpoint, or "
                + START_AGAIN.format(folder)
            )
        with reading(file):
            _open(file)
    with reading(folder / STATE_FILE):
        state = TrainerState.load_from_json(str(folder / STATE_FILE))
        counted = {"global_step": state.global_step, "log_history": len(state.log_history)}
        if any(not isinstance(value, int) or value < 0 for value in counted.values()):
            raise ValueError("it has no step")
    return state


def check_best(folder: Path, state: TrainerState, required: list[str]) -> int | None:
    """The step of the best checkpoint so far, which lies beside ``folder``; None where none was measured."""
    if not state.best_global_step:
        return None
    best = folder.parent / f"checkpoint-{state.best_global_step}"
    for name in required:
        if not os.path.lexists(best / name):
            raise UserError(
                f"{folder} names {best.name} as the best checkpoint, but {best / name} is missing. Restore it, or "
                "go on without it: --load_best_model_at_end false"
            )
        with reading(best / name):
            _open(best / name)
    return state.best_global_step


def check_settings(folder: Path, settings: dict[str, Any], warn: Warn) -> None:
    """Refuse to resume ``folder`` with settings that its state does not fit; changed lengths get a warning."""
    before = Run.read(folder)
    if before is None:
        raise UserError(
            f"{folder} cannot be resumed: {RUN_FILE} is missing; resume another checkpoint, or "
            + START_AGAIN.format(folder)
        )
    now = Run.new(settings).settings
    changed = {name: (before.settings[name], now[name]) for name in now if name in before.settings}
    changed = {name: (old, new) for name, (old, new) in changed.items() if old != new}
    for name in ("sts_data", "metric_for_best_model"):  # compared only where both runs measured something
        if name in changed and None in changed[name]:
            del changed[name]
    for name in SCHEDULE:
        if name in changed:
            old, new = changed.pop(name)
            warn(
                f"--{name} is {new} and was {old} in {folder}: the learning rate follows the new length from here"
            )
    if changed:
        listed = "; ".join(_difference(name, old, new) for name, (old, new) in changed.items())
        raise UserError(
            f"a resumed run keeps its settings, and these are not those of {folder}: {listed}. Give the same, or "
            + START_AGAIN.format(folder)
        )


def _difference(name: str, old: Any, new: Any) -> str:
    if name in ("train_file", "sts_data"):
        return f"--{name} has other rows ({new.split()[0]} now, {old.split()[0]} then)"
    if name == "model_name_or_path":
        return f"--{name} has another tokenizer"
    if name == "processes":
        return f"{new} processes (was {old})"
    return f"--{name} {new} (was {old})"


def _open(file: Path) -> None:
    """Read as much of a file as shows that it is whole."""
    if file.suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    else:  # mapped, so that the tensors themselves are not read twice
        with safe_globals():
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(content, dict):
            raise ValueError("it does not hold a state")
