"""The pages: every block of code runs or says why not, and the README's numbers are those that were measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_console import PROGRAMS
from test_simcse_model import make_tiny_model

from fused_infonce import __version__
from simcse.collator import packaged_file

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
BEFORE_AND_AFTER = "docs/migrating.md"  # tests/test_migrating.py runs and compares its blocks
TESTS = re.compile(r"pytest -m gpu\b.*")  # a marker in pyproject.toml


class Block(NamedTuple):
    page: str
    language: str
    text: str
    reason: str | None  # why it is not run


BLOCKS = [
    Block(page, m["language"], m["text"], m["reason"]) for page, t in PAGES.items() for m in FENCE.finditer(t)
]


def blocks(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.reason is None]


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=env, timeout=280
    )


# ------------------------------------------------------------------ blocks of code


def test_every_block_has_a_language_that_is_checked():
    assert {block.language for block in BLOCKS} <= {"python", "sh", "diff", "text", "bibtex"}
    assert all(page.count("```") % 2 == 0 for page in PAGES.values())
    for block in BLOCKS:
        assert block.reason is None or len(block.reason) > 10, block


@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")} - {BEFORE_AND_AFTER}))
def test_the_python_of_a_page_runs(page, tmp_path):
    """All of a page's blocks one after the other, where a trained model and a file of sentences lie."""
    code = "\n".join(block.text for block in blocks("python") if block.page == page)
    if "SimCSE(" in code:
        make_tiny_model(tmp_path / "runs" / "first")
        sentences = Path(packaged_file("sentences.txt")).read_text(encoding="utf-8").splitlines()[:20]
        (tmp_path / "sentences.txt").write_text("\n".join(sentences), encoding="utf-8")
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_first_snippet_is_short_and_runs_alone(tmp_path):
    first = next(block for block in blocks("python") if block.page == "README.md")
    assert len(first.text.splitlines()) <= 10
    done = run(first.text, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r"\d+\.\d\d nats\n", done.stdout)


@pytest.mark.parametrize("block", blocks("diff"), ids=lambda block: block.text.split()[1])
def test_a_one_line_diff_gives_the_class_it_replaces(block):
    removed, added = block.text.splitlines()
    assert (removed[0], added[0]) == ("-", "+")
    names: dict[str, Any] = {}
    if "sentence_transformers" in removed:
        pytest.importorskip("sentence_transformers")
    exec(added[1:], names)
    name = removed.split()[-1]
    assert names[name].__module__.startswith("fused_infonce.integrations.")
    try:
        exec(removed[1:], old := {})
    except ImportError:
        return  # the library is not installed; tests/test_dropins.py states its arguments
    assert names[name].__name__ == f"Fused{old[name].__name__}"


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: f"{block.page}: {block.text[:30]}")
def test_every_shell_line_is_a_command_that_test_console_parses(block):
    for line in block.text.replace("\\\n", " ").splitlines():
        assert not line.strip() or PROGRAMS.fullmatch(line.strip()) or TESTS.fullmatch(line.strip()), line
        assert "..." not in line, f"{line}: test_console leaves it out"


# ------------------------------------------------------------------ the README, and the release


def test_the_readme_fits_two_hundred_lines_and_its_generated_tables_eight_rows():
    assert len(README.splitlines()) <= 200
    for text in re.findall(r"<!-- bench: begin .*? -->\n(.*?)<!-- bench: end -->", README, re.DOTALL):
        assert text.strip(), "python -m bench report bench/results --readme README.md fills it"
        rows = 0
        for line in text.splitlines():
            rows = rows + 1 if line.startswith("|") else 0
            assert rows <= 2 + 8


def measured(job: str, candidate: str, **case: Any) -> dict[str, Any]:
    """The row of a one-way case in bf16, in the folder of results whose pictures the README shows."""
    folder = re.search(r'src="(bench/results[^"]*)/[^/"]+\.png"', README)
    assert folder
    rows = json.loads((ROOT / folder[1] / f"{job}.json").read_text(encoding="utf-8"))["rows"]
    wanted = {"candidate": candidate, "mode": "one-way", "dtype": "bf16", "status": "ok"} | case
    (row,) = (r for r in rows if all(r.get(name) == value for name, value in wanted.items()))
    return row  # type: ignore[no-any-return]


def test_the_first_sentence_of_the_readme_holds_what_was_measured():
    memory = [measured("memory", name, N=16384, regime="middle") for name in ("ours-torch", "naive")]
    error = [measured("accuracy", name, regime="trained") for name in ("ours-torch", "naive")]
    mib, dq = [f"{row['mib']['all']:,.0f}" for row in memory], [f"{row['errors']['dq']:.1e}" for row in error]
    sentences = (
        f"InfoNCE of 16,384 pairs in {mib[0]} MiB instead of {mib[1]} MiB, and the gradient of a trained model in "
        f"bf16 to {dq[0]} instead of {dq[1]}",
        f"N = 16,384, D = {memory[0]['D']}, memory beyond the inputs; relative error of the gradient at "
        f"N = {error[0]['N']}, D = {error[0]['D']}",
    )
    for sentence in sentences:
        assert sentence in " ".join(README.split()), f"write: {sentence}"


def test_the_scores_of_the_readme_are_those_of_the_trainers_page():
    table = re.search(r"^\| MiniLM.*\n\|[-|]+\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table
    for row in table[1].splitlines():
        assert row in PAGES["docs/trainer.md"]


def test_the_readme_links_to_every_page():
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in README, page


def test_relative_links_lead_to_files():
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", FENCE.sub("", text))
        for link in [*links, *re.findall(r'src="([^":]+)"', text)]:
            assert (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_the_release_has_one_version():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(
        rf"^## {re.escape(__version__)} \(", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )


def test_every_page_is_in_the_sites_navigation():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        assert f": {page.removeprefix('docs/')}\n" in settings, page
