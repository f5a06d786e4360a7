"""open_clip: ClipLoss, both directions of images and texts (Radford et al., "CLIP", 2021, figure 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..api import info_nce
from ..distributed import Group


class FusedClipLoss(nn.Module):
    """``open_clip.loss.ClipLoss``: ½ (cross entropy of images over texts + of texts over images), no N×N logits.

    Args:
        local_loss: accepted; with several ranks every rank returns the mean over all of them.
        gather_with_grad: must be True with several ranks: gradients are those of the global loss, which
            DistributedDataParallel's averaging turns into one process's on the whole batch.
        cache_labels: accepted; there are no labels to keep.
        rank, world_size: as in open_clip; with world_size > 1 the default process group is used.
        use_horovod: must be False.

    ``forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)``: features (N, D) of
    any length (open_clip gives unit rows; rows are normalised here), ``logit_scale`` 1/τ, a float or a tensor of
    one element, which gets its gradient. ``logit_bias`` is a constant of every logit, without effect on a softmax.
    0-dim, nats; with ``output_dict`` under the key ``"contrastive_loss"``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: several ranks meet through torch.distributed here")
        if world_size > 1 and not gather_with_grad:
            raise ValueError(
                f"gather_with_grad must be True with world_size={world_size}: without it the negatives of other "
                "ranks get no gradient, which this loss does not imitate"
            )
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        temperature = 1 / logit_scale
        if isinstance(temperature, Tensor) and temperature.dtype in (torch.float16, torch.bfloat16):
            temperature = 1 / logit_scale.float()  # type: ignore[union-attr]
        group: Group = "world" if self.world_size > 1 else "local"
        loss = info_nce(image_features, text_features, temperature=temperature, symmetric=True, group=group)
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum()  # a gradient of 0, for optimisers that expect one
        return {"contrastive_loss": loss} if output_dict else loss
