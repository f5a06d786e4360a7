"""Reading parts of a checkpoint and writing to a disk: what goes wrong, as one line that names the file."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from simcse.errors import UserError

# torch.save fails with a RuntimeError that has no errno; which one depends on the byte that no longer fits.
TORCH_SAVE_FAILED = ("PytorchStreamWriter", "inline_container", "iostream error")
FULL = 1 << 20  # bytes free on a disk that has no room for a checkpoint


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Whatever goes wrong while a part of a checkpoint is read, as one line that names the part."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # torch.load and load_state_dict raise whatever their readers do
        raise UserError(
            f"{what} is damaged or of another model ({reason_of(error)}); resume another checkpoint"
        ) from None


@contextmanager
def saving(what: Path | str, remedy: str = "free some space, or give another folder") -> Iterator[None]:
    """A disk that is full, or refuses for another reason, as one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or reason_of(error)
    except RuntimeError as error:
        full = _is_full(Path(what))
        if not full and not any(words in str(error) for words in TORCH_SAVE_FAILED):
            raise
        reason = (
            os.strerror(errno.ENOSPC)
            if full
            else f"torch.save could not write the whole file ({reason_of(error)})"
        )
    else:
        return
    raise UserError(f"cannot write {what}: {reason}; {remedy}") from None


def _is_full(place: Path) -> bool:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free < FULL


def reason_of(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
