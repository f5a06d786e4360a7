"""The house: what importing brings, and which way imports run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fused_infonce

ROOT = Path(fused_infonce.__file__).parents[1]


def test_public_names():
    assert set(fused_infonce.__all__) == {
        "GSInfoNCELoss", "alignment", "contrastive_stats", "gs_infonce", "info_nce", "uniformity",
    }  # fmt: skip
    assert all(getattr(fused_infonce, name).__doc__ for name in fused_infonce.__all__)
    assert (ROOT / "fused_infonce" / "py.typed").exists()


def test_import_needs_torch_alone():
    """Neither Triton nor anything of the trainer."""
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'datasets', 'scipy', 'matplotlib'): sys.modules[name] = None\n"
        "import torch, fused_infonce\n"
        "print(float(fused_infonce.info_nce(torch.eye(3), torch.eye(3))))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert float(out.stdout) == pytest.approx(4.1e-9, rel=0.02)


def test_kernels_are_a_part_of_fused_infonce_and_shadow_nothing():
    import fused_infonce.kernels

    assert Path(fused_infonce.kernels.__file__).parent == ROOT / "kernels" / "infonce"
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("folder", "others"),
    [("fused_infonce", "simcse|bench|tests"), ("kernels", "simcse|bench|tests"), ("simcse", "bench|tests")],
)
def test_imports_run_one_way(folder, others):
    for file in (ROOT / folder).rglob("*.py"):
        assert not re.search(rf"^\s*(?:from|import)\s+(?:{others})\b", file.read_text(), re.MULTILINE), file


def test_tests_of_the_product_import_no_benchmark():
    own = {"test_bench.py", "losses_for_bench.py", "test_study.py"}  # tests of the benchmarks and the experiments
    for file in (ROOT / "tests").glob("*.py"):
        assert file.name in own or not re.search(
            r"^\s*(?:from|import)\s+bench\b", file.read_text(), re.MULTILINE
        ), file
