"""The house: what importing brings, and which way imports run."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fused_infonce
import simcse

ROOT = Path(fused_infonce.__file__).parents[1]
WHERE = """
import sys, fused_infonce.kernels.settings, simcse
for name in ("fused_infonce", "fused_infonce.kernels", "fused_infonce.kernels.settings", "simcse"):
    print(sys.modules[name].__file__)
"""


def run_python(code: str, folder: Path, *path: Path) -> str:
    """What ``code`` prints in ``folder``, where ``path`` and the test's own packages can be imported."""
    # Without `site`, an editable install of this project takes no part: it would find what the folder lacks.
    elsewhere = [entry for entry in sys.path if entry and not Path(entry, "fused_infonce").exists()]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, *elsewhere]))}
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=folder, env=env)
    assert out.returncode == 0, out.stderr
    return out.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what is packaged, as git checks it out."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("fused_infonce", "kernels", "simcse", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


def build(checkout: Path, kind: str) -> Path:
    """The wheel or sdist that a build front end would get."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; build_meta.build_{kind}('out')"
    run_python(code, checkout)
    (made,) = (checkout / "out").iterdir()
    return made


def test_public_names():
    assert set(fused_infonce.__all__) == {
        "GSInfoNCELoss", "alignment", "anisotropy", "asymptotic_terms", "contrastive_stats", "cosine_logsumexp",
        "gs_infonce", "info_nce", "uniformity",
    }  # fmt: skip
    assert all(getattr(fused_infonce, name).__doc__ for name in fused_infonce.__all__)
    assert simcse.__all__ == ["SimCSE", "__version__"]
    from simcse import delimited  # noqa: F401 (becomes an attribute of the package)

    assert {name for name in dir(simcse) if not name.startswith("__")} == {"SimCSE"}
    assert "__version__" in dir(simcse)
    for package in (fused_infonce, simcse):
        assert (Path(package.__file__).parent / "py.typed").exists()


def test_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fused_infonce.__version__)
    assert simcse.__version__ == fused_infonce.__version__
    with pytest.raises(AttributeError, match="no attribute 'simcse'"):
        simcse.simcse  # noqa: B018


def test_import_needs_torch_alone():
    """Neither Triton nor anything of the trainer."""
    code = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'datasets', 'scipy', 'matplotlib'): sys.modules[name] = None\n"
        "import torch, fused_infonce\n"
        "print(float(fused_infonce.info_nce(torch.eye(3), torch.eye(3))))"
    )
    assert float(run_python(code, ROOT)) == pytest.approx(4.1e-9, rel=0.02)


def test_kernels_are_a_part_of_fused_infonce_and_shadow_nothing():
    import fused_infonce.kernels

    assert Path(fused_infonce.kernels.__file__).parent.samefile(ROOT / "kernels" / "infonce")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("folder", "others"),
    [("fused_infonce", "simcse|bench|tests"), ("kernels", "simcse|bench|tests"), ("simcse", "bench|tests")],
)
def test_imports_run_one_way(folder, others):
    for file in (ROOT / folder).rglob("*.py"):
        assert not re.search(rf"^\s*(?:from|import)\s+(?:{others})\b", file.read_text(), re.MULTILINE), file


@pytest.mark.parametrize("kernels", ["absent", "a text file", "a folder"])
def test_a_checkout_that_is_not_installed_can_be_imported(checkout, kernels):
    """Whatever an older checkout, or a system without links, has left at the place of the package."""
    place = checkout / "fused_infonce" / "kernels"
    if kernels == "a text file":
        place.write_text("../kernels/infonce")
    elif kernels == "a folder":
        place.symlink_to("../kernels/infonce")
    files = [Path(file) for file in run_python(WHERE, checkout).split()]
    assert [file.parent.resolve() for file in files] == [
        checkout / "fused_infonce", checkout / "kernels" / "infonce", checkout / "kernels" / "infonce",
        checkout / "simcse",
    ]  # fmt: skip


def test_a_wheel_holds_both_packages_and_can_be_imported_anywhere(checkout, tmp_path):
    with zipfile.ZipFile(build(checkout, "wheel")) as wheel:
        wheel.extractall(tmp_path / "installed")
    installed = tmp_path / "installed"
    (metadata,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir()} == {"fused_infonce", "simcse", metadata.name}
    assert importlib.metadata.Distribution.at(metadata).version == fused_infonce.__version__
    for package, source in (("fused_infonce/kernels", "kernels/infonce"), ("simcse", "simcse")):
        wanted = {str(p.relative_to(checkout / source)) for p in (checkout / source).rglob("*") if p.is_file()}
        assert {str(p.relative_to(installed / package)) for p in (installed / package).rglob("*.*")} == wanted
    assert (installed / "fused_infonce" / "py.typed").exists()

    files = run_python(WHERE, tmp_path, installed).split()
    assert all(Path(file).is_relative_to(installed) for file in files)
    files = run_python(WHERE, checkout, installed).split()  # inside the clone, the clone
    assert all(Path(file).is_relative_to(checkout) for file in files)


def test_a_source_distribution_makes_the_same_wheel(checkout, tmp_path):
    with tarfile.open(build(checkout, "sdist")) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("fused_infonce-*")
    assert not (unpacked / "tests").exists()
    files = run_python(WHERE, unpacked).split()
    assert all(Path(file).is_relative_to(unpacked) for file in files)
    shutil.rmtree(checkout / "out")
    with zipfile.ZipFile(build(unpacked, "wheel")) as first, zipfile.ZipFile(build(checkout, "wheel")) as second:
        assert set(first.namelist()) == set(second.namelist())


def test_tests_of_the_product_import_no_benchmark():
    # Tests of the benchmarks and the experiments, and of all command lines.
    own = {
        "test_bench.py",
        "losses_for_bench.py",
        "test_study.py",
        "test_console.py",
        "test_files.py",
        "test_roofline.py",
    }
    own |= {
        "test_first_contact.py",
        "test_first_contact_jobs.py",
        "jobs_for_contact.py",
        "contact_on_fake_driver.py",
    }
    for file in (ROOT / "tests").glob("*.py"):
        assert file.name in own or not re.search(
            r"^\s*(?:from|import)\s+bench\b", file.read_text(), re.MULTILINE
        ), file
