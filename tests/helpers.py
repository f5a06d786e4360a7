"""What several test files compare with."""

from __future__ import annotations

import signal
from collections.abc import Callable

import torch
from torch import Tensor

from fused_infonce import gs_infonce
from fused_infonce.testing import Result


def interruptible() -> None:
    """For ``preexec_fn``: a background job of a shell ignores SIGINT, and so would every process it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def loss_and_grads(inputs: list[Tensor], upstream: Tensor | None = None, **options) -> list[Tensor]:
    """The loss and its gradients, those of a queue and a temperature tensor among the options last."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    for name in ("queue", "temperature"):
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].detach().clone().requires_grad_()
            leaves.append(options[name])
    loss = gs_infonce(*leaves[: len(inputs)], **options)
    grads = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
    return [loss.detach(), *[torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]]


def differentiated(
    loss: Callable[..., Tensor], anchors: Tensor, positives: Tensor, temperature: float, autocast: bool = False
) -> Result:
    """The loss and its gradients, that of the temperature too, as ``fused_infonce.testing.exact`` names them."""
    q, k = anchors.clone().requires_grad_(), positives.clone().requires_grad_()
    tau = torch.tensor(temperature, dtype=q.dtype if q.dtype == torch.float64 else torch.float32).requires_grad_()
    with torch.autocast(q.device.type, torch.bfloat16, enabled=autocast):
        value = loss(q, k, temperature=tau)
    dq, dk, dtau = torch.autograd.grad(value, (q, k, tau))
    return {"loss": value.detach(), "dq": dq, "dk": dk, "dtau": dtau}


def relative_error(got: Tensor, want: Tensor) -> float:
    want = want.double()
    scale = want.norm()
    return float((got.double() - want).norm() / (scale if scale > 1e-12 else 1))
