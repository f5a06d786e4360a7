"""SimCLR's NT-Xent with lightly's constructor (Chen et al., 2020, equation 1), and its memory bank (MoCo)."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import Group
from ..functional import info_nce


class FusedNTXentLoss(nn.Module):
    """``lightly.loss.NTXentLoss``: each of the 2N rows of two views against all the others.

        loss = −1/2N Σ_i log( e^{s(z_i, z_p(i))/τ} / Σ_{k ≠ i} e^{s(z_i, z_k)/τ} ),  p(i) the other view's row

    With a memory bank it is, as in lightly, MoCo's loss instead (He et al., 2020): ``out0`` against ``out1`` and
    the bank's rows, without negatives from the batch:

        loss = −1/N Σ_i log( e^{s(x_i, y_i)/τ} / ( e^{s(x_i, y_i)/τ} + Σ_b e^{s(x_i, b)/τ} ) )

    Args:
        temperature: τ > 0; a tensor gets a gradient.
        memory_bank_size: 0, or (rows, features) of the bank. It starts with random unit rows; each call whose
            ``out0`` requires a gradient puts the unit rows of ``out1`` in the place of the oldest. A number of
            rows alone is accepted, as by lightly before 1.6: the bank is then made at the first call.
        gather_distributed: without a bank, the rows of every rank of the default process group are compared; with
            a bank, every rank's rows of ``out1`` are put into it.

    ``forward(out0, out1)``: (N, D) each → 0-dim, nats. Attributes are read at the call. With
    ``gather_distributed`` and no bank every rank returns the mean over all ranks, where lightly returns its own
    rows'; the gradients are the same. ``cross_entropy``, lightly's last step, must stay as it is.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed must be False: this torch has no torch.distributed")
        if not isinstance(temperature, Tensor) and not temperature > 0:
            raise ValueError(f"temperature must be > 0, not {temperature}")
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss()

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        self._check_cross_entropy()
        if out0.shape != out1.shape:
            raise ValueError(f"out1 must have the shape of out0, {tuple(out0.shape)}, not {tuple(out1.shape)}")
        if self.memory_bank.rows:
            bank = self.memory_bank(out1, update=out0.requires_grad)
            # Rows of one id are no negatives of each other: the bank's are all that is left.
            ids = torch.zeros(len(out0), dtype=torch.long, device=out0.device)
            return info_nce(out0, out1, queue=bank, temperature=self.temperature, ids=ids)
        ids = torch.arange(len(out0), device=out0.device)
        group: Group = "local"
        if self.gather_distributed and _several_ranks():
            group = "world"
            ids = ids + (dist.get_rank() << 40)  # ids that differ from rank to rank
        # Column i is row i's other view, and column i ± N row i itself: of the same id, it is masked.
        anchors, positives = torch.cat([out0, out1]), torch.cat([out1, out0])
        return info_nce(anchors, positives, temperature=self.temperature, ids=ids.repeat(2), group=group)

    def _check_cross_entropy(self) -> None:
        last = self.cross_entropy
        plain = type(last) is nn.CrossEntropyLoss and last.weight is None and last.ignore_index < 0
        if not plain or last.reduction != "mean" or last.label_smoothing != 0:
            raise ValueError(
                f"cross_entropy must be CrossEntropyLoss() without options, not {last}: no logits are formed for "
                "it; for another reduction call info_nce"
            )


class MemoryBank(nn.Module):
    """Unit rows of past calls, the oldest replaced first; like lightly's, it is not part of the state dict.

    Attributes:
        bank: (rows, features), float32; empty until the first call where ``size`` does not name the features.
        bank_ptr: where the next rows go. Rows that do not fit at the end are dropped, and it starts again at 0.
    """

    bank: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False) -> None:
        super().__init__()
        given = tuple(size) if isinstance(size, Sequence) else (size,)
        numbers_only = all(isinstance(x, Integral) and not isinstance(x, bool) and x >= 0 for x in given)
        if not numbers_only or not (len(given) == 2 or given == (0,) or given == (size,)):
            raise ValueError(
                f"memory_bank_size must be 0 or (rows, features), not {size!r}; gather_distributed is the third "
                "argument"
            )
        shape = tuple(int(x) for x in given)
        self.size = shape
        self.gather_distributed = gather_distributed
        self.bank_ptr = 0
        self.register_buffer("bank", _unit_rows(shape) if len(shape) == 2 else torch.empty(0), persistent=False)

    @property
    def rows(self) -> int:
        return self.size[0]

    def forward(self, output: Tensor, update: bool = False) -> Tensor:
        """The bank as it was before ``output``, in its dtype; with ``update``, ``output`` is put into it."""
        if len(self.size) == 1:
            self.size = (self.rows, output.shape[1])
            self.bank = _unit_rows(self.size).to(output.device)
        if output.shape[1] != self.size[1]:
            raise ValueError(f"memory_bank_size is {self.size}, but the rows have {output.shape[1]} features")
        bank = self.bank
        if update:
            self._enqueue(F.normalize(output.detach(), dim=1).contiguous())
        return bank.to(output)

    def _enqueue(self, batch: Tensor) -> None:
        if self.gather_distributed and _several_ranks():
            parts = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, batch)
            batch = torch.cat(parts)
        end = self.bank_ptr + len(batch)
        self.bank = self.bank.clone()  # the call's loss still needs the rows of before
        self.bank[self.bank_ptr : end] = batch[: self.rows - self.bank_ptr].to(self.bank)
        self.bank_ptr = end if end < self.rows else 0


def _unit_rows(shape: tuple[int, ...]) -> Tensor:
    return F.normalize(torch.randn(shape, dtype=torch.float32), dim=1)


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
