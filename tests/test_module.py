"""GSInfoNCELoss: its temperature, its state and its parameter's shape."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import rows

from fused_infonce import GSInfoNCELoss, info_nce

D = 8


def batch(kind, dtype=torch.float32):
    """Pairs that have nothing in common, or are equal."""
    q = rows(16, D, seed=1, dtype=dtype)
    return q, rows(16, D, seed=2, dtype=dtype) if kind == "hard" else q


OPTIMISERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
}


def projected(make, steps, high=0.5, low=0.015):
    """What CLIP's training loop does: the parameter is clamped after each step."""
    log_tau = torch.nn.Parameter(torch.tensor([math.log(0.1)]))
    optimiser = make([log_tau])
    for kind in steps:
        optimiser.zero_grad()
        info_nce(*batch(kind), temperature=log_tau.exp()).backward()
        optimiser.step()
        with torch.no_grad():
            log_tau.clamp_(math.log(low), math.log(high))
    return log_tau.exp().item()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_temperature_that_leaves_its_range_comes_back(name):
    steps = ["hard"] * 60 + ["easy"] * 80
    loss = GSInfoNCELoss(0.1, learnable_temperature=True, temperature_range=(0.015, 0.5), num_noise=0)
    optimiser = OPTIMISERS[name](loss.parameters())
    for i, kind in enumerate(steps):
        optimiser.zero_grad()
        loss(*batch(kind)).backward()
        optimiser.step()
        assert 0.015 * 0.999 <= loss.temperature.item() <= 0.5 * 1.001
        if i == 59:
            assert loss.temperature.item() == pytest.approx(0.5)
    assert loss.temperature.item() == pytest.approx(projected(OPTIMISERS[name], steps), rel=1e-3)
    assert loss.temperature.item() < 0.3


def test_the_same_under_a_compiler():
    torch.compiler.reset()
    ends = []
    for compiled in (False, True):
        loss = GSInfoNCELoss(0.1, learnable_temperature=True, temperature_range=(0.05, 0.2), num_noise=0)
        step = torch.compile(loss, backend="aot_eager", fullgraph=True) if compiled else loss
        optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
        for kind in ["hard"] * 12 + ["easy"] * 50:
            optimiser.zero_grad()
            step(*batch(kind)).backward()
            optimiser.step()
        ends.append(loss.temperature.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)
    assert ends[0] < 0.15


def test_several_losses_before_one_backward():
    """The projection changes the parameter in place, which no earlier graph may have kept."""
    loss = GSInfoNCELoss(0.1, learnable_temperature=True, num_noise=0)
    with torch.no_grad():
        loss.log_temperature.fill_(3.0)  # outside
    (loss(*batch("hard")) + loss(*batch("easy"))).backward()
    assert loss.log_temperature.grad.abs() > 0
    assert loss.temperature.item() == pytest.approx(1.0)
    torch.compiler.reset()
    step, eager = torch.compile(loss, backend="aot_eager", fullgraph=True), loss.log_temperature.grad.clone()
    loss.log_temperature.grad = None
    (step(*batch("hard")) + step(*batch("easy"))).backward()
    assert torch.allclose(loss.log_temperature.grad, eager)


def test_the_parameter_has_one_dimension_and_old_states_load():
    loss = GSInfoNCELoss(0.1, learnable_temperature=True)
    assert loss.log_temperature.shape == (1,)  # a 0-dim parameter cannot be sharded
    assert loss.temperature.shape == ()
    model = torch.nn.ModuleDict({"loss": loss})
    state = {"loss.log_temperature": torch.tensor(math.log(0.3))}  # 0-dim, as it was
    model.load_state_dict(state)
    assert loss.temperature.item() == pytest.approx(0.3)
    assert state["loss.log_temperature"].shape == ()  # the caller's is as it was
    again = GSInfoNCELoss(0.1, learnable_temperature=True)
    again.load_state_dict(loss.state_dict())
    assert again.temperature == copy.deepcopy(loss).temperature == loss.temperature


def test_made_on_a_device_without_values_and_filled_later():
    with torch.device("meta"):
        loss = GSInfoNCELoss(0.1, learnable_temperature=True, num_noise=0)
    assert loss.log_temperature.device.type == "meta"
    loss = loss.to_empty(device="cpu")
    loss.reset_parameters()
    assert loss.temperature.item() == pytest.approx(0.1)
