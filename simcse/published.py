"""The losses of ``--loss``: those of ``fused_infonce.losses`` that pairs and hard negatives fit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fused_infonce import losses
from fused_infonce.config import FIELDS, NOISE_OPTIONS
from simcse.arguments import LOSS_FLAGS, LossArguments


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


@dataclass(frozen=True)
class Published:
    loss: Callable[..., Tensor]
    pairs_only: bool = False  # and of one process
    ids: tuple[str, ...] = ()  # its arguments that are ids of the rows


LOSSES = {
    "gte": Published(losses.gte),
    "qwen3_embedding": Published(losses.qwen3_embedding, ids=("ids",)),
    "gemini_embedding": Published(losses.gemini_embedding, ids=("document_ids",)),
    "embedding_gemma": Published(losses.embedding_gemma, ids=("ids",)),
    "llave": Published(losses.llave),
    "debiased": Published(losses.debiased, pairs_only=True),
    "hcl": Published(losses.hcl, pairs_only=True),
}
PLACES = ("strategy", "backend", "workspace_bytes")  # flags of the loss that say where it is computed


def check_flags(options: LossArguments, views: int, rows: int, alone: bool) -> None:
    """ValueError for data of so many columns or batches of so many rows, for several processes whose batches are
    one, and for flags of gs_infonce that a published loss does not have (the noise's are refused with the flags).
    """
    own = LOSSES[options.loss]
    if own.pairs_only and views > 2:
        raise ValueError(f"--loss {options.loss} takes pairs, not {views} columns; name two in --columns")
    if own.pairs_only and rows < 2:
        raise ValueError(
            f"--loss {options.loss} needs at least 2 pairs per batch, not --per_device_train_batch_size {rows}"
        )
    if own.pairs_only and not alone:
        raise ValueError(f"--loss {options.loss} takes one process's batch; use --negatives local")
    given = [
        name
        for name in LOSS_FLAGS
        if name not in (*PLACES, *NOISE_OPTIONS) and getattr(options, name) != FIELDS[name].default
    ]
    given += ["queue_size"] * bool(options.queue_size)
    given += ["mask_duplicates"] * (options.mask_duplicates and not own.ids)
    if given:
        raise ValueError(
            f"--loss {options.loss} cannot be combined with --{given[0]}, which belongs to the losses of "
            "gs_infonce; leave one of them out"
        )


def published_loss(options: LossArguments, columns: Columns, temperature: float | Tensor, group: Any) -> Tensor:
    """The mean over this process's anchors."""
    own = LOSSES[options.loss]
    given = [columns.anchors, columns.positives]
    if columns.negatives is not None:
        N, D = columns.anchors.shape
        given.append(columns.negatives.view(-1, N, D).transpose(0, 1))
    more = {name: columns.ids for name in own.ids if columns.ids is not None}
    more |= {} if group == "local" else {"group": group}
    return own.loss(*given, temperature=temperature, **more, **{name: getattr(options, name) for name in PLACES})
