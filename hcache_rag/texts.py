"""Known texts, and where a prompt holds them: literal text, wherever the prompt came from.

Texts are found by their first characters: one hash for each place of the prompt, all at once, tells
where a known text may begin, and only there the texts are looked at. They are in sorted order, so
that the longest match is beside the place where the rest of the prompt would stand among them:
thousands of texts with one common head (`file_path: ...`) cost no more than one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hcache_rag.forks import ForkedLock

ANCHOR_CHARS = 24
"""A text is looked up by its first characters; shorter texts must stand on lines of their own."""

MIN_CUT_CHARS = 128
"""A document that was cut shorter than this is read afresh."""

Hashes: TypeAlias = npt.NDArray[np.uint64]

_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 1 << 64)
_SPREAD = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True, slots=True)
class Match:
    """A stretch of a prompt that is a known text, or the beginning of one that was cut."""

    start: int
    end: int
    text: str


class Anchors(Protocol):
    """A set of anchor hashes."""

    def places(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of some hashes may be in the set."""


class TextView(Protocol):
    """Known texts at one moment."""

    @property
    def anchors(self) -> Anchors:
        """The anchors of all texts of at least `ANCHOR_CHARS` characters, and perhaps of more."""

    @property
    def short(self) -> Collection[str]:
        """All texts that are shorter."""

    def around(self, tail: str) -> tuple[str | None, str | None]:
        """The last text in sorted order that is not after `tail`, and the first one after it.

        Where either has no text that begins like `tail` it may be any other text, or None.
        """


class KnownTexts(Protocol):
    """Something that knows texts."""

    def looking(self) -> AbstractContextManager[TextView]:
        """Look at them; the view ends with the block."""


def anchor_hashes(text: str) -> Hashes:
    """A hash of the `ANCHOR_CHARS` characters at each place of a text that has so many left."""
    encoded = text.encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(encoded, dtype="<u4").astype(np.uint64)
    count = len(codes) - ANCHOR_CHARS + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    # A polynomial in each character, all prefixes summed at once; uint64 arithmetic wraps around.
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * _powers(_FACTOR, len(codes)), out=sums[1:])
    windows = (sums[ANCHOR_CHARS:] - sums[:-ANCHOR_CHARS]) * _powers(_INVERSE, count)
    windows ^= windows >> np.uint64(32)
    spread: Hashes = windows * _SPREAD
    return spread


def _powers(factor: int, count: int) -> Hashes:
    powers = np.full(count, factor, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


class AnchorSet:
    """A set of anchor hashes as a bitmap that takes some foreign ones for its own. Not thread-safe.

    Args:
        bits_per_anchor: of these, one is set; their inverse is the share of false positives.
    """

    def __init__(self, bits_per_anchor: int = 64) -> None:
        self._bits_per_anchor = bits_per_anchor
        self._hashes = np.zeros(1024, np.uint64)
        self._count = 0
        self._shift = np.uint64(0)
        self._bitmap = np.zeros(0, np.uint8)
        self._resize()

    def __len__(self) -> int:
        return self._count

    def add(self, hashes: Hashes) -> None:
        """Add anchors; the same one may be added again."""
        end = self._count + len(hashes)
        if end > len(self._hashes):
            grown = np.zeros(max(end, 2 * len(self._hashes)), np.uint64)
            grown[: self._count] = self._hashes[: self._count]
            self._hashes = grown
        self._hashes[self._count : end] = hashes
        self._count = end
        if len(self._hashes) * self._bits_per_anchor > 8 * len(self._bitmap):
            self._resize()
        else:
            self._set(hashes)

    def places(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of some hashes may be in the set."""
        if not self._count:
            return np.zeros(len(hashes), np.bool_)
        byte, bit = self._bits(hashes)
        found: npt.NDArray[np.bool_] = (self._bitmap[byte] & bit) != 0
        return found

    def _bits(self, hashes: Hashes) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        """Where an anchor's bit is."""
        number = hashes >> self._shift
        return number >> np.uint64(3), np.uint8(1) << (number & np.uint64(7)).astype(np.uint8)

    def _set(self, hashes: Hashes) -> None:
        np.bitwise_or.at(self._bitmap, *self._bits(hashes))

    def _resize(self) -> None:
        bits = (len(self._hashes) * self._bits_per_anchor - 1).bit_length()
        self._shift = np.uint64(64 - bits)
        self._bitmap = np.zeros(1 << (bits - 3), np.uint8)
        self._set(self._hashes[: self._count])


class TextSet:
    """Known texts in memory. Thread-safe."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._sorted: list[str] = []
        self._short: set[str] = set()
        self._anchors = AnchorSet()
        self._lock = ForkedLock()
        self.add(texts)

    def __len__(self) -> int:
        return len(self._sorted) + len(self._short)

    def add(self, texts: Iterable[str]) -> None:
        """Make texts known; whitespace around them does not count."""
        stripped = {text.strip() for text in texts}
        with self._lock:
            self._short.update(t for t in stripped if 0 < len(t) < ANCHOR_CHARS)
            new = [t for t in stripped if len(t) >= ANCHOR_CHARS and not self._holds(t)]
            if not new:
                return
            if len(new) < 16:
                for text in new:
                    insort(self._sorted, text)
            else:
                self._sorted = sorted([*self._sorted, *new])
            self._anchors.add(np.concatenate([anchor_hashes(t[:ANCHOR_CHARS]) for t in new]))

    def discard(self, text: str) -> None:
        """Forget a text; nothing happens if it was not known."""
        stripped = text.strip()
        with self._lock:
            self._short.discard(stripped)
            if self._holds(stripped):
                del self._sorted[bisect_left(self._sorted, stripped)]

    def _holds(self, text: str) -> bool:
        at = bisect_left(self._sorted, text)
        return at < len(self._sorted) and self._sorted[at] == text

    @contextmanager
    def looking(self) -> Iterator[TextView]:
        """See `KnownTexts`."""
        with self._lock:
            yield self

    @property
    def anchors(self) -> AnchorSet:
        """See `TextView`."""
        return self._anchors

    @property
    def short(self) -> Collection[str]:
        """See `TextView`."""
        return self._short

    def around(self, tail: str) -> tuple[str | None, str | None]:
        """See `TextView`."""
        place = bisect_right(self._sorted, tail)
        below = self._sorted[place - 1] if place else None
        return below, self._sorted[place] if place < len(self._sorted) else None


class JoinedView:
    """Several views as one, see `TextView`."""

    def __init__(self, views: Sequence[TextView]) -> None:
        self._views = views

    @property
    def anchors(self) -> Anchors:
        """This is them, too."""
        return self

    def places(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """See `Anchors`."""
        found = np.zeros(len(hashes), np.bool_)
        for view in self._views:
            found |= view.anchors.places(hashes)
        return found

    @property
    def short(self) -> Collection[str]:
        """See `TextView`."""
        return set().union(*(view.short for view in self._views))

    def around(self, tail: str) -> tuple[str | None, str | None]:
        """Of the views' neighbours, those that begin like `tail` for longest.

        The longest text that begins `tail`, which somebody may go on to look for, is one of them or
        begins one of them.
        """
        anchor = anchor_hashes(tail[:ANCHOR_CHARS])  # none where the tail is shorter
        views = (v for v in self._views if not len(anchor) or v.anchors.places(anchor)[0])
        pairs = [view.around(tail) for view in views]
        below = [text for text, _ in pairs if text is not None]
        above = [text for _, text in pairs if text is not None]

        def alike(text: str) -> int:
            return common_length(text, tail)

        return max(below, key=alike, default=None), max(above, key=alike, default=None)


def find_texts(prompt: str, sources: Sequence[KnownTexts]) -> list[Match]:
    """All non-overlapping matches from left to right, the longest at each place."""
    with ExitStack() as stack:
        views = [stack.enter_context(source.looking()) for source in sources]
        matches = _anchored(prompt, views)
        short = {text for view in views for text in view.short}
        return _with_short(prompt, matches, short) if short else matches


def _anchored(prompt: str, views: Sequence[TextView]) -> list[Match]:
    hashes = anchor_hashes(prompt)
    candidates = [view.anchors.places(hashes) for view in views]
    matches: list[Match] = []
    end = 0
    for at in np.flatnonzero(np.logical_or.reduce(candidates)).tolist() if candidates else ():
        if at < end:
            continue
        found = [
            match
            for view, places in zip(views, candidates, strict=True)
            if places[at] and (match := longest_match(view, prompt, at)) is not None
        ]
        if found:
            matches.append(max(found, key=lambda match: match.end))
            end = matches[-1].end
    return matches


def longest_match(view: TextView, prompt: str, at: int) -> Match | None:
    """The longest match that begins at one place."""
    tail = prompt[at:]
    best: Match | None = None
    below, above = view.around(tail)
    for text in (below, above):
        common = common_length(text, tail) if text is not None else 0
        if text is None or common < ANCHOR_CHARS:
            continue
        is_long = common == len(text) or common >= MIN_CUT_CHARS
        if is_long and (best is None or common > best.end - at):
            best = Match(at, at + common, text)
    # A text that begins the tail also begins every text between itself and the tail, so it is no
    # longer than what the nearest one has in common with the tail: search again, that far.
    while below is not None and len(tail) >= ANCHOR_CHARS:
        if tail.startswith(below):
            is_text = len(below) >= ANCHOR_CHARS
            if is_text and (best is None or len(below) >= best.end - at):
                best = Match(at, at + len(below), below)
            break
        common = common_length(below, tail)
        if common == len(tail):
            break
        tail = tail[:common]
        below = view.around(tail)[0]
    return best


def common_length(a: str, b: str) -> int:
    """With how many characters both begin."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _with_short(prompt: str, matches: list[Match], short: Iterable[str]) -> list[Match]:
    """Add short texts, which count only where they fill one or more whole lines."""
    candidates = []
    for text in short:
        at = prompt.find(text)
        while at >= 0:
            end = at + len(text)
            alone = prompt[at - 1 : at] in ("", "\n") and prompt[end : end + 1] in ("", "\n")
            if alone:
                candidates.append(Match(at, end, text))
            at = prompt.find(text, at + 1)
    found = list(matches)
    for new in sorted(candidates, key=lambda m: (m.start, -m.end)):
        if all(new.end <= m.start or new.start >= m.end for m in found):
            found.append(new)
    return sorted(found, key=lambda match: match.start)
