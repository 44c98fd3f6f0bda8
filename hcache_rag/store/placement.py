"""Which shard a document belongs to: the same for everybody who knows the shards' names. Pure.

Rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates",
1998): each shard draws a number for the document, and the highest wins. A shard that comes takes
its share of the documents from all others, one that goes leaves its own to all others, and no other
document belongs elsewhere then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
"""Of splitmix64's finaliser."""


class Placement:
    """The shards that documents are placed in, by name; their order does not count."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._seeds = np.array([_digest(name) for name in self.names], np.uint64)

    def order(self, text: str) -> list[str]:
        """All shards, the one that the document of this text belongs to first."""
        return [self.names[at] for at in np.argsort(self._draws(text))[::-1].tolist()]

    def place(self, text: str) -> str:
        """The shard that the document of this text belongs to.

        Raises:
            ValueError: there are no shards.
        """
        if not self.names:
            raise ValueError("no shards to place a document in")
        return self.names[int(np.argmax(self._draws(text)))]

    def _draws(self, text: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        draws = self._seeds ^ np.uint64(_digest(text.strip()))
        draws = (draws ^ (draws >> np.uint64(30))) * _MIX[0]
        draws = (draws ^ (draws >> np.uint64(27))) * _MIX[1]
        mixed: np.ndarray[tuple[int], np.dtype[np.uint64]] = draws ^ (draws >> np.uint64(31))
        return mixed


def _digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
