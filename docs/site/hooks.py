"""MkDocs hooks: the pages at the repository's root, the pictures and the examples become a part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
COPIED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "CITATION.cff")
COPIED += ("bench/results/**/*.png", "bench/results/**/*.md")
COPIED += ("experiments/results/**/*.png", "experiments/results/**/*.md")
ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]+")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the files of ``COPIED`` at the same path, and each example as a page that shows its source."""
    for pattern in COPIED:
        for found in sorted(ROOT.glob(pattern)):
            path = found.relative_to(ROOT).as_posix()
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for example in sorted(ROOT.glob("examples/*.py")):
        page = f"# {example.name}\n\n```python\n{example.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"examples/{example.stem}.md", content=page))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrites links between ``docs/`` and the root, which are one folder in the site, and links to examples."""
    markdown = re.sub(r"\]\((?:\.\./|docs/)(?=\w)", "](", markdown)
    return re.sub(r"\]\((examples/\w+)\.py\)", r"](\1.md)", markdown)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Raises where a page would load a script, a style or a picture from another host."""
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        if found := ELSEWHERE.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.relative_to(config.site_dir)} loads from another host: {found[0]}")
