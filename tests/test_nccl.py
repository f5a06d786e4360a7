"""The loss over several GPUs. Needs two; what gloo shows of exactness is in test_distributed.py."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers import loss_and_grads, relative_error, rows
from ranks import Ranks

from fused_infonce import info_nce

D = 64
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that torch can use"),
]


@pytest.fixture(scope="module", params=["nccl", "cpu:gloo,cuda:nccl"])
def ranks(request):
    started = Ranks(2, request.param)
    yield started
    started.stop()


def batch(rank, dtype):
    return [rows(n, D, seed=10 * rank + s, dtype=dtype) for s, n in enumerate((40 + rank, 40 + rank))]


def on_gpu(group, dtype, options):
    inputs = [x.cuda() for x in batch(dist.get_rank(group), dtype)]
    return [x.float() for x in loss_and_grads(inputs, group=group, num_noise=0, **options)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_exact(ranks, dtype):
    limit = {torch.float64: 1e-6, torch.float32: 5e-6, torch.bfloat16: 2e-2}[dtype]
    for strategy, symmetric in itertools.product(("gather", "ring"), (False, True)):
        options = {"symmetric": symmetric, "temperature": 0.1}
        got = ranks.run(on_gpu, dtype, {"strategy": strategy, **options})
        whole = [torch.cat(side).double() for side in zip(batch(0, dtype), batch(1, dtype), strict=True)]
        want = loss_and_grads(whole, backend="reference", num_noise=0, **options)
        assert relative_error(torch.as_tensor(got[0][0]), want[0]) < limit
        for i in (1, 2):
            mean = torch.cat([torch.as_tensor(g[i]) for g in got]) / 2
            assert relative_error(mean, want[i]) < limit


def without_waiting(group, strategy):
    """A call that waits for the device raises."""
    q, k = (x.cuda().requires_grad_() for x in batch(dist.get_rank(group), torch.float32))
    info_nce(q, k, group=group, strategy=strategy).backward()  # compiles, connects
    torch.cuda.set_sync_debug_mode("error")
    try:
        info_nce(q, k, group=group, strategy=strategy).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_nothing_waits_for_the_device(ranks, strategy):
    ranks.run(without_waiting, strategy)
