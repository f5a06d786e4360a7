"""Row operations of the Triton backend: normalisation forward and backward, noise, weighted anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..distributed import mean_unit_row
from ..kernels import noise, normalise
from ..kernels import rows as row_kernels
from .operands import GradScale, NormalizedBatch, NormalizedRows, Operands, RowGradArgs
from .triton_memory import TritonMemory


class TritonRows(TritonMemory):
    """See ``backend.TileBackend``."""

    noise_block = 8192  # rows that are drawn at a time

    def normalise(
        self,
        anchors: Tensor,  # (N, D)
        columns: list[Tensor],  # positives (N, D), and what else is given
        scale_log2: float | Tensor,
        centers: tuple[Tensor, Tensor] | None,
        paired: bool = True,
    ) -> tuple[NormalizedBatch, Operands]:
        N, D = anchors.shape
        pair, pairs = (columns[0], N) if paired else (anchors.new_zeros(1, D).expand(N, D), 0)
        if not paired and centers is None:
            centers = mean_unit_row(anchors, torch.float32), mean_unit_row(columns[0], torch.float32)
        queries = self.rows(N, D, self.precision.product)
        keys, grad_keys = self.copies(sum(x.shape[0] for x in columns), D)
        center_q = None
        if self.precision.low_precision_products:
            center_q = self.empty(D) if centers is None else centers[0]
        center_k = self.empty(D) if centers is None else centers[1]
        r_q, r_k, shift, cosines, chords = self.vectors(5, N)
        normalise.normalise_pairs(
            anchors, pair, scale_log2, queries, keys[:N] if paired else None,
            None if grad_keys is None or not paired else grad_keys[:N],
            (r_q, r_k, shift, cosines, chords), center_q, center_k, centers is None, self.settings.row_elements,
        )  # fmt: skip
        found = [NormalizedRows(columns[0], r_k)] if paired else []
        start = pairs
        for x in columns[len(found) :]:
            part = slice(start, start + x.shape[0])
            r = self._normalise_rows(x, center_k, keys[part], None if grad_keys is None else grad_keys[part])
            found.append(NormalizedRows(x, r))
            start = part.stop
        batch = NormalizedBatch(NormalizedRows(anchors, r_q), found, center_q, center_k, cosines, chords)
        return batch, Operands(queries, keys, keys if grad_keys is None else grad_keys, shift)

    def _normalise_rows(self, x: Tensor, center: Tensor | None, rows: Tensor, grad_rows: Tensor | None) -> Tensor:
        (r,) = self.vectors(1, x.shape[0])
        normalise.normalise_rows(x, center, rows, grad_rows, r, self.settings.row_elements)
        return r

    def queries(
        self, q: NormalizedRows, k: NormalizedRows, center: Tensor | None, scale_log2: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        n, D = q.x.shape
        queries = self.rows(n, D, self.precision.product)
        shift, *unused = self.vectors(5, n)
        normalise.normalise_pairs(
            q.x, k.x, scale_log2, queries, None, None, (*unused[:2], shift, *unused[2:]), None, center, False,
            self.settings.row_elements,
        )  # fmt: skip
        return queries, shift

    def pair_cosines(self, batch: NormalizedBatch) -> Tensor:
        assert batch.cosines is not None
        return batch.cosines

    def pair_half_squared_chords(self, batch: NormalizedBatch) -> Tensor:
        assert batch.half_squared_chords is not None
        return batch.half_squared_chords

    def sampled_noise(
        self, seed: Tensor, rows: slice, num_noise: int, D: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        copy, grad_copy = self.copies(rows.stop - rows.start, D)
        noise.sample_noise(seed, rows.start, center, copy, grad_copy)
        return copy, copy if grad_copy is None else grad_copy

    def unit_rows(self, x: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
        copy, grad_copy = self.copies(*x.shape)
        self._normalise_rows(x, center, copy, grad_copy)
        return copy, copy if grad_copy is None else grad_copy

    def centered_anchors(self, batch: NormalizedBatch, rows: slice) -> Tensor:
        q = batch.anchors
        out = self.rows(rows.stop - rows.start, q.x.shape[1], self.precision.gradient)
        row_kernels.centered_anchors(q.x, q.inv_norm, batch.center_q, rows.start, out, self.settings.row_elements)
        return out

    # ------------------------------------------------------------------ backward of the normalisation

    def finish_pairs(
        self,
        batch: NormalizedBatch,
        anchors: RowGradArgs | None,
        positives: RowGradArgs | None,
        scale: GradScale,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if anchors is None and positives is None:
            return None, None, None
        if anchors is not None and anchors.positive_coeff is None and positives is None:
            dq, dots = self._finish_one(batch.anchors, anchors, scale)
            return dq, None, dots
        q, k = batch.anchors, batch.columns[0]
        side_q, side_k = _side(q, anchors), _side(k, positives)
        dots = normalise.normalise_backward(
            q.x, q.inv_norm, side_q, k.x, k.inv_norm, side_k, scale.tensor, scale.number,
            self.settings.row_elements,
        )  # fmt: skip
        return None if side_q is None else side_q.grad, None if side_k is None else side_k.grad, dots

    def finish(self, rows: NormalizedRows, args: RowGradArgs, scale: GradScale) -> Tensor:
        return self._finish_one(rows, args, scale)[0]

    def unit_dots(self, acc: Tensor, rows: NormalizedRows, weights: Tensor, center: Tensor | None) -> Tensor:
        return self._finish_one(rows, RowGradArgs(acc, None, weights, center), GradScale(None, 0.0))[1]

    def _finish_one(self, rows: NormalizedRows, args: RowGradArgs, scale: GradScale) -> tuple[Tensor, Tensor]:
        side = _side(rows, args)
        dots = normalise.normalise_backward(
            rows.x, rows.inv_norm, side, None, None, None, scale.tensor, scale.number, self.settings.row_elements
        )
        assert side is not None
        return side.grad, dots


def _side(rows: NormalizedRows, args: RowGradArgs | None) -> normalise.Side | None:
    """One side of the normalisation backward, as the kernel takes it, with memory for its gradient."""
    if args is None:
        return None
    sums, x = args.center_weight, rows.x
    return normalise.Side(
        acc=args.acc,
        stride=args.acc.stride(0),
        grad=torch.empty(x.shape, dtype=args.dtype or x.dtype, device=x.device),
        share=args.positive_coeff,
        center=args.center,
        sums=sums,
        sums_stride=0 if sums is None else sums.stride(0),
        factor=args.alpha,
    )
