"""The figures of ``contrastive_stats``, from one pass over the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import variants
from ..entry_terms import apply_to_rows_
from .problem import LOG2_E, TiledProblem, shift_slice
from .torch_tiles import TorchTiles
from .two_pass import add_noise, log_of, start


def stats(problem: TiledProblem, tiles: TorchTiles, t: float = 2.0) -> dict[str, Tensor]:
    """tiles: the problem's backend, which must be torch's: only there the logits themselves can be read."""
    constants, shift, counts = problem.log_constants(), problem.row_shift_log2, problem.counts[0]
    row = start(problem, constants.columns)
    positive_log2 = problem.operands.positive_log2  # the row shift, but for a margin and hardness
    add_noise(problem, row, None)
    log_noise = torch.where(row[1] > 0, row[0] / LOG2_E + row[1].log(), -torch.inf)

    zero = torch.zeros((), dtype=tiles.precision.sums, device=tiles.device)
    count, cosine, potential = zero.clone(), zero.clone(), zero.clone()
    hits = zero.expand(problem.N).clone()
    to_cosines = problem.cosines - positive_log2 / problem.scale_log2  # q̂_i·c
    for rows in problem.row_chunks(min(tiles.column_block, problem.T)):
        hit = torch.ones(rows.stop - rows.start, dtype=torch.bool, device=tiles.device)
        for block in problem.column_blocks(counts, split=True):
            columns = problem.columns.block(block)
            queries = problem.operands.queries[rows]
            for part in tiles.logit_slices(queries, columns, rows.start, block.start):
                tile, i = part.tile, shift_slice(part.rows, rows.start)
                if block.start < problem.N:
                    valid = tile > -torch.inf
                    s = tile / problem.scale_log2 + to_cosines[i]
                    count += valid.sum()
                    cosine += s.masked_fill(~valid, 0).sum()
                    potential += (2 * t * (s - 1)).exp_().sum()
                    hit[part.rows] &= (tile <= positive_log2[i]).all(1)
                apply_to_rows_(tile, part.scores, columns.terms, i.start, block.start)
                tiles.merge_ratios(tile, shift[i], 1, row[0][i], row[1][i])
        hits[rows] = hit.to(hits.dtype)
    if problem.options.log_own is not None:  # one more column
        own_log2 = LOG2_E * (problem.options.log_own - problem.kappa * problem.positive.value)
        tiles.merge_ratios(own_log2, zero, 1, *row)
    losses = log_of(problem, row)
    return {
        "loss": variants.counted_loss(losses, problem.options).mean(),
        "noise_share": (log_noise - losses.nan_to_num(nan=math.nan, neginf=0.0)).exp().mean(),
        "accuracy": hits.mean(),
        "positive_cosine": problem.cosines.mean(),
        "negative_cosine": cosine / count,
        "alignment": (2 - 2 * problem.cosines).mean(),
        "uniformity": (potential / count).log(),
    }
