"""What a user can put right reaches them as one line and exit code 2; Ctrl-C as one line and 130."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

EXTRA_TRAIN = ("transformers", "safetensors", "scipy", "matplotlib", "numpy", "datasets", "pyarrow")


class UserError(Exception):
    """Something the user gave cannot be used. The message names what came, and the remedy."""


def is_first() -> bool:
    """Whether this is the process of its machine that speaks, of those that torchrun started."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def exit_cleanly(program: str) -> Iterator[None]:
    """Run a command line: ``UserError`` → one line on stderr, exit 2; Ctrl-C → one line, exit 130."""
    try:
        yield
    except (UserError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            if error.name not in EXTRA_TRAIN:
                raise
            message = f"{error.name} is missing: pip install 'fused-infonce[train]'"
        if is_first():
            print(f"{program}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
