"""Which of some vectors are nearest to another one: FAISS, with deletions that are right.

LlamaIndex's own FAISS stores cannot delete, or delete another node than was asked for. FAISS itself
has traps too: an IVF index inside an `IndexIDMap2` ends the process when a vector is removed, and a
graph cannot remove at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import faiss
import numpy as np
import numpy.typing as npt

IndexKind: TypeAlias = Literal["auto", "flat", "hnsw"]

GRAPH_FROM = 50_000
"""With "auto", so many vectors make a graph: comparing with all of them takes longer than embedding
the question (`benchmarks/bench_retrieval.py`)."""

_NEIGHBOURS = 32
_LOOKED_AT_TO_BUILD = 100
_LOOKED_AT = 128
_MAX_DEAD_SHARE = 0.25
"""When more of a graph's vectors are deleted ones, it is built anew."""

Vectors: TypeAlias = npt.NDArray[np.float32]


class Nearest:
    """Vectors by number, and the nearest ones by inner product. Not thread-safe.

    "flat" compares with every vector and finds the nearest ones. "hnsw" is a graph of neighbours
    (Malkov and Yashunin, 2016) that looks at few of them and may miss one. In a graph, a deleted
    vector stays as a place to pass through; it is never found, and goes when the graph is built
    anew.

    Args:
        kind: "auto" is flat up to `GRAPH_FROM` vectors.
    """

    def __init__(self, kind: IndexKind = "auto") -> None:
        if kind not in ("auto", "flat", "hnsw"):
            raise ValueError(f"the kind of an index is 'auto', 'flat' or 'hnsw', not {kind!r}")
        self.kind = kind
        self._faiss: Any = None
        self._alive: set[int] = set()
        self._dead: set[int] = set()

    def __len__(self) -> int:
        return len(self._alive)

    @property
    def dimensions(self) -> int | None:
        """Of each vector; None where there is none."""
        return int(self._faiss.d) if self._faiss is not None else None

    @property
    def is_graph(self) -> bool:
        """Whether a vector may be missed."""
        return self._faiss is not None and not isinstance(_inner(self._faiss), faiss.IndexFlat)

    def add(self, numbers: Sequence[int], vectors: Vectors) -> None:
        """Add normalised vectors (N, D) under numbers that were never used before."""
        if not len(numbers):
            return
        if self._faiss is None or (
            self.kind == "auto" and not self.is_graph and len(self) + len(numbers) > GRAPH_FROM
        ):
            self._build(len(self) + len(numbers), vectors.shape[1])
        self._faiss.add_with_ids(np.ascontiguousarray(vectors), np.asarray(numbers, np.int64))
        self._alive.update(numbers)

    def remove(self, numbers: Collection[int]) -> None:
        """Remove vectors; numbers without one are passed over."""
        gone = self._alive.intersection(numbers)
        self._alive -= gone
        if not gone:
            return
        if not self._alive:
            self._faiss, self._dead = None, set()
        elif self.is_graph:
            self._dead |= gone
            if len(self._dead) > _MAX_DEAD_SHARE * self._faiss.ntotal:
                self._build(len(self))
        else:
            self._faiss.remove_ids(np.fromiter(gone, np.int64))

    def _build(self, size: int, dimensions: int | None = None) -> None:
        """Make the index that suits `size` vectors, and put those into it that are there."""
        numbers = sorted(self._alive)
        held = self.vectors(numbers) if numbers else None
        width = held.shape[1] if held is not None else int(dimensions or 0)
        is_graph = self.kind == "hnsw" or (self.kind == "auto" and size > GRAPH_FROM)
        inner: Any
        if is_graph:
            inner = faiss.IndexHNSWFlat(width, _NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
            inner.hnsw.efConstruction = _LOOKED_AT_TO_BUILD
        else:
            inner = faiss.IndexFlatIP(width)
        self._faiss, self._dead = faiss.IndexIDMap2(inner), set()
        if held is not None:
            self._faiss.add_with_ids(held, np.asarray(numbers, np.int64))

    def vectors(self, numbers: Sequence[int]) -> Vectors:
        """The vectors (N, D) of some numbers."""
        found: Vectors = self._faiss.reconstruct_batch(np.asarray(numbers, np.int64))
        return found

    def search(
        self, vector: Vectors, top_k: int, among: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Numbers and inner products of the nearest vectors, best first.

        Args:
            vector: normalised, (D,).
            among: only these are compared, and all of them.
        """
        if among is not None:
            return self._compared(vector, top_k, among)
        count = min(top_k, len(self))
        if count < 1:
            return []
        if not self.is_graph:
            return _pairs(*self._faiss.search(vector[None], count))
        options = faiss.SearchParametersHNSW(  # type: ignore[attr-defined]
            efSearch=max(_LOOKED_AT, 2 * count)
        )
        dead = faiss.IDSelectorBatch(np.fromiter(self._dead, np.int64, len(self._dead)))
        alive = faiss.IDSelectorNot(dead)
        if self._dead:
            options.sel = alive
        found = _pairs(*self._faiss.search(vector[None], count, params=options))
        return found if len(found) == count else self._compared(vector, count, sorted(self._alive))

    def _compared(
        self, vector: Vectors, top_k: int, numbers: Sequence[int]
    ) -> list[tuple[int, float]]:
        if not len(numbers) or top_k < 1:
            return []
        scores = self.vectors(numbers) @ vector
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [(int(numbers[i]), float(scores[i])) for i in best]

    def write(self, path: Path) -> None:
        """Write it to a file; nothing is written where it is empty."""
        if self._faiss is not None:
            faiss.write_index(self._faiss, str(path))

    @classmethod
    def read(cls, path: Path, numbers: Collection[int], kind: IndexKind = "auto") -> Nearest:
        """Read what `write` wrote, and also a bare flat index, whose rows are 0, 1, ...

        Args:
            numbers: of the vectors that are alive.
            kind: what it is made into, if it is of another one.

        Raises:
            RuntimeError, ValueError: it is no such file, or not that of these vectors.
        """
        found = cls(kind)
        if not numbers:
            return found
        index = faiss.read_index(str(path))
        if not isinstance(index, faiss.IndexIDMap2):
            rows = index.reconstruct_n(0, index.ntotal)
            index = faiss.IndexIDMap2(faiss.IndexFlatIP(index.d))
            index.add_with_ids(rows, np.arange(len(rows)))
        its = set(faiss.vector_to_array(index.id_map).tolist())
        found._faiss, found._alive = index, set(numbers)
        found._dead = its - found._alive
        if not found._alive <= its or (found._dead and not found.is_graph):
            raise ValueError(f"{len(numbers)} nodes, but {len(its)} embeddings")
        if kind != "auto" and found.is_graph != (kind == "hnsw"):
            found._build(len(found))
        return found


def normalised(vector: Sequence[float]) -> Vectors:
    """A vector (D,) of length 1 in the same direction; zero stays zero.

    Raises:
        ValueError: it is empty, or a number in it is not finite.
    """
    found = np.asarray(vector, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise ValueError(f"an embedding is a list of numbers, but this one has shape {found.shape}")
    largest = float(np.abs(found).max())
    if not np.isfinite(largest):
        bad = int(np.count_nonzero(~np.isfinite(found)))
        raise ValueError(f"{bad} of an embedding's {found.size} numbers are not finite")
    if largest:
        found = found / largest  # whose squares are neither too large nor too small
        found /= np.linalg.norm(found)
    return found.astype(np.float32)


def _inner(index: Any) -> Any:
    return faiss.downcast_index(index.index)


def _pairs(scores: Vectors, numbers: npt.NDArray[np.int64]) -> list[tuple[int, float]]:
    found = zip(numbers[0].tolist(), scores[0].tolist(), strict=True)
    return [(number, score) for number, score in found if number >= 0]
