"""The losses of ``--loss`` and their options: those of ``fused_infonce.losses`` that pairs and hard negatives fit.

An option is a keyword argument of the loss that is a plain value. Its name, type and default are those of the
signature, and its meaning is the sentence of the docstring that begins with its name.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

from fused_infonce import losses


@dataclass
class Columns:
    """Everything of a batch that the loss compares, beside its options."""

    anchors: Tensor  # (B, D)
    positives: Tensor  # (B, D)
    negatives: Tensor | None  # (H, D), view after view
    queue: Tensor | None  # (Q, D)
    ids: Tensor | None  # (B,)
    negative_ids: Tensor | None  # (H,)

    def prefix(self, dim: int) -> "Columns":
        """The first ``dim`` features of every row."""
        rows = {name: getattr(self, name) for name in ("anchors", "positives", "negatives", "queue")}
        return replace(self, **{name: x[:, :dim] for name, x in rows.items() if x is not None})


class Option(NamedTuple):
    type: Any
    default: Any
    meaning: str


@dataclass(frozen=True)
class Published:
    loss: Callable[..., Tensor]
    ids: tuple[tuple[str, str], ...] = ()  # its arguments that are ids, and which of Columns they are
    own_negatives: bool = True  # (N, K, D), each row's own; else (H, D), columns of all rows

    @cached_property
    def pairs_only(self) -> bool:
        return "negatives" not in inspect.signature(self.loss).parameters

    @cached_property
    def options(self) -> dict[str, Option]:
        signature, types = inspect.signature(self.loss).parameters, get_type_hints(self.loss)
        names = [name for name in types if name in signature and _is_plain(types[name])]
        return {name: Option(types[name], signature[name].default, meaning(self.loss, name)) for name in names}


def _is_plain(hint: Any) -> bool:
    if hint in (bool, int, float, str, NoneType) or get_origin(hint) is Literal:
        return True
    return bool(get_args(hint)) and all(map(_is_plain, get_args(hint)))


def meaning(loss: Callable[..., Tensor], name: str) -> str:
    """The sentence "name: …" of the loss's docstring; empty where it has none (or python -OO removed it)."""
    text = " ".join((loss.__doc__ or "").replace("``", "").replace('"', "'").split())
    found = re.search(rf"(?<![\w:]){name}: (.+?\.)(?= |$)", text)
    return found[1] if found else ""


LOSSES = {
    "gte": Published(losses.gte),
    "qwen3_embedding": Published(losses.qwen3_embedding, (("ids", "ids"),)),
    "gemini_embedding": Published(losses.gemini_embedding, (("document_ids", "ids"),)),
    "embedding_gemma": Published(losses.embedding_gemma, (("ids", "ids"),)),
    "llave": Published(losses.llave),
    "focal": Published(losses.focal, (("ids", "ids"), ("negative_ids", "negative_ids")), own_negatives=False),
    "clip": Published(losses.clip, (("ids", "ids"),)),
    "debiased": Published(losses.debiased),
    "hcl": Published(losses.hcl),
}
# What the others need beside rows of texts, or how the trainer has them.
CALL = "which training data do not hold; call fused_infonce.losses"
UNFIT = {
    "supcon": f"needs a label for each row, {CALL}.supcon",
    "cross_entropy": f"needs class vectors and a target for each row, {CALL}.cross_entropy",
    "soft_labels": f"needs a teacher's embeddings of the batch, {CALL}.soft_labels",
    "gistembed": f"needs a guide's embeddings of the batch, {CALL}.gistembed",
    "matryoshka": "sums another loss over prefixes, which --matryoshka_dims does here",
}
PLACES = ("strategy", "backend", "workspace_bytes")  # flags of the loss that say where it is computed


def check_name(name: str) -> None:
    """ValueError for a loss that is not there, or that the training data cannot feed."""
    if name in UNFIT:
        raise ValueError(f"--loss {name} {UNFIT[name]}")
    if name != "gs_infonce" and name not in LOSSES:
        raise ValueError(f"--loss must be one of gs_infonce, {', '.join(LOSSES)}, not {name}")


def options_of(name: str) -> dict[str, Option]:
    return LOSSES[name].options if name in LOSSES else {}


def users(option: str) -> list[str]:
    """The losses that have an option of this name."""
    return [name for name, own in LOSSES.items() if option in own.options]


def published_flags() -> dict[str, tuple[Any, str]]:
    """Type and help of a flag for each option of any loss; a list where the loss takes a sequence."""
    flags: dict[str, tuple[Any, str]] = {}
    for own in LOSSES.values():
        for name, option in own.options.items():
            is_list = get_origin(option.type) is Sequence
            flags.setdefault(name, (list[str] if is_list else option.type, _help(name)))
    return flags


def _help(option: str) -> str:
    """The option's meaning for each of its losses; those without a sentence of their own share the one before."""
    parts: list[list[Any]] = []
    for name in users(option):
        own = LOSSES[name].options[option]
        default = " ".join(own.default) if isinstance(own.default, tuple) else own.default
        label = f"{name} (default: {default})" if default is not None else name
        if own.meaning or not parts:
            parts.append([[label], own.meaning])
        else:
            parts[-1][0].append(label)
    return " ".join(f"Of --loss {', '.join(labels)}: {text}" for labels, text in parts)


def published_loss(
    name: str, columns: Columns, temperature: float | Tensor, group: Any, options: dict[str, Any]
) -> Tensor:
    """The mean over this process's anchors. options: the loss's own, and where it is computed."""
    own = LOSSES[name]
    given = [columns.anchors, columns.positives]
    if columns.negatives is not None:
        N, D = columns.anchors.shape
        in_rows = columns.negatives.view(-1, N, D).transpose(0, 1)  # (N, K, D)
        given.append(in_rows if own.own_negatives else columns.negatives)
    ids = {argument: getattr(columns, of) for argument, of in own.ids}
    options = {**options, **{argument: x for argument, x in ids.items() if x is not None}, "group": group}
    return own.loss(*given, temperature=temperature, **options)
