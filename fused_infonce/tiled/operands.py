"""What the algorithms and a backend's operations pass to each other.

Exponents are in base 2: names with ``_log2`` hold base-2 logarithms. What belongs to rows has shape (N, 1), what
belongs to columns (T,), so that both broadcast over a tile.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..distributed import Counts
from ..entry_terms import EntryTerms
from ..kernels.settings import fp32_products
from ..options import Options

_COLUMN_INPUTS = ("positives", "negatives", "queue")
_SETS = {
    needed: frozenset(itertools.compress(_COLUMN_INPUTS, needed))
    for needed in itertools.product((False, True), repeat=3)
}


@dataclass(slots=True)
class NeedsGrad:
    """Which gradients are requested."""

    anchors: bool
    positives: bool
    negatives: bool
    queue: bool
    temperature: bool
    log_own: bool = False

    @staticmethod
    def none() -> NeedsGrad:
        return NeedsGrad(False, False, False, False, False)

    @property
    def columns(self) -> frozenset[str]:
        return _SETS[self.positives, self.negatives, self.queue]

    @property
    def rows(self) -> bool:
        """The temperature's gradient is read off the anchors'."""
        return self.anchors or self.temperature


@dataclass(slots=True, eq=False)
class Gradients:
    """Gradients of the requested inputs, in their shapes, of κ, 0-dim, and of log O_i, (N,)."""

    anchors: Tensor | None = None
    positives: Tensor | None = None
    negatives: Tensor | None = None
    queue: Tensor | None = None
    kappa: Tensor | None = None
    log_own: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor | None, ...]:
        return self.anchors, self.positives, self.negatives, self.queue


@functools.lru_cache(maxsize=64)  # batches seldom change their shapes, and small ones feel the time
def column_spans(counts: Counts) -> tuple[tuple[str, slice], ...]:
    """The inputs whose rows are columns of the logits, and where they lie."""
    spans, start = [], 0
    for name in _COLUMN_INPUTS:
        count = getattr(counts, name)
        if count:
            spans.append((name, slice(start, start + count)))
            start += count
    return tuple(spans)


def grad_range(counts: Counts, needed: frozenset[str]) -> slice:
    """A rank's columns from the first to the last whose gradients are requested; slice(0, 0) if there are none."""
    spans = [columns for name, columns in column_spans(counts) if name in needed]
    return slice(spans[0].start, spans[-1].stop) if spans else slice(0, 0)


@dataclass(slots=True)
class Precision:
    """Dtypes of the computation."""

    sums: torch.dtype  # sums, exponentials, positives and the accumulators of gradients
    product: torch.dtype  # operands of the similarity product
    gradient: torch.dtype  # operands of the gradient products, and the stored exponentials
    low_precision_products: bool  # whether the gradient products round their operands further than the sums do

    @staticmethod
    def of(dtype: torch.dtype, device: torch.device) -> Precision:
        """For products in ``dtype``. fp16 lacks the range of the exponentials, so its gradients use bf16."""
        if dtype == torch.float64:
            return Precision(dtype, dtype, dtype, False)
        gradient = torch.bfloat16 if dtype == torch.float16 else dtype
        low_precision = dtype != torch.float32 or fp32_products(device) != "ieee"
        return Precision(torch.float32, dtype, gradient, low_precision)


@dataclass(slots=True, eq=False)
class NormalizedRows:
    """Rows of an input and their reciprocal norms, 0 for a zero row; the unit rows are their product."""

    x: Tensor  # (n, D)
    inv_norm: Tensor  # (n, 1)

    def part(self, rows: slice) -> NormalizedRows:
        return NormalizedRows(self.x[rows], self.inv_norm[rows])


@dataclass(slots=True, eq=False)
class NormalizedBatch:
    """The inputs of a call with their norms and centres."""

    anchors: NormalizedRows
    columns: list[NormalizedRows]  # positives, negatives, queue: those that are given
    center_q: Tensor | None  # (D,), of the anchors in the gradient product; None: not centred there
    center_k: Tensor  # (D,), of every column
    cosines: Tensor | None = None  # (N, 1) s_ii, and ½‖q̂_i − k̂_i‖², where normalising computed them
    half_squared_chords: Tensor | None = None


@dataclass(slots=True, eq=False)
class Operands:
    """Operands of the products."""

    queries: Tensor  # (N, D) q̂_i in the product dtype, times scale_log2 where the backend's products do not scale
    keys: Tensor  # (T, D) x̂_j − c, product dtype
    grad_keys: Tensor  # (T, D) the same in the gradient dtype
    positive_log2: Tensor  # (N, 1) scale_log2 q̂_i·(k̂_i − c), from unrounded rows


@dataclass(slots=True, eq=False)
class Columns:
    """Columns of the logits, and the terms of their entries."""

    rows: Tensor  # (T, D) centred unit rows, product dtype
    grad_rows: Tensor  # (T, D) the same in the gradient dtype
    terms: EntryTerms

    def __len__(self) -> int:
        return self.rows.shape[0]

    def block(self, columns: slice) -> Columns:
        """Some of the columns; the terms keep their places in the whole matrix."""
        return replace(self, rows=self.rows[columns], grad_rows=self.grad_rows[columns])


@dataclass(slots=True, eq=False)
class RowDenominator:
    """What the sum of a row's E_ij = 2^(q_i·k_j + b_ij − row_shift_i) is added to. (N, 1) each.

    The offset o_i (nats) keeps E_ij in range. It is known in advance, or it is the row's maximum, which only the
    backend knows once it has seen the row; the constants are given without the offset then.
    """

    row_shift_log2: Tensor  # the known offset included
    offset: Tensor | None  # None: 0, or the row's maximum
    offset_is_maximum: bool
    constant: Tensor | None  # times e^(−o_i), see variants.LogConstants; with offset_is_maximum its logarithm
    positive_term: Tensor | float  # e^(−o_i), decoupled 0; with offset_is_maximum the backend computes it
    options: Options
    positive_on_diagonal: bool  # dloss_i/ds_ii is −Σ_j dloss_i/ds_ij, so a tile's diagonal can hold it


@dataclass(slots=True, eq=False)
class Accumulator:
    """Gradient products of the columns, summed over chunks of rows."""

    grad: Tensor  # (n, D) Σ_i α_i E_ij q̃_i
    sums: Tensor | None  # (n,) Σ_i α_i E_ij; None where the anchors are not centred, or reflected

    def part(self, columns: slice) -> Accumulator:
        return Accumulator(self.grad[columns], None if self.sums is None else self.sums[columns])


@dataclass(slots=True, eq=False)
class RowStats:
    """Results of the rows, (N, 1) each. Both shares are multiplied by ``unit``, as the tiles are."""

    alpha: Tensor  # e^(−o_i)-scaled f'(loss_i)/(1 + R_i), f as in variants.transformed_loss; decoupled 1/R_i
    losses: Tensor  # nats, as variants.row_loss returns them
    share: Tensor | None  # f'(loss_i) R_i/(1 + R_i); None where the tiles' diagonal held it
    constant_share: Tensor | None  # f'(loss_i) T_i/(1 + R_i) of the constant T_i
    unit: float = 1.0  # the factor of every E_ij in the tiles and in the sums and products that they enter


@dataclass(slots=True, eq=False)
class GradScale:
    """A factor of every gradient: the part a device holds and the part the host knows, so no launch joins them."""

    tensor: Tensor | None  # 0-dim, the sums' dtype; None: 1
    number: float = 1.0

    def times(self, x: float | Tensor) -> GradScale:
        if isinstance(x, Tensor):
            return GradScale(x if self.tensor is None else self.tensor * x, self.number)
        return GradScale(self.tensor, self.number * x)

    @property
    def value(self) -> float | Tensor:
        return self.number if self.tensor is None else self.tensor * self.number


@dataclass(slots=True, eq=False)
class RowGradArgs:
    """One side's gradient of unit rows: alpha_i acc_i − positive_coeff_i p̂_i + center_weight_i center.

    p̂_i is the unit row of the other side's pair. A center without weights says that a backend which reflects the
    anchors along it (``OnePassRows.weighted_anchors``) is to reflect acc_i back.
    """

    acc: Tensor  # (n, D)
    positive_coeff: Tensor | None  # (n, 1)
    center_weight: Tensor | None  # (n, 1)
    center: Tensor | None  # (D,)
    alpha: Tensor | None = None  # (n, 1); None: 1
    disposable: bool = False  # whether the gradient may overwrite acc
    dtype: torch.dtype | None = None  # of the gradient; None: the input's
