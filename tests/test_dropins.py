"""What a drop-in loss replaces, it replaces whole: every argument and attribute is honoured or refused by name."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import relative_error, rows
from ranks import Ranks
from test_integrations import applied, compare, mnrl, model  # noqa: F401 (a fixture)
from torch import Tensor, nn

from fused_infonce import info_nce
from fused_infonce.integrations.ntxent import FusedNTXentLoss
from fused_infonce.integrations.open_clip import FusedClipLoss

N, D, W = 6, 16, 2
FLAGS = list(itertools.product([False, True], [False, True]))


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(W)
    yield ranks
    ranks.stop()


# ---------------------------------------------------------------------- open_clip


def parts_of(x: Tensor) -> list[Tensor]:
    return [part.clone() for part in x.chunk(W)]


def clip_rank(group, options: dict, features: list[Tensor], scale: float, real: bool = False) -> list[Tensor]:
    """The loss on this rank and its gradients: image rows, text rows, scale."""
    rank = dist.get_rank(group)
    leaves = [parts_of(x)[rank].requires_grad_() for x in features]
    leaves.append(torch.tensor(scale, dtype=torch.float64, requires_grad=True))
    kind = pytest.importorskip("open_clip").ClipLoss if real else FusedClipLoss
    loss = kind(rank=rank, world_size=W, **options)(*leaves)
    loss.backward()
    return [loss.detach(), *[x.grad for x in leaves]]


def clip_formula(
    local_loss: bool, gather_with_grad: bool, features: list[Tensor], scale: float
) -> list[list[Tensor]]:
    """The same for each rank, in one process, from open_clip's published semantics.

    Rows of other ranks are constants unless ``gather_with_grad``; with ``local_loss`` a rank's loss is that of its
    own rows, whose columns are all constants without ``gather_with_grad``, its own too.
    """
    leaves = [[part.requires_grad_() for part in parts_of(x)] for x in features]
    scales = [torch.tensor(scale, dtype=torch.float64, requires_grad=True) for _ in range(W)]
    losses = []
    for rank in range(W):
        units = [[F.normalize(part, dim=1) for part in parts] for parts in leaves]
        keeps = [gather_with_grad or (k == rank and not local_loss) for k in range(W)]
        whole = [
            torch.cat([u if keep else u.detach() for u, keep in zip(parts, keeps, strict=True)]) for parts in units
        ]
        total = 0
        for a, b in ((0, 1), (1, 0)):
            anchors = units[a][rank] if local_loss else whole[a]
            labels = torch.arange(len(anchors)) + (rank * N if local_loss else 0)
            total = total + F.cross_entropy(scales[rank] * anchors @ whole[b].T, labels) / 2
        losses.append(total)
    answers = []
    for rank in range(W):
        source = sum(losses) if gather_with_grad else losses[rank]
        own = [parts[rank] for parts in leaves]
        grads = torch.autograd.grad(source, own, retain_graph=True)
        of_scale = torch.autograd.grad(losses[rank], scales[rank], retain_graph=True)
        answers.append([losses[rank].detach(), *grads, *of_scale])
    if local_loss and gather_with_grad:  # ours is what averaging over ranks makes of it
        mean = sum(answer[-1] for answer in answers) / W
        answers = [[*answer[:-1], mean] for answer in answers]
    return answers


BOTH_FLAGS = pytest.mark.parametrize(("local_loss", "gather_with_grad"), FLAGS)


@BOTH_FLAGS
def test_clip_on_two_ranks(local_loss, gather_with_grad, two_ranks):
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    features = [rows(W * N, D, seed=s) for s in (1, 2)]
    got = two_ranks.run(clip_rank, options, features, 14.3)
    want = clip_formula(local_loss, gather_with_grad, features, 14.3)
    for rank in range(W):
        for g, w in zip(got[rank], want[rank], strict=True):
            assert relative_error(torch.as_tensor(g), w) < 1e-11, (rank, g, w)


@BOTH_FLAGS
def test_clip_on_two_ranks_against_the_real_one(local_loss, gather_with_grad, two_ranks):
    pytest.importorskip("open_clip")
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    features = [F.normalize(rows(W * N, D, seed=s), dim=1) for s in (1, 2)]
    ours, theirs = (two_ranks.run(clip_rank, options, features, 14.3, real) for real in (False, True))
    for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a[0] == pytest.approx(b[0], rel=1e-12)
        for k, x in enumerate(features):
            assert relative_error(torch.as_tensor(a[1 + k]), across(parts_of(x)[rank], b[1 + k])) < 1e-11
        if not (local_loss and gather_with_grad):
            assert a[-1] == pytest.approx(b[-1], rel=1e-11)
    assert sum(a[-1] for a in ours) == pytest.approx(sum(b[-1] for b in theirs), rel=1e-11)


def across(units: Tensor, grad) -> Tensor:
    """A gradient with respect to unit rows without its part along them, which normalising takes away."""
    grad = torch.as_tensor(grad)
    return grad - units * (grad * units).sum(1, keepdim=True)


def clip_logits(group, options: dict, features: list[Tensor]) -> list[Tensor]:
    """The cross entropy of ``get_logits`` and its gradients, as losses that inherit form them."""
    rank = dist.get_rank(group)
    leaves = [F.normalize(parts_of(x)[rank], dim=1).requires_grad_() for x in features]
    loss = FusedClipLoss(rank=rank, world_size=W, **options)
    per_image, per_text = loss.get_logits(*leaves, 14.3, logit_bias=torch.tensor(-2.0))
    labels = torch.arange(len(per_image)) + (rank * N if options["local_loss"] else 0)
    value = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@BOTH_FLAGS
def test_logits_on_two_ranks_give_the_loss(local_loss, gather_with_grad, two_ranks):
    options = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    features = [F.normalize(rows(W * N, D, seed=s), dim=1) for s in (1, 2)]
    formed = two_ranks.run(clip_logits, options, features)
    fused = two_ranks.run(clip_rank, options, features, 14.3)
    for rank in range(W):
        assert formed[rank][0] == pytest.approx(fused[rank][0], rel=1e-12)
        for k in (0, 1):
            want = across(parts_of(features[k])[rank], formed[rank][1 + k])
            assert relative_error(torch.as_tensor(fused[rank][1 + k]), want) < 1e-11


def test_logits_on_one_rank():
    a, b = rows(N, D, seed=1), rows(N, D, seed=2)  # not of unit length: dot products, as open_clip's
    per_image, per_text = FusedClipLoss().get_logits(a, b, torch.tensor(3.0), logit_bias=1.0)
    torch.testing.assert_close(per_image, 3.0 * a @ b.T + 1.0)
    torch.testing.assert_close(per_text, per_image.T)


def test_fused_clip_loss_is_a_clip_loss():
    open_clip = pytest.importorskip("open_clip")
    loss = FusedClipLoss()
    assert isinstance(loss, open_clip.ClipLoss)
    a, b = (F.normalize(rows(N, D, seed=s), dim=1) for s in (1, 2))
    for ours, theirs in zip(loss.get_logits(a, b, 7.0), open_clip.ClipLoss().get_logits(a, b, 7.0), strict=True):
        torch.testing.assert_close(ours, theirs)

    class FusedCoCaLoss(open_clip.CoCaLoss, FusedClipLoss):
        pass

    class FusedDistillClipLoss(open_clip.DistillClipLoss, FusedClipLoss):
        pass

    captions = rows(N, 5, 11, seed=3), torch.arange(N * 5).reshape(N, 5) % 11
    for pair, inputs in (
        ((FusedCoCaLoss(2.0, 1.0), open_clip.CoCaLoss(2.0, 1.0)), (a, b, *captions, 20.0)),
        ((FusedDistillClipLoss(), open_clip.DistillClipLoss()), (a, b, 20.0, b, a, 10.0)),
    ):
        (x1, y1), (x2, y2) = (loss(*inputs) for loss in pair)
        torch.testing.assert_close((x1, y1), (x2, y2))


def test_clip_says_what_it_does_not_host():
    a, b = rows(N, D, seed=1), rows(N, D, seed=2)
    with pytest.raises(ValueError, match="use_horovod must be False"):
        FusedClipLoss(use_horovod=True)
    late = FusedClipLoss()
    late.use_horovod = True
    with pytest.raises(ValueError, match="use_horovod must be False"):
        late(a, b, 10.0)
    for loss in (FusedClipLoss(world_size=2), FusedClipLoss()):
        loss.world_size = 2
        with pytest.raises(ValueError, match="world_size is 2, but the default process group is not initialised"):
            loss(a, b, 10.0)

    class OtherLogits(FusedClipLoss):
        def get_logits(self, *args, **kwargs):
            return super().get_logits(*args, **kwargs)

    with pytest.raises(TypeError, match="OtherLogits overrides get_logits"):
        OtherLogits()(a, b, 10.0)


def clip_of_another_size(group, a: Tensor) -> None:
    FusedClipLoss(world_size=3)(a, a, 10.0)


def test_clip_with_a_world_size_that_is_not_the_groups(two_ranks):
    for _, error in two_ranks.tried(clip_of_another_size, rows(N, D)):
        assert "world_size is 3, but the default process group has 2 ranks" in error


@pytest.mark.parametrize("name", ["local_loss", "gather_with_grad", "cache_labels"])
def test_clip_flags_without_effect_on_one_rank(name):
    a, b = rows(N, D, seed=1), rows(N, D, seed=2)
    assert FusedClipLoss(**{name: True})(a, b, 10.0) == FusedClipLoss()(a, b, 10.0)


def clip_with_late_flags(group, features: list[Tensor]) -> list[Tensor]:
    """Flags that are assigned after construction."""
    rank = dist.get_rank(group)
    loss = FusedClipLoss()
    loss.world_size, loss.rank, loss.local_loss = W, rank, True
    leaves = [parts_of(x)[rank].requires_grad_() for x in features]
    value = loss(*leaves, 14.3)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def test_clip_flags_assigned_later(two_ranks):
    features = [rows(W * N, D, seed=s) for s in (1, 2)]
    for got, want in zip(
        two_ranks.run(clip_with_late_flags, features), clip_formula(True, False, features, 14.3), strict=True
    ):
        for g, w in zip(got, want[:3], strict=True):
            assert relative_error(torch.as_tensor(g), w) < 1e-11


# ---------------------------------------------------------------------- lightly


def moco_formula(out0: Tensor, out1: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """lightly's loss with a memory bank: the batch gives no negatives.

    The bank's rows are of unit length in fp32; here in float64, or its rounding (1e-8) would be what is compared.
    """
    x, y, bank = (F.normalize(rows, dim=1) for rows in (out0, out1, bank.double()))
    logits = torch.cat([(x * y).sum(1, keepdim=True), x @ bank.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))


class Bank:
    """The published rule: written from a pointer on, rows beyond the end dropped, then from 0 again."""

    def __init__(self, bank: Tensor):
        self.bank, self.pointer = bank.clone(), 0

    def push(self, units: Tensor) -> None:
        for k, unit in enumerate(units):
            if self.pointer + k < len(self.bank):
                self.bank[self.pointer + k] = unit
        self.pointer += len(units)
        if self.pointer >= len(self.bank):
            self.pointer = 0


@pytest.mark.parametrize("size", [(16, D), (17, D), 16, (4, D), [12, D]], ids=str)
def test_memory_bank(size):
    """Steps enough to come round; batches of uneven sizes; one without gradients, which leaves the bank alone."""
    torch.manual_seed(0)
    loss = FusedNTXentLoss(0.2, size)
    twin = None
    for step, (batch, learns) in enumerate([(6, True), (6, True), (3, True), (6, False), (6, True), (6, True)]):
        inputs = [rows(batch, D, seed=10 * step + s).requires_grad_(learns) for s in range(2)]
        value = loss(*inputs)
        if twin is None:  # the same draw, at the first call where the features were not named
            torch.manual_seed(0)
            twin = Bank(F.normalize(torch.randn(size if isinstance(size, int) else size[0], D), dim=1))
        want = moco_formula(*inputs, twin.bank, 0.2)
        assert value.item() == pytest.approx(want.item(), rel=1e-12)
        if learns:
            got, expected = (torch.autograd.grad(x, inputs) for x in (value, want))
            assert all(relative_error(g, w) < 1e-11 for g, w in zip(got, expected, strict=True))
            twin.push(F.normalize(inputs[1].detach(), dim=1))
        torch.testing.assert_close(loss.memory_bank.bank, twin.bank, rtol=0, atol=0)
    assert not loss.state_dict()  # as lightly's


def test_memory_bank_against_lightly():
    theirs = pytest.importorskip("lightly.loss").NTXentLoss
    pair = []
    for kind in (FusedNTXentLoss, theirs):
        torch.manual_seed(3)
        pair.append(kind(0.2, (20, D)))
    torch.testing.assert_close(pair[0].memory_bank.bank, pair[1].memory_bank.bank, rtol=0, atol=0)
    for step in range(8):
        results = []
        for loss in pair:
            inputs = [rows(6, D, seed=10 * step + s, dtype=torch.float32).requires_grad_() for s in range(2)]
            value = loss(*inputs)
            results.append([value.detach(), *torch.autograd.grad(value, inputs)])
        for a, b in zip(*results, strict=True):
            assert relative_error(a, b) < 1e-5
        torch.testing.assert_close(pair[0].memory_bank.bank, pair[1].memory_bank.bank, rtol=0, atol=1e-7)


def banks_of_ranks(group, inputs: list[Tensor], gather: bool) -> list[Tensor]:
    torch.manual_seed(0)
    loss = FusedNTXentLoss(0.2, (4 * N, D), gather)
    leaves = [parts_of(x)[dist.get_rank(group)].requires_grad_() for x in inputs]
    first, second = loss(*leaves), loss(*leaves)
    return [loss.memory_bank.bank, first.detach(), second.detach()]


@pytest.mark.parametrize("gather", [False, True])
def test_memory_bank_on_two_ranks(gather, two_ranks):
    """Gathered, the banks hold every rank's rows and stay alike; the loss is each rank's own, as lightly's."""
    inputs = [rows(W * N, D, seed=s) for s in (1, 2)]
    for rank, (bank, *values) in enumerate(two_ranks.run(banks_of_ranks, inputs, gather)):
        torch.manual_seed(0)
        twin = Bank(F.normalize(torch.randn(4 * N, D), dim=1))
        own = [parts_of(x)[rank] for x in inputs]
        for value in values:
            assert value == pytest.approx(moco_formula(*own, twin.bank, 0.2).item(), rel=1e-12)
            twin.push(F.normalize(inputs[1] if gather else own[1], dim=1))
        torch.testing.assert_close(torch.as_tensor(bank), twin.bank, rtol=0, atol=0)


def ntxent_rank(group, inputs: list[Tensor], real: bool) -> list[Tensor]:
    leaves = [parts_of(x)[dist.get_rank(group)].requires_grad_() for x in inputs]
    kind = pytest.importorskip("lightly.loss").NTXentLoss if real else FusedNTXentLoss
    value = kind(0.2, gather_distributed=True)(*leaves)
    value.backward()
    return [value.detach(), *[x.grad for x in leaves]]


def test_ntxent_on_two_ranks_against_lightly(two_ranks):
    """The same gradients on each rank; the value is the mean of the ranks' own."""
    pytest.importorskip("lightly.loss")
    inputs = [rows(W * N, D, seed=s) for s in (1, 2)]
    ours, theirs = (two_ranks.run(ntxent_rank, inputs, real) for real in (False, True))
    mean = sum(answer[0] for answer in theirs) / W
    for a, b in zip(ours, theirs, strict=True):
        assert a[0] == pytest.approx(mean, rel=1e-12)
        for g, w in zip(a[1:], b[1:], strict=True):
            assert relative_error(torch.as_tensor(g), torch.as_tensor(w)) < 1e-11


def test_ntxent_takes_lightlys_arguments_in_its_order():
    assert list(inspect.signature(FusedNTXentLoss).parameters) == [
        "temperature", "memory_bank_size", "gather_distributed",
    ]  # fmt: skip
    defaults = [p.default for p in inspect.signature(FusedNTXentLoss).parameters.values()]
    assert defaults == [0.5, 0, False]
    loss = FusedNTXentLoss(0.5, 0, True)
    assert loss.gather_distributed
    assert not loss.memory_bank.rows
    assert not FusedNTXentLoss(0.5, (0, D)).memory_bank.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, not 0.0"),
        ({"temperature": -0.5}, "temperature must be > 0"),
        ({"memory_bank_size": True}, "memory_bank_size must be 0 or .*gather_distributed is the third"),
        ({"memory_bank_size": -1}, "memory_bank_size must be 0 or"),
        ({"memory_bank_size": 1.5}, "memory_bank_size must be 0 or"),
        ({"memory_bank_size": None}, "memory_bank_size must be 0 or"),
        ({"memory_bank_size": "16"}, "memory_bank_size must be 0 or"),
        ({"memory_bank_size": (4, 8, 2)}, "memory_bank_size must be 0 or"),
        ({"memory_bank_size": (8,)}, "memory_bank_size must be 0 or"),
        ({"memory_bank_size": (4, -8)}, "memory_bank_size must be 0 or"),
    ],
    ids=str,
)
def test_ntxent_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedNTXentLoss(**arguments)


@pytest.mark.parametrize(
    "size", [np.int64(16), (np.int32(16), np.int64(8)), torch.Size([16, 8]), [16, 8]], ids=repr
)
def test_memory_bank_takes_numbers_of_numpy(size):
    loss = FusedNTXentLoss(0.5, size)
    assert loss(torch.randn(4, 8), torch.randn(4, 8)).isfinite()
    assert loss.memory_bank.size == (16, 8)


def test_ntxent_attributes_assigned_later():
    inputs = [rows(N, D, seed=1), rows(N, D, seed=2)]
    loss = FusedNTXentLoss()
    loss.temperature = 0.1
    assert loss(*inputs) == FusedNTXentLoss(0.1)(*inputs)
    loss.temperature = nn.Parameter(torch.tensor(0.1))
    assert list(loss.parameters())
    loss(*inputs).backward()
    assert loss.temperature.grad.abs() > 0
    loss.temperature = None
    with pytest.raises(TypeError, match="temperature"):
        loss(*inputs)


@pytest.mark.parametrize(
    "last",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(N)),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.NLLLoss(),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [0, (8, D)])
def test_ntxent_refuses_another_cross_entropy(last, size):
    loss = FusedNTXentLoss(0.5, size)
    loss.cross_entropy = last
    with pytest.raises(ValueError, match="cross_entropy must be CrossEntropyLoss"):
        loss(rows(N, D, seed=1), rows(N, D, seed=2))


def test_a_bank_of_other_features():
    with pytest.raises(ValueError, match=r"memory_bank_size is \(8, 4\), but the rows have 16 features"):
        FusedNTXentLoss(0.5, (8, 4))(rows(N, D), rows(N, D))


# ---------------------------------------------------------------------- pytorch-metric-learning


def test_metric_learnings_call_and_options_are_refused():
    with pytest.raises(ValueError, match="out1 must have the shape of out0"):
        FusedNTXentLoss(0.07)(rows(2 * N, D), torch.arange(N).repeat(2))
    for name in ("distance", "reducer", "embedding_regularizer", "embedding_reg_weight", "collect_stats"):
        with pytest.raises(TypeError, match=name):
            FusedNTXentLoss(**{name: None})


# ---------------------------------------------------------------------- sentence-transformers

CACHED = pytest.mark.parametrize("cached", [False, True])
ASSIGNED = [
    {"scale": 50.0},
    {"directions": ("query_to_doc", "query_to_query")},
    {"directions": ["query_to_doc", "query_to_query"]},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"partition_mode": "per_direction"},
    {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
    {
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": 5.0,
        "directions": ("query_to_doc", "doc_to_doc"),
    },
    {"hardness_mode": "hard_negatives"},  # of strength 0
    {"hardness_strength": 5.0},  # of no negatives
    {"gather_across_devices": True},
]


@CACHED
@pytest.mark.parametrize("values", ASSIGNED, ids=str)
def test_mnrl_attributes_assigned_later_are_honoured(cached, values, model):  # noqa: F811
    pair = [kind(model) for kind in mnrl(cached)]
    for loss, (name, value) in itertools.product(pair, values.items()):
        setattr(loss, name, value)
    compare(*[applied(loss, cached) for loss in pair], [rows(12, D, seed=s) for s in range(3)], torch.float64)


@CACHED
def test_mnrl_attributes_assigned_back(cached, model):  # noqa: F811
    """Given to the constructor and then taken back."""
    loss = mnrl(cached)[0](model, hardness_mode="all_negatives", hardness_strength=5.0)
    loss.hardness_mode = None
    inputs = [rows(12, D, seed=s) for s in range(3)]
    assert applied(loss, cached)(*inputs) == applied(mnrl(cached)[0](model), cached)(*inputs)


@CACHED
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"similarity_fct": torch.mm}, "similarity_fct must be cos_sim, not mm"),
        ({"similarity_fct": nn.CosineSimilarity()}, "similarity_fct must be cos_sim"),
        ({"scale": 0.0}, "scale must be > 0"),
        ({"scale": -20.0}, "scale must be > 0"),
        ({"directions": ("doc_to_query",)}, "directions must contain 'query_to_doc'"),
        ({"directions": ("query_to_document",)}, "directions must contain .*query_to_document"),
        ({"directions": "query_to_doc"}, "directions must contain"),
        ({"directions": ()}, "directions must contain"),
        (
            {"directions": ("query_to_doc", "query_to_query"), "partition_mode": "per_direction"},
            "partition_mode='per_direction' cannot be combined",
        ),
        ({"partition_mode": "each"}, "partition_mode must be 'joint' or 'per_direction', not 'each'"),
        ({"hardness_mode": "negatives"}, "hardness_mode must be one of .*not 'negatives'"),
        (
            {"directions": ("query_to_doc", "doc_to_doc"), "num_noise": 5},
            "num_noise cannot be combined with directions",
        ),
        (
            {"hardness_mode": "hard_negatives", "hardness_strength": 5.0, "mask_duplicates": True},
            "mask_duplicates cannot be combined with directions",
        ),
        ({"hardness_strength": -1.0}, "hardness_strength must be >= 0"),
    ],
)
def test_mnrl_attributes_assigned_later_are_refused(cached, values, message, model):  # noqa: F811
    loss = mnrl(cached)[0](model)
    for name, value in values.items():
        setattr(loss, name, value)
    with pytest.raises(ValueError, match=message):
        applied(loss, cached)(*[rows(12, D, seed=s) for s in range(3)])


@CACHED
def test_every_argument_of_mnrl_is_one_of_ours_and_stays_assignable(cached, model):  # noqa: F811
    ours, theirs = mnrl(cached)
    mine, library = (inspect.signature(kind).parameters for kind in (ours, theirs))
    assert list(mine)[: len(library)] == list(library)
    assert all(mine[name].default == library[name].default for name in library)
    loss = ours(model, num_noise=3)
    for name in mine:
        setattr(loss, name, getattr(loss, name))  # each is an attribute, read at the call
    inputs = [rows(12, D, seed=s) for s in range(2)]
    plain = applied(ours(model), cached)(*inputs)
    loss.noise, loss.num_noise = "expected", 10**6
    assert applied(loss, cached)(*inputs) > plain + 1
    loss.noise_weight = 0.0
    assert applied(loss, cached)(*inputs) == plain
    for name, value in {"noise": "other", "num_noise": -1, "backend": "other", "workspace_bytes": 0}.items():
        other = ours(model)
        setattr(other, name, value)
        with pytest.raises(ValueError, match=name):
            applied(other, cached)(*inputs)


@CACHED
def test_a_scale_that_is_learned(cached, model):  # noqa: F811
    results = []
    for kind in mnrl(cached):
        loss = kind(model)
        loss.scale = nn.Parameter(torch.tensor(20.0))
        value = applied(loss, cached)(*[rows(12, D, seed=s) for s in range(3)])
        value.backward()
        results.append(torch.stack([value.detach(), loss.scale.grad]))
    torch.testing.assert_close(*results)


@CACHED
def test_mask_duplicates_assigned_later(cached, model):  # noqa: F811
    loss = mnrl(cached)[0](model)
    features = [model.preprocess(t) for t in (["a cat sleeps", "a dog barks"], ["the animal rests"] * 2)]
    assert loss(features, None) > 0.6
    loss.mask_duplicates = True
    assert loss(features, None).item() == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- GISTEmbed


class Embedded(nn.Module):
    """A model whose features are its embeddings."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}


def gist(columns: list[Tensor], guide: list[Tensor], **options) -> Tensor:
    """GISTEmbedLoss of sentence-transformers itself, past its constructor, which asks for tokenizers."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    loss = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    nn.Module.__init__(loss)
    settings = {"temperature": 0.05, "margin_strategy": "absolute", "margin": 0.0, "contrast_anchors": True}
    settings |= {"contrast_positives": True, "gather_across_devices": False, "must_retokenize": False}
    settings |= {
        "model": Embedded("own"),
        "guide": Embedded("guide"),
        "similarity_fct": nn.CosineSimilarity(dim=-1),
    }
    for name, value in {**settings, "cross_entropy_loss": nn.CrossEntropyLoss(), **options}.items():
        setattr(loss, name, value)
    return loss([{"own": x, "guide": g} for x, g in zip(columns, guide, strict=True)], None)


@pytest.mark.parametrize("margin", [0.0, 0.1, -0.1])
@pytest.mark.parametrize("contrast_anchors", [False, True])
@pytest.mark.parametrize("columns", [2, 3])
def test_guide_is_gistembed_without_contrasted_positives(columns, contrast_anchors, margin):
    """As docs/losses.md says: with an absolute margin; anchors are contrasted where they are further negatives."""
    inputs = [rows(12, D, seed=s) for s in range(columns)]
    guide = [rows(12, 5, seed=9 + s) for s in range(columns)]

    def ours(*columns):
        (anchors, positives, *more), (guide_anchors, guide_positives, *guide_more) = columns, guide
        further = [torch.cat([*more, anchors])] if contrast_anchors else more
        guide_further = [torch.cat([*guide_more, guide_anchors])] if contrast_anchors else guide_more
        return info_nce(
            anchors, positives, *further, temperature=0.05, filter_margin=-margin,
            guide=[guide_anchors, guide_positives, *guide_further],
        )  # fmt: skip

    def theirs(*columns):
        options = {"margin": margin, "contrast_anchors": contrast_anchors, "contrast_positives": False}
        return gist(list(columns), guide, **options)

    compare(ours, theirs, inputs, torch.float64)
    for option in ({"contrast_positives": True}, {"margin_strategy": "relative", "margin": 0.3}):
        other = gist(
            inputs, guide, **{"contrast_anchors": contrast_anchors, "contrast_positives": False, **option}
        )
        assert abs(ours(*inputs) - other) > 1e-6  # what it is not
