"""Every launcher of the Triton backend alone, with the arguments that a whole call gives it, and its variants.

The launchers are the functions of ``fused_infonce.kernels`` that the backend calls. They are recorded during a
call and then called by themselves, so that nothing here repeats their arguments. A variant changes one flag of the
launch settings, or lets cuBLAS make the product instead of the kernel, or the other way round.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from bench.cases import Case, make_batch, run_step
from bench.measure import Event, clock_for
from bench.registry import Candidate, first_line

HELPERS = ("common", "settings")  # modules of the kernels that launch nothing
FLAGS = ("library",)  # arguments of launchers: whether cuBLAS makes the result, and not a kernel


@dataclass
class Launch:
    """A launcher and its arguments; of like calls the one with the most memory."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    calls: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(_tensors("", self.arguments))

    @property
    def bytes(self) -> int:
        """Of all tensors it takes, each once: what is read or written at least."""
        memory = {(x.data_ptr(), x.shape): x.numel() * x.element_size() for x in self.tensors.values()}
        return sum(memory.values())

    @property
    def flops(self) -> int:
        """Of its matrix products: rows by rows for similarities, the tile by rows for gradients."""
        found = self.arguments
        q, k, tile = found.get("queries"), found.get("keys"), found.get("tile")
        if isinstance(tile, Tensor):
            made = [(found.get("acc_rows"), tile.shape[1]), (found.get("acc_columns"), tile.shape[0])]
            return sum(2 * out.numel() * summed for out, summed in made if out is not None)
        if isinstance(q, Tensor) and isinstance(k, Tensor) and self.name.rpartition(".")[2] in SIMILARITIES:
            return 2 * q.shape[0] * k.shape[0] * q.shape[1]
        return 0

    @property
    def kind(self) -> tuple[Any, ...]:
        """What launches other code: which tensors there are, their dtypes, and every flag."""
        flags = [(name, x) for name, x in self.arguments.items() if isinstance(x, bool) or x is None]
        return (self.name, *((name, x.dtype) for name, x in self.tensors.items()), *flags)


SIMILARITIES = ("exp_similarity", "ratio_sums", "weighted_ratios")


def measure(
    case: Case,
    candidates: list[Candidate],
    device: str,
    seconds: float,
    with_variants: bool = True,
    timed: bool = True,
) -> Iterator[Event]:
    """Yields time, TFLOP/s and GB/s of each launch of a call, and of its variants.

    Not timed, it makes each once, so that its kernels are compiled, and yields the seconds.
    """
    batch, clock = make_batch(case, device), clock_for(device)
    loss = candidates[0].loss_for(case)
    launches = record(lambda: run_step(loss, batch, case, device))
    if not launches:
        raise RuntimeError(f"{candidates[0].name} called no launcher of fused_infonce.kernels")
    for launch in launches:
        others = variants(launch.arguments) if with_variants else ()
        for variant, arguments in (("as called", launch.arguments), *others):
            row = {"candidate": launch.name, "variant": variant, "calls": launch.calls}
            yield "start", {"candidate": launch.name}
            start = time.perf_counter()
            try:
                launch.function(**arguments)
                if not timed:
                    yield "result", row | {"status": "ok", "seconds": [time.perf_counter() - start]}
                    continue
                ms = clock(lambda f=launch.function, arguments=arguments: f(**arguments))
            except Exception as error:  # a variant may need more than the device has
                yield "result", row | {"status": "failed", "reason": first_line(error)}
                continue
            rates = {"gb_s": launch.bytes / ms / 1e6, "tflops": launch.flops / ms / 1e9 if launch.flops else None}
            shapes = {name: str(tuple(x.shape)).replace(" ", "") for name, x in launch.tensors.items()}
            yield "result", row | {"status": "ok", "ms": ms, **rates, "shapes": shapes}


def variants(arguments: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a name and the arguments with one flag changed, of the launch settings or among the arguments."""
    for name, value in arguments.items():
        if name in FLAGS:
            yield f"{name}={not value}", arguments | {name: not value}
        if any(arguments.get(flag) for flag in FLAGS):  # the library has no launch settings
            continue
        if is_dataclass(value) and type(value).__module__.endswith("kernels.settings"):
            for flag in (f.name for f in fields(value) if isinstance(getattr(value, f.name), bool)):
                changed = replace(value, **{flag: not getattr(value, flag)})
                yield f"{flag}={getattr(changed, flag)}", arguments | {name: changed}


def record(step: Callable[[], object]) -> list[Launch]:
    """Returns the launches of a step, like calls once."""
    step()  # what is set up once, and compiled, is no part of it
    found: dict[Any, Launch] = {}
    inside = False

    def recorder(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def launch(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:  # a launcher that calls another one counts once
                return function(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            this = Launch(name, function, dict(bound.arguments))
            if this.tensors:
                other = found.setdefault(this.kind, this)
                if other.bytes < this.bytes:
                    other.arguments = this.arguments
                other.calls += 1
            inside = True
            try:
                return function(*args, **kwargs)
            finally:
                inside = False

        return launch

    with replaced(recorder):
        step()
    return list(found.values())


@contextlib.contextmanager
def replaced(recorder: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, every public function of the kernels' modules is what ``recorder`` makes of it."""
    import fused_infonce.kernels as package

    before = []
    try:
        for info in pkgutil.iter_modules(package.__path__):
            if info.name in HELPERS:
                continue
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if function.__module__ == module.__name__ and not name.startswith("_"):
                    before.append((module, name, function))
                    setattr(module, name, recorder(f"{info.name}.{name}", function))
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of arguments, also of those in tuples, dictionaries and the like, by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, x in value.items():
            yield from _tensors(f"{name}.{key}".lstrip("."), x)
    elif isinstance(value, (tuple, list)):
        for i, x in enumerate(value):
            yield from _tensors(f"{name}.{i}", x)
