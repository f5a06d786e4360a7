"""The folder of a training run: whose it is, which checkpoints belong to the run, and whether they can be resumed.

``run.json``, in the folder and in each checkpoint, holds the run's id and the settings that its checkpoints depend
on. Nothing in it is a path, so a folder can be moved, linked or named in another way.
"""

import errno
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from simcse.elastic import START_FILE
from simcse.errors import UserError
from simcse.files import replaced
from simcse.layout import UNFINISHED_MODEL, delete_model

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
PLOT_FILE = "alignment_uniformity.png"
UNFINISHED = ".unfinished"  # a checkpoint while it is written
TRIAL = ".simcse-trial-"  # files that another process of the run may be trying to write at this moment
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
START_AGAIN = "start a new run from its weights: --model_name_or_path {} without --resume_from_checkpoint"
SCHEDULE = ("num_train_epochs", "max_steps")  # settings that may change at a resume

# torch.save fails with a RuntimeError that has no errno; which one depends on the byte that no longer fits.
TORCH_SAVE_FAILED = ("PytorchStreamWriter", "inline_container", "iostream error")
FULL = 1 << 20  # bytes free on a disk that has no room for a checkpoint

Warn = Callable[[str], None]


@dataclass
class Run:
    """A run's id, and the settings that have to be the same when one of its checkpoints is resumed."""

    id: str
    settings: dict[str, Any]

    @classmethod
    def new(cls, settings: dict[str, Any]) -> "Run":
        return cls(uuid.uuid4().hex, json.loads(json.dumps(settings, default=str)))

    @classmethod
    def read(cls, folder: Path) -> "Run | None":
        """What ``folder``'s ``run.json`` says; None where there is none."""
        file = folder / RUN_FILE
        if not os.path.lexists(file):
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            return cls(str(content["id"]), dict(content["settings"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({_reason(error)})") from None

    def write(self, folder: Path) -> None:
        with replaced(folder / RUN_FILE) as file:
            file.write_text(json.dumps({"id": self.id, "settings": self.settings}, indent=2) + "\n")

    def checkpoints(self, output: Path) -> list[Path]:
        """This run's checkpoints in ``output``, in the order of their steps."""
        return [folder for folder in numbered(output) if _owner(folder) == self.id]


def numbered(output: Path) -> list[Path]:
    """Every folder ``checkpoint-STEP`` in ``output``, in the order of their steps."""
    folders = [path for path in output.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def digest(texts: Iterator[str]) -> str:
    """A fingerprint of texts in their order."""
    state = blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


# Where a run or a model may be written


def check_output_dir(folder: Path, overwrite: bool, name: str = "--output_dir") -> None:
    """Refuse a folder that cannot be written, and, without ``overwrite``, one that holds somebody's files."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{name} {folder} is a file; give a folder")
    _try_to_write(folder, name)
    if overwrite or not folder.is_dir():
        return
    remains = {RUN_FILE, START_FILE, UNFINISHED, UNFINISHED_MODEL}  # of a run that came to no checkpoint
    held = sorted(path.name for path in folder.iterdir() if not path.name.startswith(TRIAL))
    if set(held) <= remains:
        return
    told = "give another folder, or --overwrite_output_dir to replace what is there"
    if RUN_FILE in held:
        raise UserError(
            f"{name} {folder} holds an earlier run: go on with it by --resume_from_checkpoint true, {told}"
        )
    shown = ", ".join([name for name in held if name not in remains][:3])
    raise UserError(f"{name} {folder} holds files that this run did not write ({shown}): {told}")


def _try_to_write(folder: Path, name: str) -> None:
    place = folder
    while not os.path.lexists(place):  # makes no folder: what is refused later leaves nothing
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place, prefix=TRIAL):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {name} {folder}: {error.strerror}") from None


def clear(output: Path) -> None:
    """Delete what an earlier run wrote into ``output``; other files stay."""
    for folder in numbered(output):
        if (folder / STATE_FILE).exists():
            shutil.rmtree(folder)
    delete_model(output)
    for name in (STATE_FILE, PLOT_FILE, RUN_FILE):
        with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            (output / name).unlink()
    shutil.rmtree(output / UNFINISHED, ignore_errors=True)


def take_over(output: Path, run: Run, checkpoint: Path | None, best_step: int | None, overwrite: bool) -> Run:
    """Make ``output`` the folder of ``run``, which starts anew or from ``checkpoint``; what it is from now on.

    A run that goes back to an earlier checkpoint of its own is another run from there: later checkpoints keep the
    old id, and are neither resumed nor deleted as if they were of this one. The best checkpoint, at ``best_step``,
    comes along into another folder.
    """
    if checkpoint is None or not inside(checkpoint, output):
        if overwrite:
            clear(output)
        if checkpoint is not None and best_step is not None:
            _copy_checkpoint(checkpoint.parent / f"checkpoint-{best_step}", output, run)
    else:
        before = Run.read(checkpoint)
        assert before is not None
        step = step_of(checkpoint)
        chain = before.checkpoints(output)
        if chain[-1] == output / checkpoint.name:
            run = Run(before.id, run.settings)
        else:
            for folder in chain:
                if step_of(folder) <= step:
                    Run(run.id, before.settings).write(folder)
    run.write(output)
    return run


def inside(checkpoint: Path, output: Path) -> bool:
    return checkpoint.resolve().parent == output.resolve()


def _copy_checkpoint(source: Path, output: Path, run: Run) -> None:
    unfinished = output / UNFINISHED
    shutil.copytree(source, unfinished)
    run.write(unfinished)
    unfinished.rename(output / source.name)


def rotate(output: Path, run: Run, limit: int | None, best: str | None) -> None:
    """Delete the run's oldest checkpoints beyond ``limit``; the latest and the best always stay."""
    own = run.checkpoints(output)
    if not limit or limit < 0 or not own:
        return
    kept = {own[-1].name} | ({Path(best).name} if best else set())
    others = [folder for folder in own if folder.name not in kept]
    for folder in others[: max(0, len(own) - max(limit, len(kept)))]:
        shutil.rmtree(folder, ignore_errors=True)


# What is resumed


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
        owners = {owner for folder in folders if (owner := _owner(folder))}
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
            if _owner(folder) is None:
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


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Whatever goes wrong while a part of a checkpoint is read, as one line that names the part."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch.load and load_state_dict raise whatever their readers do
        raise UserError(
            f"{what} is damaged or of another model ({_reason(error)}); resume another checkpoint"
        ) from None


@contextmanager
def saving(what: Path | str, remedy: str = "free some space, or give another folder") -> Iterator[None]:
    """A disk that is full, or refuses for another reason, as one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or _reason(error)
    except RuntimeError as error:
        full = _is_full(Path(what))
        if not full and not any(words in str(error) for words in TORCH_SAVE_FAILED):
            raise
        reason = (
            os.strerror(errno.ENOSPC) if full else f"torch.save could not write the whole file ({_reason(error)})"
        )
    else:
        return
    raise UserError(f"cannot write {what}: {reason}; {remedy}") from None


def _is_full(place: Path) -> bool:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free < FULL


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__


def _owner(folder: Path) -> str | None:
    """The id of the run whose checkpoint a folder is; None where it does not say."""
    try:
        run = Run.read(folder)
    except UserError:
        return None
    return run.id if run else None
