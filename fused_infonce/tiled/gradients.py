"""From gradients of unit rows to gradients of the inputs, for both algorithms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import Options
from .backend import TileBackend
from .operands import (
    Accumulator,
    Gradients,
    GradScale,
    NeedsGrad,
    NormalizedBatch,
    RowGradArgs,
    column_spans,
    grad_range,
)  # fmt: skip
from .problem import shift_slice


def finish_sides(
    backend: TileBackend,
    options: Options,
    batch: NormalizedBatch,
    needs: NeedsGrad,
    acc: Accumulator | None,  # of the columns whose gradients are requested
    of_positive: Tensor | None,  # (N, 1) −dloss_i/ds_ii, where acc does not contain it
    anchors: RowGradArgs | None,
    scale: GradScale,
    disposable: bool = False,  # whether gradients may overwrite acc
    dtype: torch.dtype | None = None,
) -> tuple[Gradients, Tensor | None]:
    """The gradients of all inputs; and ⟨q̂_i, dq̂_i⟩ without its factor ``scale``, (N, 1)."""
    out, positives = Gradients(), None
    first = grad_range(options.counts, needs.columns).start
    for (name, columns), rows in zip(column_spans(options.counts), batch.columns, strict=True):
        if acc is None or name not in needs.columns:
            continue
        part = acc.part(shift_slice(columns, -first))
        weight = None if part.sums is None else part.sums[:, None]
        args = RowGradArgs(part.grad, None, weight, batch.center_q, None, disposable, dtype)
        if name == "positives":
            args.positive_coeff = of_positive
            positives = args
        else:
            setattr(out, name, backend.finish(rows, args, scale))
    dq, out.positives, dots = backend.finish_pairs(batch, anchors, positives, scale)
    out.anchors = dq if needs.anchors else None
    return out, dots
