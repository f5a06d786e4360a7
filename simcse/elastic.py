"""torchrun's restarts: a run that lost a process goes on from its last whole checkpoint."""

import os
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

START_FILE = ".simcse-started"  # in the output folder, while torchrun runs: the id of its run


def restarts() -> int:
    """How many times torchrun has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def join_again() -> None:
    """After a restart, the processes' group under a name of its own.

    torchrun keeps its store of addresses over restarts, and torch (2.13) looks there for those of the dead.
    """
    if not restarts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.PrefixStore(f"restart {restarts()}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def mark_start(output_dir: str | Path, run_id: str) -> None:
    """So that a restart tells this launch's run from an older one in the same folder."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        Path(output_dir, START_FILE).write_text(run_id, encoding="utf-8")


def mark_end(output_dir: str | Path) -> None:
    """Remove the mark: at the end, and at a first start that of an older launch which was cut off."""
    with suppress(OSError):
        Path(output_dir, START_FILE).unlink()


def run_of_this_launch(output_dir: str | Path) -> str | None:
    """After a restart, the id of the run that torchrun's first start began; None: it had not begun."""
    if not restarts():
        return None
    with suppress(OSError):
        return Path(output_dir, START_FILE).read_text(encoding="utf-8")
    return None
