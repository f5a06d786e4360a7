"""A griffe extension: reStructuredText in docstrings as the Markdown that the site shows."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

import fused_infonce

FORMULA = re.compile(r"^\.\. math::\n((?:(?:[ \t]+.*)?\n)+)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turns formulas into MathML, which browsers show without a script, and roles into links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = FORMULA.sub(_formula, obj.docstring.value)
            obj.docstring.value = ROLE.sub(_link, text)


def _formula(found: re.Match[str]) -> str:
    return f"\n{convert(textwrap.dedent(found[1]).strip(), display='block')}\n\n"


def _link(found: re.Match[str]) -> str:
    name = found[1]
    public = name in fused_infonce.__all__
    return f"[`{name}`][fused_infonce.{name}]" if public else f"`{name}`"
