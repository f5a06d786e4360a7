"""The folder of a training run: whose it is, which checkpoints belong to the run, and whether they can be resumed.

``run.json``, in the folder and in each checkpoint, holds the run's id and the settings that its checkpoints depend
on. Nothing in it is a path, so a folder can be moved, linked or named in another way.
"""

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from simcse.elastic import START_FILE
from simcse.errors import UserError
from simcse.files import replaced
from simcse.saved_model import UNFINISHED_MODEL, delete_model
from simcse.storage import reason_of

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
PLOT_FILE = "alignment_uniformity.png"
UNFINISHED = ".unfinished"  # a checkpoint while it is written
TRIAL = ".simcse-trial-"  # files that another process of the run may be trying to write at this moment
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


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
            raise UserError(f"{file} is damaged ({reason_of(error)})") from None

    def write(self, folder: Path) -> None:
        with replaced(folder / RUN_FILE) as file:
            file.write_text(json.dumps({"id": self.id, "settings": self.settings}, indent=2) + "\n")

    def checkpoints(self, output: Path) -> list[Path]:
        """This run's checkpoints in ``output``, in the order of their steps."""
        return [folder for folder in numbered(output) if owner(folder) == self.id]


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


def owner(folder: Path) -> str | None:
    """The id of the run whose checkpoint a folder is; None where it does not say."""
    try:
        run = Run.read(folder)
    except UserError:
        return None
    return run.id if run else None
