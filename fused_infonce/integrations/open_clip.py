"""open_clip: ClipLoss, both directions of images and texts (Radford et al., "CLIP", 2021, figure 3).

Where open_clip is installed, ``FusedClipLoss`` inherits from its ``ClipLoss``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..functional import info_nce

if TYPE_CHECKING:
    _Base = nn.Module
else:
    try:
        from open_clip import ClipLoss as _Base
    except ImportError:
        _Base = nn.Module


class FusedClipLoss(_Base):
    """``open_clip.ClipLoss``: ½ (cross entropy of images over texts + of texts over images), no N×N logits.

    Args:
        local_loss: with several ranks: False returns the loss of all ranks' rows, the same on every rank; True
            returns that of this rank's rows against all ranks' columns.
        gather_with_grad: with several ranks: whether the other ranks' losses give this rank's rows a gradient.
            With False they do not, as in open_clip: after DistributedDataParallel's averaging, encoders then get
            a fraction of the whole batch's gradient (1/W of it, where ``local_loss`` is False).
        cache_labels: accepted, without effect: there are no labels to keep.
        rank: accepted, without effect on the loss: the process group knows it.
        world_size: above 1 the default process group is used, which must have this size.
        use_horovod: must be False.

    ``forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)``: features (N, D),
    ``logit_scale`` 1/τ, a float or a tensor of one element, which gets its gradient. Rows are normalised here, as
    open_clip's models normalise them before; open_clip's loss takes the dot product of whatever it is given, so
    features of another length than 1 give another loss there. ``logit_bias`` is added to every logit and has no
    effect on a softmax. 0-dim, nats; with ``output_dict`` under the key ``"contrastive_loss"``.

    Every attribute is read at the call. Losses and gradients on each rank are those of open_clip, for every
    combination of ``local_loss`` and ``gather_with_grad``; only the gradient of ``logit_scale`` with both of them
    is the mean over ranks already, which averaging turns open_clip's into. For CoCa write
    ``class FusedCoCaLoss(CoCaLoss, FusedClipLoss)``. ``get_logits`` materialises the logits, for losses that
    need them, such as open_clip's ``DistillClipLoss``.
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
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod
        self._check_horovod()

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        if type(self).get_logits is not FusedClipLoss.get_logits:
            raise TypeError(
                f"{type(self).__name__} overrides get_logits, which this forward does not call: no logits are "
                "formed; override forward too, or inherit from open_clip's ClipLoss"
            )
        if self._has_several_ranks():
            loss = self._loss_among_ranks(image_features, text_features, logit_scale)
        else:
            loss = info_nce(image_features, text_features, temperature=_temperature(logit_scale), symmetric=True)
        if isinstance(logit_bias, Tensor) and logit_bias.requires_grad:
            loss = loss + 0 * logit_bias.sum()  # a gradient of 0, for optimisers that expect one
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits per image and per text, as open_clip's: scaled dot products of the features as they are.

        They are held in full: (N, N) on one rank; with several (N, W·N) with ``local_loss``, else (W·N, W·N).
        """
        images, texts = image_features, text_features
        if self._has_several_ranks():
            all_images, all_texts = self._gathered(images), self._gathered(texts)
            if self.local_loss:
                per_image, per_text = logit_scale * images @ all_texts.T, logit_scale * texts @ all_images.T
            else:
                per_image = logit_scale * all_images @ all_texts.T
                per_text = per_image.T
        else:
            per_image, per_text = logit_scale * images @ texts.T, logit_scale * texts @ images.T
        if logit_bias is not None:
            per_image, per_text = per_image + logit_bias, per_text + logit_bias
        return per_image, per_text

    def _has_several_ranks(self) -> bool:
        self._check_horovod()
        if self.world_size == 1:
            return False
        size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
        if self.world_size != size:
            found = f"has {size} ranks" if size else "is not initialised (torch.distributed.init_process_group)"
            raise ValueError(f"world_size is {self.world_size}, but the default process group {found}")
        return True

    def _check_horovod(self) -> None:
        if self.use_horovod:
            raise ValueError("use_horovod must be False: several ranks meet through torch.distributed here")

    def _loss_among_ranks(self, images: Tensor, texts: Tensor, logit_scale: float | Tensor) -> Tensor:
        W, group = self.world_size, dist.group.WORLD
        if self.local_loss and not self.gather_with_grad:
            # open_clip's columns are then constants, the positives too.
            tau = _temperature(logit_scale)
            per_image = info_nce(images, texts.detach(), temperature=tau, group=group, reduction="none")
            per_text = info_nce(texts, images.detach(), temperature=tau, group=group, reduction="none")
            return _scale_gradient((per_image + per_text).mean() / 2, 1 / W)
        if isinstance(logit_scale, Tensor) and logit_scale.requires_grad:
            logit_scale = _MeanGradient.apply(logit_scale)  # type: ignore[no-untyped-call]
        tau = _temperature(logit_scale)
        if self.local_loss:
            losses = info_nce(images, texts, temperature=tau, symmetric=True, group=group, reduction="none")
            return _scale_gradient(losses.mean(), 1 / W)
        if not self.gather_with_grad:
            # The gradient of the global loss comes back times W, for averaging; open_clip's does not.
            images, texts = _scale_gradient(images, 1 / W), _scale_gradient(texts, 1 / W)
        return info_nce(images, texts, temperature=tau, symmetric=True, group=group)

    def _gathered(self, x: Tensor) -> Tensor:
        """All ranks' rows, with the gradients that the flags ask for."""
        if self.gather_with_grad:
            from torch.distributed.nn.functional import all_gather

            return torch.cat(list(all_gather(x)))  # type: ignore[no-untyped-call]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(parts, x.detach().contiguous())
        if not self.local_loss:
            parts[dist.get_rank()] = x
        return torch.cat(parts)


def _temperature(logit_scale: float | Tensor) -> float | Tensor:
    if isinstance(logit_scale, Tensor) and logit_scale.dtype in (torch.float16, torch.bfloat16):
        logit_scale = logit_scale.float()
    return 1 / logit_scale


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    scaled: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _MeanGradient(torch.autograd.Function):
    """The mean over ranks of the gradient: each holds its rows' share of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad / dist.get_world_size()
