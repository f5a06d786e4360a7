"""The figure of docs/theory.md: its curves, its spectra, and its table of noise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from test_simcse_model import make_tiny_model
from test_simcse_sts import ROWS, write_sts

from experiments import theory
from fused_infonce import contrastive_stats

WORDS = {"a": "snow", "b": "rain", "c": "a man plays", "d": "a woman sings"}


def test_the_document_has_the_table_of_noise():
    assert theory.noise_table() in Path(__file__).parents[1].joinpath("docs/theory.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("tau", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("cosine", theory.SHARES_COSINE)
def test_the_share_of_noise_is_that_of_a_pair_without_negatives(tau, cosine):
    q = torch.zeros(1, 768, dtype=torch.float64)
    k = q.clone()
    q[0, 0], k[0, 0], k[0, 1] = 1, cosine, math.sqrt(1 - cosine**2)
    stats = contrastive_stats(q, k, temperature=tau, noise="expected", num_noise=192, noise_weight=2.0)
    assert theory.noise_share(tau, cosine, noise_weight=2.0) == pytest.approx(
        float(stats["noise_share"]), rel=1e-9
    )


@pytest.mark.parametrize("sphere", [theory.Sphere(), theory.Sphere(8, 0.3, 0.5)], ids=str)
def test_the_curves_meet_at_the_limit_above_the_bound(sphere):
    found = theory.curves(sphere, (64, 512, 4096))
    assert [c.N for c in found] == [64, 512, 4096]
    assert all(c.bound < c.terms < c.loss for c in found)
    assert found[0].loss - found[0].terms > found[1].loss - found[1].terms > found[2].loss - found[2].terms
    assert found[-1].terms == pytest.approx(sphere.limit, abs=0.03)
    assert found[-1].bound == pytest.approx(-sphere.cosine / sphere.tau, abs=0.03)


def test_the_command_draws_two_encoders(tmp_path, capsys):
    model = make_tiny_model(tmp_path / "tiny:one")  # a colon of the folder is not that of a pooler
    sts = write_sts(tmp_path / "sts.tsv", [(*row[:4], WORDS[row[4]], WORDS[row[5]]) for row in ROWS])
    models = [f"{model}:avg", f"{model}:cls_before_pooler", str(model)]
    theory.main(["--models", *models, "--sts_data", str(sts), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / theory.PICTURE).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count(f"| {model}, avg |") == 2
    assert printed.count(f"| {model}, cls_before_pooler |") == 1
    assert "| 16,384 | " in printed


def test_spectra_are_shares_of_the_vectors_that_are_measured(tmp_path):
    model = make_tiny_model(tmp_path / "tiny")
    sts = write_sts(tmp_path / "sts.tsv", [(*row[:4], WORDS[row[4]], WORDS[row[5]]) for row in ROWS])
    found = theory.spectrum(str(model), str(sts))
    assert sum(found.shares) == pytest.approx(1)
    assert found.shares == sorted(found.shares, reverse=True)
    assert found.figures["top_singular_share"] == pytest.approx(found.shares[0])
