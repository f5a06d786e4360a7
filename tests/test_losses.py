"""The published losses: each against its own dense version in float64, and what bf16 costs beside it."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from helpers import relative_error, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments import dense_losses as dense
from experiments import matryoshka as prototype
from experiments.losses import CASES as MEASURED
from experiments.losses import errors
from fused_infonce import autograd, cosine_logsumexp, info_nce, losses
from fused_infonce import dense as matrix

N, D, K = 24, 16, 3
TAU = 0.1
BASE = rows(N, D, seed=9)
Q, P = BASE + 0.5 * rows(N, D, seed=1), BASE + 0.5 * rows(N, D, seed=2)
NEGATIVES = BASE[:, None] + rows(N, K, D, seed=3)
LABELS = torch.arange(N) % 5
CLASSES, TARGETS = rows(7, D, seed=4), torch.arange(N) % 7
TEACHER = rows(N, 12, seed=5), rows(N, 12, seed=6)
WEIGHTS = rows(N, seed=7).abs()
IDS = torch.arange(N) // 2 * 7

# name → ours and the dense one, functions of the tensors that get gradients, and these tensors
CASES = {
    "qwen3": (
        lambda q, d, n: losses.qwen3_embedding(q, d, n, temperature=TAU, ids=IDS),
        lambda q, d, n: dense.qwen3(q, d, n, tau=TAU, ids=IDS),
        (Q, P, NEGATIVES),
    ),
    "qwen3, no documents among themselves": (
        lambda q, d: losses.qwen3_embedding(q, d, temperature=TAU, doc_to_doc=False, margin=None),
        lambda q, d: dense.qwen3(q, d, tau=TAU, doc_to_doc=False, margin=None),
        (Q, P),
    ),
    "qwen3, everything masked": (
        lambda q, d, n: losses.qwen3_embedding(q, d, n, temperature=TAU, margin=-2.0),
        lambda q, d, n: dense.qwen3(q, d, n, tau=TAU, margin=-2.0),
        (Q, P, NEGATIVES),
    ),
    "gemini": (
        lambda q, d, n: losses.gemini_embedding(q, d, n, query_ids=IDS, document_ids=LABELS, temperature=TAU),
        lambda q, d, n: dense.gemini(q, d, n, tau=TAU, query_ids=IDS, document_ids=LABELS),
        (Q, P, NEGATIVES),
    ),
    "gemini, documents alone": (
        lambda q, d: losses.gemini_embedding(q, d, document_ids=LABELS, temperature=TAU),
        lambda q, d: dense.gemini(q, d, tau=TAU, document_ids=LABELS),
        (Q, P),
    ),
    "gemma": (
        lambda q, d, n: losses.embedding_gemma(q, d, n, temperature=TAU),
        lambda q, d, n: dense.embedding_gemma(q, d, n, tau=TAU),
        (Q, P, NEGATIVES),
    ),
    "llave": (
        lambda q, d, n: losses.llave(q, d, n, temperature=TAU),
        lambda q, d, n: dense.gte(
            q,
            d,
            n,
            tau=TAU,
            directions=["query_to_doc"],
            hardness_mode="in_batch_negatives",
            hardness_strength=9.0,
        ),
        (Q, P, NEGATIVES),
    ),
    "supcon": (
        lambda z: losses.supcon(z, LABELS, temperature=TAU),
        lambda z: dense.supcon(z, LABELS, tau=TAU),
        (Q,),
    ),
    "supcon, rows without a positive": (
        lambda z: losses.supcon(z, torch.arange(N) // 2 * 9 - torch.arange(N) % 7, temperature=TAU),
        lambda z: dense.supcon(z, torch.arange(N) // 2 * 9 - torch.arange(N) % 7, tau=TAU),
        (Q,),
    ),
    "debiased": (
        lambda q, d: losses.debiased(q, d, temperature=0.5, tau_plus=0.1),
        lambda q, d: dense.debiased(q, d, tau=0.5, tau_plus=0.1),
        (Q, rows(N, D, seed=8)),
    ),
    "debiased, at the bound": (
        lambda q, d: losses.debiased(q, d, temperature=TAU, tau_plus=0.5),
        lambda q, d: dense.debiased(q, d, tau=TAU, tau_plus=0.5),
        (Q, P),
    ),
    "hcl": (
        lambda q, d: losses.hcl(q, d, temperature=0.5, tau_plus=0.1, beta=0.7),
        lambda q, d: dense.hcl(q, d, tau=0.5, tau_plus=0.1, beta=0.7),
        (Q, rows(N, D, seed=8)),
    ),
    "focal": (
        lambda q, d: losses.focal(q, d, temperature=TAU),
        lambda q, d: dense.focal(q, d, tau=TAU),
        (Q, P),
    ),
    "soft labels": (
        lambda q, d: losses.soft_labels(q, d, *TEACHER, temperature=TAU, teacher_temperature=0.2),
        lambda q, d: dense.soft_labels(q, d, *TEACHER, tau=TAU, teacher_tau=0.2),
        (Q, P),
    ),
    "clip": (
        lambda q, d: losses.clip(q, d, weights=WEIGHTS, temperature=TAU),
        lambda q, d: dense.clip(q, d, WEIGHTS, tau=TAU),
        (Q, P),
    ),
    "cross entropy": (
        lambda x, c: losses.cross_entropy(x, TARGETS, c, temperature=TAU),
        lambda x, c: dense.cross_entropy(x, TARGETS, c, tau=TAU),
        (Q, CLASSES),
    ),
}


def compare(ours, want, given, limit=1e-10):
    leaves = [x.clone().requires_grad_() for x in given]
    a, b = ours(*leaves), want(*leaves)
    assert a.ndim == 0
    assert relative_error(a.detach(), b.detach()) < limit
    for x, y in zip(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves), strict=True):
        assert relative_error(x, y) < limit


@pytest.mark.parametrize("most", [matrix.MAX_LOGITS, 0], ids=["dense", "tiles"])
@pytest.mark.parametrize("name", CASES)
def test_the_formula(name, most, monkeypatch):
    monkeypatch.setattr(matrix, "MAX_LOGITS", most)
    compare(*CASES[name])


def test_matryoshka_is_the_sum_over_prefixes():
    dims, weights = (4, 8, 16), (0.5, 1.0, 2.0)
    ours = partial(losses.matryoshka(info_nce, dims, weights), temperature=TAU)
    compare(ours, partial(dense.matryoshka, tau=TAU, dims=dims, weights=weights), (Q, P))
    cut = [x[..., :4] for x in (Q, P, NEGATIVES)]
    both = losses.matryoshka(losses.qwen3_embedding, (4, D))(Q, P, negatives=NEGATIVES)
    assert relative_error(both, losses.qwen3_embedding(Q, P, NEGATIVES) + losses.qwen3_embedding(*cut)) < 1e-12
    queue = rows(5, D, seed=8)
    short = losses.matryoshka(info_nce, (4,))(Q, P, queue=queue, ids=LABELS)
    assert torch.equal(short, info_nce(*cut[:2], queue=queue[:, :4], ids=LABELS))


DIRECTIONS = [
    ("query_to_doc", *others)
    for n in range(4)
    for others in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), n)
]
PARTITIONS = [(d, "joint") for d in DIRECTIONS] + [
    (d, "per_direction") for d in (("query_to_doc", "doc_to_query"),)
]


@pytest.mark.parametrize("mode", [None, "in_batch_negatives", "hard_negatives", "all_negatives"])
@pytest.mark.parametrize(("directions", "partition_mode"), PARTITIONS, ids=str)
def test_gte_in_every_combination(directions, partition_mode, mode):
    chosen = {
        "directions": directions, "partition_mode": partition_mode, "hardness_mode": mode,
        "hardness_strength": 4.0 if mode else 0.0,
    }  # fmt: skip
    for given in ((Q, P), (Q, P, NEGATIVES)):
        compare(
            lambda *x: losses.gte(*x, temperature=TAU, **chosen),
            lambda *x: dense.gte(*x, tau=TAU, **chosen),
            given,
        )


def test_a_learned_temperature():
    tau = torch.tensor([TAU], dtype=torch.float64)
    compare(
        lambda t: losses.qwen3_embedding(Q, P, NEGATIVES, temperature=t),
        lambda t: dense.qwen3(Q, P, NEGATIVES, tau=t),
        (tau,),
    )


@pytest.mark.parametrize("name", MEASURED)
def test_gradients_at_the_trained_stage_are_as_exact_as_info_nce_s(name, monkeypatch):
    """In fp32, and in bf16 within a factor of what rounded products cost InfoNCE itself."""
    monkeypatch.setattr(autograd, "SMALL_PRODUCT", 0)
    found, usual = errors(name, 256, 64), errors("InfoNCE", 256, 64)
    assert found["fp32"] < 1e-5, found
    assert found["bf16"] < 2 * usual["bf16"] < 0.04, (found, usual)
    assert not found["bf16"] > 1.25 * found["dense bf16"], found  # which is NaN for one


ROWS = 2048  # N·M entries are 16 MiB in fp32, and a call is tiled
PLACE = {"workspace_bytes": 1 << 21}
# name → the loss of queries, documents (N, D) and own hard negatives (N, 2, D)
BOUNDED = {
    "gte": lambda q, d, n: losses.gte(q, d, n, **PLACE),
    "gte per direction": lambda q, d, n: losses.gte(
        q, d, n, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction", **PLACE
    ),
    "qwen3_embedding": lambda q, d, n: losses.qwen3_embedding(q, d, n, ids=torch.arange(ROWS) // 2, **PLACE),
    "gemini_embedding": lambda q, d, n: losses.gemini_embedding(
        q, d, n, query_ids=torch.arange(ROWS) // 2, document_ids=torch.arange(ROWS) // 3, **PLACE
    ),
    "embedding_gemma": lambda q, d, n: losses.embedding_gemma(q, d, n, **PLACE),
    "llave": lambda q, d, n: losses.llave(q, d, n, **PLACE),
    "gistembed": lambda q, d, n: losses.gistembed(
        q, d, n[:, 0], guide=[x.detach() for x in (d, q, n[:, 1])], **PLACE
    ),
    "focal": lambda q, d, n: losses.focal(q, d, n[:, 0], **PLACE),
    "debiased": lambda q, d, n: losses.debiased(q, d, **PLACE),
    "hcl": lambda q, d, n: losses.hcl(q, d, **PLACE),
    "supcon": lambda q, d, n: losses.supcon(q, torch.arange(ROWS) // 4, **PLACE),
    "cross_entropy": lambda q, d, n: losses.cross_entropy(q, torch.arange(ROWS), d, **PLACE),
    "soft_labels": lambda q, d, n: losses.soft_labels(q, d, n[:, 0], n[:, 1], **PLACE),
    "clip": lambda q, d, n: losses.clip(q, d, weights=torch.rand(ROWS), **PLACE),
    "matryoshka": lambda q, d, n: losses.matryoshka(info_nce, (4, 8, 16))(q, d, n[:, 0], **PLACE),
    "matryoshka of a loss": lambda q, d, n: losses.matryoshka(losses.embedding_gemma, (8, 16))(q, d, n, **PLACE),
}


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of bytes behind a tensor that any operation returns, backward's too."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return out


def largest(loss) -> int:
    leaves = [
        rows(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate([(ROWS, 16)] * 2 + [(ROWS, 2, 16)])
    ]
    leaves = [x.requires_grad_() for x in leaves]
    with LargestTensor() as seen:
        loss(*leaves).backward()
    return seen.bytes


def test_every_loss_is_among_those_whose_memory_is_tested():
    parts = {"contrast", "log_add", "own_negatives", "pair_cosines"}
    assert {name.split()[0] for name in BOUNDED} == set(losses.__all__) - parts


@pytest.mark.parametrize("name", BOUNDED)
def test_no_tensor_of_rows_times_columns(name):
    """The largest one is a tile, or soft labels' chunk of a teacher's distribution: 1/4 of the matrix."""
    assert largest(BOUNDED[name]) <= ROWS * ROWS * 4 // 4


def test_the_matrix_of_a_dense_loss_is_seen():
    assert largest(lambda q, d, n: dense.focal(q, d, tau=TAU)) >= ROWS * ROWS * 4


def test_matryoshka_in_one_sweep():
    """The prototype that docs/losses.md reports: loss and gradients of one call per prefix."""
    q, k = prototype.inputs(70, torch.float64)
    for tile in (1 << 20, 70 * 32):
        found = prototype.one_sweep(q, k, tile=tile)
        assert prototype.difference(found, prototype.dense(q, k)) < 1e-10


def test_own_negatives_of_uneven_numbers():
    owners, limit = torch.tensor([3, 0, 3, 3, 7, 0]), torch.full((N,), 0.3, dtype=torch.float64)
    flat = rows(6, D, seed=8).requires_grad_()
    for more in ({}, {"hardness": 5.0, "limit": limit}):
        found = losses.own_negatives(Q, flat, TAU, owners=owners, **more)
        assert found.isinf().sum() >= N - 3
        for row in (0, 3, 7):
            few = {name: x[row : row + 1] if name == "limit" else x for name, x in more.items()}
            want = losses.own_negatives(Q[row : row + 1], flat[owners == row][None], TAU, **few)[0]
            assert found[row] == want or abs(found[row] - want) < 1e-12
            if want > -torch.inf:
                a, b = (torch.autograd.grad(x, flat, retain_graph=True)[0] for x in (found[row], want))
                assert relative_error(a, b) < 1e-12
    loss = losses.contrast(losses.pair_cosines(Q, P), TAU, losses.own_negatives(Q, flat, TAU, owners=owners))
    assert torch.autograd.grad(loss.sum(), flat)[0].isfinite().all()


def test_reductions():
    each = losses.embedding_gemma(Q, P, NEGATIVES, reduction="none")
    assert each.shape == (N,)
    assert torch.equal(losses.embedding_gemma(Q, P, NEGATIVES, reduction="sum"), each.sum())
    with pytest.raises(ValueError, match="reduction must be one of"):
        losses.embedding_gemma(Q, P, reduction="max")


def test_contrast_of_the_negatives_is_info_nce():
    term = cosine_logsumexp(Q, P, exclude_diagonal=True)
    assert relative_error(losses.contrast(losses.pair_cosines(Q, P), 0.05, term).mean(), info_nce(Q, P)) < 1e-12


@pytest.mark.parametrize("terms", [1, 3])
def test_an_anchor_without_negatives_has_loss_and_gradient_zero(terms):
    empty = torch.full((2,), -torch.inf, requires_grad=True)
    positive = torch.tensor([0.3, 0.5], requires_grad=True)
    loss = losses.contrast(positive, 0.05, *[empty] * terms)
    assert loss.tolist() == [0, 0]
    for grad in torch.autograd.grad(loss.sum(), (empty, positive)):
        assert grad.tolist() == [0, 0]


def test_compiled_without_a_break():
    def step(q, d, n):
        return losses.gte(q, d, n, temperature=TAU) + losses.qwen3_embedding(q, d, n, temperature=TAU)

    leaves = [x.float().requires_grad_() for x in (Q, P, NEGATIVES)]
    compiled, eager = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), step(*leaves)
    for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.gte(Q, P, NEGATIVES[:, 0]), r"negatives must be \(N, K, D\)"),
        (lambda: losses.gte(Q, P, directions=("doc_to_doc",)), "directions must contain 'query_to_doc'"),
        (
            lambda: losses.gte(Q, P, directions=("query_to_doc", "doc_to_doc"), partition_mode="per_direction"),
            r"cannot be combined with \['doc_to_doc'\]",
        ),
        (lambda: losses.gte(Q, P, hardness_mode="all"), "hardness_mode must be one of"),
        (lambda: losses.gte(Q, P, hardness_strength=-1), "hardness_strength must be >= 0"),
        (lambda: losses.qwen3_embedding(Q, P, NEGATIVES[:3]), "own rows must have shape"),
        (lambda: losses.hcl(Q, P, beta=0.0), "beta must be > 0"),
        (lambda: losses.debiased(Q[:1], P[:1]), "anchors must be at least 2 rows"),
        (lambda: losses.debiased(Q, P, tau_plus=1.0), "tau_plus must be a probability"),
        (
            lambda: losses.gistembed(Q, P, guide=TEACHER, strategy="ring"),
            "strategy must be 'auto' or 'gather' with a guide",
        ),
        (lambda: losses.matryoshka(info_nce, (4, 32))(Q, P), "dims must be at most the embeddings' 16 features"),
        (lambda: losses.matryoshka(info_nce, ()), "dims must be positive integers"),
        (lambda: losses.matryoshka(info_nce, (4, 8), (1.0,)), "weights must have one number for each of the 2"),
        (lambda: losses.gistembed(Q, P, guide=TEACHER, margin_strategy="both"), "margin_strategy must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
