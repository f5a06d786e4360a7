"""A griffe extension: what docstrings and signatures need to be shown in Markdown."""

from __future__ import annotations

import pydoc
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

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Writes out a type that has a name of ours, such as ``Reduction``, which is shown as "Literal" else."""
        for parameter in func.parameters:
            if getattr(parameter.annotation, "canonical_path", "") in ("typing.Literal", "typing.Union"):
                meaning = getattr(pydoc.locate(func.module.path), str(parameter.annotation), parameter.annotation)
                parameter.annotation = re.sub(r"\b(?:[a-z_]\w*\.)+", "", str(meaning))


def _formula(found: re.Match[str]) -> str:
    return f"\n{convert(textwrap.dedent(found[1]).strip(), display='block')}\n\n"


def _link(found: re.Match[str]) -> str:
    name = found[1]
    public = name in fused_infonce.__all__
    return f"[`{name}`][fused_infonce.{name}]" if public else f"`{name}`"
