"""torchrun's restarts: a run that lost a process goes on from its last whole checkpoint."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

START_FILE = ".started"  # in the output folder, while torchrun runs


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


def mark_start(output_dir: str) -> None:
    """So that a restart tells this run's checkpoints from older ones in the same folder."""
    if "TORCHELASTIC_RESTART_COUNT" in os.environ and not restarts():
        Path(output_dir, START_FILE).touch()


def mark_end(output_dir: str) -> None:
    Path(output_dir, START_FILE).unlink(missing_ok=True)


def checkpoint_of_this_run(output_dir: str) -> str | None:
    """After a restart, the latest checkpoint since torchrun's first start; None: there is none."""
    start = Path(output_dir, START_FILE)
    if not restarts() or not start.is_file():
        return None
    since = start.stat().st_mtime
    states = Path(output_dir).glob("checkpoint-*/trainer_state.json")
    ours = [state.parent for state in states if state.stat().st_mtime >= since]
    return str(max(ours, key=lambda folder: int(folder.name.split("-")[1]))) if ours else None
