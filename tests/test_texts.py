"""Texts of a store are found as those of a `TextSet` are; anchors miss nothing."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from store_conformance import a_record

import hcache_rag.texts
from hcache_rag.store import NewState, StateStore
from hcache_rag.texts import (
    ANCHOR_CHARS,
    MIN_CUT_CHARS,
    Anchors,
    AnchorSet,
    KnownTexts,
    Match,
    TextSet,
    TextView,
    anchor_hashes,
    find_texts,
)

SETTINGS = settings(deadline=None, derandomize=True, max_examples=150)
MAX_REPEATS = 5
"""A search that asks the same so often in a row asks it for ever."""


@contextmanager
def small_limits(anchor: int = 3, cut: int = 5, key: int = 480) -> Iterator[None]:
    """Limits that short texts reach; `key` bytes of a text stand in a store's keys."""
    with ExitStack() as stack:
        stack.enter_context(
            patch.multiple("hcache_rag.texts", ANCHOR_CHARS=anchor, MIN_CUT_CHARS=cut)
        )
        stack.enter_context(patch("hcache_rag.store.rows.ANCHOR_CHARS", anchor))
        stack.enter_context(patch("hcache_rag.store.tables._TEXT_BYTES", key))
        yield


class Patient:
    """Known texts that lose patience with a search that does not end."""

    def __init__(self, known: KnownTexts) -> None:
        self._known = known

    @contextmanager
    def looking(self) -> Iterator[TextView]:
        with self._known.looking() as view:
            yield PatientView(view)


class PatientView:
    """Counts how often the same is asked."""

    def __init__(self, view: TextView) -> None:
        self._view = view
        self._last, self._repeats = "", 0

    @property
    def anchors(self) -> Anchors:
        return self._view.anchors

    @property
    def short(self) -> Collection[str]:
        return self._view.short

    def around(self, tail: str) -> tuple[str | None, str | None]:
        self._repeats = self._repeats + 1 if tail == self._last else 0
        self._last = tail
        assert self._repeats < MAX_REPEATS, f"the search does not end at {tail!r}"
        return self._view.around(tail)


def find_in(known: KnownTexts, prompt: str) -> list[Match]:
    """All matches, of a search that ends."""
    return find_texts(prompt, [Patient(known)])


def store_of(texts: Sequence[str]) -> StateStore:
    """A store in memory with a state of each text."""
    store = StateStore.in_memory()
    store.put_all(NewState(a_record(text=text), []) for text in texts)
    return store


def check_against_set(store: StateStore, texts: Sequence[str], prompt: str) -> None:
    """A store finds what a set of its texts finds; of equally good texts it may name another."""
    found, expected = find_in(store, prompt), find_in(TextSet(texts), prompt)
    assert [(m.start, m.end) for m in found] == [(m.start, m.end) for m in expected]
    for one, other in zip(found, expected, strict=True):
        stretch = prompt[one.start : one.end]
        assert one.text in texts
        assert one.text.startswith(stretch)
        assert (one.text == stretch) is (other.text == stretch)


# --- a store is a set ---------------------------------------------------------------------------


def texts_over(alphabet: str, max_size: int = 12) -> st.SearchStrategy[list[str]]:
    """Texts that begin, contain and continue each other, without whitespace around them."""
    return st.lists(st.text(alphabet, min_size=1, max_size=max_size), max_size=8)


@st.composite
def prompts(draw: st.DrawFn, texts: Sequence[str], glue: str) -> str:
    """A prompt of texts, whole or cut anywhere, with scraps in between."""
    parts = []
    for text in draw(st.lists(st.sampled_from(texts), max_size=4)) if texts else []:
        cut = draw(st.integers(0, len(text)))
        parts.append(text if draw(st.booleans()) else text[:cut])
        parts.append(draw(st.text(glue, max_size=2)))
    return "".join(parts)


@pytest.mark.parametrize("alphabet", ["ab", "a\0", "aé🙂", "a\0\1\x7f\xff", "ab\n\0"])
@pytest.mark.parametrize("key", [480, 6, 3], ids=lambda key: f"key-of-{key}-bytes")
@SETTINGS
@given(data=st.data())
def test_a_store_finds_what_a_set_finds(alphabet: str, key: int, data: st.DataObject) -> None:
    """Small alphabets, NUL characters, characters of several bytes, beginnings in common."""
    texts = [t for t in (text.strip() for text in data.draw(texts_over(alphabet))) if t]
    with small_limits(key=key):
        store = store_of(texts)
        for _ in range(3):
            check_against_set(store, texts, data.draw(prompts(texts, alphabet)))
        check_against_set(store, texts, data.draw(st.text(alphabet, max_size=40)))


@pytest.mark.parametrize("key", [480, 6], ids=lambda key: f"key-of-{key}-bytes")
@SETTINGS
@given(data=st.data())
def test_a_store_finds_what_a_set_finds_after_deletes(key: int, data: st.DataObject) -> None:
    """What was found before is not found any more, and what it hid is."""
    texts = sorted(set(data.draw(texts_over("ab"))))
    gone = data.draw(st.lists(st.sampled_from(texts), unique=True)) if texts else []
    left = [text for text in texts if text not in gone]
    with small_limits(key=key):
        store = store_of(texts)
        prompt = data.draw(prompts(texts, "ab\n"))
        check_against_set(store, texts, prompt)
        for text in gone:
            assert store.delete(a_record(text=text).key)
        check_against_set(store, left, prompt)
        store.put_all(NewState(a_record(text=text), []) for text in gone)
        check_against_set(store, texts, prompt)


HEADS = {
    "nothing": "",
    "one-character-before-the-key-ends": "h" * 479,
    "a-whole-key": "h" * 480,
    "longer-than-a-key": "h" * 600,
    "two-byte-characters": "é" * 240,
    "a-character-cut-by-the-key": "é" * 239 + "🙂",
    "four-byte-characters": "🙂" * 120,
    "shorter-than-a-cut": "🙂" * 119 + "aaa",
    "nul-at-the-end-of-a-key": "h" * 479 + "\0",
    "nuls": "h" + "\0" * 250,
    "a-line": "file_path: /home/somebody/documents/encyclopaedia/page.md\n\n",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@settings(SETTINGS, max_examples=30)
@given(data=st.data())
def test_a_store_finds_what_a_set_finds_with_the_real_limits(
    head: str, data: st.DataObject
) -> None:
    """Texts with one head, about as long as what stands in a key."""
    tails = st.text("abé🙂\0", max_size=4).map(str.strip)
    texts = [head + tail for tail in data.draw(st.lists(tails, min_size=1, max_size=6))]
    texts += data.draw(st.lists(st.sampled_from([head, head[:-1], head[:200]]), max_size=2))
    texts = [text.strip() for text in texts if text.strip()]
    store = store_of(texts)
    for _ in range(3):
        check_against_set(store, texts, data.draw(prompts(texts or [head], "ab\0\n")))


def test_limits_are_the_documented_ones_in_a_store_too() -> None:
    """Anchors of 24 characters, cuts from 128 on, short texts as lines."""
    text = "".join(chr(ord("a") + n % 26) for n in range(300))
    store = store_of([text, "Yes."])
    assert (ANCHOR_CHARS, MIN_CUT_CHARS) == (24, 128)
    assert find_in(store, f"x {text[:128]}|") == [Match(2, 130, text)]
    assert find_in(store, f"x {text[:127]}|") == []
    assert find_in(store, f"Yes.\n{text}") == [Match(0, 4, "Yes."), Match(5, 305, text)]
    assert find_in(store, "Yes. No") == []


@pytest.mark.parametrize("length", [479, 480, 481, 600])
@pytest.mark.parametrize("following", ["", "!", "z", "\n\nQuestion: why?"])
def test_a_document_that_was_cut_after_any_length_is_found(length: int, following: str) -> None:
    """Of which another one with the same beginning is known too."""
    head = "".join(chr(ord("a") + n * n % 26) for n in range(700))
    texts = [head + "xxx", head + "yyy", head[:length] + "#" * 9]
    check_against_set(store_of(texts), texts, f"> {head[:length]}{following}")
    check_against_set(store_of(texts[:1]), texts[:1], f"> {head[:length]}{following}")


def test_a_text_that_ends_where_a_nul_is_cut_is_found() -> None:
    """Between two texts that go on with the NUL, in a prompt that does so in a third way."""
    text = "🙂" * 119 + "aaa"
    texts = [text, f"{text}\0bb", f"{text}\0dd"]
    check_against_set(store_of(texts), texts, f"{text}\0cc")
    assert find_in(store_of(texts), f"{text}\0cc") == [Match(0, len(text), text)]


def test_many_texts_with_the_same_first_480_bytes_are_told_apart() -> None:
    """Whole, cut behind the key, and continued by each other."""
    head = "A licence that stands at the head of every document. " * 12
    assert len(head) > 480
    texts = [f"{head}{number} is article {number}." for number in range(300)]
    texts += [f"{text} And more." for text in texts[::10]]
    store = store_of(texts)
    index = TextSet(texts)
    for text in texts[::17] + texts[300:]:
        for prompt in (f"> {text}\n\nWhy?", f"> {text[:-2]}?", f"> {text} Any", f"{text}{text}"):
            assert find_in(store, prompt) == find_in(index, prompt)
        assert find_in(store, f"> {text}\n")[0].text == text


def test_thousands_of_short_and_long_texts_are_found_in_one_prompt() -> None:
    """All of them, in order, as a set finds them."""
    numbers = random.Random(0)
    texts = [
        "".join(numbers.choices("abcdefgh é🙂", k=numbers.choice([5, 23, 24, 25, 200]))).strip()
        for _ in range(3000)
    ]
    store, index = store_of(texts), TextSet(texts)
    for begin in range(0, 3000, 100):
        prompt = "\n".join(texts[begin : begin + 100])
        assert find_in(store, prompt) == find_in(index, prompt)
        assert len(find_in(store, prompt)) >= 90


def test_a_store_and_a_set_are_searched_together() -> None:
    """The longest match wins, from wherever it is."""
    short = "A text that is known to one of them"
    long = f"{short}, and goes on"
    for first, second in [(short, long), (long, short)]:
        store, index = store_of([first]), TextSet([second])
        assert find_texts(f"> {long}.", [store, index]) == [Match(2, 2 + len(long), long)]
        assert find_texts(f"> {short}.", [store, index]) == [Match(2, 2 + len(short), short)]


def test_nothing_is_found_where_nothing_is_known() -> None:
    """Empty stores, empty prompts, preambles."""
    preamble = a_record(is_preamble=True)
    store = StateStore.in_memory()
    assert find_in(store, preamble.text) == []
    store.put(preamble, [])
    assert find_in(store, preamble.text) == find_in(store, "") == []
    with store.looking() as view:
        assert list(view.short) == []


def test_copies_of_a_text_count_once() -> None:
    """States of other models; the text is known until the last one is deleted."""
    text = "A text that two models have read."
    store = StateStore.in_memory()
    copies = [a_record(number, text=text) for number in range(3)]
    for record in copies:
        store.put(record, [])
    for record in copies:
        assert find_in(store, text) == [Match(0, len(text), text)]
        store.delete(record.key)
    assert find_in(store, text) == []


# --- who has opened a store before ---------------------------------------------------------------


@settings(SETTINGS, max_examples=30)
@given(data=st.data())
def test_what_is_put_later_is_seen_by_who_looks_later(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Two openings of one store on disk, which look and change it by turns."""
    known: set[str] = set()
    path = tmp_path_factory.mktemp("texts")
    with small_limits(), StateStore.open(path) as first, StateStore.open(path) as second:
        for _ in range(data.draw(st.integers(1, 5))):
            writer, reader = data.draw(st.sampled_from([(first, second), (second, first)]))
            new = data.draw(texts_over("ab\0"))
            writer.put_all(NewState(a_record(text=text), []) for text in new)
            known |= set(new)
            for text in (
                data.draw(st.lists(st.sampled_from(sorted(known)), unique=True)) if (known) else []
            ):
                writer.delete(a_record(text=text).key)
                known.discard(text)
            prompt = data.draw(prompts(sorted({*known, *new}), "ab\n"))
            if data.draw(st.booleans()):
                check_against_set(reader, sorted(known), prompt)
        for each in (first, second):
            check_against_set(each, sorted(known), prompt)


def test_a_view_stays_as_it_was_while_others_write(tmp_path: Path) -> None:
    """What a search has begun with is what it ends with; the next one sees the rest."""
    texts = [f"This is text number {number}, long enough." for number in range(3)]
    with StateStore.open(tmp_path / "store") as store, StateStore.open(tmp_path / "store") as other:
        store.put(a_record(text=texts[0]), [])
        store.put(a_record(text="short"), [])
        with store.looking() as view:
            other.put(a_record(text=texts[1]), [])
            other.put(a_record(text="tiny"), [])
            other.delete(a_record(text=texts[0]).key)
            other.delete(a_record(text="short").key)
            assert view.around(texts[0])[0] == texts[0]
            assert view.around(texts[2])[0] != texts[1]
            assert sorted(view.short) == ["short"]
        assert find_in(store, "\n".join([*texts, "short", "tiny"])) == find_in(
            TextSet([texts[1], "tiny"]), "\n".join([*texts, "short", "tiny"])
        )


# --- anchors ------------------------------------------------------------------------------------

UINT64 = st.integers(0, 2**64 - 1)


@SETTINGS
@given(st.lists(st.lists(UINT64, max_size=50), max_size=10), st.lists(UINT64, max_size=50))
@example([[0]], [0])
@example([[2**64 - 1]], [])
def test_anchors_are_never_missed(batches: list[list[int]], others: list[int]) -> None:
    """Whatever else is in the set; an empty one has nothing."""
    anchors = AnchorSet()
    assert not anchors.places(np.array(others, np.uint64)).any()
    added: list[int] = []
    for batch in batches:
        anchors.add(np.array(batch, np.uint64))
        added += batch
        assert len(anchors) == len(added)
        assert anchors.places(np.array(added, np.uint64)).all()


@pytest.mark.parametrize("batch", [1, 7, 500, 5000])
def test_a_growing_set_misses_nothing_and_takes_few_for_its_own(batch: int) -> None:
    """Through several doublings; less than a tenth of foreign hashes at any time."""
    numbers = np.random.default_rng(0)
    hashes = numbers.integers(0, 2**64, 10_000 if batch > 1 else 2500, np.uint64)
    foreign = numbers.integers(0, 2**64, 20_000, np.uint64)
    anchors = AnchorSet()
    for begin in range(0, len(hashes), batch):
        anchors.add(hashes[begin : begin + batch])
        if begin % 500 == 0:
            assert anchors.places(hashes[: begin + batch]).all()
            assert anchors.places(foreign).mean() < 0.1
    assert len(anchors) == len(hashes)
    assert anchors.places(hashes).all()


def test_anchors_of_real_texts_are_spread_as_well_as_random_ones() -> None:
    """Texts that differ in a few letters; foreign ones that do, too."""
    own = [f"This is document number {number:06} of many." for number in range(5000)]
    foreign = [f"This is document number {number:06} of many." for number in range(5000, 20_000)]
    begins = [text[10:] for text in own], [text[10:] for text in foreign]
    hashes = [np.concatenate([anchor_hashes(t[:ANCHOR_CHARS]) for t in each]) for each in begins]
    anchors = AnchorSet()
    anchors.add(hashes[0])
    assert anchors.places(hashes[0]).all()
    assert anchors.places(hashes[1]).mean() < 0.1


def naive_hash(window: str) -> int:
    """The polynomial, in Python's integers."""
    factor, spread = hcache_rag.texts._FACTOR, int(hcache_rag.texts._SPREAD)
    total = sum(ord(char) * pow(factor, power, 1 << 64) for power, char in enumerate(window))
    total %= 1 << 64
    return (total ^ total >> 32) * spread % (1 << 64)


@SETTINGS
@given(st.text(max_size=120), st.integers(1, 30))
@example("\0" * 60, 24)
@example("\U0010ffff" * 60, 24)
@example("x" * 23, 24)
@example("x" * 24, 24)
def test_anchor_hashes_are_a_polynomial_of_each_window(text: str, anchor: int) -> None:
    """One for each place that has a whole window left."""
    with small_limits(anchor=anchor):
        hashes = anchor_hashes(text).tolist()
    windows = [text[at : at + anchor] for at in range(len(text) - anchor + 1)]
    assert hashes == [naive_hash(window) for window in windows]


@SETTINGS
@given(st.text(min_size=1, max_size=60), st.text(max_size=60), st.text(max_size=60))
def test_equal_windows_have_equal_hashes(text: str, before: str, behind: str) -> None:
    """Wherever they stand."""
    with small_limits(anchor=len(text)):
        (expected,) = anchor_hashes(text).tolist()
        assert anchor_hashes(before + text + behind).tolist()[len(before)] == expected


def test_different_windows_have_different_hashes() -> None:
    """All of a hundred thousand, far from the beginning too."""
    letters = "".join(random.Random(0).choices("ab", k=100_000))
    windows = {letters[at : at + ANCHOR_CHARS] for at in range(len(letters) - ANCHOR_CHARS + 1)}
    assert len(set(anchor_hashes(letters).tolist())) == len(windows)
