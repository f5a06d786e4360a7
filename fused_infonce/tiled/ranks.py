"""Columns of several ranks: all gathered in one matrix, or one rank's after the other's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distributed import Exchange
from ..options import NO_ID
from .operands import Accumulator, Columns, NeedsGrad, grad_range
from .problem import TiledProblem


def grad_ranges(problem: TiledProblem, needs: NeedsGrad) -> list[slice]:
    """Of every rank, the columns whose gradients some rank requests."""
    needed = needs.columns if problem.exchange is None else problem.exchange.wants
    return [grad_range(counts, needed) for counts in problem.counts]


def iter_ranks(
    problem: TiledProblem, acc: Tensor | None, ranges: list[slice]
) -> Iterator[tuple[int, Columns, Tensor | None]]:
    """Every rank's columns, this rank's first, with memory for the gradients of those in ``ranges``.

    Afterwards ``acc``, this rank's own memory, contains what all ranks have summed for it.
    """
    if problem.exchange is None:
        yield 0, problem.columns, acc
        return
    gradient = problem.backend.precision.gradient
    lengths = [columns.stop - columns.start for columns in ranges]
    for owner, rows, sums in problem.exchange.tour(problem.operands.keys, acc, lengths):
        if owner == problem.rank:
            yield owner, problem.columns, sums
        else:
            yield owner, Columns(rows, rows.to(gradient), problem.terms_of(owner)), sums


@dataclass(slots=True, eq=False)
class AllColumns:
    """The columns of one pass: this rank's, or all ranks' in one matrix."""

    columns: Columns
    grad_range: slice  # those whose gradients are requested
    places: list[list[slice]]  # where each rank's lie; empty with one process
    exchange: Exchange | None

    def return_to_owners(self, acc: Accumulator) -> Accumulator:
        """The sum over ranks of the gradients of this rank's columns, its positives first."""
        if self.exchange is None:
            return acc
        grad = self.exchange.home([[acc.grad[part] for part in parts] for parts in self.places])
        if acc.sums is None:
            return Accumulator(grad, None)
        return Accumulator(grad, self.exchange.home([[acc.sums[part] for part in parts] for parts in self.places]))


def all_columns(problem: TiledProblem, needs: NeedsGrad) -> AllColumns:
    """Own positives and negatives come first, so that their terms keep their places; then the other ranks'; then
    all queues, whose gradients are seldom requested.
    """
    exchange = problem.exchange
    if exchange is None:
        return AllColumns(problem.columns, grad_range(problem.options.counts, needs.columns), [], None)
    rows = exchange.gather(problem.operands.keys, exchange.lengths("columns"))
    owners = [problem.rank, *exchange.others]
    pairs = [counts.positives + counts.negatives for counts in problem.counts]
    order = [(owner, slice(0, pairs[owner])) for owner in owners]
    order += [(owner, slice(pairs[owner], problem.counts[owner].columns)) for owner in owners]
    every_row = torch.cat([rows[owner][part] for owner, part in order])
    ids = problem.ids
    if ids is not None:
        full = [
            torch.cat([x, x.new_full((pairs[rank] - len(x), *x.shape[1:]), NO_ID)]) for rank, x in enumerate(ids)
        ]
        ids = [torch.cat([full[owner] for owner in owners])]
    terms = replace(problem.columns.terms, column_ids=None if ids is None else ids[0])
    columns = Columns(every_row, every_row.to(problem.backend.precision.gradient), terms)
    last = {"queue": len(every_row), "positives": sum(pairs), "negatives": sum(pairs)}
    places: list[list[slice]] = [[] for _ in problem.counts]
    stop = max((last[name] for name in exchange.wants), default=0)
    start = 0
    for owner, part in order:
        if start < stop:
            places[owner].append(slice(start, start + part.stop - part.start))
        start += part.stop - part.start
    return AllColumns(columns, slice(0, stop), places, exchange)
