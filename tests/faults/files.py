"""Damaged files."""

from __future__ import annotations

import random
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import lmdb

from faults.documents import ROOT, Known, a_record, a_state
from faults.looking import complaints, look, opened
from faults.outcomes import Outcome, Sight
from faults.processes import one_by_one
from hcache_rag.store import StateStore

PAGE = 4096


@dataclass(frozen=True)
class Original:
    """A store's file, one without free pages, and what the file was like some time ago."""

    data: bytes
    compact: bytes
    older: bytes
    known: Known

    def pages(self) -> dict[str, list[int]]:
        """Page numbers of the compact file, by kind."""
        found: dict[str, list[int]] = {"meta": [0, 1], "branch": [], "leaf": [], "overflow": []}
        page = 2
        while page < len(self.compact) // PAGE:
            flags, num_pages = struct.unpack_from("<HI", self.compact, page * PAGE + 10)
            kind = {1: "branch", 2: "leaf", 4: "overflow"}[flags & 7]
            found[kind].append(page)
            page += num_pages if kind == "overflow" else 1
        return found


def an_original(folder: Path) -> Original:
    """A store with documents of all kinds, some of them replaced and deleted on the way."""
    path = folder / "original"
    large = [a_record(number) for number in range(10)]
    small = [a_record(number, tokens=1) for number in range(100, 125)]
    again = [a_record(number, layout=(number + 1) % 3) for number in (1, 4, 7)]
    gone = [large[5], *small[:5]]
    with StateStore.open(path) as store:
        store.name_model(ROOT, "toy", "several", "to have some of each")
        store.put_all([a_state(record, ["somebody"]) for record in large[:6]])
        store.put_all([a_state(record) for record in small[:20]])
        older = (path / "data.mdb").read_bytes()
        store.put_all([a_state(record) for record in (*large[6:], *small[20:])])
        for record in gone:
            store.delete(record.key)
        for record in again:
            store.put_all([a_state(record)])
        known = Known.of((*large, *small, *again), gone)
        if complaints(store) or look(store, known).verdict != "right":
            raise RuntimeError(f"{complaints(store)} {look(store, known)}")
    (folder / "compact").mkdir()
    with lmdb.open(str(path), readonly=True) as env:
        env.copy(str(folder / "compact"), compact=True)
    data, compact = ((folder / p / "data.mdb").read_bytes() for p in ("original", "compact"))
    return Original(data, compact, older, known)


Damage: TypeAlias = Callable[[Original, random.Random], tuple[bytes, str]]
"""A damaged file, and what was done to it."""


def damaged(fault: str, count: int, seed: int, damage: Damage) -> Outcome:
    """Look into `count` damaged copies of a store.

    Every other one is opened for reading only; the others are salvaged and repaired, and looked
    into again.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        original = an_original(folder)

        def chosen(number: int) -> tuple[bytes, str]:
            return damage(original, random.Random(f"{seed}/{number}"))

        def work(number: int) -> Sight:
            path = folder / f"{number}"
            path.mkdir()
            (path / "data.mdb").write_bytes(chosen(number)[0])
            sight = Sight()
            with opened(sight, path, read_only=number % 2 == 0, durability="fast") as store:
                if store is not None:
                    look(store, original.known, sight)
            if number % 2 and sight.verdict != "right":
                _repair(path, original.known, sight)
            shutil.rmtree(path)
            return sight

        def about(number: int) -> str:
            return f"[seed {seed}, number {number}: {chosen(number)[1]}]"

        return one_by_one(Outcome(fault), work, about, count, folder)


def _repair(path: Path, known: Known, sight: Sight) -> None:
    """Save what is whole; then nothing wrong may be left, and everything work."""
    with sight.step("salvage"):
        StateStore.salvage(path)
    with opened(sight, path, durability="fast") as store:
        if store is not None:
            store.repair(store.verify())
            for what in complaints(store):
                sight.add("wrong", "after repair", what)
            look(store, known, sight)


FLIPS = {"meta": 0.1, "branch": 0.1, "leaf": 0.2, "node": 0.2, "overflow": 0.05, "any": 0.35}
"""Where bytes are flipped, and how often: LMDB's own pages, the numbers in them, anywhere."""


def a_flip(original: Original, source: random.Random, where: str = "") -> tuple[bytes, str]:
    """One byte is another, in one of `FLIPS` or by default in any of them."""
    kind = where or source.choices(list(FLIPS), list(FLIPS.values()))[0]
    data = bytearray(original.data if kind == "any" else original.compact)
    at = source.randrange(len(data)) if kind == "any" else _place(original, kind, source)
    before = data[at]
    data[at] ^= source.randrange(1, 256)
    place = f"page {at // PAGE} ({kind}), byte {at % PAGE}"
    return bytes(data), f"{place}, {before:#04x} to {data[at]:#04x}"


def flips(count: int, seed: int, where: str = "") -> Outcome:
    """One byte of each file is another."""
    fault = f"flips, {where}" if where else "flips"
    return damaged(fault, count, seed, partial(a_flip, where=where))


def _place(original: Original, kind: str, source: random.Random) -> int:
    """A byte of the compact file that means something; of a "node", one of LMDB's numbers."""
    pages = original.pages()
    page = source.choice(pages[kind] if kind != "node" else pages["branch"] + pages["leaf"])
    begin = page * PAGE
    if kind in ("meta", "overflow"):
        return begin + source.randrange({"meta": 160, "overflow": 16}[kind])
    lower, upper = _shorts(original.compact, begin + 12, 2)
    if kind == "node":
        pointer = begin + source.randrange(16, lower, 2)
        if source.random() < 0.2:
            return pointer + source.randrange(2)
        return begin + _shorts(original.compact, pointer, 1)[0] + source.randrange(8)
    at = source.randrange(lower + PAGE - upper)
    return begin + (at if at < lower else at - lower + upper)


def _shorts(data: bytes, at: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}H", data, at)


def a_truncation(original: Original, source: random.Random) -> tuple[bytes, str]:
    """The file loses its end; every other time zeros stand in its place."""
    data = source.choice((original.data, original.compact))
    step, is_filled_up = source.choice((1, PAGE)), source.random() < 0.5
    length = source.randrange(len(data)) // step * step
    cut = data[:length] + bytes(len(data) - length if is_filled_up else 0)
    return cut, f"{length:,} of {len(data):,} bytes" + " and zeros" * is_filled_up


def truncations(count: int, seed: int) -> Outcome:
    """Files that end early."""
    return damaged("truncations", count, seed, a_truncation)


def a_torn_write(original: Original, source: random.Random) -> tuple[bytes, str]:
    """Some pages are as they were some time ago, or zeros."""
    num_pages = source.randint(1, 8)
    is_older = source.random() < 0.6
    last = len(original.older if is_older else original.data) // PAGE - num_pages
    first = source.randint(0, last if source.random() < 0.8 else 2)
    run = slice(first * PAGE, (first + num_pages) * PAGE)
    data = bytearray(original.data)
    data[run] = original.older[run] if is_older else bytes(num_pages * PAGE)
    what = "as they were" if is_older else "zeros"
    return bytes(data), f"pages {first} to {first + num_pages - 1} {what}"


def torn_writes(count: int, seed: int) -> Outcome:
    """Files of which some pages were not written."""
    return damaged("torn writes", count, seed, a_torn_write)
