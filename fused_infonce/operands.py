"""What the sweep and a backend's operations hand each other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .kernels.settings import fp32_products

_NOTHING = torch.empty(0)


@dataclass(slots=True)
class Precision:
    sums: torch.dtype  # sums, exponentials, positives and gradients' accumulators
    product: torch.dtype  # operands of the similarity product
    gradient: torch.dtype  # operands of the gradient products, and the stored exponentials
    low_precision_products: bool  # whether the gradient products round their operands further than the sums do

    @staticmethod
    def of(dtype: torch.dtype, device: torch.device) -> Precision:
        """For products in ``dtype``; fp16 has not the range for exponentials, so its gradients use bf16."""
        if dtype == torch.float64:
            return Precision(dtype, dtype, dtype, False)
        gradient = torch.bfloat16 if dtype == torch.float16 else dtype
        rounds = dtype != torch.float32 or fp32_products(device) != "ieee"
        return Precision(torch.float32, dtype, gradient, rounds)


@dataclass(slots=True, eq=False)
class Rows:
    """One of the inputs and its rows' reciprocal norms, 0 for a zero row."""

    x: Tensor  # (n, D)
    r: Tensor  # (n, 1)
    unit: Tensor | None = None  # x̂_i = x_i r_i, (n, D), where a backend keeps them

    def part(self, rows: slice) -> Rows:
        if rows.stop - rows.start == self.r.shape[0]:
            return self
        return Rows(self.x[rows], self.r[rows], None if self.unit is None else self.unit[rows])


@dataclass(slots=True, eq=False)
class Limits:
    """Scores beyond which a column is no negative of a row, and a row none of a column in the other direction.

    Without a guide the scores are q_i·k_j for rows and, for columns, bits s_ij = q_i·k_j + row_bias_i.
    """

    rows: Tensor  # (N, 1)
    columns: Tensor | None  # (n,) of the first n columns, where both directions are asked for
    guide: tuple[Tensor, Tensor] | None = None  # unit rows (N, G) and (T, G) whose products are the scores instead


@dataclass(slots=True, eq=False)
class Columns:
    """Columns of the similarity matrix and what is special about some of its entries."""

    rows: Tensor  # (T, D) centred unit rows, product dtype
    grad_rows: Tensor  # (T, D) the same in the gradient dtype
    bias: float = 0.0  # log2 of every column's weight
    num_positives: int = 0  # columns [0, N): column i is row i's positive and no negative of it
    num_negatives: int = 0  # columns [N, N + H): hard negatives
    own_bias: float = 0.0  # log2-weight of column N + hN + i in row i
    row_ids: Tensor | None = None  # (N,)
    column_ids: Tensor | None = None  # (n,) of the first n columns; equal to the row's id: masked
    limits: Limits | None = None

    def __len__(self) -> int:
        return self.rows.shape[0]

    def block(self, columns: slice) -> Columns:
        """Some of the columns; what is special keeps its place in the whole matrix."""
        return replace(self, rows=self.rows[columns], grad_rows=self.grad_rows[columns])


@dataclass(slots=True, eq=False)
class Units:
    """The inputs of a call, their norms and their centres."""

    anchors: Rows
    keys: list[Rows]  # positives, negatives, queue: those that are there, in the order of the columns
    center_q: Tensor | None  # (D,), of the anchors in the gradient product; None: not centred there
    center_k: Tensor  # (D,), of every column
    cosines: Tensor | None = None  # (N, 1) s_ii, where a backend knows them anyway
    chords: Tensor | None = None  # (N, 1) ½‖q̂_i − k̂_i‖², likewise

    def detach(self) -> None:
        """Forgets the inputs, in place."""
        self.anchors.x = _NOTHING
        for rows in self.keys:
            rows.x = _NOTHING

    def attach(self, inputs: list[Tensor]) -> Units:
        """Takes them back; anchors first."""
        for rows, x in zip((self.anchors, *self.keys), inputs, strict=True):
            rows.x = x
        return self


@dataclass(slots=True, eq=False)
class Operands:
    """What the similarity product is taken of; exponents are in base 2, in bits."""

    queries: Tensor  # (N, D) q̂_i in the product dtype, times bits where the backend's products do not
    keys: Tensor  # (T, D) the keys centred, product dtype
    grad_keys: Tensor  # (T, D) the same in the gradient dtype
    own_products: Tensor  # (N, 1) bits q̂_i·k̃_i, from unrounded rows


@dataclass(slots=True, eq=False)
class RowTerms:
    """What a row's sum of E_ij = 2^(q_i·k_j + bias_ij − shift_i) is measured against, (N, 1) each."""

    shift: Tensor
    offset: Tensor | None  # o_i, nats, part of the shift; None: 0
    constant: Tensor | None  # t_i, expected noise's share of the sum; None: 0
    own: Tensor | float  # e^(−o_i) + t_i; t_i where the positive is not in the denominator
    decoupled: bool  # that is so
    whole: bool  # a positive loses the share of all its row's ratios, neither more nor less


@dataclass(slots=True, eq=False)
class Accumulator:
    """Gradient products of the columns, summed over chunks of rows."""

    grad: Tensor  # (n, D) Σ_i α_i E_ij q̃_i
    sums: Tensor | None  # (n,) Σ_i α_i E_ij; None where nobody asks

    def part(self, columns: slice) -> Accumulator:
        if columns.stop - columns.start == self.grad.shape[0]:
            return self
        return Accumulator(self.grad[columns], None if self.sums is None else self.sums[columns])


@dataclass(slots=True, eq=False)
class RowSums:
    """What one sweep knows of its rows in the end, (N, 1) each."""

    alpha: Tensor  # 1/(own_i + Σ_j E_ij)
    losses: Tensor  # nats
    total: (
        Tensor | None
    )  # Σ_j E_ij + t_i; None where the tiles' diagonal held it: the positives have lost it already
    share: Tensor | None  # α_i total_i = R_i/(1 + R_i), likewise


@dataclass(slots=True, eq=False)
class Scale:
    """A factor of every gradient, in two parts so that no launch multiplies them: the device's and the host's."""

    tensor: Tensor | None  # 0-dim, the sums' dtype; None: 1
    number: float = 1.0

    def times(self, x: float | Tensor) -> Scale:
        if isinstance(x, Tensor):
            return Scale(x if self.tensor is None else self.tensor * x, self.number)
        return Scale(self.tensor, self.number * x)

    @property
    def value(self) -> float | Tensor:
        return self.number if self.tensor is None else self.tensor * self.number


@dataclass(slots=True, eq=False)
class Side:
    """One side's part of the normalisation backward, rows of the other side being its pairs."""

    acc: Tensor  # (n, D)
    share: Tensor | None  # (n, 1) what a positive loses; None: nothing
    sums: Tensor | None  # (n, 1) weights of the centre; None: none
    center: Tensor | None  # (D,)
    factor: Tensor | None = None  # (n, 1); None: 1
    disposable: bool = False  # whether the gradient may take the place of acc
    dtype: torch.dtype | None = None  # of the gradient; None: the input's
