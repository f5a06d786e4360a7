"""A batch in mini batches: gradient caching, and the size that is the fastest on this machine.

Each mini batch holds sentences of like length and no more padding than they need. Its activations are either kept
until the backward pass or, in gradient caching, computed a second time there; the gradients have the same bits.
"""

import ctypes
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Embed = Callable[..., tuple[Tensor, Tensor]]

SMALLEST = 32  # sentences in the first mini batch that is measured; each further one is twice as large
GAIN = 0.1  # by which twice the size has to be faster; two runs then seldom choose different sizes
SHARE_OF_FREE_MEMORY = 0.5  # that kept activations may take
UNMEASURED = 64  # sentences, where the weights are sharded and one process alone cannot run the model

PASSES_PER_TRIM = 8  # that are computed again; more would let the heap grow further, trims at each cost a fifth
# glibc's mallopt: parameters and values
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
NEVER, LARGEST = 2**31 - 1, 2**30  # bytes


@dataclass(frozen=True)
class MiniBatches:
    """``size`` sentences are embedded at once, 0: the whole batch.

    Mini batches keep their activations, ``bytes_per_token`` each, as far as they fit into ``budget`` bytes; all
    others are computed again in the backward pass. Neither changes a bit of the gradients.
    """

    size: int = 0
    bytes_per_token: float = 0.0
    budget: float = 0.0


def embed_in_mini_batches(model: Embed, inputs: dict[str, Tensor], plan: MiniBatches) -> tuple[Tensor, Tensor]:
    """``model(**inputs)`` in mini batches of ``plan.size`` rows.

    Gradient caching (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
    2021): each mini batch is embedded without keeping its graph, the loss gives the vectors' gradients at once,
    and the backward embeds each mini batch again, with the same random state, to pass them on. That is what
    activation checkpointing does when a whole mini batch is its unit.
    """
    if not plan.size or plan.size >= len(inputs["input_ids"]):
        return model(**inputs)
    names = list(inputs)
    passes = itertools.count(1)

    def embed(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        # Autocast would give all mini batches the same bf16 copy of a weight, and sum their gradients in bf16.
        torch.clear_autocast_cache()
        return model(**dict(zip(names, tensors, strict=True)))

    def embed_twice(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        if tensors[0].device.type == "cpu" and next(passes) % PASSES_PER_TRIM == 0:
            trim_heap()
        return embed(*tensors)

    places = _mini_batches(inputs["attention_mask"], plan.size)
    tokens = list(itertools.accumulate(len(rows) * width for rows, width in reversed(places)))[::-1]
    outputs = []
    for (rows, width), held in zip(places, tokens, strict=True):
        # Tensors by position: checkpoint finds their device's random state there.
        tensors = [inputs[name][rows, :width] for name in names]
        # The last ones are kept: the backward begins there, and frees them before it computes others again.
        keep = held * plan.bytes_per_token < plan.budget
        outputs.append(embed(*tensors) if keep else checkpoint(embed_twice, *tensors, use_reentrant=False))
    vectors, extra = zip(*outputs, strict=True)
    order = torch.cat([rows for rows, _ in places])
    return torch.cat(vectors)[order.argsort()], torch.stack(extra).sum()


def choose(model: Embed, inputs: dict[str, Tensor], parameters: list[Tensor], size: int | None) -> MiniBatches:
    """The size of mini batches that embeds ``inputs`` fastest, forward and backward.

    Sizes from ``SMALLEST`` on are tried until twice the size is not faster by ``GAIN``, or does not fit. ``size``:
    the one that a resumed run has; then the memory alone is measured. The caller keeps the random state.
    """
    batch = len(inputs["input_ids"])
    budget = SHARE_OF_FREE_MEMORY * _free_memory(inputs["input_ids"].device)
    plan = MiniBatches(size if size is not None else min(SMALLEST, batch), 0.0, budget)
    plan = replace(plan, bytes_per_token=_bytes_per_token(model, inputs, parameters, plan.size or SMALLEST))
    if size is not None:
        return plan
    width = inputs["input_ids"].shape[1]
    best = _seconds_per_row(model, inputs, parameters, plan.size)
    while plan.size < batch:
        larger = min(2 * plan.size, batch)
        if larger * width * plan.bytes_per_token > budget:
            break
        seconds = _seconds_per_row(model, inputs, parameters, larger)
        if seconds > (1 - GAIN) * best:
            break
        plan, best = replace(plan, size=larger), seconds
    return replace(plan, size=0) if plan.size >= batch else plan


@functools.cache
def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def trim_heap() -> None:
    """Return glibc's free memory to the system: between the small tensors of mini batches little is reused."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensors, instead of returning it to the system.

    By default a tensor above 32 MiB is mapped and unmapped for each use, and the system clears its pages anew at
    each step: half the time of a step of 128 sentences, by ``getrusage`` (MiniLM, 2 cores).
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def _mini_batches(mask: Tensor, size: int) -> list[tuple[Tensor, int]]:
    """For each mini batch of a mask (R, L) its rows, and how many columns they need; the longest rows first."""
    lengths, order = _used_columns(mask).sort(descending=True, stable=True)
    return list(zip(order.split(size), lengths[::size].clamp(min=1).tolist(), strict=True))


def _used_columns(mask: Tensor) -> Tensor:
    """Columns up to the last token of each row; where padding is on the left, all. (R, L) → (R,)"""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask.bool() * places).amax(1)


def _free_memory(device: torch.device) -> float:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        with suppress(OSError, ValueError):  # outside of a container there is no limit
            limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
            free = min(free, float(limit) - float(used))
    except (OSError, StopIteration):
        return 0.0  # unknown: nothing is kept
    return max(free, 0.0) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _bytes_per_token(model: Embed, inputs: dict[str, Tensor], parameters: list[Tensor], size: int) -> float:
    """What autograd holds for a mini batch of the longest rows, weights apart, for each of its tokens."""
    rows, width = _mini_batches(inputs["attention_mask"], size)[0]
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(**{name: x[rows, :width] for name, x in inputs.items()})
    del output
    return sum(held.values()) / (len(rows) * width)


def _seconds_per_row(model: Embed, inputs: dict[str, Tensor], parameters: list[Tensor], size: int) -> float:
    """Forward and backward of mini batches at the quartiles of the length; the faster of two runs."""
    places = _mini_batches(inputs["attention_mask"], size)
    chosen = [places[len(places) // 4], places[3 * len(places) // 4]][: len(places)]
    times = []
    for _ in range(2):
        begin = _now(inputs["input_ids"].device)
        for rows, width in chosen:
            torch.clear_autocast_cache()
            vectors, extra = model(**{name: x[rows, :width] for name, x in inputs.items()})
            torch.autograd.grad(vectors.float().square().sum() + extra, parameters, allow_unused=True)
        times.append(_now(inputs["input_ids"].device) - begin)
    return min(times) / sum(len(rows) for rows, _ in chosen)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
