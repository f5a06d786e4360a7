"""The drop-in losses: the loss and gradients of the libraries' own, and training inside of them."""

from __future__ import annotations

import inspect
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, rows
from ranks import Ranks
from test_simcse_model import make_tiny_model
from torch import Tensor, nn

from fused_infonce import info_nce
from fused_infonce.integrations.ntxent import FusedNTXentLoss
from fused_infonce.integrations.open_clip import FusedClipLoss

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=["fp64", "fp32"])
N, D = 12, 16


def compare(ours, theirs, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Both of the same inputs: the other's answer in float64 is the truth, dtype sets the limit."""
    results = []
    for loss, kind in ((ours, dtype), (theirs, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        value = loss(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < LIMITS[dtype]


# ---------------------------------------------------------------------- sentence-transformers


def mnrl(cached: bool):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses

    from fused_infonce.integrations import sentence_transformers as fused

    name = "CachedMultipleNegativesRankingLoss" if cached else "MultipleNegativesRankingLoss"
    return getattr(fused, "Fused" + name), getattr(losses, name)


def applied(loss: nn.Module, cached: bool):
    """A function of embeddings, one argument a column."""
    if cached:  # two mini batches
        return lambda *columns: loss.calculate_loss([[x[:5], x[5:]] for x in columns])
    return lambda *columns: loss.compute_loss_from_embeddings(list(columns), None)


MNRL_OPTIONS = [
    {},
    {"scale": 50.0},
    {"directions": ("query_to_doc", "query_to_query")},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
    {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
    {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    {
        "directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction",
        "hardness_mode": "hard_negatives", "hardness_strength": 5.0,
    },
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny sentence-transformers model without dropout."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("encoder")
    make_tiny_model(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(settings))
    transformer = Transformer(str(folder), max_seq_length=16)
    pooling = Pooling(settings["hidden_size"], pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")


@DTYPES
@pytest.mark.parametrize("options", MNRL_OPTIONS, ids=str)
@pytest.mark.parametrize(("cached", "columns"), list(itertools.product([False, True], [2, 4])))
def test_multiple_negatives_ranking(cached, columns, options, dtype, model):
    ours, theirs = mnrl(cached)
    inputs = [rows(N, D, seed=s) for s in range(columns)]
    compare(applied(ours(model, **options), cached), applied(theirs(model, **options), cached), inputs, dtype)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_fct": torch.mm}, "similarity_fct must be cos_sim, not mm"),
        ({"directions": ("query_to_doc", "doc_to_doc"), "decoupled": True}, "decoupled cannot be combined"),
        ({"scale": 0.0}, "Scale must be"),
    ],
    ids=["similarity", "options", "scale"],
)
def test_what_is_not_hosted_is_said(cached, options, message, model):
    with pytest.raises(ValueError, match=message):
        applied(mnrl(cached)[0](model, **options), cached)(*[rows(N, D, seed=s) for s in range(2)])


def test_config_for_the_model_card(model):
    config = mnrl(False)[0](model, num_noise=5).get_config_dict()
    assert config["scale"] == 20.0
    assert config["num_noise"] == 5
    assert config["mask_duplicates"] is False


@pytest.mark.parametrize("cached", [False, True])
def test_the_same_document_twice_is_no_negative_where_masked(cached, model):
    ours, _ = mnrl(cached)
    texts = [["a cat sleeps", "a dog barks"], ["the animal rests", "the animal rests"]]
    features = [model.preprocess(column) for column in texts]
    plain, masked = (ours(model, mask_duplicates=on)(features, None).item() for on in (False, True))
    assert masked == pytest.approx(0, abs=1e-6)  # nothing else to tell it from
    assert plain > 0.6
    wider = [features[0], {k: F.pad(v, (0, 3)) if isinstance(v, Tensor) else v for k, v in features[1].items()}]
    assert ours(model, mask_duplicates=True)(wider, None).item() == pytest.approx(masked, abs=1e-5)


def test_noise_reaches_the_loss(model):
    inputs = [rows(N, D, seed=s, dtype=torch.float32) for s in (1, 2)]
    plain, noisy = (
        applied(mnrl(False)[0](model, num_noise=M, noise="expected"), False)(*inputs) for M in (0, 10**6)
    )
    assert noisy > plain + 1


@pytest.mark.parametrize("cached", [False, True])
def test_training_in_the_real_trainer(cached, model, tmp_path):
    """The same loss curve as with the library's own loss, and a model card."""
    import copy

    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    words = ["cat", "dog", "sun", "moon", "tree", "river", "stone", "bird", "house", "song"]
    data = {
        "anchor": [f"the {a} and the {b}" for a in words for b in words[:2]],
        "positive": [f"{a} {b}" for a in words for b in words[:2]],
        "negative": [f"no {b} here" for a in words for b in words[:2]],
    }
    curves = []
    for which in mnrl(cached):
        copied = copy.deepcopy(model)
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / which.__name__), max_steps=5, per_device_train_batch_size=10,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=True, seed=1,
        )  # fmt: skip
        loss = which(copied, mini_batch_size=4) if cached else which(copied)
        trainer = SentenceTransformerTrainer(
            model=copied, args=args, train_dataset=Dataset.from_dict(data), loss=loss
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        copied.save_pretrained(str(tmp_path / "saved" / which.__name__))
    assert len(curves[0]) == 5
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-3)  # the log rounds to 4 digits
    assert curves[0][-1] < curves[0][0]
    card = (tmp_path / "saved" / mnrl(cached)[0].__name__ / "README.md").read_text()
    assert mnrl(cached)[0].__name__ in card


# ---------------------------------------------------------------------- open_clip


def clip_formula(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    logits = logit_scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    labels = torch.arange(len(images))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@DTYPES
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_clip(scale, dtype):
    inputs = [rows(N, D, seed=1), rows(N, D, seed=2), torch.tensor(scale, dtype=torch.float64)]
    compare(FusedClipLoss(), clip_formula, inputs, dtype)


def test_clip_is_exact_for_trained_rows():
    """Logit scale 100 and pairs at cosine 0.98: the formula in float64, where it can still tell."""
    q = F.normalize(rows(64, 256, seed=1))
    k = F.normalize(q + 0.2 * F.normalize(rows(64, 256, seed=2)))
    inputs = [q, k, torch.tensor(100.0, dtype=torch.float64)]
    leaves = [x.float().requires_grad_() for x in inputs]
    dq = torch.autograd.grad(FusedClipLoss()(*leaves), leaves[:2])
    z = 100 * (q @ k.T)
    ratios = [(z - z.diagonal()[:, None]).exp(), (z.T - z.diagonal()[:, None]).exp()]
    for one in ratios:
        one.fill_diagonal_(0)
    shares = [one / (1 + one.sum(1, keepdim=True)) for one in ratios]
    own = sum(share.sum(1, keepdim=True) for share in shares)
    want = 100 / 128 * ((shares[0] + shares[1].T) @ k - own * k)
    want -= q * (q * want).sum(1, keepdim=True)
    assert relative_error(dq[0], want) < 3e-5


def test_clip_as_open_clip_calls_it():
    q, k = (rows(N, D, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    scale, bias = torch.tensor([20.0], requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    loss = FusedClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    out = loss(image_features=q, text_features=k, logit_scale=scale, logit_bias=bias, output_dict=True)
    assert list(out) == ["contrastive_loss"]
    out["contrastive_loss"].backward()
    assert scale.grad.shape == (1,)
    assert bias.grad == 0


def test_clip_against_the_real_one():
    open_clip = pytest.importorskip("open_clip")
    inputs = [F.normalize(rows(N, D, seed=s)) for s in (1, 2)]
    compare(
        lambda q, k: FusedClipLoss()(q, k, 30.0),
        lambda q, k: open_clip.ClipLoss()(F.normalize(q), F.normalize(k), 30.0),
        inputs,
        torch.float32,
    )


# ---------------------------------------------------------------------- NT-Xent


@DTYPES
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_ntxent(temperature, dtype):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    labels = torch.arange(N).repeat(2)

    def theirs(a, b):
        return losses.NTXentLoss(temperature=temperature)(torch.cat([a, b]), labels)

    compare(FusedNTXentLoss(temperature), theirs, [rows(N, D, seed=1), rows(N, D, seed=2)], dtype)


def test_ntxent_against_lightly():
    loss = pytest.importorskip("lightly.loss")
    inputs = [rows(N, D, seed=1), rows(N, D, seed=2)]
    compare(FusedNTXentLoss(0.5), loss.NTXentLoss(0.5), inputs, torch.float32)


def test_ntxent_views_of_different_sizes():
    with pytest.raises(ValueError, match=r"out1 must have the shape of out0, \(3, 4\)"):
        FusedNTXentLoss()(torch.ones(3, 4), torch.ones(2, 4))


@pytest.fixture(scope="module")
def guide(model):
    """Another tiny model, with the same vocabulary."""
    import copy

    other = copy.deepcopy(model)
    for i, weight in enumerate(other.parameters()):
        weight.data += 0.1 * rows(*weight.shape, seed=i).to(weight)
    return other


TEXTS = [[f"{a} {b}" for a in ("cat", "dog", "sun") for b in ("one", "two")] for _ in range(3)]
TEXTS = [
    [f"{text} {more}" for text in texts] for texts, more in zip(TEXTS, ("red", "blue green", ""), strict=True)
]
GIST_OPTIONS = [
    {},
    {"margin": 0.1, "temperature": 0.05},
    {"margin": 0.3, "margin_strategy": "relative", "contrast_positives": False},
    {"contrast_anchors": False, "margin": -0.05},
]


def gist_pair(cached: bool):
    from sentence_transformers.sentence_transformer import losses

    from fused_infonce.integrations import sentence_transformers as fused

    name = "CachedGISTEmbedLoss" if cached else "GISTEmbedLoss"
    return getattr(fused, "Fused" + name), getattr(losses, name)


def step(loss: nn.Module, columns: int) -> list[Tensor]:
    """A loss and the gradients of its model's weights, in float64."""
    loss.model.zero_grad()
    loss.double()
    features = [loss.model.preprocess(texts) for texts in TEXTS[:columns]]
    value = loss(features, None)
    value.backward()
    return [value.detach(), *(x.grad.clone() for x in loss.model.parameters() if x.grad is not None)]


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("options", GIST_OPTIONS, ids=str)
def test_gistembed(options, cached, columns, model, guide):
    import copy

    results = []
    for kind in gist_pair(cached):
        more = {"mini_batch_size": 4} if cached else {}
        results.append(step(kind(copy.deepcopy(model), copy.deepcopy(guide), **options, **more), columns))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-9 or b.norm() < 1e-9


def test_gistembed_tokenizes_again_for_a_shorter_guide(model, guide):
    import copy

    shorter = copy.deepcopy(guide)
    shorter.max_seq_length = 8
    ours, theirs = (step(kind(copy.deepcopy(model), copy.deepcopy(shorter)), 2) for kind in gist_pair(False))
    assert relative_error(ours[0], theirs[0]) < 1e-9


@pytest.mark.parametrize("cached", [False, True])
def test_matryoshka(cached, model):
    import copy

    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    from fused_infonce.integrations.sentence_transformers import FusedMatryoshkaLoss

    results = []
    for kind, inner in zip((FusedMatryoshkaLoss, MatryoshkaLoss), mnrl(cached), strict=True):
        copied = copy.deepcopy(model)
        dims = [copied.get_embedding_dimension(), 4]
        results.append(step(kind(copied, inner(copied), dims, [1.0, 0.3]), 3))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-9 or b.norm() < 1e-9
    with pytest.raises(ValueError, match="loss must be one of fused_infonce"):
        FusedMatryoshkaLoss(model, mnrl(cached)[1](model), [4])


@pytest.mark.parametrize("name", ["gist", "cached gist", "matryoshka", "matryoshka of cached"])
def test_gist_and_matryoshka_in_the_real_trainer(name, model, guide, tmp_path):
    """Two steps: each step's loss is the library's to fp32 rounding, and so is what the step has learned."""
    import copy

    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

    from fused_infonce.integrations.sentence_transformers import FusedMatryoshkaLoss

    cached = "cached" in name
    more = {"mini_batch_size": 4} if cached else {}
    if "gist" in name:
        makers = [lambda m, kind=kind: kind(m, copy.deepcopy(guide), **more) for kind in gist_pair(cached)]
    else:
        pairs = zip((FusedMatryoshkaLoss, MatryoshkaLoss), mnrl(cached), strict=True)
        makers = [lambda m, kind=kind, inner=inner: kind(m, inner(m, **more), [8, 4]) for kind, inner in pairs]
    data = Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), TEXTS, strict=True)))
    found = []
    for number, make in enumerate(makers):
        copied = copy.deepcopy(model).float()
        loss, seen = make(copied), []
        loss.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.item()))
        args = SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / str(number)), max_steps=2, per_device_train_batch_size=6,
            learning_rate=1e-3, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=1,
        )  # fmt: skip
        SentenceTransformerTrainer(model=copied, args=args, train_dataset=data, loss=loss).train()
        found.append(seen)
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][0] != found[0][1]


# ---------------------------------------------------------------------- several ranks


def of_one_rank(group, name: str, inputs: list[Tensor], own: slice) -> list[Tensor]:
    import torch.distributed as dist

    rank = dist.get_rank(group)
    part = slice(rank * own.stop, (rank + 1) * own.stop)
    leaves = [x[part].clone().requires_grad_() for x in inputs]
    value = several(name, leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def several(name: str, leaves: list[Tensor]) -> Tensor:
    import torch.distributed as dist

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if name == "clip":
        return FusedClipLoss(gather_with_grad=True, world_size=ranks)(*leaves, 20.0)
    if name == "ntxent":
        return FusedNTXentLoss(0.3, gather_distributed=True)(*leaves)
    every = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    hard = {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}
    options = {"mnrl": {}, "mnrl, terms": {"directions": every, **hard}}[name]
    loss = mnrl(False)[0](None, gather_across_devices=True, **options)
    return applied(loss, False)(*leaves)


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.parametrize("name", ["clip", "ntxent", "mnrl", "mnrl, terms"])
def test_two_ranks_are_one_batch(name, two_ranks):
    """Every rank's loss is that of the whole batch; its gradients are W times its rows', for DDP to average.

    Where the denominator has several terms a rank's loss is that of its own rows, as in the library.
    """
    inputs = [rows(2 * N, D, seed=s) for s in range(2 if name in ("clip", "ntxent") else 3)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    whole = several(name, leaves)
    grads = torch.autograd.grad(whole, leaves)
    answers = two_ranks.run(of_one_rank, name, inputs, slice(0, N))
    if name == "mnrl, terms":
        assert (answers[0][0] + answers[1][0]) / 2 == pytest.approx(whole.item(), rel=1e-12)
    for rank, (loss, *parts) in enumerate(answers):
        assert name == "mnrl, terms" or loss == pytest.approx(whole.item(), rel=1e-12)
        for part, grad in zip(parts, grads, strict=True):
            assert relative_error(torch.as_tensor(part), 2 * grad[rank * N : (rank + 1) * N]) < 1e-11


@pytest.mark.parametrize("cached", [False, True])
def test_sentence_transformers_shows_and_takes_the_loss_s_other_options(cached):
    """What the library's arguments do not decide: named in the signature, refused by name otherwise."""
    module = pytest.importorskip("fused_infonce.integrations.sentence_transformers")
    prefix = "FusedCached" if cached else "Fused"
    loss = getattr(module, f"{prefix}MultipleNegativesRankingLoss")
    shown = inspect.signature(loss).parameters
    assert {"decoupled", "filter_margin", "noise", "backend"} <= set(shown)
    assert shown["num_noise"].default == 0
    assert not {"symmetric", "hardness", "options"} & set(shown)
    model = nn.Sequential(nn.Identity())
    q, k = rows(6, 5, seed=1), rows(6, 5, seed=2)
    for options in (
        {"decoupled": True},
        {"angular_margin": 0.2, "filter_threshold": 0.5},
        {"label_smoothing": 0.1},
    ):
        made = loss(model, **options)
        assert made._loss(q, [k]) == info_nce(q, k, **options) != info_nce(q, k)
        assert made.get_config_dict().items() >= options.items()
    with pytest.raises(TypeError, match="unexpected keyword argument 'symmetric'"):
        loss(model, symmetric=True)
