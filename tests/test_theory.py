"""Anisotropy and the asymptotic terms of InfoNCE, against closed forms, dense formulas and dense autograd."""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, rows
from torch.autograd import forward_ad

from fused_infonce import alignment, anisotropy, asymptotic_terms, info_nce, uniformity
from fused_infonce.noise import log_mean_exp_cosine
from fused_infonce.testing import REGIMES, embeddings

SPECTRUM = ("mean_cosine", "top_singular_share", "top_eigenvalue_share", "effective_rank")
TERMS = ("alignment", "uniformity", "bound")


def dense_anisotropy(x):
    unit = F.normalize(x, dim=1)
    cosines = unit @ unit.T
    N = len(x)
    sigma = torch.linalg.svd(unit, full_matrices=False).S
    p = sigma / sigma.sum()
    return {
        "mean_cosine": cosines[~torch.eye(N, dtype=torch.bool)].mean(),
        "top_singular_share": p.max(),
        "top_eigenvalue_share": torch.linalg.eigvalsh(cosines).max() / cosines.trace(),
        "effective_rank": torch.special.entr(p).sum().exp(),
    }


def dense_terms(anchors, positives, tau):
    s = F.normalize(anchors, dim=1) @ F.normalize(positives, dim=1).T
    N = len(s)
    own = torch.eye(N, dtype=torch.bool)
    others = (s / tau).masked_fill(own, -math.inf)
    return {
        "alignment": -s.diagonal().mean() / tau,
        "uniformity": (others.logsumexp(1) - math.log(N - 1)).mean(),
        "bound": s[~own].mean() / tau,
    }


def clustered(N, D, clusters, seed, spread=0.1):
    centres = rows(clusters, D, seed=seed)
    return centres[torch.arange(N) % clusters] + spread * rows(N, D, seed=seed + 1)


DATA = {
    "random": lambda: rows(60, 12, seed=1),
    "wide": lambda: rows(12, 60, seed=2),
    "square": lambda: rows(20, 20, seed=3),
    "cone": lambda: rows(60, 12, seed=4) * 0.1 + 1,
    "clustered": lambda: clustered(60, 12, 5, seed=5),
    "collapsed": lambda: torch.ones(60, 12, dtype=torch.float64),
    "rank 2": lambda: rows(60, 2, seed=6) @ rows(2, 12, seed=7),
    "opposite": lambda: torch.cat([rows(1, 12, seed=8), -rows(1, 12, seed=8)]),
    "orthogonal": lambda: 3 * torch.eye(12, dtype=torch.float64),
}


# ---------------------------------------------------------------------- anisotropy


@pytest.mark.parametrize("name", DATA)
def test_anisotropy_is_that_of_a_dense_decomposition(name):
    x = DATA[name]()
    got, want = anisotropy(x), dense_anisotropy(x)
    assert tuple(got) == SPECTRUM
    for figure, value in want.items():
        assert got[figure].dtype == torch.float64
        assert got[figure].shape == ()
        assert abs(got[figure] - value) < 1e-10, figure
    single = anisotropy(x.float())
    for figure, value in want.items():
        assert single[figure].dtype == torch.float32
        assert abs(single[figure] / value - 1) < 1e-4 if abs(value) > 0.1 else abs(single[figure] - value) < 1e-5


@pytest.mark.parametrize(
    ("x", "figures"),
    [
        (torch.ones(5, 3, dtype=torch.float64), (1, 1, 1, 1)),
        (7 * torch.eye(6, dtype=torch.float64), (0, 1 / 6, 1 / 6, 6)),
        (torch.tensor([[1.0, 0], [-2, 0]], dtype=torch.float64), (-1, 1, 1, 1)),
        (torch.tensor([[1.0, 0], [0, 0], [0, 2]], dtype=torch.float64), (0, 0.5, 0.5, 2)),
    ],
    ids=["collapsed", "orthogonal", "opposite", "zero row"],
)
def test_anisotropy_of_plain_cases(x, figures):
    assert torch.allclose(torch.stack(list(anisotropy(x).values())), torch.tensor(figures, dtype=torch.float64))


def test_anisotropy_of_any_scale_order_and_layout():
    x = DATA["cone"]()
    want = anisotropy(x)
    scales = torch.logspace(-150, 150, len(x), dtype=torch.float64)[:, None]
    strided = torch.empty(12, 60, dtype=torch.float64).copy_(x.T).T
    for other in (x * scales, x.flip(0), strided):
        for figure, value in anisotropy(other).items():
            assert torch.allclose(value, want[figure], rtol=1e-12), figure
    for dtype in (torch.bfloat16, torch.float16):
        low = x.to(dtype)
        assert anisotropy(low) == anisotropy(low.float())
        with torch.autocast("cpu", torch.bfloat16):
            assert anisotropy(low) == anisotropy(low.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_anisotropy_of_what_is_not_finite_is_nan(bad):
    x = DATA["random"]()
    x[3, 4] = bad
    assert all(value.isnan() for value in anisotropy(x).values())
    zero = anisotropy(torch.zeros(4, 3))
    assert zero["mean_cosine"] == 0
    assert all(zero[figure].isnan() for figure in SPECTRUM[1:])


@pytest.mark.parametrize("figure", SPECTRUM)
@pytest.mark.parametrize("name", ["random", "wide", "square", "cone", "clustered"])
def test_gradients_of_anisotropy(name, figure):
    x = DATA[name]().requires_grad_()
    (got,) = torch.autograd.grad(anisotropy(x)[figure], x)
    (want,) = torch.autograd.grad(dense_anisotropy(x)[figure], x)
    assert relative_error(got, want) < 1e-9


def test_gradients_of_anisotropy_where_singular_values_repeat_or_vanish():
    """The effective rank of orthogonal rows is at its maximum; that of rows in a plane rises within the plane."""
    x = DATA["orthogonal"]().requires_grad_()
    (g,) = torch.autograd.grad(anisotropy(x)["effective_rank"], x)
    assert g.abs().max() < 1e-12
    flat, basis = rows(60, 2, seed=6), torch.linalg.qr(rows(12, 2, seed=7)).Q.T
    inside = flat.clone().requires_grad_()
    (want,) = torch.autograd.grad(anisotropy(inside)["effective_rank"], inside)
    x = (flat @ basis).requires_grad_()
    (got,) = torch.autograd.grad(anisotropy(x)["effective_rank"], x)
    assert relative_error(got, want @ basis) < 1e-9
    zeros = torch.cat([flat, torch.zeros(60, 3, dtype=torch.float64)], 1).requires_grad_()
    (got,) = torch.autograd.grad(anisotropy(zeros)["effective_rank"], zeros)
    assert relative_error(got[:, :2], want) < 1e-9
    assert got[:, 2:].abs().max() < 1e-12


def test_higher_derivatives_of_anisotropy():
    x = rows(5, 4, seed=1).requires_grad_()
    for figure in SPECTRUM:
        assert torch.autograd.gradcheck(lambda z, figure=figure: anisotropy(z)[figure], x, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lambda z, figure=figure: anisotropy(z)[figure], x)


# ---------------------------------------------------------------------- the asymptotic terms


@pytest.mark.parametrize("tau", [0.05, 0.5, 2.0])
@pytest.mark.parametrize("name", DATA)
def test_terms_are_those_of_the_matrix(name, tau):
    q = DATA[name]()
    k = q + 0.3 * rows(*q.shape, seed=20)
    for positives in (k, q):
        got, want = asymptotic_terms(q, positives, tau), dense_terms(q, positives, tau)
        assert tuple(got) == TERMS
        single = asymptotic_terms(q.float(), positives.float(), tau)
        for term, value in want.items():
            assert got[term].dtype == torch.float64
            assert got[term].shape == ()
            assert abs(got[term] - value) < 1e-11 / tau, term
            assert single[term].dtype == torch.float32
            assert abs(single[term] - value) < 1e-5 / tau, term


@pytest.mark.parametrize("tau", [0.02, 0.05, 0.5, 5.0])
@pytest.mark.parametrize("name", DATA)
def test_the_bound_holds(name, tau):
    """And is reached where all cosines are equal; the log of a mean is above the mean of the logs."""
    q = DATA[name]()
    k = q + 0.3 * rows(*q.shape, seed=20)
    for positives in (k, q, q.flip(0)):
        terms = asymptotic_terms(q, positives, tau)
        assert terms["bound"] <= terms["uniformity"] + 1e-12 / tau
    terms = asymptotic_terms(q, q, tau)
    assert terms["uniformity"] <= uniformity(q, t=1 / (2 * tau)) + 1 / tau + 1e-12 / tau
    if name in ("collapsed", "opposite", "orthogonal"):
        assert torch.allclose(terms["bound"], terms["uniformity"], rtol=1e-12, atol=1e-12)
    else:
        assert terms["uniformity"] - terms["bound"] > 1e-9


def test_the_bound_is_the_sum_of_all_entries_of_the_product():
    x, tau = DATA["cone"](), 0.05
    N, unit = len(x), F.normalize(x, dim=1)
    total = (unit @ unit.T).sum()
    bound = asymptotic_terms(x, x, tau)["bound"]
    assert torch.allclose(bound, (total - N) / (tau * N * (N - 1)))
    assert torch.allclose(bound, anisotropy(x)["mean_cosine"] / tau)
    assert anisotropy(x)["top_eigenvalue_share"] >= total / N**2


def test_the_alignment_term_is_another_scale_of_alignment():
    q, k = rows(50, 8, seed=1), rows(50, 8, seed=2)
    assert torch.allclose(asymptotic_terms(q, k, 0.1)["alignment"], (alignment(q, k) / 2 - 1) / 0.1)


def on_the_sphere(N, D, cosine, seed):
    """Pairs at one cosine, both sides uniform on the sphere."""
    q, z = F.normalize(rows(N, D, seed=seed)), rows(N, D, seed=seed + 1)
    side = F.normalize(z - q * (q * z).sum(1, keepdim=True))
    return q, cosine * q + math.sqrt(1 - cosine**2) * side


SIZES = (64, 1024, 16384)


def gaps(pairs, tau):
    """InfoNCE − log N less the sum of the terms, for each size; and the terms of the largest."""
    found = []
    for N in SIZES:
        q, k = (x[:N].float() for x in pairs)
        terms = asymptotic_terms(q, k, tau)
        found.append(
            float(info_nce(q, k, temperature=tau) - math.log(N) - terms["alignment"] - terms["uniformity"])
        )
    return found, terms


@pytest.mark.parametrize(("D", "tau", "cosine"), [(4, 0.5, 0.9), (8, 0.3, 0.5), (16, 0.2, 0.8)])
def test_infonce_approaches_the_terms_on_the_sphere(D, tau, cosine):
    """There both terms are known: −κ cos and log c_D(κ), the expectation in closed form."""
    kappa = 1 / tau
    log_c, deviation = log_mean_exp_cosine(kappa, D)[0], log_mean_exp_cosine(2 * kappa, D)[0]
    deviation = math.sqrt(math.exp(deviation - 2 * log_c) - 1)  # of e^(κ cos) / c_D(κ)
    gap, terms = gaps(on_the_sphere(SIZES[-1], D, cosine, seed=3), tau)
    error = deviation / math.sqrt(SIZES[-1])  # of one row's mean over the columns
    assert gap[0] > 8 * gap[1] > 64 * gap[2] > 0  # as 1/N
    assert gap[2] < error
    assert abs(terms["alignment"] + kappa * cosine) < 1e-5
    assert abs(terms["uniformity"] - log_c) < error
    q, k = (x.float() for x in on_the_sphere(SIZES[-1], D, cosine, seed=5))
    loss = info_nce(q, k, temperature=tau) - math.log(SIZES[-1])
    assert abs(loss - (log_c - kappa * cosine)) < 2 * error


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_infonce_approaches_the_terms_of_a_finite_distribution(tau):
    """Pairs drawn from 30; expectations are means over the 30, and exchanging the sides gives other terms."""
    first = clustered(30, 6, 4, seed=1)
    second = first + rows(30, 6, seed=2) + 1
    drawn = torch.randint(0, 30, (SIZES[-1],), generator=torch.Generator().manual_seed(0))
    s = F.normalize(first) @ F.normalize(second).T / tau
    limit = {"alignment": -s.diagonal().mean(), "uniformity": (s.logsumexp(1) - math.log(30)).mean()}
    exchanged = (s.logsumexp(0) - math.log(30)).mean()
    rates = (
        (s.exp() / s.exp().mean(1, keepdim=True)).var(1).mean().sqrt() + s.logsumexp(1).std() + s.diagonal().std()
    )
    error = 3 * float(rates) / math.sqrt(SIZES[-1])
    gap, terms = gaps((first[drawn], second[drawn]), tau)
    assert gap[0] > gap[1] > gap[2] > 0
    assert gap[2] < error
    for term, value in limit.items():
        assert abs(terms[term] - value) < error, term
    assert abs(limit["uniformity"] - exchanged) > 2 * error


def test_the_gap_is_what_the_docstring_says():
    q, k = rows(40, 6, seed=1), rows(40, 6, seed=2)
    terms = asymptotic_terms(q, k, 0.2)
    ratios = info_nce(q, k, temperature=0.2, reduction="none").expm1()
    got = info_nce(q, k, temperature=0.2) - math.log(39) - terms["alignment"] - terms["uniformity"]
    assert torch.allclose(got, ratios.reciprocal().log1p().mean(), rtol=1e-10)


@pytest.mark.parametrize("regime", REGIMES)
def test_terms_of_every_stage_of_training(regime):
    q, k = embeddings(regime, 300, 32)
    tau = REGIMES[regime]
    want = dense_terms(q, k, tau)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        for term, value in asymptotic_terms(q.to(dtype), k.to(dtype), tau).items():
            assert abs(value - want[term]) < tolerance / tau, (dtype, term)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("same", [False, True])
def test_gradients_of_the_terms(term, same):
    q, k = DATA["cone"]().requires_grad_(), (DATA["cone"]() + 0.1 * rows(60, 12, seed=9)).requires_grad_()
    tau = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    inputs = (q, tau) if same else (q, k, tau)
    got = torch.autograd.grad(asymptotic_terms(q, q if same else k, tau)[term], inputs)
    want = torch.autograd.grad(dense_terms(q, q if same else k, tau)[term], inputs)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-10


def test_temperatures_of_every_kind():
    q, k = rows(20, 6, seed=1, dtype=torch.float32), rows(20, 6, seed=2, dtype=torch.float32)
    want = asymptotic_terms(q, k, 0.25)
    for tau in (torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64)):
        got = asymptotic_terms(q, k, tau)
        for term in TERMS:
            assert got[term].dtype == torch.float32
            assert torch.allclose(got[term], want[term])
    for tau in (math.nan, 0.0, -0.25):
        assert all(value.isnan() for value in asymptotic_terms(q, k, torch.tensor(tau)).values())
    assert asymptotic_terms(q, k) == asymptotic_terms(q, k, 0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_terms_of_what_is_not_finite_are_nan(bad, which):
    pair = [rows(20, 6, seed=1), rows(20, 6, seed=2)]
    pair[which][3, 4] = bad
    assert all(value.isnan() for value in asymptotic_terms(*pair, 0.1).values())


# ---------------------------------------------------------------------- errors, and what autograd may be asked for

X = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, not list", lambda: anisotropy([[1.0]])),
        (TypeError, "x must be float64.*int64", lambda: anisotropy(torch.ones(4, 3, dtype=torch.int64))),
        (TypeError, "x must be a dense tensor", lambda: anisotropy(X.to_sparse())),
        (ValueError, r"x must be a matrix.*\(4,\)", lambda: anisotropy(torch.ones(4))),
        (ValueError, r"x must be a matrix.*at least two rows.*\(1, 3\)", lambda: anisotropy(X[:1])),
        (ValueError, r"x must be a matrix.*at least one.*\(4, 0\)", lambda: anisotropy(X[:, :0])),
        (TypeError, "anchors must be a torch.Tensor", lambda: asymptotic_terms(None, X)),
        (TypeError, "positives must be a torch.Tensor", lambda: asymptotic_terms(X, None)),
        (TypeError, "positives must be a dense tensor", lambda: asymptotic_terms(X, X.to_sparse())),
        (TypeError, "anchors must be float64.*int32", lambda: asymptotic_terms(X.int(), X)),
        (ValueError, r"anchors must be.*at least two rows.*\(1, 3\)", lambda: asymptotic_terms(X[:1], X[:1])),
        (ValueError, "positives must have one row for each of the 4", lambda: asymptotic_terms(X, X[:3])),
        (ValueError, "positives must have the anchors' 3 features", lambda: asymptotic_terms(X, X[:, :2])),
        (ValueError, "temperature must be > 0, not 0", lambda: asymptotic_terms(X, X, 0)),
        (ValueError, "temperature must be finite", lambda: asymptotic_terms(X, X, math.inf)),
        (TypeError, "temperature must be a number, not str", lambda: asymptotic_terms(X, X, "0.05")),
        (ValueError, "temperature must be.*one element", lambda: asymptotic_terms(X, X, torch.ones(2))),
    ],
)
def test_errors_name_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_terms_have_one_derivative_in_reverse_mode():
    x, y = rows(6, 4).requires_grad_(), rows(6, 4, seed=1)
    (g,) = torch.autograd.grad(asymptotic_terms(x, y)["uniformity"], x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(g.sum(), x)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"forward-mode differentiation.*reverse mode"),
    ):
        asymptotic_terms(forward_ad.make_dual(x.detach(), y), y)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.vjp):
        loss = functools.partial(lambda z, y: asymptotic_terms(z, y)["bound"], y=y)
        with pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
            transform(loss, y) if transform is torch.func.vjp else transform(loss)(y)


MEMORY = """
import torch
from fused_infonce import anisotropy, asymptotic_terms
from fused_infonce.testing import added_memory

def step(N, D):
    x, y = (torch.randn(N, D, requires_grad=True) for _ in "xy")
    def run():
        for figures in (anisotropy(x), asymptotic_terms(x, y)):
            sum(figures.values()).backward()
    return run

step(64, 8)()
print(added_memory(step(16384, 16), "cpu"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process as Linux reports it")
def test_no_matrix_of_pairs():
    """It would take 1 GiB in fp32 at N = 16384; the rows take 1 MiB each, the default workspace 64."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 96 * 2**20
