"""A griffe extension: what docstrings and signatures need to be shown in Markdown."""

from __future__ import annotations

import inspect
import pydoc
import re
import textwrap
import typing
from typing import Any

import griffe
from latex2mathml.converter import convert

import fused_infonce

FORMULA = re.compile(r"^\.\. math::\n((?:(?:[ \t]+.*)?\n)+)", re.MULTILINE)
NAMES = re.compile(r"^(    \w[\w, ]*,)\n +(?=\w[\w, ]*:)", re.MULTILINE)  # of several arguments, on two lines
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turns formulas into MathML, which browsers show without a script, and roles into links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = FORMULA.sub(_formula, inspect.cleandoc(obj.docstring.value))
            obj.docstring.value = ROLE.sub(_link, NAMES.sub(r"\1 ", text))

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Shows the signature that a function has at run time, and the meaning of a type's name of ours."""
        signature = getattr(pydoc.locate(func.path), "__signature__", None)
        if signature:
            func.parameters = griffe.Parameters(*map(_parameter, signature.parameters.values()))
        for parameter in func.parameters:
            if isinstance(parameter.annotation, griffe.ExprName) or str(parameter.annotation).isidentifier():
                meaning = getattr(pydoc.locate(func.module.path), str(parameter.annotation), None)
                if typing.get_origin(meaning):
                    parameter.annotation = re.sub(r"\b(?:[a-z_]\w*\.)+", "", str(meaning))


def _parameter(p: inspect.Parameter) -> griffe.Parameter:
    default = None if p.default is p.empty else getattr(p.default, "__name__", repr(p.default))
    annotation = None if p.annotation is p.empty else str(p.annotation)
    kind = griffe.ParameterKind(p.kind.description)
    return griffe.Parameter(p.name, annotation=annotation, kind=kind, default=default)


def _formula(found: re.Match[str]) -> str:
    return f"\n{convert(textwrap.dedent(found[1]).strip(), display='block')}\n\n"


def _link(found: re.Match[str]) -> str:
    name = found[1]
    public = name in fused_infonce.__all__
    return f"[`{name}`][fused_infonce.{name}]" if public else f"`{name}`"
