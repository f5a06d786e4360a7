"""Terms of single entries of the logits: which columns are masked for which rows, and log-weights.

One value describes all of them. The operations below apply it to a tile of logits, whose logarithm's base is also
that of the value's numbers; the Triton kernels read the same fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True, eq=False)
class Limits:
    """Scores above which a column does not count as a negative of a row, nor a row as one of a column.

    Without a guide the scores are the logits themselves, before a row's shift is subtracted.
    """

    rows: Tensor  # (N, 1)
    columns: Tensor | None  # (n,) of the first n columns, where both directions are computed
    guide: tuple[Tensor, Tensor] | None = None  # unit rows (N, G) and (T, G) whose products are the scores instead


@dataclass(slots=True, eq=False)
class EntryTerms:
    bias: float = 0.0  # log-weight of every column
    num_positives: int = 0  # columns [0, N): column i is row i's positive (or the row itself), masked
    num_negatives: int = 0  # columns [N, N + H): hard negatives
    own_bias: float = 0.0  # log-weight of column N + hN + i in row i
    row_ids: Tensor | None = None  # (N,), or (N, 2) of which either masks
    column_ids: Tensor | None = None  # (n,) or (n, 2) of the first n columns; masked where equal to the row's id
    limits: Limits | None = None
    column_bias: Tensor | None = None  # (T,) log-weight of each column, in the rows' direction; −∞: masked


def _each(ids: Tensor, ndim: int) -> tuple[Tensor, ...]:
    """The ids that a row or column has: one, or two along the last dimension."""
    return (ids,) if ids.ndim == ndim else ids.unbind(-1)


def mask_(tile: Tensor, terms: EntryTerms, i0: int, j0: int) -> Tensor | None:
    """Applies what both directions share, in place; returns the positives' entries, now −∞, as a view (n,).

    tile: logits (C, B) of the entries (i0 + a, j0 + b).
    """
    diagonal = tile.diagonal(i0 - j0).fill_(-math.inf) if terms.num_positives else None
    if terms.bias:
        tile.add_(terms.bias)
    if terms.column_ids is not None and terms.row_ids is not None and j0 < len(terms.column_ids):
        ids = terms.column_ids[j0 : j0 + tile.shape[1]]
        of_rows = terms.row_ids[i0 : i0 + tile.shape[0], None]  # (C, 1) or (C, 1, 2)
        for a, b in zip(_each(of_rows, 2), _each(ids, 1), strict=True):
            tile[:, : len(ids)].masked_fill_(a == b, -math.inf)
    return diagonal


def guide_scores(tile: Tensor, terms: EntryTerms, i0: int, j0: int) -> Tensor | None:
    """The guide's scores of a tile's entries, (C, B); None where the logits themselves are the scores."""
    if terms.limits is None or terms.limits.guide is None:
        return None
    rows, columns = terms.limits.guide
    return rows[i0 : i0 + tile.shape[0]] @ columns[j0 : j0 + tile.shape[1]].T


def apply_to_rows_(tile: Tensor, scores: Tensor | None, terms: EntryTerms, i0: int, j0: int) -> None:
    """Applies what only the rows' direction has, in place: limits, and weights of columns
    and of own hard negatives."""
    if terms.limits is not None:
        limit = terms.limits.rows[i0 : i0 + tile.shape[0]]
        scores = tile if scores is None else scores
        tile[:, : scores.shape[1]].masked_fill_(scores > limit, -math.inf)
    if terms.column_bias is not None:  # after the limits, which compare scores without weights
        tile.add_(terms.column_bias[j0 : j0 + tile.shape[1]])
    N, H = terms.num_positives, terms.num_negatives
    if terms.own_bias:
        for start in range(N, N + H, N):
            tile.diagonal(i0 - (j0 - start)).add_(terms.own_bias)


def apply_to_columns_(tile: Tensor, scores: Tensor | None, terms: EntryTerms, j0: int) -> None:
    """Applies what only the columns' direction has, in place. tile: logits (C, B), before a column's shift."""
    if terms.limits is not None and terms.limits.columns is not None:
        limit = terms.limits.columns[j0 : j0 + tile.shape[1]]
        tile.masked_fill_((tile if scores is None else scores) > limit, -math.inf)
