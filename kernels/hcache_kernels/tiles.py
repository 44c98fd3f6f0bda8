"""Which rows a kernel's programs take: stretches that lie in one chunk each."""

from __future__ import annotations

from collections.abc import Iterable

ROWS_OF_A_TILE = 128


def tiles_of(chunks: Iterable[tuple[int, int]], *, crosses_chunks: bool) -> list[list[int]]:
    """(first row, rows, chunk) of each tile.

    Args:
        chunks: first row and rows of each chunk, one behind another.
        crosses_chunks: a tile may go on in the next chunk: nothing is said of a chunk as a whole.
    """
    stretches: list[list[int]] = []
    for index, (first, rows) in enumerate(chunks):
        if crosses_chunks and stretches:
            stretches[0][1] += rows
        else:
            stretches.append([first, rows, index])
    return [
        [first + begin, min(ROWS_OF_A_TILE, rows - begin), chunk]
        for first, rows, chunk in stretches
        for begin in range(0, rows, ROWS_OF_A_TILE)
    ]
