"""Several processes: what they agree on before any work, and how rows and sums travel between them.

Every rank sweeps its own anchors over everyone's columns. ``gather`` holds all columns at once; ``ring`` passes
blocks of them round, and the sums for a block's gradients travel behind it until they are home. What is one number
a column (ids, shifts, sums) is gathered by both. Nothing here waits for a device.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from .config import Strategy

Group = ProcessGroup | Literal["local", "world"] | None
GATHER_BYTES = 4 << 30  # "auto" gathers as long as that takes no more on each rank
CENTER_ROWS = 1024
_KEYS, _SUMS = 0, 1  # tags
_PACKAGE = os.path.dirname(__file__)
# Their names from torch 2.13 on, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Counts(NamedTuple):
    """Rows of one rank."""

    positives: int
    negatives: int
    queue: int
    unpaired: int = 0  # anchors of a call without positives, whose columns are the negatives

    @property
    def rows(self) -> int:
        """Anchors."""
        return self.positives + self.unpaired

    @property
    def columns(self) -> int:
        return self.positives + self.negatives + self.queue


@dataclass(slots=True)
class Facts:
    """What a rank tells the others."""

    same: dict[str, Any]  # has to be the same on every rank; None: this rank has no say
    counts: Counts
    seed: int | None = None
    error: str | None = None  # why this rank cannot go on


def resolve_group(group: Group) -> ProcessGroup | None:
    """The process group that is meant; None: this process alone.

    ``"world"`` is looked up at each call. torch.distributed.group.WORLD is None before init_process_group, so a
    None that comes before is reported: a loss that was meant for all processes would silently be local.
    """
    if group == "local":
        return None
    ready = dist.is_available() and dist.is_initialized()
    if group is None:
        if dist.is_available() and not ready:
            warnings.warn(
                "group is None before torch.distributed.init_process_group, as torch.distributed.group.WORLD is "
                "until then: the loss is that of this process alone. Give group='world' for all processes, which "
                "is looked up at each call, or group='local' (the default) for one.",
                stacklevel=_stacklevel_of_caller(),
            )
        return None
    if group == "world":
        if not ready:
            raise TypeError(
                "group='world' must come after torch.distributed.init_process_group, which was not called"
            )
        group = dist.group.WORLD
    if not dist.is_available() or not isinstance(group, ProcessGroup):
        raise TypeError(
            "group must be 'local', 'world', or a process group this rank belongs to, such as "
            f"torch.distributed.group.WORLD after init_process_group, not {group!r}"
        )
    return group


def _stacklevel_of_caller() -> int:
    """Returns the ``stacklevel`` with which a warning names the code that called this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


def agree(group: ProcessGroup, facts: Facts) -> list[Facts]:
    """Everyone's facts, by way of the CPU. ValueError on every rank where they differ, or where one has failed."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, facts, group=_host_group(group))
    failed = [f"rank {rank}: {other.error}" for rank, other in enumerate(everyone) if other.error]
    if failed:
        raise ValueError(f"gs_infonce cannot run on every rank of the group; {'; '.join(failed)}")
    differences = []
    for name in facts.same:
        said: dict[Any, list[int]] = {}
        for rank, other in enumerate(everyone):
            if other.same[name] is not None:
                said.setdefault(other.same[name], []).append(rank)
        if len(said) > 1:
            values = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in said.items())
            differences.append(f"{name} ({values})")
    if differences:
        raise ValueError(f"the ranks of the group must agree on {'; '.join(differences)}")
    return everyone


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


@functools.lru_cache(maxsize=16)
def _host_group(group: ProcessGroup) -> ProcessGroup:
    """A group of the same ranks for tensors on the CPU: itself where it takes them, else a new gloo group."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    beside = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    assert isinstance(beside, ProcessGroup)
    return beside


def choose_strategy(strategy: Strategy, columns: int, D: int, itemsize: int) -> Literal["gather", "ring"]:
    """``auto`` by size: ``gather`` while everyone's rows, twice, and the sums for them, twice, are small."""
    if strategy != "auto":
        return strategy
    return "gather" if columns * D * (2 * itemsize + 8) <= GATHER_BYTES else "ring"


def mean_unit_row(x: Tensor, dtype: torch.dtype, some: int = CENTER_ROWS) -> Tensor:
    """Mean of about ``some`` evenly spaced unit rows. → (D,)"""
    mean: Tensor = F.normalize(x[:: -(-len(x) // some)].to(dtype), dim=1).mean(0)
    return mean


@dataclass(slots=True, eq=False)
class Exchange:
    """The group of one call: who has how many rows, and every way in which tensors travel."""

    group: ProcessGroup
    counts: list[Counts]  # by rank
    wants: frozenset[str]  # the columns' inputs whose gradients some rank asks for
    strategy: Literal["gather", "ring"]
    masks_negatives: bool  # whether negatives have ids, on the ranks that have any
    rank: int = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(self.group), len(self.counts)

    @property
    def others(self) -> list[int]:
        """The other ranks, in the order in which a ring brings their blocks."""
        return [(self.rank - step) % self.size for step in range(1, self.size)]

    def total(self, name: str) -> int:
        return sum(getattr(counts, name) for counts in self.counts)

    def lengths(self, name: str) -> list[int]:
        return [getattr(counts, name) for counts in self.counts]

    # ------------------------------------------------------------------ everyone's, or everyone's sum

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(x, group=self.group)
        return x

    def centers(self, anchors: Tensor, positives: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean unit rows of some anchors and positives of every rank, the same on all ranks. → (D,), (D,)"""
        some = max(1, CENTER_ROWS // self.size)
        means = [mean_unit_row(x, dtype, some) for x in (anchors, positives)]
        both = self.sum(torch.stack(means)).div_(self.size)
        return both[0], both[1]

    def gather(self, x: Tensor, lengths: list[int]) -> list[Tensor]:
        """Everyone's rows, of which rank r has lengths[r]. (n, …) → [(n_r, …)]"""
        most = max(lengths)
        out = x.new_empty(self.size * most, *x.shape[1:])
        _all_gather(out, _padded(x, most), group=self.group)
        return [part[:n] for part, n in zip(out.view(self.size, most, *x.shape[1:]), lengths, strict=True)]

    def home(self, parts: list[list[Tensor]]) -> Tensor:
        """The sum over ranks of what each has for this one; parts[r]: rows for rank r, one below the other."""
        lengths = [sum(map(len, rows)) for rows in parts]
        most, like = max(lengths), parts[self.rank][0]
        buffer = like.new_zeros(self.size * most, *like.shape[1:])
        for rank, rows in enumerate(parts):
            torch.cat(rows, out=buffer[rank * most : rank * most + lengths[rank]])
        own = like.new_empty(most, *like.shape[1:])
        _reduce_scatter(own, buffer, group=self.group)
        return own[: lengths[self.rank]]

    def merged(self, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Running maxima and sums (n_r, 1) of every rank's columns → those of this rank's, over all ranks."""
        maxima = torch.stack([_padded(maximum, max(self.lengths("positives"))) for maximum, _ in parts])
        dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.group)
        peaks = [peak[: len(maximum)] for peak, (maximum, _) in zip(maxima, parts, strict=True)]
        sums = [[total * torch.exp2(m - peak)] for peak, (m, total) in zip(peaks, parts, strict=True)]
        return peaks[self.rank].clone(), self.home(sums)

    # ------------------------------------------------------------------ a tour over everyone's columns

    def tour(
        self, keys: Tensor, acc: Tensor | None, wanted: list[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Every rank's keys (T_r, D), this one's first, with memory for sums, (wanted[r], D), that go home.

        After the tour ``acc``, this rank's own memory, holds the sums of all ranks.
        """
        if self.strategy == "ring":
            return self._ring(keys, acc, wanted)
        return self._gathered(keys, acc, wanted)

    def _gathered(
        self, keys: Tensor, acc: Tensor | None, wanted: list[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        rows = self.gather(keys, self.lengths("columns"))
        sums = None if acc is None else [acc.new_zeros(n, acc.shape[1]) for n in wanted]
        yield self.rank, keys, acc
        for owner in self.others:
            yield owner, rows[owner], None if sums is None else sums[owner]
        if acc is not None and sums is not None and any(wanted):
            sums[self.rank] = acc
            acc.copy_(self.home([[x] for x in sums]))

    def _ring(
        self, keys: Tensor, acc: Tensor | None, wanted: list[int]
    ) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """The next block arrives while this one is worked on, and so do the sums of earlier ranks for it."""
        lengths, longest = self.lengths("columns"), max(wanted, default=0)
        held = _padded(keys, max(lengths))
        flight: _Flight | None = None  # of the sums
        for step, owner in enumerate([self.rank, *self.others]):
            block = self._pass_on(held, _KEYS) if step + 1 < self.size else None
            sums = acc if acc is None or step == 0 else acc.new_zeros(longest, acc.shape[1])
            yield owner, held[: lengths[owner]], None if sums is None else sums[: wanted[owner]]
            if sums is not None and longest:
                sums = _padded(sums, longest)
                if flight is not None:
                    sums += flight.land()
                flight = self._pass_on(sums, _SUMS)
            if block is not None:
                held = block.land()
        if acc is not None and flight is not None:
            acc.copy_(flight.land()[: len(acc)])

    def _pass_on(self, x: Tensor, tag: int) -> _Flight:
        """Starts to send x to the next rank, and to receive as much from the one before."""
        arriving, group = torch.empty_like(x), self.group
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=group, tag=tag, group_peer=after),
                dist.P2POp(dist.irecv, arriving, group=group, tag=tag, group_peer=before),
            ]
        )
        return _Flight(works, x, arriving)


@dataclass(slots=True, eq=False)
class _Flight:
    works: list[Any]
    leaving: Tensor  # kept until it has been sent
    arriving: Tensor

    def land(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.arriving


def _padded(x: Tensor, rows: int) -> Tensor:
    """x with zero rows below it, contiguous; x itself where nothing is missing."""
    if len(x) == rows:
        return x.contiguous()
    out = x.new_zeros(rows, *x.shape[1:])
    out[: len(x)] = x
    return out
