"""SimCLR's NT-Xent, as in lightly and pytorch-metric-learning (Chen et al., 2020, equation 1)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..api import info_nce
from ..distributed import Group


class FusedNTXentLoss(nn.Module):
    """Each of the 2N rows of two views against all the others, rows of its own view as negatives too.

        loss = −1/2N Σ_i log( e^{s(z_i, z_p(i))/τ} / Σ_{k ≠ i} e^{s(z_i, z_k)/τ} ),  p(i) the other view's row

    Args:
        temperature: τ > 0; a tensor gets a gradient.
        gather_distributed: the rows of every rank of the default process group.

    ``forward(out0, out1)``: (N, D) each → 0-dim, nats. There is no memory bank: past rows go to ``queue`` of
    ``info_nce``.
    """

    def __init__(self, temperature: float | Tensor = 0.5, gather_distributed: bool = False) -> None:
        super().__init__()
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed must be False: this torch has no torch.distributed")
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if out0.shape != out1.shape:
            raise ValueError(f"out1 must have the shape of out0, {tuple(out0.shape)}, not {tuple(out1.shape)}")
        ids = torch.arange(len(out0), device=out0.device)
        group: Group = "local"
        if self.gather_distributed and dist.is_initialized() and dist.get_world_size() > 1:
            group = "world"
            ids = ids + (dist.get_rank() << 40)  # ids that differ from rank to rank
        # Column i is row i's other view, and column i ± N row i itself: of the same id, it is masked.
        anchors, positives = torch.cat([out0, out1]), torch.cat([out1, out0])
        return info_nce(anchors, positives, temperature=self.temperature, ids=ids.repeat(2), group=group)
