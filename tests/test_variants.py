"""The neighbours of InfoNCE: each formula as published, in float64 with the whole matrix, against the sweep."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import NOISE, VARIANTS, both
from helpers import loss_and_grads, relative_error, rows
from torch import Tensor

from fused_infonce import GSInfoNCELoss, gs_infonce, info_nce
from fused_infonce.testing import REGIMES, embeddings

N, D, H = 37, 24, 74
TAU = 0.2


def cosines(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """(N, T) of the first with all others; and those of the pairs, (N, 1)."""
    q, *columns = (F.normalize(x, dim=1) for x in parts)
    s = q @ torch.cat(columns).T
    return s, s.diagonal()[:, None]


def without_positives(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.eye(*logits.shape, dtype=torch.bool), -math.inf)


def decoupled(s: Tensor, positive: Tensor, tau: Tensor) -> Tensor:
    """Yeh et al. 2022, equation 6."""
    return (without_positives(s / tau).logsumexp(1) - positive[:, 0] / tau).mean()


def arccon(s: Tensor, positive: Tensor, tau: Tensor, m: float = 0.3) -> Tensor:
    """Zhang et al. 2022, equation 4: cos(θ + m) in the numerator, and for the positive in the denominator."""
    target = (positive.acos() + m).cos()
    logits = torch.cat([target / tau, without_positives(s / tau)], 1)
    return F.cross_entropy(logits, torch.zeros(len(s), dtype=torch.long))


def hardened(s: Tensor, positive: Tensor, tau: Tensor, beta: float = 4.0) -> Tensor:
    """Lan et al. 2025, equation 5: logits of the negatives grow by β sg(s)."""
    penalty = (beta * s.detach()).masked_fill(torch.eye(*s.shape, dtype=torch.bool), 0.0)
    return F.cross_entropy(s / tau + penalty, torch.arange(len(s)))


def smoothed(s: Tensor, positive: Tensor, tau: Tensor, epsilon: float = 0.1) -> Tensor:
    """Szegedy et al. 2016, section 7, as torch does it."""
    return F.cross_entropy(s / tau, torch.arange(len(s)), label_smoothing=epsilon)


def filtered(s: Tensor, positive: Tensor, tau: Tensor, margin: float = 0.1) -> Tensor:
    """GISTEmbed, Solatorio 2024, with the model as its own guide."""
    return F.cross_entropy((s / tau).masked_fill(s > positive + margin, -math.inf), torch.arange(len(s)))


def cut_off(s: Tensor, positive: Tensor, tau: Tensor, threshold: float = 0.2) -> Tensor:
    similar = (s > threshold) & ~torch.eye(*s.shape, dtype=torch.bool)
    return F.cross_entropy((s / tau).masked_fill(similar, -math.inf), torch.arange(len(s)))


def focal(s: Tensor, positive: Tensor, tau: Tensor, gamma: float = 2.0) -> Tensor:
    """Lin et al. 2017, equation 4, of the softmax over the columns."""
    log_p = (s / tau).log_softmax(1).diagonal()
    return (-((1 - log_p.exp()) ** gamma) * log_p).mean()


FORMULAS = {
    decoupled: {"decoupled": True},
    arccon: {"angular_margin": 0.3},
    hardened: {"hardness": 4.0},
    smoothed: {"label_smoothing": 0.1},
    filtered: {"filter_margin": 0.1},
    cut_off: {"filter_threshold": 0.2},
    focal: {"focal_gamma": 2.0},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("columns", ["pairs", "negatives", "symmetric"])
@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.__name__)
def test_the_published_formula(formula, columns, dtype):
    inputs = [rows(n, D, seed=s, dtype=dtype) for s, n in enumerate((N, N, H))]
    inputs = inputs if columns == "negatives" else inputs[:2]
    tau = torch.tensor(TAU, dtype=torch.float64)
    symmetric = columns == "symmetric"
    ours = loss_and_grads(
        inputs, num_noise=0, temperature=tau, symmetric=symmetric, backend="torch", workspace_bytes=20_000,
        **FORMULAS[formula],
    )  # fmt: skip
    leaves = [x.double().requires_grad_() for x in (*inputs, tau)]
    want = formula(*cosines(*leaves[:-1]), leaves[-1])
    if symmetric:
        want = (want + formula(*cosines(leaves[1], leaves[0]), leaves[-1])) / 2
    exact = [want.detach(), *torch.autograd.grad(want, leaves)]
    for a, b in zip(ours, exact, strict=True):
        assert relative_error(a, b) < (1e-11 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
@pytest.mark.parametrize("name", VARIANTS)
def test_with_every_other_option(name, symmetric, reduction, dtype):
    """Against the reference, in tiles of few rows, in one sweep and in two, from τ = 0.002 to 10."""
    plain = VARIANTS[name].given(symmetric=symmetric, reduction=reduction, noise_weight=0.7)
    for noise, own, tau in itertools.product(NOISE, (0.0, 1.3), (0.002, 0.02, 0.05, 10.0)):
        masked = own > 0 and "label_smoothing" not in plain.options
        case = plain.given(hard_negative_weight=own, **NOISE[noise])
        case = replace(case, negatives=2, queue=True, ids=masked)
        ours, want = both(case, "torch", N, D, dtype, workspace_bytes=20_000, temperature=tau)
        limit = (1e-10 if dtype == torch.float64 else 1e-5) * max(1, 0.05 / tau)
        last = None if dtype == torch.float64 else -1  # dτ may cancel
        for what, a, b in zip(("loss", "q", "k", "h", "queue", "tau"), ours[:last], want[:last], strict=False):
            assert relative_error(a, b) < limit, (what, noise, own, tau)


@pytest.mark.parametrize("name", ["decoupled", "margin", "filter", "smoothing", "focal"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
def test_gradcheck(name, symmetric):
    """All but hardness, whose weights have no derivative on purpose."""
    q, k, h = (rows(n, 5, seed=n).requires_grad_() for n in (4, 6, 12))
    tau = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

    def loss(q, k, h, tau):
        return info_nce(
            q, k[:4], h, temperature=tau, symmetric=symmetric, backend="torch", **VARIANTS[name].options
        )

    assert torch.autograd.gradcheck(loss, (q, k, h, tau))


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"reduction": "none"}, {"temperature": 0.002}], ids=str
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_decoupled_row_without_negatives_counts_nothing(options, backend):
    q, k = rows(6, 5, seed=1), rows(6, 5, seed=2)
    alone = torch.arange(6).clamp(min=4)  # rows 4 and 5 share an id
    everything = torch.zeros(6, dtype=torch.int64)
    upstream = rows(6, seed=3) if "reduction" in options else None
    for ids in (alone, everything):
        found = loss_and_grads([q, k], upstream, num_noise=0, decoupled=True, ids=ids, backend=backend, **options)
        assert all(x.isfinite().all() for x in found)
        assert found[0].any() == found[1].any() == (ids is alone)
    assert info_nce(q[:1], k[:1], decoupled=True, backend=backend) == 0


def test_close_and_equal_pairs_keep_the_margin_s_gradient():
    """1 − s² is not read off s: rows 1e-4 apart, where s says nothing of it in fp32."""
    q = F.normalize(rows(64, 96, seed=1), dim=1)
    k = q + 1e-4 * rows(64, 96, seed=2)
    tau = torch.tensor(0.05, dtype=torch.float64)
    single = [x.float() for x in (q, k)]
    ours = loss_and_grads(single, num_noise=0, temperature=tau, angular_margin=0.2)
    exact = [x.double().requires_grad_() for x in single]
    s = F.normalize(exact[0], dim=1) @ F.normalize(exact[1], dim=1).T
    chord = (F.normalize(exact[0], dim=1) - F.normalize(exact[1], dim=1)).square().sum(1) / 2
    sine = (chord * (2 - chord)).sqrt()
    target = s.diagonal() * math.cos(0.2) - sine * math.sin(0.2)
    z = without_positives((s - target[:, None]) / 0.05)
    want = z.logsumexp(1).exp().log1p().mean()
    for a, b in zip(ours[1:3], torch.autograd.grad(want, exact), strict=True):
        assert relative_error(a, b) < 2e-3  # of directions that fp32 rows know to 1e-3
    same = loss_and_grads([single[0], single[0].clone()], num_noise=0, angular_margin=0.2)
    assert all(x.isfinite().all() for x in same)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_a_focal_row_without_a_loss_has_a_gradient_of_zero(gamma, backend):
    """The weight's slope at a probability of 1 is infinite for γ < 1, and its product with the loss is not."""
    q, k = rows(1, 5, seed=1), rows(1, 5, seed=2)
    loss, dq, dk = loss_and_grads([q, k], num_noise=0, focal_gamma=gamma, backend=backend)
    assert loss == 0
    assert not dq.any()
    assert not dk.any()
    close = rows(16, 64, seed=3)  # losses about 1e-9
    ours, want = (
        loss_and_grads([close, close + 1e-3], num_noise=0, focal_gamma=gamma, backend=x)
        for x in ("torch", "reference")
    )
    for a, b in zip(ours, want, strict=True):
        assert b.any()
        assert relative_error(a, b) < 1e-9


def test_a_focal_gamma_of_zero_is_infonce():
    q, k = rows(9, 5, seed=1), rows(9, 5, seed=2)
    assert info_nce(q, k, focal_gamma=0) == info_nce(q, k)
    slight, plain = (loss_and_grads([q, k], num_noise=0, focal_gamma=gamma) for gamma in (1e-9, 0.0))
    for a, b in zip(slight, plain, strict=True):
        assert relative_error(a, b) < 1e-6


def test_equal_pairs_under_a_margin_in_the_reference_too():
    q = rows(6, 5, seed=1).requires_grad_()
    loss = info_nce(q, q.detach().clone(), angular_margin=0.2, backend="reference")
    assert loss.isfinite()
    assert torch.autograd.grad(loss, q)[0].isfinite().all()


def test_rows_too_short_for_fp32_are_zero_rows_under_smoothing_too():
    q, k = (rows(6, 5, seed=s, dtype=torch.float32) for s in (1, 2))
    tiny, none = q.clone(), q.clone()
    tiny[3], none[3] = 1e-25, 0
    losses = [info_nce(x, k, label_smoothing=0.1) for x in (tiny, none)]
    assert losses[0].isfinite()
    assert losses[0] == losses[1]


def test_zero_rows_and_nan():
    q, k = rows(9, 5, seed=1), rows(9, 5, seed=2)
    q[3] = 0
    for name in ("decoupled", "margin", "hardness", "filter", "smoothing", "focal"):
        options = VARIANTS[name].options
        loss, dq, _ = loss_and_grads([q, k], num_noise=0, **options)
        want = loss_and_grads([q, k], num_noise=0, backend="reference", **options)
        assert relative_error(loss, want[0]) < 1e-12
        assert (dq[3] == 0).all()
        bad = q.clone()
        bad[5, 2] = math.nan
        assert info_nce(bad, k, **options).isnan(), name


def test_a_guide_alone_filters_what_it_holds_for_better_than_the_positive():
    """GISTEmbed's rule, in both directions, and its margin's sign."""
    q, k, guide = rows(8, 5, seed=1), rows(8, 5, seed=2), [rows(8, 3, seed=3), rows(8, 3, seed=4)]
    s, g = cosines(q, k)[0] / 0.05, cosines(*guide)[0]
    for margin, options in ((0.0, {}), (-0.2, {"filter_margin": -0.2})):
        limit = g.diagonal() + margin
        keep = torch.eye(8, dtype=torch.bool)
        found = info_nce(q, k, guide=guide, symmetric=True, **options)
        one = F.cross_entropy(s.masked_fill((g > limit[:, None]) & ~keep, -math.inf), torch.arange(8))
        other = F.cross_entropy(s.T.masked_fill((limit[:, None] < g.T) & ~keep, -math.inf), torch.arange(8))
        assert relative_error(found, (one + other) / 2) < 1e-12


def test_the_module_takes_them():
    q, k = rows(8, 5, seed=1), rows(8, 5, seed=2)
    options = {"decoupled": True, "angular_margin": 0.1, "hardness": 2.0, "filter_margin": 0.2}
    module = GSInfoNCELoss(num_noise=0, **options)
    assert module(q, k) == gs_infonce(q, k, num_noise=0, **options)
    assert "decoupled=True" in repr(module)
    guide = [rows(8, 3, seed=3), rows(8, 3, seed=4)]
    assert GSInfoNCELoss(num_noise=0)(q, k, guide=guide) == info_nce(q, k, guide=guide)
    assert GSInfoNCELoss(num_noise=0, label_smoothing=0.1)(q, k) == info_nce(q, k, label_smoothing=0.1)


def test_defaults_change_nothing_to_the_bit():
    inputs = [rows(20, 6, seed=s, dtype=torch.float32) for s in (1, 2)]
    off = {
        "decoupled": False,
        "angular_margin": 0.0,
        "hardness": 0.0,
        "label_smoothing": 0.0,
        "filter_margin": None,
    }
    found = loss_and_grads(inputs, num_noise=0, **off)
    assert all(torch.equal(a, b) for a, b in zip(found, loss_and_grads(inputs, num_noise=0), strict=True))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("symmetric", [False, True], ids=["oneway", "symmetric"])
def test_fp32_is_as_exact_as_without_them(regime, symmetric):
    q, k = (x.float() for x in embeddings(regime, 200, 384))
    for name in ("decoupled", "margin", "hardness", "filter", "smoothing", "focal", "all"):
        options = {"num_noise": 0, "symmetric": symmetric, "temperature": 0.05, **VARIANTS[name].options}
        ours = loss_and_grads([q, k], backend="torch", **options)
        want = loss_and_grads([q.double(), k.double()], backend="reference", **options)
        for a, b in zip(ours, want, strict=True):
            assert relative_error(a, b) < 5e-6, name
