"""Row operations of the torch backend: normalising, centring, and the backward of the normalisation.

All passes go over slices of rows that stay in a cache, in place where possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import noise
from ..variants import smallest_operand
from .operands import GradScale, NormalizedBatch, NormalizedRows, Operands, RowGradArgs
from .problem import row_slices
from .torch_memory import TorchMemory

CENTER_ROWS = 64  # rows that a centre is the mean of; any constant is exact
BF16_CENTER_ROWS = 1024  # the same where sums of centred rows are rounded
SMALL_BATCH_ROWS = 256  # up to here a mean over more than CENTER_ROWS would take 4 % of the time


def zero_rows(like: Tensor, dtype: torch.dtype) -> NormalizedRows:
    """As many zero rows as ``like`` has, in the memory of one."""
    n, D = like.shape
    return NormalizedRows(like.new_zeros(1, D).expand(n, D), like.new_zeros(n, 1, dtype=dtype))


class TorchRows(TorchMemory):
    may_be_tiny = False  # whether ratios can be below variants.smallest_operand
    product_scale: float = 1.0  # a factor of the similarity product, where the queries do not contain it

    def normalise(
        self,
        anchors: Tensor,
        columns: list[Tensor],
        scale_log2: float | Tensor,
        centers: tuple[Tensor, Tensor] | None,
        paired: bool = True,
    ) -> tuple[NormalizedBatch, Operands]:
        precision = self.precision
        self.product_scale = scale_log2 if isinstance(scale_log2, float) else 1.0
        least = math.log2(smallest_operand(precision.sums))
        self.may_be_tiny = not isinstance(scale_log2, float) or -2 * scale_log2 < least
        q, keys = self._rows(anchors), [self._rows(x) for x in columns]
        center_q = None
        if precision.low_precision_products:
            center_q = self._mean(q) if centers is None else centers[0]
        center_k = self._mean(keys[0]) if centers is None else centers[1]
        lengths = [x.shape[0] for x in columns]
        rows = self.empty(sum(lengths), anchors.shape[1], dtype=precision.product)
        places = torch.split(rows, lengths)
        pair = keys[0] if paired else zero_rows(anchors, precision.sums)
        queries, positive_log2 = self._queries(q, pair, center_k, scale_log2, places[0] if paired else None)
        for k, out in zip(keys[paired:], places[paired:], strict=True):
            self._center(k, center_k, out)
        grad_rows = rows
        if precision.gradient != precision.product:
            grad_rows = torch.empty_like(rows, dtype=precision.gradient)
            for k, out in zip(keys, torch.split(grad_rows, lengths), strict=True):
                self._center(k, center_k, out)
        return NormalizedBatch(q, keys, center_q, center_k), Operands(queries, rows, grad_rows, positive_log2)

    def queries(
        self, q: NormalizedRows, k: NormalizedRows, center: Tensor | None, scale_log2: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._queries(q, k, center, scale_log2, None)

    def _queries(
        self,
        q: NormalizedRows,
        k: NormalizedRows,
        center: Tensor | None,
        scale_log2: float | Tensor,
        keys: Tensor | None,  # memory for k̂ − center, in its dtype
    ) -> tuple[Tensor, Tensor]:
        (N, D), sums = q.x.shape, self.precision.sums
        queries, positive_log2 = self.empty(N, D, dtype=self.precision.product), self.empty(N, 1)
        exact = keys is not None and keys.dtype == sums
        for i in row_slices(N, self.row_step(D)):
            unit, centered = self._unit(q.part(i)), self._unit(k.part(i), "pair")
            if center is not None:
                centered = torch.sub(centered, center, out=keys[i] if keys is not None and exact else centered)
            if keys is not None and not exact:
                keys[i].copy_(centered)
            products = torch.mul(unit, centered, out=self.scratch("rows", tuple(unit.shape)))
            positive_log2[i] = products.sum(1, keepdim=True)
            queries[i].copy_(unit.mul_(scale_log2) if self.product_scale == 1 else unit)
        return queries, positive_log2.mul_(scale_log2)

    def pair_cosines(self, batch: NormalizedBatch) -> Tensor:
        return self._pair_sums(batch, lambda q, k: q.mul_(k))

    def pair_half_squared_chords(self, batch: NormalizedBatch) -> Tensor:
        return self._pair_sums(batch, lambda q, k: q.sub_(k).square_()).div_(2)

    def _pair_sums(self, batch: NormalizedBatch, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Sums of what ``combine`` makes of q̂ and k̂, in place of q̂. → (N, 1)"""
        N, D = batch.anchors.x.shape
        out = self.empty(N, 1)
        for i in row_slices(N, self.row_step(D)):
            q, k = self._unit(batch.anchors.part(i)), self._unit(batch.columns[0].part(i), "pair")
            out[i] = combine(q, k).sum(1, keepdim=True)
        return out

    def unit_dots(self, acc: Tensor, rows: NormalizedRows, weights: Tensor, center: Tensor | None) -> Tensor:
        n, D = acc.shape
        out = self.empty(n, 1)
        for i in row_slices(n, self.row_step(D)):
            unit, v = self._unit(rows.part(i)), acc[i]
            if center is not None:
                v = torch.addcmul(v, weights[i], center, out=self.scratch("rows", tuple(v.shape)))
            out[i] = unit.mul_(v).sum(1, keepdim=True)
        return out

    def sampled_noise(
        self, seed: Tensor, rows: slice, num_noise: int, D: int, center: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sums = self.precision.sums
        out = self.scratch(f"noise {sums}", (rows.stop - rows.start, D))
        noise.sample_block(seed, rows.start // noise.NOISE_BLOCK, num_noise, D, sums, self.device, out)
        return self.unit_rows(out, center)

    def unit_rows(self, x: Tensor, center: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, copies = self._rows(x.to(self.precision.sums)), []
        for dtype in dict.fromkeys((self.precision.product, self.precision.gradient)):
            copies.append(self.scratch(f"noise {dtype}", tuple(x.shape), dtype))
            self._center(rows, center, copies[-1])
        return copies[0], copies[-1]

    def centered_anchors(
        self,
        batch: NormalizedBatch,
        rows: slice,
        weights: Tensor | None = None,  # (n, 1)
        column_major: bool = False,
    ) -> Tensor:
        n, D = rows.stop - rows.start, batch.anchors.x.shape[1]
        out = self.matrix(n, D, self.precision.gradient, column_major, "anchors")
        self._center(batch.anchors.part(rows), batch.center_q, out, weights)
        return out

    def _rows(self, x: Tensor) -> NormalizedRows:
        norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=self.precision.sums)
        return NormalizedRows(x, norms.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0))

    def _unit(self, rows: NormalizedRows, name: str = "unit") -> Tensor:
        """x̂ in scratch memory, which the caller may overwrite. → (n, D)"""
        out = self.scratch(name, tuple(rows.x.shape))
        return torch.mul(rows.x, rows.inv_norm, out=out)

    def _center(
        self, rows: NormalizedRows, center: Tensor | None, out: Tensor, weights: Tensor | None = None
    ) -> None:
        """w_i (x̂_i − center) to ``out``; weights: (n, 1)."""
        n, D = out.shape
        for i in row_slices(n, self.row_step(D)):
            part, place = rows.part(i), out[i]
            exact = place.dtype == self.precision.sums
            work = torch.mul(part.x, part.inv_norm, out=place) if exact else self._unit(part)
            if center is not None:
                work.sub_(center)
            if weights is not None:
                work.mul_(weights[i])
            if not exact:
                place.copy_(work)

    def _mean(self, rows: NormalizedRows) -> Tensor:
        """Mean of the first unit rows. → (D,)"""
        many = self.precision.low_precision_products and len(rows.x) > SMALL_BATCH_ROWS
        first = rows.part(slice(0, BF16_CENTER_ROWS if many else CENTER_ROWS))
        x = first.x.to(self.precision.sums)
        return torch.mv(x.T, first.inv_norm[:, 0]).div_(len(x))

    # ------------------------------------------------------------------ backward of the normalisation

    def finish_pairs(
        self,
        batch: NormalizedBatch,
        anchors: RowGradArgs | None,
        positives: RowGradArgs | None,
        scale: GradScale,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        q, k, dq, dk, dots = batch.anchors, batch.columns[0], None, None, None
        if anchors is not None:
            dq, dots = self._finish(q, k, anchors, scale)
        if positives is not None:
            dk, _ = self._finish(k, q, positives, scale)
        return dq, dk, dots

    def finish(self, rows: NormalizedRows, args: RowGradArgs, scale: GradScale) -> Tensor:
        return self._finish(rows, None, args, scale)[0]

    def _finish(
        self, rows: NormalizedRows, pair: NormalizedRows | None, args: RowGradArgs, scale: GradScale
    ) -> tuple[Tensor, Tensor]:
        (n, D), dtype, sums = rows.x.shape, args.dtype or rows.x.dtype, self.precision.sums
        out = args.acc if args.disposable and args.acc.dtype == dtype else self.empty(n, D, dtype=dtype)
        dots, factors = self.empty(n, 1), rows.inv_norm * scale.value
        for i in row_slices(n, self.row_step(D)):
            dx, v = out[i], args.acc[i]
            work = dx if dx.dtype == sums else self.scratch("gradient", tuple(dx.shape))
            if args.alpha is not None:
                # α first, and not with 1/norm: the product of the two may leave fp32's range.
                v = torch.mul(v, args.alpha[i], out=work)
            elif v.dtype != sums or v.stride(1) != 1:
                v = work.copy_(v)
            if pair is not None and args.positive_coeff is not None:
                other = self._unit(pair.part(i), "pair")
                v = torch.addcmul(v, other, args.positive_coeff[i], value=-1, out=work)
            if args.center is not None and args.center_weight is not None:
                v = torch.addcmul(v, args.center_weight[i], args.center, out=work)
            unit = self._unit(rows.part(i))
            dot = torch.mul(unit, v, out=self.scratch("rows", tuple(unit.shape))).sum(1, keepdim=True)
            dots[i] = dot
            torch.addcmul(v, unit, dot, value=-1, out=work).mul_(factors[i])
            if work is not dx:
                dx.copy_(work)
        return out, dots
