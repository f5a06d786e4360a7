"""CLIP's loss on two towers: pictures of a digit's strokes and their descriptions, both made up here.

    python examples/clip.py

A few seconds on a CPU. The temperature is learned as in open_clip: a logarithm, clamped at 100.
"""

import math

import torch
from torch import nn

from fused_infonce.integrations.open_clip import FusedClipLoss

torch.manual_seed(0)
N, CONCEPTS = 256, 32
pictures, texts = torch.randn(CONCEPTS, 64), torch.randn(CONCEPTS, 48)  # what a concept looks and reads like


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    mixture = (3 * torch.randn(N, CONCEPTS)).softmax(1)
    return mixture @ pictures, mixture @ texts


image_tower = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
text_tower = nn.Sequential(nn.Linear(48, 128), nn.GELU(), nn.Linear(128, 32))
log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
loss = FusedClipLoss()
optimizer = torch.optim.AdamW([*image_tower.parameters(), *text_tower.parameters(), log_scale], lr=2e-3)

for step in range(101):
    images, words = batch()
    value = loss(image_tower(images), text_tower(words), log_scale.exp().clamp(max=100))
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    if step % 25 == 0:
        print(f"step {step:3}   loss {value.item():.3f}   logit scale {log_scale.exp().item():.1f}")
