"""Chunks of rows fill the multiprocessors and spare the columns' accumulator, by the real rule, without a GPU."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from fused_infonce.kernels import settings
from fused_infonce.tiled import chunks, triton_memory
from fused_infonce.tiled.operands import Precision
from fused_infonce.tiled.problem import TiledProblem

ROWS, FEATURES = (16384, 32768, 65536), (128, 256, 768, 1024)
MULTIPROCESSORS = (78, 108, 132, 148)  # H20, A100, H100 and H200, B200
MEMORY = 80 << 30  # bytes, of an A100 or H100
PRODUCTS, COPIES = 780e12, 4.3e12  # FLOP/s and bytes/s that an H200 reaches


def chunks_of(N: int, D: int, multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each chunk of a call with N columns, in bf16 and the default workspace of a GPU."""
    monkeypatch.setattr(triton_memory, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(triton_memory, "workspace_of", lambda device: MEMORY // 40)
    precision = Precision(torch.float32, torch.bfloat16, torch.bfloat16, True)
    problem = object.__new__(TiledProblem)
    problem.N, problem.D = N, D
    problem.backend = triton_memory.TritonMemory(precision, torch.device("cpu"), None, N, N)
    return [rows.stop - rows.start for rows in problem.row_chunks(N)]


def utilisation(found: list[int], D: int, multiprocessors: int) -> float:
    tiles = sum(math.ceil(rows / 128) for rows in found) * math.ceil(D / 256)
    return tiles / (multiprocessors * sum(chunks.waves(rows, D, multiprocessors) for rows in found))


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
def test_chunks_fill_the_multiprocessors(multiprocessors, monkeypatch, record_property):
    lines = [f"{multiprocessors} multiprocessors: chunks × rows (last), used, accumulator's share of the products"]
    for N, D in ((N, D) for N in ROWS for D in FEATURES):
        found = chunks_of(N, D, multiprocessors, monkeypatch)
        used = utilisation(found, D, multiprocessors)
        share = (2 * len(found) - 1) * 4 * N * D / COPIES / (6 * N * N * D / PRODUCTS)
        lines.append(f"{N:6} {D:5}  {len(found)} × {found[0]} ({found[-1]})  {used:.3f}  {share:.3f}")
        assert all(rows % 128 == 0 for rows in found[:-1])
        assert 2 * found[-1] >= found[0]
        assert sum(found) == N
        # 16384 rows have too few tiles for some: no division into chunks uses more than one chunk of all rows.
        assert used >= min(0.95, utilisation([N], D, multiprocessors)), lines[-1]
        assert share <= 0.05, lines[-1]
    record_property("table", "\n".join(lines))


@pytest.mark.parametrize("N", [1000, 2500, 10_007])
def test_a_small_workspace_holds_the_chunks(N):
    for most in (1, 100, 128, 300, 999):
        rows = chunks.rows_per_chunk(N, 64, most, 128, 132)
        assert 0 < rows <= most
        assert rows % 128 == 0 or most < 128
        assert chunks.rows_per_chunk(N, 64, most, 1, 1) <= most
    assert chunks.rows_per_chunk(N, 64, N, 128, 132) == N


def test_the_workspace_is_a_fortieth_of_the_memory(monkeypatch):
    class Card:
        total_memory = MEMORY
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    assert settings.workspace_of.__wrapped__(torch.device("cuda")) == 2 << 30
    assert settings.workspace_of(torch.device("cpu")) == settings.MIN_WORKSPACE
