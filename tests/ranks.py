"""Processes that talk over gloo, started once and asked many times."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms want it on a GPU

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 120  # seconds that an answer may take


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Ranks:
    """``size`` processes; ``run(f, …)`` has each call f(group, …), f a function of a module in this folder."""

    def __init__(self, size: int, backend: str = "gloo", timeout: float = 60):
        context = mp.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = rank, size, port, theirs, backend, timeout
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        """What f returns on each of the first ``size`` ranks, whose group it is given."""
        return [answer for answer, _ in self.tried(function, *args, size=size, check=True)]

    def tried(
        self, function: Callable[..., Any], *args: Any, size: int | None = None, check: bool = False
    ) -> list[tuple[Any, str]]:
        """The same, with the error's text where there was one."""
        for pipe in self.pipes:
            pipe.send((function, args, size or len(self.pipes)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} has not answered for {PATIENCE} seconds"
            answers.append(pipe.recv())
        for rank, (_, error, trace) in enumerate(answers):
            assert not (check and error), f"rank {rank}: {trace}"
        return [(answer, error) for answer, error, _ in answers[:size]]

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join()


def _serve(rank: int, size: int, port: int, pipe: Connection, backend: str, timeout: float) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is NaN here, too
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # as torchrun does
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
    groups: dict[int, Any] = {size: dist.group.WORLD}
    while True:
        try:
            function, args, wanted = pipe.recv()
        except EOFError:
            return
        answer, error, trace = None, "", ""
        try:
            if wanted not in groups:
                groups[wanted] = dist.new_group(list(range(wanted)))
            if rank < wanted:
                answer = function(groups[wanted], *args)
        except Exception as exception:
            error, trace = f"{type(exception).__name__}: {exception}", traceback.format_exc()
        pipe.send((_portable(answer), error, trace))


def _portable(answer: Any) -> Any:
    """Tensors by value: this process may be gone before the other reads them."""
    if isinstance(answer, torch.Tensor):
        return answer.detach().cpu().clone().numpy()
    if isinstance(answer, (list, tuple)):
        return [_portable(x) for x in answer]
    return {k: _portable(v) for k, v in answer.items()} if isinstance(answer, dict) else answer
