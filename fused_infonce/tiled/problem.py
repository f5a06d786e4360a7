"""A call as the tiled algorithms see it: rows normalised and centred once, shifts, columns, noise and chunks.

In base 2 the exponent of a ratio is z_ij = q_i·k_j + b_ij − row_shift_i, where q_i·k_j is a tile's product
scale_log2 · q̂_i·(x̂_j − c): with keys centred by c, s_ij − s_ii is a product less a number per row. The variants
change the scale (hardness), the shift (another positive than s_ii) and the entries' terms. N and T are this rank's
rows and columns; with a process group (``Options.exchange``) its rows meet the columns of all ranks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import variants
from ..distributed import Counts
from ..entry_terms import EntryTerms, Limits
from ..options import Options
from .backend import TileBackend
from .chunks import rows_per_chunk
from .operands import Columns

LOG2_E = 1 / math.log(2)


@dataclass(slots=True, eq=False)
class NoiseSide:
    """Rows that meet the noise: their queries (N, D), their shift (N, 1), and the centre of their columns."""

    queries: Tensor
    row_shift_log2: Tensor
    center: Tensor | None


def row_slices(n: int, step: int) -> list[slice]:
    """[0, n) in slices of ``step`` rows, of 1 at least."""
    step = max(1, step)
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


def shift_slice(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


class TiledProblem:
    def __init__(
        self,
        backend: TileBackend,
        options: Options,
        kappa: float | Tensor,
        inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],  # (N, D), (N, D), (H, D), (Q, D)
        noise_rows: Tensor | None,  # (M, D)
    ) -> None:
        self.backend, self.options = backend, options
        self.noise_rows = noise_rows
        self.N, self.D = inputs[0].shape
        sums = backend.precision.sums
        self.kappa_given = kappa  # a float's constants are computed on the host
        self.kappa = kappa.to(sums) if isinstance(kappa, Tensor) else kappa
        self.scale_log2 = variants.logit_scale(self.kappa, options) * LOG2_E
        self.exchange = exchange = options.exchange
        self.rank = 0 if exchange is None else exchange.rank
        self.counts = [options.counts] if exchange is None else exchange.counts  # by rank
        columns = [x for x in inputs[1:] if x is not None]
        centers = None if exchange is None else exchange.centers(inputs[0], columns[0], sums)
        self.batch, self.operands = backend.normalise(
            inputs[0], columns, self.scale_log2, centers, paired=options.paired
        )
        self.T = self.operands.keys.shape[0]
        self.positive_shift_log2: Tensor | None = None  # (κ p_i − (κ + β) s_ii) log2(e), (N, 1); None: 0
        if options.paired and (options.angular_margin or options.column_hardness):
            self.positive_shift_log2 = self.kappa * LOG2_E * self.positive.value - self.scale_log2 * self.cosines
        self.row_shift_log2 = self._shifted(self.operands.positive_log2)  # (N, 1)
        self.ids = None if options.column_ids is None else self._ids_by_rank(options.column_ids)
        self.column_bias = None if options.log_weights is None else self._weights_by_rank(options.log_weights)
        self.columns = Columns(self.operands.keys, self.operands.grad_keys, self._own_terms())

    # ------------------------------------------------------------------ positives

    @functools.cached_property
    def cosines(self) -> Tensor:
        """s_ii, (N, 1); 0 without positives"""
        if not self.options.paired:
            return torch.zeros_like(self.operands.positive_log2)
        return self.backend.pair_cosines(self.batch)

    @functools.cached_property
    def positive(self) -> variants.Positive:
        if not self.options.angular_margin:
            return variants.unchanged_positive(self.cosines)
        zero = (self.batch.anchors.inv_norm == 0) | (self.batch.columns[0].inv_norm == 0)
        chords = self.backend.pair_half_squared_chords(self.batch)
        return variants.positive_cosine(self.cosines, chords, zero, self.options)

    def _shifted(self, positive_log2: Tensor) -> Tensor:
        return positive_log2 if self.positive_shift_log2 is None else positive_log2 + self.positive_shift_log2

    def log_constants(self) -> variants.LogConstants:
        """What joins the denominators beside the columns' ratios, in nats."""
        if self.options.noise_kind != "expected" and self.options.log_own is None:
            return variants.LogConstants()
        return variants.log_constants(self.options, self.kappa_given, self.positive.value, self.D)

    def hidden_nan(self) -> Tensor | None:
        """NaN where some column contains one, else 0; None where the losses show it themselves.

        Ids and a guide can mask a column in every row: that hides it from the losses, but not from the gradients,
        whose products multiply it by 0.
        """
        if not variants.can_hide_columns(self.options):
            return None
        hidden = self.operands.keys.sum(dtype=self.backend.precision.sums) * 0
        return hidden if self.exchange is None else self.exchange.sum(hidden)

    def column_direction(self, loss: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Of the columns' z_ij − loss_j = q_i·k_j + row_bias_i − column_shift_j, in base 2: the row bias (N, 1),
        and by rank the column shift (N,).
        """
        shift = self.scale_log2 * self.cosines
        row_bias = shift - self.operands.positive_log2
        shift = self._shifted(shift)
        return row_bias, self.of_positives((shift if loss is None else shift + loss * LOG2_E)[:, 0])

    # ------------------------------------------------------------------ columns and their entries' terms

    def of_positives(self, x: Tensor) -> list[Tensor]:
        """One number per positive, (N,), of every rank."""
        return [x] if self.exchange is None else self.exchange.gather(x, self.exchange.lengths("positives"))

    def terms_of(self, owner: int) -> EntryTerms:
        """Of the entries between this rank's rows and the owner's columns, none of which is a row's own."""
        if owner == self.rank:
            return self.columns.terms
        ids = self.ids
        return EntryTerms(
            row_ids=self.columns.terms.row_ids,
            column_ids=None if ids is None else ids[owner],
            limits=self._limits_of(owner),
            column_bias=None if self.column_bias is None else self.column_bias[owner],
        )

    def _own_terms(self) -> EntryTerms:
        options, ids = self.options, self.ids
        return EntryTerms(
            num_positives=options.masked_diagonal,
            num_negatives=options.counts.negatives,
            own_bias=options.own_log_weight * LOG2_E,
            row_ids=options.ids,
            column_ids=None if ids is None else ids[self.rank],
            limits=self._limits_of(self.rank),
            column_bias=None if self.column_bias is None else self.column_bias[self.rank],
        )

    def _weights_by_rank(self, log_weights: Tensor) -> list[Tensor]:
        """Log-weights of every rank's columns in base 2."""
        bits = log_weights.to(self.backend.precision.sums) * LOG2_E
        return [bits] if self.exchange is None else self.exchange.gather(bits, self.exchange.lengths("columns"))

    @functools.cached_property
    def _similarity_limits(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
        """Scores above which a column is too similar, (N, 1), and the unit rows of a guide."""
        similar = self.options.similar
        if similar is None:
            return None
        guide, scores = None, self.cosines
        if similar.guide is not None:
            rows, columns = (self.backend.unit_rows(x)[0].clone() for x in similar.guide)
            guide = rows, columns
            if self.options.paired:
                scores = (rows * columns[: self.N]).sum(1, keepdim=True, dtype=self.backend.precision.sums)
        return variants.similarity_limit(scores, similar), guide

    def _limits_of(self, owner: int) -> Limits | None:
        if self._similarity_limits is None:
            return None
        limit, guide = self._similarity_limits
        if guide is not None:
            return Limits(limit, limit[:, 0], guide)
        columns = self._limits_of_columns[owner] if self.options.symmetric else None
        return Limits(self.scale_log2 * (limit - self.cosines) + self.operands.positive_log2, columns)

    @functools.cached_property
    def _limits_of_columns(self) -> list[Tensor]:
        assert self._similarity_limits is not None
        return self.of_positives((self.scale_log2 * self._similarity_limits[0])[:, 0])

    def _ids_by_rank(self, ids: Tensor) -> list[Tensor]:
        """Ids of each rank's first columns: its positives', and its negatives' where those have any."""
        exchange = self.exchange
        if exchange is None:
            return [ids]
        lengths = [c.positives + c.negatives * exchange.masks_negatives for c in exchange.counts]
        return exchange.gather(ids.long(), lengths)

    # ------------------------------------------------------------------ noise

    def noise_blocks(self, center: Tensor | None) -> Iterator[Columns]:
        """The noise as columns centred by ``center``, a block at a time; the same vectors at each call."""
        options, backend = self.options, self.backend
        M = options.num_noise if options.has_noise_columns else 0
        terms = EntryTerms(bias=options.log_noise_weight * LOG2_E)
        for block in row_slices(M, backend.noise_block):
            if self.noise_rows is not None:
                copies = backend.unit_rows(self.noise_rows[block], center)
            else:
                assert options.seed is not None
                copies = backend.sampled_noise(options.seed, block, M, self.D, center)
            yield Columns(*copies, terms)

    def noise_sides(self) -> Iterator[NoiseSide]:
        """The directions that contain noise: rows, and columns where the loss is symmetric."""
        if not self.options.has_noise_columns:
            return
        batch = self.batch
        yield NoiseSide(self.operands.queries, self.row_shift_log2, batch.center_k)
        if self.options.symmetric:
            q, positive_log2 = self.backend.queries(
                batch.columns[0], batch.anchors, batch.center_q, self.scale_log2
            )
            yield NoiseSide(q, self._shifted(positive_log2), batch.center_q)

    # ------------------------------------------------------------------ chunks

    def row_chunks(self, columns: int) -> list[slice]:
        """Chunks of rows that the workspace holds with their weighted anchors; see ``chunks.rows_per_chunk``."""
        backend = self.backend
        most = min(backend.max_chunk_rows, max(1, backend.workspace_elements // (columns + self.D)))
        step = rows_per_chunk(self.N, self.D, most, backend.chunk_multiple, backend.multiprocessors)
        return row_slices(self.N, step)

    def column_blocks(self, counts: Counts, split: bool) -> Iterator[slice]:
        """Blocks of a rank's columns; with ``split`` none extends beyond the end of the positives."""
        edges = [0, counts.positives, counts.columns] if split else [0, counts.columns]
        for first, last in itertools.pairwise(edges):
            for block in row_slices(last - first, self.backend.column_block):
                yield shift_slice(block, first)
