"""The flags of the losses, and which of them belong together.

An option of ``gs_infonce`` is a field of ``LossConfig``, one of a published loss an argument of its function; each
is a flag of its name by itself. Where both have the name, the flag is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import make_dataclass
from typing import TYPE_CHECKING

from fused_infonce.config import FIELDS, NOISE_OPTIONS, TYPES
from simcse.flags import flag
from simcse.published import LOSSES, PLACES, options_of, published_flags, users

if TYPE_CHECKING:
    from simcse.arguments import LossArguments

# Trainer works with the mean, and ``--learn_temperature`` has a range in the place of ``min_temperature``.
LOSS_FLAGS = [name for name in FIELDS if name not in ("reduction", "min_temperature")]
PUBLISHED_FLAGS = published_flags()


def loss_flags() -> type:
    """A dataclass with these flags. Of an option of a published loss None says that the flag was not given, since
    its default depends on the loss: ``fill_defaults`` puts it in.
    """
    fields = []
    for name in dict.fromkeys([*LOSS_FLAGS, *PUBLISHED_FLAGS]):
        own_type, text = PUBLISHED_FLAGS.get(name, (None, ""))
        if name not in FIELDS:
            options = {"nargs": "+"} if own_type == list[str] else {}
            fields.append((name, own_type | None, flag(None, text, **options)))
        elif own_type is None:
            fields.append((name, TYPES[name], flag(FIELDS[name].default, FIELDS[name].metadata["meaning"])))
        else:
            own = f"{FIELDS[name].metadata['meaning']} (default: {FIELDS[name].default}) {text}"
            fields.append((name, TYPES[name] | None, flag(None, own)))
    return make_dataclass("LossFlags", fields)


def fill_defaults(options: LossArguments) -> None:
    """Puts defaults in the place of flags that were not given; ValueError for one that the loss does not have."""
    own = options_of(options.loss)
    for name in PUBLISHED_FLAGS:
        if name not in own and name not in FIELDS and getattr(options, name) is not None:
            raise ValueError(
                f"--{name} belongs to --loss {' or '.join(users(name))}, not to {options.loss}; leave one "
                "of them out"
            )
        if getattr(options, name) is None:
            default = own[name].default if name in own else FIELDS[name].default if name in FIELDS else None
            setattr(options, name, default)


def refuse_noise(options: LossArguments) -> None:
    """ValueError for noise with a published loss, which has none; sets its number to 0."""
    for name in NOISE_OPTIONS:
        value = getattr(options, name)
        if value != FIELDS[name].default and (name, value) != ("num_noise", 0):
            raise ValueError(
                f"--{name} {value} cannot be combined with --loss {options.loss}, which has no noise; leave one "
                "of them out"
            )
    options.num_noise = 0


def check_flags(options: LossArguments, views: int, rows: int, alone: bool) -> None:
    """ValueError for data of so many columns (``views``), for batches of so many rows in one process (``alone``),
    and for flags of gs_infonce that a published loss does not have.
    """
    name, own = options.loss, LOSSES[options.loss]
    if own.pairs_only and views > 2:
        raise ValueError(f"--loss {name} takes pairs, not {views} columns; name two in --columns")
    if own.pairs_only and rows < 2 and alone:
        raise ValueError(
            f"--loss {name} needs at least 2 pairs per batch, not --per_device_train_batch_size {rows}"
        )
    given = [
        option
        for option, value in options.loss_options.items()
        if option not in (*PLACES, *NOISE_OPTIONS) and value != FIELDS[option].default
    ]
    given += ["queue_size"] * bool(options.queue_size)
    given += ["mask_duplicates"] * (options.mask_duplicates and not own.ids)
    if given:
        raise ValueError(
            f"--loss {name} cannot be combined with --{given[0]}, which belongs to the losses of gs_infonce; "
            "leave one of them out"
        )


@contextmanager
def named_as_flag(names: Iterable[str]) -> Iterator[None]:
    """A loss's error, whose message begins with the option's name, as one that begins with the flag."""
    try:
        yield
    except ValueError as error:
        if re.split("[ =]", str(error), maxsplit=1)[0] in names:
            raise ValueError(f"--{error}") from None
        raise
