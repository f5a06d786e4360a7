"""SimCLR's loss on two noisy views of points on rings: the encoder learns the ring, which no label tells it.

    python examples/simclr.py

A few seconds on a CPU.
"""

import torch
from torch import nn

from fused_infonce import alignment, uniformity
from fused_infonce.integrations.ntxent import FusedNTXentLoss

torch.manual_seed(0)


def views(n: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """The same points, each turned by two random angles: what stays is the radius."""
    radius = torch.rand(n, 1) * 3

    def one() -> torch.Tensor:
        angle = torch.rand(n, 1) * 6.2832
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)

    return one(), one()


encoder = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
loss = FusedNTXentLoss(temperature=0.2)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)

for step in range(201):
    out0, out1 = (encoder(x) for x in views())
    value = loss(out0, out1)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    if step % 50 == 0:
        with torch.no_grad():
            print(
                f"step {step:3}   loss {value.item():.3f}   alignment {alignment(out0, out1):.3f}   "
                f"uniformity {uniformity(out0):.3f}"
            )
