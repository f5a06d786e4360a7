"""How many rows of the logits a chunk holds, where the workspace does not hold all of them."""

from __future__ import annotations

import functools
import math

TILE_ROWS, TILE_FEATURES = 128, 256  # of the tile of E k̃ that a multiprocessor computes at a time
# Each chunk reads and writes the columns' accumulator, 8 bytes per column and feature; products are assumed to
# hide half. In units of the time in which all multiprocessors compute a tile each, at 780 TFLOP/s and 4.3 TB/s
# (one H200), that is this times D / multiprocessors.
ACCUMULATOR_COST = 0.5 * 8 * 780 / (2 * TILE_ROWS * TILE_FEATURES * 4.3)


def waves(rows: int, D: int, multiprocessors: int) -> float:
    """The time of E k̃ for a chunk, in tiles one after the other: of the whole tiles, or of halves of them."""
    tiles = math.ceil(rows / TILE_ROWS) * math.ceil(D / TILE_FEATURES)
    return min(math.ceil(tiles * parts / multiprocessors) / parts for parts in (1, 2))


@functools.lru_cache(maxsize=64)
def rows_per_chunk(N: int, D: int, most: int, multiple: int, multiprocessors: int) -> int:
    """Rows of each chunk but the last, at most ``most``; a multiple of ``multiple`` unless ``most`` is smaller.

    With one multiprocessor the chunks are equal. With more, the size leaves the last chunk at least half as many
    rows, and makes the time of idle multiprocessors and of passes over the accumulator the shortest.
    """
    if most >= N:
        return N
    if most < multiple or multiprocessors == 1:
        even = math.ceil(N / math.ceil(N / most))
        return min(most, math.ceil(even / multiple) * multiple)

    def cost(rows: int) -> float:
        chunks = math.ceil(N / rows)
        last = N - (chunks - 1) * rows
        if 2 * last < rows:
            return math.inf
        products = (chunks - 1) * waves(rows, D, multiprocessors) + waves(last, D, multiprocessors)
        return products + chunks * ACCUMULATOR_COST * D / multiprocessors

    return min(range(most - most % multiple, 0, -multiple), key=cost)
