"""The rows of all ranks of a group, for losses that need more of them than a log-sum-exp of their cosines."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..distributed import Counts, Exchange, Facts, agree, resolve_group


def group_of(options: dict[str, Any]) -> ProcessGroup | None:
    """The process group among a loss's options; None: this process alone."""
    return resolve_group(options.get("group", "local"))


class Everyone:
    """What every rank has beside rows of this one: how many may differ. Without a group it is this rank alone.

    Every rank has to make one, to gather the same, and to call backward if one does.
    """

    def __init__(self, rows: Tensor, options: dict[str, Any]) -> None:
        group, self.exchange, self.own = group_of(options), None, slice(0, len(rows))
        if group is None:
            return
        same = {"the number of features": rows.shape[-1], "the dtype": rows.dtype}
        everyone = agree(group, Facts(same, Counts(len(rows), 0, 0)))
        self.exchange = Exchange(group, [facts.counts for facts in everyone], frozenset(), "gather", False)
        first = sum(facts.counts.positives for facts in everyone[: self.exchange.rank])
        self.own = slice(first, first + len(rows))

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank below one another, rank 0's first: (n, …) → (Σ n, …), ``own`` of which are this rank's.

        The gradient that comes back to x is the sum over ranks of what each one's loss gives, as that of
        ``cosine_logsumexp``.
        """
        return x if self.exchange is None else _Gather.apply(x, self.exchange)  # type: ignore[no-untyped-call]


def summed(x: Tensor, options: dict[str, Any]) -> Tensor:
    """The sum over ranks, without gradient; x without a group."""
    group = group_of(options)
    if group is None:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, group=group)
    return x


def count(rows: Tensor, options: dict[str, Any]) -> int:
    """The number of rows on all ranks; every rank has to ask."""
    exchange = Everyone(rows, options).exchange
    return len(rows) if exchange is None else sum(counts.positives for counts in exchange.counts)


def row_numbers(rows: Tensor, options: dict[str, Any]) -> Tensor:
    """An id for each row, (N,), different on every rank of the options' group."""
    group = group_of(options)
    first = 0 if group is None else dist.get_rank(group) << 40
    return torch.arange(first, first + len(rows), device=rows.device)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return torch.cat(exchange.gather(x, exchange.lengths("positives")))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        parts = torch.split(upstream, ctx.exchange.lengths("positives"))
        return ctx.exchange.home([[part] for part in parts]), None
