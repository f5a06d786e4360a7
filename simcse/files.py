"""Output files: tried before the work, written under a temporary name, moved into place when they are whole."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from simcse.errors import UserError

UNFINISHED = f".unfinished-{os.getpid()}"


def output_file(flag: str, name: str, others: dict[str, Sequence[str | Path | None]] | None = None) -> Path:
    """The path of a file that ``flag`` names, which could be written just now; ``UserError`` where it could not.

    ``others`` are the command's further files, input or output, by their flags: none may be the same file.
    """
    with _refusing(flag, name):
        path = Path(name).expanduser()
        if not name:
            raise UserError(f"{flag} must name a file, but it is empty")
        if path.is_dir() or name.endswith(os.sep):
            raise UserError(f"{flag} must name a file, but {name} is a folder")
        _check_is_folder(flag, path.parent)
        for other, given in (others or {}).items():
            if any(_same(path, Path(one).expanduser()) for one in given if one):
                raise UserError(f"{flag} and {other} name the same file, {name}; choose another one")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{flag}: {name} is write-protected; choose another file")
        if not _is_device(path):
            attempt = _unfinished(path)
            attempt.touch()
            attempt.unlink()
    return path


def output_folder(flag: str, name: str) -> Path:
    """The path of a folder that ``flag`` names, which is there or could be made just now."""
    with _refusing(flag, name):
        path = Path(name).expanduser()
        if not name:
            raise UserError(f"{flag} must name a folder, but it is empty")
        if path.exists() and not path.is_dir():
            raise UserError(f"{flag} must name a folder, but {name} is a file")
        nearest = path
        while not (nearest.exists() or nearest.is_symlink()) and nearest != nearest.parent:
            nearest = nearest.parent
        _check_is_folder(flag, nearest)
        attempt = nearest / UNFINISHED
        attempt.mkdir()
        attempt.rmdir()
    return path


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; at the end it takes the place of ``path``, after an error not.

    So ``path`` is whole at every moment, or absent. What is not a regular file (a pipe, ``/dev/stdout``) is
    written to as it is.
    """
    path = Path(path)
    if _is_device(path):
        yield path
        return
    unfinished, target = _unfinished(path), path.resolve()
    try:
        yield unfinished
        if target.exists():
            shutil.copymode(target, unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """``Path.write_text`` in UTF-8, whole or not at all."""
    with replaced(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _unfinished(path: Path) -> Path:
    # Where `path` is a link, its target is replaced. The name is short: that of `path` may have the full length.
    return path.resolve().with_name(UNFINISHED + path.suffix)


def _is_device(path: Path) -> bool:
    if path.is_relative_to("/dev/fd") or str(path) in ("/dev/stdout", "/dev/stderr"):
        return True  # also where they are links to a regular file that the shell has opened
    return path.exists() and not path.is_file()


def _same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return one.resolve() == other.resolve()


def _check_is_folder(flag: str, folder: Path) -> None:
    if not folder.exists():
        raise UserError(f"{flag}: the folder {folder} does not exist; create it first")
    if not folder.is_dir():
        raise UserError(f"{flag}: {folder} is a file, not a folder")


@contextmanager
def _refusing(flag: str, name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag}: cannot write {name}: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:  # ~nobody, a NUL byte
        raise UserError(f"{flag}: cannot write {name}: {error}") from None
