"""The loss over the rows of several processes: exactly that of one process on the concatenated batch."""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import CASES, VARIANTS, uneven_owners
from helpers import loss_and_grads, relative_error, rows
from ranks import Ranks
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from experiments import scaling
from fused_infonce import GSInfoNCELoss, autograd, backends, gs_infonce, info_nce
from fused_infonce.distributed import GATHER_BYTES, choose_strategy

D, M = 12, 9
UNEVEN = {1: [5], 2: [7, 4], 4: [5, 2, 1, 6]}
SMALL_PRODUCT = autograd.SMALL_PRODUCT  # as this process and every rank import it
MULTIPLIES_FASTER = backends.multiplies_faster
LIMIT = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.fixture(scope="module")
def ranks():
    started = Ranks(4)
    yield started
    started.stop()


def batch(counts, views, queue, dtype):
    """Rows of every rank: anchors, positives, ``views`` hard negatives an anchor, a queue of uneven length."""
    made = []
    for rank, n in enumerate(counts):
        sizes = [n, n, views * n, queue and queue + rank]
        parts = [rows(size, D, seed=10 * rank + i, dtype=dtype) if size else None for i, size in enumerate(sizes)]
        made.append(parts)
    return made


def in_views(parts, counts, views):
    """Hard negatives of all ranks in the order of one process: view after view."""
    pairs = list(zip(parts, counts, strict=True))
    return torch.cat([part[v * n : (v + 1) * n] for v in range(views) for part, n in pairs])


def one_rank(group, case, counts, views, queue, dtype, upstream):
    """The loss and its gradients on this rank."""
    rank = dist.get_rank(group)
    parts = batch(counts, views, queue, dtype)[rank]
    options = dict(case)
    for name in ("ids", "negative_ids", "negative_owners"):
        if name in options:
            options[name] = options[name][rank]
    if queue:
        options["queue"] = parts[3]
    options["temperature"] = torch.tensor(options.get("temperature", 0.05), dtype=torch.float64)
    torch.manual_seed(rank)  # noise has to be rank 0's all the same
    upstream = upstream[rank] if case.get("reduction") == "none" else None
    inputs = [x for x in parts[:3] if x is not None]
    if options.pop("own", False) == "equal":
        inputs[2] = inputs[2].view(counts[rank], views, -1)
    return loss_and_grads(inputs, upstream, group=group, backend="torch", workspace_bytes=20_000, **options)


def one_process(case, counts, views, queue, dtype, upstream):
    parts = batch(counts, views, queue, torch.float64)
    options = dict(case)
    options.pop("strategy", None)
    if "ids" in options:
        options["ids"] = torch.cat(options["ids"])
    own = options.pop("own", False)
    together = torch.cat if own else functools.partial(in_views, counts=counts, views=views)
    if "negative_ids" in options:
        options["negative_ids"] = together(options["negative_ids"])
    if "negative_owners" in options:
        first = itertools.accumulate(counts, initial=0)
        options["negative_owners"] = torch.cat([i + x for i, x in zip(first, options["negative_owners"], strict=False)])
    anchors, positives = (torch.cat([p[i] for p in parts]).to(dtype) for i in (0, 1))
    inputs = [anchors, positives] + ([together([p[2] for p in parts]).to(dtype)] if views else [])
    if own == "equal":
        inputs[2] = inputs[2].view(sum(counts), views, -1)
    if queue:
        options["queue"] = torch.cat([p[3] for p in parts]).to(dtype)
    options["temperature"] = torch.tensor(options.get("temperature", 0.05), dtype=torch.float64)
    torch.manual_seed(0)
    upstream = torch.cat(upstream) if case.get("reduction") == "none" else None
    sampled = case.get("num_noise", 0) and "noise" not in case  # the reference draws other bits
    return loss_and_grads(inputs, upstream, backend="torch" if sampled else "reference", **options)


def assert_same(ranks, case, counts, views=0, queue=0, dtype=torch.float64, temperature=True):
    """Every rank's loss, its gradients over W, and the mean of the temperature's, against one process."""
    W = len(counts)
    upstream = [rows(n, seed=50 + r, dtype=dtype) for r, n in enumerate(counts)]
    got = ranks.run(one_rank, case, counts, views, queue, dtype, upstream, size=W)
    got = [[torch.as_tensor(x) for x in answer] for answer in got]
    loss, *grads = one_process(case, counts, views, queue, dtype, upstream)
    limit = LIMIT[dtype] * max(1, 0.05 / case.get("temperature", 0.05))
    if case.get("reduction") == "none":
        assert relative_error(torch.cat([g[0] for g in got]), loss) < limit
    else:
        for g in got:
            assert relative_error(g[0], loss) < limit
            assert g[0] == got[0][0]  # to the bit
    names = ["anchors", "positives"] + ["negatives"] * bool(views) + ["queue"] * bool(queue)
    for i, name in enumerate(names):
        parts = [g[1 + i] for g in got]
        shared = name == "negatives" and not case.get("own")
        whole = in_views(parts, counts, views) if shared else torch.cat(parts)
        assert relative_error(whole / W, grads[i]) < limit, name
    if temperature:
        mean = sum(g[-1] for g in got) / W
        assert relative_error(mean, grads[-1]) < limit, "temperature"


ONE_PROCESS_ONLY = [name for name, case in CASES.items() if case.guide]  # a guide's rows do not travel


@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ONE_PROCESS_ONLY])
def test_every_case(ranks, name, strategy):
    case, counts = CASES[name], UNEVEN[2]
    options = {"num_noise": 0, **case.options, "strategy": strategy}
    if options.get("noise") == "given":
        options["noise"] = rows(M, D, seed=5)
    if case.ids:
        options["ids"] = [torch.arange(n) % 4 for n in counts]
        if case.negatives:
            options["negative_ids"] = [torch.arange(case.negatives * n) % 5 for n in counts]
            if case.own == "equal":
                options["negative_ids"] = [x.view(-1, case.negatives) for x in options["negative_ids"]]
        if case.ids == "pair":
            options["ids"] = [
                torch.stack([torch.arange(n) // 2, x], 1) for n, x in zip(counts, options["ids"], strict=True)
            ]
    if case.own:
        options["own"] = case.own
    if case.own == "uneven":
        options["negative_owners"] = [uneven_owners(case.negatives * n, n) for n in counts]
    assert_same(ranks, options, counts, views=case.negatives, queue=3 * case.queue)


@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ONE_PROCESS_ONLY])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_neighbours(ranks, name, strategy, symmetric, reduction):
    """With hard negatives and a queue."""
    options = {"num_noise": 0, "strategy": strategy, "symmetric": symmetric, "reduction": reduction}
    assert_same(ranks, {**VARIANTS[name].options, **options}, UNEVEN[2], views=2, queue=3)


NOISE = {
    "none": {"num_noise": 0},
    "sampled": {"num_noise": M, "noise_weight": 0.7},
    "given": {"noise": rows(M, D, seed=5)},
    "expected": {"noise": "expected", "num_noise": 50},
}


@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
def test_every_option_is_that_of_one_process(ranks, W, strategy, symmetric):
    counts = UNEVEN[W]
    for noise, reduction, more in itertools.product(NOISE, ("mean", "sum", "none"), (False, True)):
        case = {"strategy": strategy, "symmetric": symmetric, "reduction": reduction, **NOISE[noise]}
        if more:
            case |= {"hard_negative_weight": 1.3, "ids": [torch.arange(n) % 4 for n in counts]}
        assert_same(ranks, case, counts, views=2 * more, queue=3 * more)


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_masks_and_temperatures(ranks, strategy):
    counts = UNEVEN[4]
    ids = {
        "ids": [torch.arange(n) % 4 for n in counts],
        "negative_ids": [torch.arange(2 * n) % 5 for n in counts],
    }
    for temperature, symmetric in itertools.product((1e-3, 0.02, 10.0), (False, True)):
        case = {"strategy": strategy, "num_noise": 0, "temperature": temperature, "symmetric": symmetric, **ids}
        assert_same(ranks, case, counts, views=2, temperature=temperature > 1e-3)


@pytest.mark.parametrize("W", [2, 4])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_fp32(ranks, W, strategy):
    for options in ({}, {"symmetric": True}, {"reduction": "none"}):
        case = {"strategy": strategy, "noise": rows(M, D, seed=5, dtype=torch.float32), **options}
        assert_same(ranks, case, UNEVEN[W], views=1, queue=2, dtype=torch.float32, temperature=False)


def half_on_rank(group, dtype, strategy, symmetric):
    q, k = (rows(40, 24, seed=10 * dist.get_rank(group) + s, dtype=dtype) for s in (1, 2))
    options = {"num_noise": 0, "temperature": 0.1, "symmetric": symmetric}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        return [x.float() for x in loss_and_grads([q, k], group=group, strategy=strategy, **options)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "autocast"])
def test_half_precision_rows_travel_and_stay_as_exact(ranks, dtype, monkeypatch):
    q, k = (torch.cat([rows(40, 24, seed=10 * r + s, dtype=dtype) for r in range(4)]) for s in (1, 2))
    for strategy, symmetric in itertools.product(("gather", "ring"), (False, True)):
        ranks.run(without_small_products)
        got = ranks.run(half_on_rank, dtype, strategy, symmetric)
        options = {"num_noise": 0, "temperature": 0.1, "symmetric": symmetric, "backend": "reference"}
        want = loss_and_grads([q.double(), k.double()], **options)
        for i in (1, 2):
            whole = torch.cat([torch.as_tensor(g[i]) for g in got]) / 4
            assert 1e-6 < relative_error(whole, want[i]) < 1e-2  # rounded, and no more than that
    ranks.run(with_small_products)


def without_small_products(group):
    """Few multiply-adds run in fp32, and all on CPUs without units for less; here they are not to."""
    autograd.SMALL_PRODUCT = 0
    backends.multiplies_faster = lambda dtype, device_type: True


def with_small_products(group):
    autograd.SMALL_PRODUCT = SMALL_PRODUCT
    backends.multiplies_faster = MULTIPLIES_FASTER


@functools.cache
def patched_interpreter():
    import interpreter

    interpreter.patch()


def by_kernels(group, dtype, options):
    patched_interpreter()
    rank = dist.get_rank(group)
    q, k, h = (rows(n, 16, seed=10 * rank + s, dtype=dtype) for s, n in enumerate((9, 9, 18)))
    return [x.float() for x in loss_and_grads([q, k, h], group=group, backend="triton", **options)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo's tensors are on the CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernels_behind_both_strategies(ranks, dtype):
    pytest.importorskip("triton")
    ranks.run(without_small_products)
    for strategy, symmetric in (("gather", False), ("gather", True), ("ring", False)):
        options = {"noise": "expected", "num_noise": 9, "symmetric": symmetric, "temperature": torch.tensor(0.1)}
        two = ranks.run(by_kernels, dtype, {**options, "strategy": strategy, "hard_negative_weight": 1.0}, size=2)
        q, k, h = (
            [rows(n, 16, seed=10 * r + s, dtype=dtype).double() for r in (0, 1)] for s, n in enumerate((9, 9, 18))
        )
        inputs = [torch.cat(q), torch.cat(k), in_views(h, [9, 9], 2)]
        want = loss_and_grads(inputs, backend="reference", hard_negative_weight=1.0, **options)
        limit = 5e-6 if dtype == torch.float32 else 2e-2
        for i in (1, 2):
            assert relative_error(torch.cat([torch.as_tensor(g[i]) for g in two]) / 2, want[i]) < limit
        assert relative_error(in_views([torch.as_tensor(g[3]) for g in two], [9, 9], 2) / 2, want[3]) < limit
        assert relative_error(sum(torch.as_tensor(g[4]) for g in two) / 2, want[4]) < 4 * limit
    ranks.run(with_small_products)


# ---------------------------------------------------------------------- averaging


def trained_by_ddp(group, strategy):
    """Gradients of an encoder and a learned temperature as DDP averages them."""
    rank = dist.get_rank(group)
    model = encoder()
    wrapped = torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    loss = wrapped(*views()[rank], group=group, strategy=strategy)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


class Encoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(D, D).double()
        self.loss = GSInfoNCELoss(0.1, learnable_temperature=True, num_noise=M).double()

    def forward(self, x, y, **where):
        self.loss.group, self.loss.strategy = where.get("group", "local"), where.get("strategy", "auto")
        return self.loss(self.linear(x), self.linear(y))


def encoder():
    torch.manual_seed(3)
    model = Encoder()
    torch.manual_seed(7)
    return model


def views():
    return [[rows(n, D, seed=20 * r + s) for s in (1, 2)] for r, n in enumerate(UNEVEN[4])]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_ddp_gives_the_gradient_of_one_process_and_not_one_w_th_of_it(ranks, strategy):
    """Through a model of all ranks' rows: a gather that forgets W is off by W, or loses other ranks' anchors."""
    got = ranks.run(trained_by_ddp, strategy)
    model = encoder()
    model(*(torch.cat(side) for side in zip(*views(), strict=True))).backward()
    want = [p.grad for p in model.parameters()]
    for answer in got:
        for name, a, b in zip(dict(model.named_parameters()), answer[1:], want, strict=True):
            assert relative_error(torch.as_tensor(a), b) < 1e-12, name


# ---------------------------------------------------------------------- who asks for what


def some_gradients(group, strategy, wanted, symmetric):
    rank = dist.get_rank(group)
    q, k, h = rows(3, D, seed=rank), rows(3, D, seed=rank + 10), rows(2, D, seed=rank + 20)
    tau = torch.tensor(0.1, dtype=torch.float64)
    leaves = [q, k, h if rank else None, tau]  # rank 0 has no hard negatives
    for x, need in zip(leaves, wanted, strict=True):
        if x is not None:
            x.requires_grad_(need)
    loss = info_nce(*leaves[:3], temperature=tau, group=group, strategy=strategy, symmetric=symmetric)
    if any(wanted):
        loss.backward()
    return [loss, [None if x is None else x.grad for x in leaves]]


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_only_the_gradients_that_are_wanted(ranks, strategy):
    for symmetric in (False, True):
        every = ranks.run(some_gradients, strategy, (True,) * 4, symmetric)
        for wanted in itertools.product((False, True), repeat=4):
            if wanted == (False, False, True, False):
                continue  # rank 0 would ask for nothing
            for (loss, some), (all_loss, full) in zip(
                ranks.run(some_gradients, strategy, wanted, symmetric), every, strict=True
            ):
                assert loss == pytest.approx(float(all_loss), rel=1e-12)
                for a, b, want in zip(some, full, wanted, strict=True):
                    assert (a is not None) == (want and b is not None)
                    if a is not None:
                        assert relative_error(torch.as_tensor(a), torch.as_tensor(b)) < 1e-12


ASKED = {  # of rank 0 and rank 1: which inputs exist, and which of them need a gradient
    "negatives on one rank, frozen positives": (({"a", "n"}, {"a", "p", "n"}), ({"a"}, {"a", "p"})),
    "a queue on one rank": (({"a"}, {"a", "p", "q"}), ({"a"}, {"a", "p"})),
    "a queue that learns on one rank": (({"a", "p", "q"}, {"a", "p", "q"}), ({"a", "p"}, {"a", "p"})),
    "different extras": (({"a", "p", "n"}, {"a", "p", "n"}), ({"a", "p", "q"}, {"a", "p", "q"})),
    "only temperature and negatives": (({"n", "t"}, {"a", "p", "n"}), ({"t"}, {"a", "p"})),
    "only negatives": (({"n"}, {"a", "p", "n"}), (set(), {"a", "p"})),
    "anchors on one rank": (({"a", "p"}, {"a", "p"}), ({"p"}, {"a", "p"})),
    "positives on one rank": (({"a", "p"}, {"a", "p"}), ({"a"}, {"a", "p"})),
    "negatives frozen on one rank": (({"a", "n"}, {"a", "p", "n"}), ({"a"}, {"a", "p", "n"})),
    "temperature on one rank": (({"a", "t"}, {"a", "p"}), ({"a"}, {"a", "p"})),
    "no_grad on one rank": (({"a", "p"}, {"a", "p"}), ({"off", "a", "p"}, {"a", "p"})),
    "nothing on one rank": (({"a", "p"}, {"a", "p"}), (set(), {"a", "p"})),
}


def asked_of(group, per_rank, strategy, options, by_grad):
    """This rank's part of one call and its backward; the gradients that came, by name."""
    rank = dist.get_rank(group)
    needs, given = per_rank[rank]
    inputs = {name: rows(3, D, seed=10 * rank + i) for i, name in enumerate("apnq") if name in given}
    tau = torch.tensor(0.1, dtype=torch.float64)
    for name, x in {**inputs, "t": tau}.items():
        x.requires_grad_(name in needs)
    with torch.set_grad_enabled("off" not in needs):
        loss = info_nce(
            inputs["a"], inputs["p"], inputs.get("n"), queue=inputs.get("q"), temperature=tau, group=group,
            strategy=strategy, **options,
        )  # fmt: skip
    leaves = {name: x for name, x in {**inputs, "t": tau}.items() if x.requires_grad}
    total = loss.sum()
    if by_grad:  # a single one: the engine prunes what leads to the others
        name = next(iter(leaves))
        return [total, {name: torch.autograd.grad(total, leaves[name])[0]}]
    total.backward()
    return [total, {name: x.grad for name, x in leaves.items()}]


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_exchanges_follow_from_what_all_ranks_know(ranks, strategy, name):
    """Whatever a rank happens to need: the gradients of one process, or an error on every rank; nobody waits."""
    smoothing = {"label_smoothing": 0.1}
    variants = [({}, False), (smoothing, True), ({**smoothing, "symmetric": True}, False)]
    variants.append(({**smoothing, "reduction": "none"}, True))
    for options, by_grad in variants:
        start = time.monotonic()
        answers = ranks.tried(asked_of, ASKED[name], strategy, options, by_grad, size=2)
        assert time.monotonic() - start < 20
        errors = [error for _, error in answers]
        if any(errors):
            assert all("must agree on whether" in error for error in errors), errors
            continue
        whole = dict.fromkeys("apnq")
        for key in whole:
            parts = [rows(3, D, seed=10 * r + "apnq".index(key)) for r in (0, 1) if key in ASKED[name][r][1]]
            whole[key] = torch.cat(parts).requires_grad_() if parts else None
        tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        everything = (whole["a"], whole["p"], whole["n"])
        loss = info_nce(*everything, queue=whole["q"], temperature=tau, backend="reference", **options).sum()
        loss.backward()
        for rank, ((_, got), _) in enumerate(answers):
            for key, grad in got.items():
                if key == "t":
                    continue
                first = sum(3 for r in range(rank) if key in ASKED[name][r][1])
                want = whole[key].grad[first : first + 3]
                assert relative_error(torch.as_tensor(grad) / 2, want) < 1e-12, (key, options)
        if all("t" in got for (_, got), _ in answers):
            mean = sum(torch.as_tensor(got["t"]) for (_, got), _ in answers) / 2
            assert relative_error(mean, tau.grad) < 1e-12


def fails_in_its_own_way(group, kind):
    """Errors of a kind that the arguments' checks do not know, on rank 1 alone."""
    q = rows(3, D)
    if dist.get_rank(group) == 1:
        if kind == "forward mode":
            with forward_ad.dual_level():
                return info_nce(forward_ad.make_dual(q, q), q, group=group)
        if kind == "torch.func":
            return torch.func.grad(lambda x: info_nce(x, q, group=group))(q)
        if kind == "sparse":
            return info_nce(q.to_sparse(), q, group=group)
        return info_nce(q, q, temperature=object(), group=group)
    return info_nce(q, q, group=group)


@pytest.mark.parametrize("kind", ["forward mode", "torch.func", "sparse", "an object"])
def test_an_error_on_one_rank_is_an_error_on_all(ranks, kind):
    start = time.monotonic()
    errors = [error for _, error in ranks.tried(fails_in_its_own_way, kind, size=2)]
    assert time.monotonic() - start < 20
    assert "rank 1" in errors[0]
    assert errors[1]


def by_name(group):
    q = rows(3, D, seed=dist.get_rank(group))
    loss = GSInfoNCELoss(num_noise=0, group="world")
    want = info_nce(q, q, group=dist.group.WORLD)
    return [bool(loss(q, q) == want), bool(info_nce(q, q, group="world") == want != info_nce(q, q, group=None))]


def test_the_world_by_name(ranks):
    assert ranks.run(by_name) == [[True, True]] * 4


def with_temperature_that_learns(group):
    tau = torch.tensor(0.1, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info_nce(rows(3, D), rows(3, D, seed=1), temperature=tau, group=group).backward()
    return tau.grad


def test_no_warning_for_reading_a_temperature(ranks):
    assert all(x is not None for x in ranks.run(with_temperature_that_learns, size=2))


def learned_in_parallel(group, wrapper):
    """A temperature pushed out of its range and pulled back, on ranks that DDP keeps equal, or FSDP shards."""
    loss = GSInfoNCELoss(0.1, learnable_temperature=True, temperature_range=(0.05, 0.2), num_noise=0, group=group)
    if wrapper == "FSDP2":
        wrapped = fully_shard(loss, mesh=DeviceMesh.from_group(group, "cpu"))
    else:
        wrapped = torch.nn.parallel.DistributedDataParallel(loss, process_group=group)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    rank, seen = dist.get_rank(group), []
    for step in range(100):
        q = rows(8, D, seed=rank, dtype=torch.float32)
        k = rows(8, D, seed=50 + rank, dtype=torch.float32) if step < 20 else q
        optimiser.zero_grad()
        wrapped(q, k).backward()
        optimiser.step()
        held = loss.log_temperature.detach()
        seen.append(float(held.full_tensor() if wrapper == "FSDP2" else held))
    return seen


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_a_learned_temperature_comes_back_on_every_rank(ranks, wrapper):
    one, two = ranks.run(learned_in_parallel, wrapper, size=2)
    assert one == two
    momentum = 0.1 / (1 - 0.9)  # which Adam still takes a parameter, without a gradient
    assert math.log(0.19) < one[19] < math.log(0.2) + 1.1 * momentum
    assert one[-1] < math.log(0.12)


def differing(group, change, rank_of_change):
    rank = dist.get_rank(group)
    options = {"temperature": 0.05, "num_noise": 3, "ids": torch.arange(4), "strategy": "auto"}
    shape, dtype, grad = (4, 6), torch.float32, True
    if rank == rank_of_change:
        options |= {name: value for name, value in change.items() if name not in ("shape", "dtype", "grad")}
        shape, dtype, grad = change.get("shape", shape), change.get("dtype", dtype), change.get("grad", True)
    q = rows(*shape, dtype=dtype).requires_grad_(grad)
    return gs_infonce(q, rows(*shape, seed=1, dtype=dtype), group=group, **options)


DISAGREEMENTS = [
    ({"shape": (4, 5)}, r"the number of features \(6 on ranks 0, 1, 3, 5 on rank 2\)"),
    ({"dtype": torch.float64}, r"the dtype \(torch.float32 on ranks 0, 1, 3, torch.float64 on rank 2\)"),
    ({"temperature": 0.1}, r"temperature \(0.05 on ranks 0, 1, 3, 0.1 on rank 2\)"),
    ({"symmetric": True}, r"symmetric \(False on ranks 0, 1, 3, True on rank 2\)"),
    ({"reduction": "none"}, "reduction"),
    ({"num_noise": 4}, "num_noise"),
    ({"noise": "expected"}, r"noise \(sampled .* expected on rank 2\)"),
    ({"noise_weight": 2.0}, "noise_weight"),
    ({"hardness": 2.0}, r"hardness \(0.0 on ranks 0, 1, 3, 2.0 on rank 2\)"),
    ({"filter_threshold": 0.9}, r"filter_threshold \(None on ranks 0, 1, 3, 0.9 on rank 2\)"),
    ({"min_temperature": 0.01}, r"min_temperature \(None .* 0.01 on rank 2\)"),
    ({"ids": None}, "the number of ids per row"),
    ({"strategy": "ring"}, r"strategy \(auto .* ring on rank 2\)"),
    ({"grad": False}, "whether anchors need a gradient"),
    ({"shape": (3, 6)}, "rank 2: ValueError: ids must have shape"),
    ({"strategy": "star"}, "rank 2: ValueError: strategy must be one of"),
    ({"backend": "reference"}, "rank 2: ValueError: backend='reference' supports a single process only"),
]


@pytest.mark.parametrize(("change", "message"), DISAGREEMENTS, ids=[m[:40] for _, m in DISAGREEMENTS])
def test_ranks_that_disagree_all_get_an_error_that_says_which(ranks, change, message):
    start = time.monotonic()
    answers = ranks.tried(differing, change, 2)
    assert time.monotonic() - start < 20
    errors = [error for _, error in answers]
    for rank, error in enumerate(errors):
        if rank == 2 and message.startswith("rank 2"):
            assert error == errors[0].split("rank 2: ")[1]  # its own
        else:
            assert error.startswith("ValueError: ")
            assert re.search(message, error), error
    ranks.run(one_rank, {"num_noise": 0}, UNEVEN[4], 0, 0, torch.float64, None)  # and they go on


def agreed_beside(group, wrong):
    """With a group that takes no CPU tensors, as an NCCL group does."""
    from fused_infonce.distributed import Counts, Facts, agree

    only_gpu = dist.new_group([0, 1], backend="cuda:gloo", use_local_synchronization=True)
    rank = dist.get_rank(group)
    return [agree(only_gpu, Facts({"D": 5 + rank * wrong}, Counts(rank, 0, 0)))[1].counts.positives for _ in "ab"]


def test_a_group_for_gpus_only_is_agreed_in_beside_it(ranks):
    assert ranks.run(agreed_beside, False, size=2) == [[1, 1], [1, 1]]
    for _, error in ranks.tried(agreed_beside, True, size=2):
        assert "D (5 on rank 0, 6 on rank 1)" in error


# ---------------------------------------------------------------------- the rest


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_a_group_of_one(ranks, strategy):
    """Nothing travels, least of all to oneself."""
    assert_same(ranks, {"num_noise": 20, "strategy": strategy}, UNEVEN[1], views=1, queue=2)


def test_auto_gathers_what_is_small():
    assert choose_strategy("auto", 1024, 768, 2) == "gather"
    assert choose_strategy("auto", 1 << 24, 768, 2) == "ring"
    assert choose_strategy("ring", 2, 2, 2) == "ring"
    edge = GATHER_BYTES // (768 * 12)
    assert choose_strategy("auto", edge, 768, 2) == "gather" != choose_strategy("auto", edge + 1, 768, 2)


def travels(group, strategy):
    """How many times the ring passes something on, how many bytes, and the most that is gathered whole."""
    from fused_infonce import distributed

    passed, largest = [], [0]

    def counted(self, x, tag):
        passed.append(x.numel() * x.element_size())
        return pass_on(self, x, tag)

    pass_on, gather = distributed.Exchange._pass_on, distributed.Exchange.gather
    distributed.Exchange._pass_on = counted
    distributed.Exchange.gather = lambda self, x, n: largest.append(x.numel() * self.size) or gather(self, x, n)
    try:
        rank = dist.get_rank(group)
        q, k = rows(64, D, seed=rank).requires_grad_(), rows(64, D, seed=rank + 9).requires_grad_()
        info_nce(q, k, symmetric=True, group=group, strategy=strategy).backward()
    finally:
        distributed.Exchange._pass_on, distributed.Exchange.gather = pass_on, gather
    return len(passed), sum(passed), max(largest)


def test_a_ring_holds_one_block_at_a_time(ranks):
    assert ranks.run(travels, "gather")[0] == [0, 0, 4 * 64 * D]
    # Keys in both sweeps and sums for them; nothing but one number a row is gathered.
    block = 64 * D * 8
    assert ranks.run(travels, "ring")[0] == [3 + 3 + 4, (3 + 3 + 4) * block, 4 * 64]
    model = scaling.Case(W=4, pairs=256, D=D, itemsize=4)  # of which the docs' table speaks; fp64 is twice fp32
    assert 2 * scaling.bytes_sent(model, "ring") == (3 + 3 + 4) * block


def compiled_step(group):
    rank = dist.get_rank(group)
    q, k = rows(5, D, seed=rank).requires_grad_(), rows(5, D, seed=rank + 9)
    step = torch.compile(lambda q, k: info_nce(2 * q, k, group=group), backend="eager")
    return torch.autograd.grad(step(q, k), q) + torch.autograd.grad(info_nce(2 * q, k, group=group), q)


def test_inside_a_compiled_step(ranks):
    for a, b in ranks.run(compiled_step, size=2):
        assert (a == b).all()


def one_loss_after(group, wait):
    rank = dist.get_rank(group)
    gs_infonce(rows(3, D, seed=rank), rows(3, D, seed=rank), group=group)
    if rank == 1 and wait == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        time.sleep(wait)
    return gs_infonce(rows(3, D, seed=rank), rows(3, D, seed=rank), group=group)


@pytest.mark.parametrize("wait", ["killed", 12])
def test_a_rank_that_dies_or_hangs_ends_the_others_within_the_timeout(wait):
    small = Ranks(2, timeout=4)
    try:
        for pipe in small.pipes:
            pipe.send((one_loss_after, (wait,), 2))
        assert small.pipes[0].poll(60)  # 4 seconds, and what it takes to start
        _, error, _ = small.pipes[0].recv()
        assert error
    finally:
        small.stop()
