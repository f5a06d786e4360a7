"""The code blocks of docs/migrating.md run and agree, before and after; those of losses.md and examples run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


class _Model(torch.nn.Module):
    """Stands for a sentence-transformers model: the losses are given embeddings."""

    def __getitem__(self, _):
        return self


@pytest.mark.parametrize("section", SECTIONS)
def test_before_and_after(section):
    for package in re.findall(r"from (sentence_transformers|pytorch_metric_learning)", SECTIONS[section]):
        pytest.importorskip(package)
    blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert len(blocks) == 2
    a, b = (F.normalize(rows(10, 16, seed=s)) for s in (1, 2))
    names = {"image_features": a, "text_features": b, "z0": a, "z1": b, "anchors": a, "positives": b}
    names |= {"logit_scale": torch.tensor(30.0), "model": _Model()}
    found = []
    for block in blocks:
        scope = dict(names)
        exec(block, scope)
        loss = scope["loss"]
        if isinstance(loss, torch.nn.Module):
            loss = loss.compute_loss_from_embeddings([a, b], None)
        found.append(loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # a logit scale is fp32


def test_the_page_of_losses():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(), re.DOTALL):
        exec(block, {})


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.stem)
def test_example(example, tmp_path):
    if "sentence_transformers" in example.read_text(encoding="utf-8"):
        pytest.importorskip("sentence_transformers")
    done = subprocess.run(
        [sys.executable, str(example)], capture_output=True, text=True, cwd=tmp_path, timeout=280, env=os.environ
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(x) for x in re.findall(r"loss +([\d.]+)", done.stdout)] or eval(done.stdout.split(":")[-1])
    assert losses[-1] < losses[0]
