"""The register of candidates: implementations of the loss that are compared.

A candidate is a function of a case that returns a loss, which is a function of a batch. A further file of
candidates, which use the same decorator, is measured beside these: ``python -m bench loss --also my_losses.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.cases import MODES, PUBLISHED, Case, Loss, Mode

ALL_MODES: tuple[Mode, ...] = (*MODES, *PUBLISHED)


class Unsupported(Exception):  # noqa: N818 (a result, not an error)
    """A candidate cannot compute a case; the message is the reason."""


@dataclass(frozen=True)
class Candidate:
    name: str
    make: Callable[[Case], Loss]  # raises Unsupported or ImportError where it cannot run
    modes: tuple[Mode, ...] = ("one-way", "forward")
    noise: bool = False  # whether it takes noise
    negatives: bool = False  # whether it takes hard negatives
    package: str | None = None  # on PyPI, whose version is recorded
    cuda: bool = False  # whether it needs CUDA
    expects: str = "sampled"  # "expected": noise in closed form
    loss: str = "InfoNCE"  # another loss is not checked, and is timed for scale only

    def loss_for(self, case: Case) -> Loss:
        """Returns the loss; raises Unsupported where the candidate cannot compute the case or is not installed."""
        if case.mode not in self.modes:
            raise Unsupported(f"not {case.mode}")
        if case.noise and not self.noise:
            raise Unsupported("no noise")
        if case.negatives and not self.negatives:
            raise Unsupported("no hard negatives")
        if self.expects == "expected" and not case.noise:
            raise Unsupported("without noise it is ours-torch or ours-triton")
        if self.cuda and not torch.cuda.is_available():
            raise Unsupported("needs CUDA" + (f" and the package {self.package}" if not self.version() else ""))
        try:
            return self.make(case)
        except ImportError as error:
            if isinstance(error, ModuleNotFoundError) and not self.version():
                raise Unsupported("not installed") from None
            raise Unsupported(f"does not import: {first_line(error)}") from None

    def version(self) -> str | None:
        try:
            return version(self.package) if self.package else None
        except PackageNotFoundError:
            return None


CANDIDATES: dict[str, Candidate] = {}


def candidate(name: str, **facts: object) -> Callable[[Callable[[Case], Loss]], Callable[[Case], Loss]]:
    """Registers ``make``, a function of a case, under a name; ``facts`` are further fields of Candidate."""

    def register(make: Callable[[Case], Loss]) -> Callable[[Case], Loss]:
        CANDIDATES[name] = Candidate(name, make, **facts)  # type: ignore[arg-type]
        return make

    return register


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
