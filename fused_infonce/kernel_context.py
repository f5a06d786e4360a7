"""A context in which torch operations run as one kernel of torch's own would."""

from __future__ import annotations

from typing import Any

import torch


class as_a_kernel:  # noqa: N801 (a context manager; a class takes a third of a generator's time)
    """Runs operations as a kernel of torch's own: on the tensors' device, without a graph, and with the products'
    dtypes chosen here, not by autocast.
    """

    __slots__ = ("casts", "device", "no_grad", "there")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.casts = torch.is_autocast_enabled(device.type)
        here = device.type != "cuda" or device.index == torch.cuda.current_device()
        self.there: Any = None if here else torch.cuda.device(device)
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        if self.casts:  # torch.autocast(enabled=False) does the same in thirty times the time
            torch.set_autocast_enabled(self.device.type, False)
        if self.there is not None:
            self.there.__enter__()
        self.no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.no_grad.__exit__(*error)
        if self.there is not None:
            self.there.__exit__(*error)
        if self.casts:
            torch.set_autocast_enabled(self.device.type, True)
