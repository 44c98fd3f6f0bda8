"""Whether a file is one that LMDB can be given: it trusts its pages, and a damaged one can end the
process that reads it.

Reads the file format of LMDB 0.9 (`MDB_page`, `MDB_node` and `MDB_meta` in its mdb.c), as far as a
store uses it, and never through LMDB. Every page that can be reached is looked at, all of one level
of a tree at once: what is checked is what LMDB takes for granted when it reads, writes and deletes.
It does not look at what is stored.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hcache_rag.store.backend import TABLES

BRANCH, LEAF, OVERFLOW, META = 1, 2, 4, 8
"""Kinds of pages."""
PLAIN, BIG, TREE = 0, 1, 2
"""Kinds of nodes on leaves: the value is in the node; on pages of its own; is another tree's."""

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_HEADER_BYTES, _NODE_BYTES, _MAX_KEY_BYTES = 16, 8, 511
_HEADER = struct.Struct("<QHHI")  # number, pad, kind, lower and upper end of the room between
_TREE = struct.Struct("<IHHQQQQQ")
_META = struct.Struct("<IIQQ")
_MAX_DEPTH, _MAX_PROBLEMS, _PAGES_AT_ONCE = 32, 20, 2048
_NO_PAGE = 2**64 - 1
_FREE_FLAGS = 0x08
"""`MDB_INTEGERKEY`, and none of the flags that an environment keeps."""
_MAX_MISSING_PAGES = 1 << 17
"""What a transaction takes at the end and gives back, it need not write."""

Numbers = npt.NDArray[np.int64]


class DamagedPagesError(ValueError):
    """A file is so damaged that nothing in it can be found."""


class _Tree(NamedTuple):
    """A tree, as it describes itself (`MDB_db`)."""

    pad: int
    flags: int
    depth: int
    branches: int
    leaves: int
    overflow_pages: int
    entries: int
    root: int


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes of some leaves or branches, each an array over all of them.

    Args:
        at: where they begin, in bytes of the file.
        key_bytes: of their keys.
        low: bytes of their values, or on branches the number of a page.
        kind: on leaves.
        is_first: of its page.
    """

    at: Numbers
    key_bytes: Numbers
    low: Numbers
    kind: Numbers
    is_first: npt.NDArray[np.bool_]

    @property
    def keys(self) -> _Keys:
        """Where their keys are."""
        return _Keys(self.at + _NODE_BYTES, self.key_bytes)

    def those(self, which: npt.NDArray[np.bool_]) -> _Nodes:
        """Some of them."""
        numbers = (self.at, self.key_bytes, self.low, self.kind)
        at, key_bytes, low, kind = (array[which] for array in numbers)
        return _Nodes(at, key_bytes, low, kind, self.is_first[which])


class _Keys(NamedTuple):
    """Some keys, by where they begin and how long they are."""

    at: Numbers
    length: Numbers

    def those(self, which: Any) -> _Keys:
        """Some of them."""
        return _Keys(self.at[which], self.length[which])


def problems(path: Path) -> list[str]:
    """What is wrong with the pages of an LMDB file at rest, for people; empty where nothing is.

    Nobody may write meanwhile.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return _Pages(path).check()
    except DamagedPagesError as error:
        return [str(error)]


def rows(path: Path, tables: Container[str] = TABLES) -> Iterator[tuple[str, bytes, bytes]]:
    """(table, key, value) of all in some tables that stands on pages that are whole.

    Raises:
        DamagedPagesError: nothing can be found.
        OSError: it cannot be read.
    """
    pages = _Pages(path)
    for name, tree in pages.tables():
        for key, value in pages.rows_of(tree) if name in tables else ():
            yield name, key, value


class _Pages:
    def __init__(self, path: Path) -> None:
        if path.stat().st_size < 2 * _HEADER_BYTES + 4096:
            raise DamagedPagesError("the file has no beginning")
        self._bytes = np.memmap(path, np.uint8, "r")
        self._found: list[str] = []
        self._page_bytes = self._size_of_pages()
        self._halves = self._bytes[: len(self._bytes) // 2 * 2].view("<u2")
        metas = [self._meta(number) for number in (0, 1)]
        self._free, self._main, last, self._newest = max(metas, key=lambda meta: meta[3])
        in_file = len(self._bytes) // self._page_bytes
        if (self._free.flags, self._main.flags, self._main.pad) != (_FREE_FLAGS, 0, 0):
            raise DamagedPagesError("the file is used in a way that no store is")
        if last >= in_file + _MAX_MISSING_PAGES:
            raise DamagedPagesError(f"{last + 1:,} pages are said to be in a file of {in_file:,}")
        self._num_pages = min(last + 1, in_file)
        self._last = last
        self._uses = np.zeros(last + 2, np.int32)
        """How often each page is used; kept as differences, since values take several."""

    def _size_of_pages(self) -> int:
        size: int = _TREE.unpack_from(self._bytes.data, _HEADER_BYTES + _META.size)[0]
        if size & (size - 1) or not 256 <= size <= 1 << 15 or len(self._bytes) < 2 * size:
            raise DamagedPagesError(f"pages of {size:,} bytes cannot be")
        return size

    def _meta(self, number: int) -> tuple[_Tree, _Tree, int, int]:
        """Free pages, tables, last page and transaction of one of the two first pages."""
        at = number * self._page_bytes
        page, _, kind, _ = _HEADER.unpack_from(self._bytes.data, at)
        magic, version, _, _ = _META.unpack_from(self._bytes.data, at + _HEADER_BYTES)
        if (page, kind, magic, version) != (number, META, _MAGIC, _VERSION):
            raise DamagedPagesError(f"page {number} is not the beginning of an LMDB 0.9 file")
        at += _HEADER_BYTES + _META.size
        free, main = (
            _Tree(*_TREE.unpack_from(self._bytes.data, at + n * _TREE.size)) for n in (0, 1)
        )
        last, transaction = struct.unpack_from("<QQ", self._bytes.data, at + 2 * _TREE.size)
        if free.pad != self._page_bytes or (transaction and transaction % 2 != number):
            raise DamagedPagesError(f"page {number} does not agree with its place")
        return free, main, last, transaction

    def check(self) -> list[str]:
        """Look at everything."""
        before = 0
        for nodes in self._leaves("free pages", self._free):
            for number in range(len(nodes.at)):
                key, value = self._row(nodes, number)
                transaction = int.from_bytes(key, "little")
                if not before < transaction <= self._newest or len(key) != 8:
                    self._say("a list of free pages is of no transaction")
                before = transaction
                self._check_free(value)
        for name, tree in self.tables():
            for _ in self._leaves(name, tree):
                pass
        uses = np.cumsum(self._uses[:-1])
        for page in np.flatnonzero(uses[2:] > 1)[:_MAX_PROBLEMS] + 2:
            self._say(f"page {page} is used {uses[page]} times")
        return self._found

    def tables(self) -> list[tuple[str, _Tree]]:
        """The tables by name."""
        found = []
        for nodes in self._leaves("tables", self._main):
            for number in range(len(nodes.at)):
                key, value = self._row(nodes, number)
                if nodes.kind[number] != TREE or len(value) != _TREE.size:
                    self._say("something else stands where tables are named")
                    continue
                tree = _Tree(*_TREE.unpack(value))
                if tree.flags or tree.pad:
                    self._say(f"{key!r} is not a plain table")
                    continue
                found.append((key.decode(errors="replace"), tree))
        return found

    def rows_of(self, tree: _Tree) -> Iterator[tuple[bytes, bytes]]:
        """Key and value of all nodes on whole pages."""
        for nodes in self._leaves("", tree):
            for number in range(len(nodes.at)):
                yield self._row(nodes, number)

    def _leaves(self, name: str, tree: _Tree) -> Iterator[_Nodes]:
        """The nodes on the leaves of a tree, some pages at a time; says what is wrong."""
        if tree.root == _NO_PAGE:
            if any(tree[2:7]):
                self._say(f"{name}: no pages, but {tree.entries} entries")
            return
        if not 1 <= tree.depth <= _MAX_DEPTH:
            self._say(f"{name}: {tree.depth} levels")
            return
        level = np.array([min(tree.root, self._num_pages)], np.int64)
        lowest = _Keys(np.zeros(1, np.int64), np.zeros(1, np.int64))
        branches = entries = overflow_pages = 0
        for _ in range(tree.depth - 1):
            nodes = self._nodes(name, level, BRANCH)
            branches += len(level)
            lowest = _lowest(nodes, lowest)
            level = nodes.low
            if len(level) > self._num_pages:
                self._say(f"{name}: more pages on one level than there are")
                return
        last = None
        for begin in range(0, len(level), _PAGES_AT_ONCE):
            some = slice(begin, begin + _PAGES_AT_ONCE)
            nodes = self._nodes(name, level[some], LEAF)
            if tree is not self._free and not self._found:
                last = self._check_order(name, nodes, lowest.those(some), last)
            nodes, pages = self._with_values(name, nodes)
            entries += len(nodes.at)
            overflow_pages += pages
            yield nodes
        counted = (branches, len(level), overflow_pages, entries)
        if counted != tree[3:7]:
            self._say(f"{name}: branches, leaves, pages and entries are {counted}, not {tree[3:7]}")

    def _check_order(
        self, name: str, nodes: _Nodes, lowest: _Keys, last: _Keys | None
    ) -> _Keys | None:
        """Keys rise, and are those that the branches above lead to; the last one of them."""
        keys, firsts = nodes.keys, np.flatnonzero(nodes.is_first)
        if not len(firsts):
            return last
        lasts = np.append(firsts[1:] - 1, len(nodes.at) - 1)
        before = keys.those(lasts[:-1])
        if last is not None:
            before = _Keys(*(np.concatenate(pair) for pair in zip(last, before, strict=True)))
        above = lowest if last is not None else lowest.those(slice(1, None))
        rises = self._are_below(keys.those(slice(-1)), keys.those(slice(1, None))).all()
        if (
            not rises
            or not self._are_below(before, above).all()
            or self._are_below(keys.those(firsts), lowest).any()
        ):
            self._say(f"{name}: keys are not in order")
        return keys.those(lasts[-1:])

    def _are_below(self, some: _Keys, others: _Keys) -> npt.NDArray[np.bool_]:
        """Which of some keys sort before others, one by one."""
        found, left, begin = np.zeros(len(some.at), bool), np.arange(len(some.at)), 0
        columns = np.arange(32)
        while len(left):
            one, other = (
                self._columns(keys.those(left), begin + columns) for keys in (some, others)
            )
            differs = one != other
            first, is_decided = differs.argmax(1), differs.any(1)
            rows = np.flatnonzero(is_decided)
            found[left[rows]] = one[rows, first[rows]] < other[rows, first[rows]]
            begin += len(columns)
            is_longer = np.maximum(some.length[left], others.length[left]) > begin
            left = left[~is_decided & is_longer]
        return found

    def _columns(self, keys: _Keys, columns: Numbers) -> npt.NDArray[np.int16]:
        """Some bytes of keys; -1 behind their end."""
        places = np.minimum(keys.at[:, None] + columns, len(self._bytes) - 1)
        return np.where(columns < keys.length[:, None], self._bytes[places], np.int16(-1))

    def _nodes(self, name: str, pages: Numbers, kind: int) -> _Nodes:
        """The nodes of some pages, of those that are whole."""
        inside = (pages >= 2) & (pages < self._num_pages)
        if not inside.all():
            self._say(f"{name}: pages that are not in the file")
        pages = pages[inside]
        np.add.at(self._uses, pages, 1)
        np.add.at(self._uses, pages + 1, -1)
        starts = pages * self._page_bytes
        halves = starts // 2
        numbers = sum(self._at(halves + place) << 16 * place for place in range(4))
        lower, upper = self._at(halves + 6), self._at(halves + 7)
        counts = (lower - _HEADER_BYTES) // 2
        whole = (numbers == pages) & (self._at(halves + 5) == kind) & (lower <= upper)
        whole &= (counts >= 1) & (lower % 2 == 0) & (upper <= self._page_bytes)
        self._say_pages(name, pages[~whole])
        pages, starts, counts, upper = (a[whole] for a in (pages, starts, counts, upper))
        owner = np.repeat(np.arange(len(pages)), counts)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        begins = self._at((starts[owner] + _HEADER_BYTES) // 2 + nth)
        fits = (begins % 2 == 0) & (begins >= upper[owner])
        fits &= begins + _NODE_BYTES <= self._page_bytes
        at = starts[owner] + np.where(fits, begins, 0)
        low = self._at(at // 2) | self._at(at // 2 + 1) << 16
        flags, key_bytes = self._at(at // 2 + 2), self._at(at // 2 + 3)
        if kind == BRANCH:
            low |= flags << 32
            room = key_bytes
            fits &= key_bytes <= _MAX_KEY_BYTES
        else:
            room = key_bytes + np.where(flags == BIG, 8, low)
            fits &= (flags <= TREE) & (key_bytes >= 1) & (key_bytes <= _MAX_KEY_BYTES)
        ends = begins + (_NODE_BYTES + room + 1) // 2 * 2
        # Nodes lie side by side, from the room's upper end to the page's end.
        order = np.lexsort((begins, owner))
        is_first = np.ones(len(owner), bool)
        is_first[1:] = owner[1:] != owner[:-1]  # the same before and after the sorting
        expected = np.where(is_first, upper[owner], np.roll(ends[order], 1))
        fits[order] &= begins[order] == expected
        is_last = np.roll(is_first, -1)
        fits[order] &= ~is_last | (ends[order] == self._page_bytes)
        good = np.ones(len(pages), bool)
        good[owner[~fits]] = False
        self._say_pages(name, pages[~good])
        keep = good[owner]
        return _Nodes(at, key_bytes, low, flags, is_first).those(keep)

    def _with_values(self, name: str, nodes: _Nodes) -> tuple[_Nodes, int]:
        """Those whose values are there, and how many pages of their own these take."""
        big = np.flatnonzero(nodes.kind == BIG)
        if not len(big):
            return nodes, 0
        pages = self._value_pages(nodes, big)
        needed = (_HEADER_BYTES - 1 + nodes.low[big]) // self._page_bytes + 1
        good = (pages >= 2) & (pages < self._num_pages)
        halves = np.where(good, pages, 0) * self._page_bytes // 2
        numbers = sum(self._at(halves + place) << 16 * place for place in range(4))
        counts = self._at(halves + 6) | self._at(halves + 7) << 16
        good &= (numbers == pages) & (self._at(halves + 5) == OVERFLOW)
        good &= (counts >= needed) & (pages + counts <= self._num_pages)
        np.add.at(self._uses, pages[good], 1)
        np.add.at(self._uses, (pages + counts)[good], -1)
        if not good.all():
            self._say(f"{name}: {int((~good).sum())} values are not where they should be")
        keep = np.ones(len(nodes.at), bool)
        keep[big[~good]] = False
        return nodes.those(keep), int(counts[good].sum())

    def _value_pages(self, nodes: _Nodes, big: Numbers) -> Numbers:
        """Where the values of big nodes begin; a page that cannot be is 0."""
        places = (nodes.at + _NODE_BYTES + nodes.key_bytes)[big]
        eight = np.ascontiguousarray(self._bytes[places[:, None] + np.arange(8)])
        pages = eight.view("<u8")[:, 0]
        found: Numbers = np.where(pages < self._num_pages, pages, 0).astype(np.int64)
        return found

    def _row(self, nodes: _Nodes, number: int) -> tuple[bytes, bytes]:
        begin = int(nodes.at[number]) + _NODE_BYTES
        end = begin + int(nodes.key_bytes[number])
        key, size = self._bytes[begin:end].tobytes(), int(nodes.low[number])
        if nodes.kind[number] == BIG:
            page = int(self._value_pages(nodes, np.array([number]))[0])
            end = page * self._page_bytes + _HEADER_BYTES
        return key, self._bytes[end : end + size].tobytes()

    def _check_free(self, value: bytes) -> None:
        """A list of pages that nothing uses: how many, then their numbers, the last one first."""
        pages = np.frombuffer(value[: len(value) // 8 * 8], "<u8")
        if len(value) % 8 or not len(pages) or pages[0] != len(pages) - 1:
            self._say("a list of free pages is not one")
            return
        pages = pages[1:]
        if len(pages) and (pages[0] > self._last or pages[-1] < 2):
            self._say("a list of free pages names others")
            return
        numbers = pages.astype(np.int64)
        if (np.diff(numbers) >= 0).any():
            self._say("a list of free pages is not in order")
            return
        np.add.at(self._uses, numbers, 1)
        np.add.at(self._uses, numbers + 1, -1)

    def _at(self, halves: Numbers) -> Numbers:
        """16-bit numbers of the file."""
        found: Numbers = self._halves[halves].astype(np.int64)
        return found

    def _say_pages(self, name: str, pages: Any) -> None:
        for page in pages[:_MAX_PROBLEMS]:
            self._say(f"{name}: page {page} is damaged")

    def _say(self, problem: str) -> None:
        if len(self._found) < _MAX_PROBLEMS:
            self._found.append(problem)


def _lowest(nodes: _Nodes, lowest: _Keys) -> _Keys:
    """The keys from which on the pages below some branches may be: LMDB ignores the first one."""
    page = np.cumsum(nodes.is_first) - 1
    page = np.minimum(page, len(lowest.at) - 1)
    at = np.where(nodes.is_first, lowest.at[page], nodes.keys.at)
    return _Keys(at, np.where(nodes.is_first, lowest.length[page], nodes.key_bytes))
