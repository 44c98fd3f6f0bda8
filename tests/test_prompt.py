"""Finding known texts in prompts, and cutting prompts into tokens that lose nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hcache_rag.prompt import Piece, Tokenizer
from hcache_rag.state import TokenIds, token_array
from hcache_rag.texts import ANCHOR_CHARS, MIN_CUT_CHARS, Match, TextSet, find_texts

BOS, IM_END = 256, 258
SETTINGS = settings(deadline=None, derandomize=True, max_examples=200)


@contextmanager
def small_limits(anchor: int = 3, cut: int = 5) -> Iterator[None]:
    """Limits that short texts reach."""
    with patch.multiple("hcache_rag.texts", ANCHOR_CHARS=anchor, MIN_CUT_CHARS=cut):
        yield


def find_in(texts: TextSet, prompt: str) -> list[Match]:
    return find_texts(prompt, [texts])


@pytest.fixture
def _small_limits() -> Iterator[None]:
    with small_limits():
        yield


# --- finding ------------------------------------------------------------------------------------


def common_length(a: str, b: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def longest_matches(
    texts: Sequence[str], prompt: str, anchor: int, cut: int
) -> list[tuple[int, int, set[str]]]:
    """Brute force: at each place, left to right, what any text has most in common with."""
    known = {text.strip() for text in texts if len(text.strip()) >= anchor}
    found = []
    at = 0
    while at < len(prompt):
        common = {text: common_length(text, prompt[at:]) for text in known}
        common = {t: n for t, n in common.items() if n >= anchor and (n == len(t) or n >= cut)}
        longest = max(common.values(), default=0)
        if longest:
            found.append((at, at + longest, {t for t, n in common.items() if n == longest}))
        at += longest or 1
    return found


AB_TEXTS = st.lists(st.text("ab", max_size=12), max_size=8)
AB_PROMPT = st.text("ab", max_size=40)


@SETTINGS
@given(AB_TEXTS, AB_PROMPT)
@example(["abab", "ababbb", "ababba"], "abababbab")
@example(["aaa", "aaab", "aaabbbbb"], "aaabbbbab")
def test_find_agrees_with_brute_force(texts: list[str], prompt: str) -> None:
    """Texts over two letters begin, contain and continue each other."""
    with small_limits():
        # Short texts have a test of their own.
        index = TextSet(text for text in texts if len(text) >= 3)
        found = find_in(index, prompt)
    expected = longest_matches(texts, prompt, 3, 5)
    assert [(m.start, m.end) for m in found] == [(start, end) for start, end, _ in expected]
    assert all(m.text in known for m, (_, _, known) in zip(found, expected, strict=True))


@SETTINGS
@given(st.lists(st.text("ab \n", min_size=3, max_size=12), max_size=8), st.data())
def test_find_in_prompts_made_of_the_texts(texts: list[str], data: st.DataObject) -> None:
    """Prompts of documents, their beginnings and scraps in between."""
    parts = st.sampled_from([*texts, "a", "\n", " b", ""])
    prompt = "".join(
        text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text
        for text in data.draw(st.lists(parts, max_size=8))
    )
    with small_limits():
        index = TextSet(text for text in texts if len(text.strip()) >= 3)
        found = find_in(index, prompt)
    expected = longest_matches(texts, prompt, 3, 5)
    assert [(m.start, m.end) for m in found] == [(start, end) for start, end, _ in expected]
    assert all(m.text in known for m, (_, _, known) in zip(found, expected, strict=True))


@SETTINGS
@given(st.lists(st.text("ab", min_size=1, max_size=8), min_size=1, max_size=8), st.data())
def test_discarded_texts_are_as_if_they_had_never_been_added(
    texts: list[str], data: st.DataObject
) -> None:
    """Others that begin alike stay."""
    gone = data.draw(st.lists(st.sampled_from([*texts, "abab"]), max_size=4))
    prompt = "\n".join(data.draw(st.permutations(texts)))
    with small_limits():
        index = TextSet(texts)
        for text in gone:
            index.discard(text)
        kept = TextSet(text for text in texts if text not in gone)
        assert find_in(index, prompt) == find_in(kept, prompt)


@SETTINGS
@given(AB_TEXTS, AB_PROMPT)
def test_the_order_of_adding_does_not_matter(texts: list[str], prompt: str) -> None:
    """Nor does adding twice."""
    with small_limits():
        forth, back = TextSet(texts), TextSet([*reversed(texts), *texts])
        assert find_in(forth, prompt) == find_in(back, prompt)


@pytest.mark.usefixtures("_small_limits")
@pytest.mark.parametrize(
    ("longer", "prompt"),
    [
        pytest.param("The sun is hot.aaa", "The sun is hot.bbb", id="longer-sorts-before"),
        pytest.param("The sun is hot.zzz", "The sun is hot.bbb", id="longer-sorts-behind"),
        pytest.param("The sun is hot.aaa", "The sun is hot.", id="prompt-ends"),
    ],
)
def test_a_whole_text_comes_before_an_equally_long_cut_of_another(longer: str, prompt: str) -> None:
    """A document that another one continues (a chunk and its parent) is itself when it is whole."""
    whole = "The sun is hot."
    assert find_in(TextSet([whole, longer]), prompt) == [Match(0, len(whole), whole)]


def test_thousands_of_texts_with_one_header() -> None:
    """Each is found whole among all the others, where it stands."""
    header = "file_path: /home/somebody/documents/encyclopaedia/volume/"
    header += "page.md\nretrieved: today\nlanguage: en\nlicence: CC-BY\n\n"
    assert len(header) > 100
    numbers = random.Random(0)
    texts = [f"{header}{numbers.randrange(10**9):x} is article {n}, ends" for n in range(5000)]
    texts += [f"{text} not here." for text in texts[::50]]
    index = TextSet(texts)
    for text in texts[::97] + texts[5000:]:
        prompt = f"Context:\n\n{text}\n\nQuestion: why?"
        assert find_in(index, prompt) == [Match(10, 10 + len(text), text)]
    joined = "\n\n".join(texts[:300])
    assert [m.text for m in find_in(index, joined)] == texts[:300]


def test_limits_are_the_documented_ones() -> None:
    """A document that was cut is found from 128 characters on, and not from 127."""
    text = "".join(chr(ord("a") + n % 26) for n in range(300))
    index = TextSet([text])
    assert (ANCHOR_CHARS, MIN_CUT_CHARS) == (24, 128)
    assert find_in(index, f"x {text[:128]}|") == [Match(2, 130, text)]
    assert find_in(index, f"x {text[:127]}|") == []
    assert find_in(index, text[:128]) == [Match(0, 128, text)]
    assert find_in(TextSet([text[:127]]), f"x {text[:127]}|") == [Match(2, 129, text[:127])]


def test_the_longest_cut_wins() -> None:
    """Of many texts with a long common head, the one with most in common is taken."""
    head = "h" * 150
    texts = [head + 10 * letter + "!" for letter in "abcdef"]
    for letter in "abcdef":
        (match,) = find_in(TextSet(texts), f"> {head}{5 * letter}")
        assert match == Match(2, 157, f"{head}{10 * letter}!")


@pytest.mark.parametrize("text", ["  {}\n\n", "\t{}", "{} "])
def test_whitespace_around_a_text_does_not_count(text: str) -> None:
    """Neither when it is added nor when it is discarded."""
    core = "A text that is long enough, with  spaces inside."
    index = TextSet([text.format(core)])
    assert find_in(index, f"({core})") == [Match(1, 1 + len(core), core)]
    assert find_in(index, core.replace("  ", " ")) == []
    index.discard(f"\n{core}\n")
    assert find_in(index, core) == []


@pytest.mark.parametrize(
    ("prompt", "starts"),
    [
        ("Yes.", [0]),
        ("Yes.\nNo", [0]),
        ("No\nYes.", [3]),
        ("No\n\nYes.\n\nNo", [4]),
        ("Yes.\nYes.", [0, 5]),
        ("Yes. No", []),
        ("Oh Yes.", []),
        ("Yes..", []),
        (" Yes.", []),
        ("Yes. \nYes.", [6]),
    ],
)
def test_a_short_text_counts_only_on_a_line_of_its_own(prompt: str, starts: list[int]) -> None:
    """Else "Yes." would be found in half of all texts."""
    assert find_in(TextSet(["Yes."]), prompt) == [Match(s, s + 4, "Yes.") for s in starts]


@pytest.mark.usefixtures("_small_limits")
@SETTINGS
@given(st.lists(st.text("ab", max_size=2)), st.text("ab\n", max_size=30))
def test_short_texts_are_found_as_lines(texts: list[str], prompt: str) -> None:
    """Against splitting the prompt into lines."""
    expected, at = [], 0
    for line in prompt.split("\n"):
        if line and line in texts:
            expected.append(Match(at, at + len(line), line))
        at += len(line) + 1
    with small_limits():
        assert find_in(TextSet(texts), prompt) == expected


def test_of_short_texts_too_the_longest_is_taken() -> None:
    """A text of two lines is one document, though its first line is one too."""
    for number in range(50):
        index = TextSet([f"{number}", f"{number}\nmore", "more"])
        assert [m.text for m in find_in(index, f"{number}\nmore")] == [f"{number}\nmore"]


def test_a_short_text_is_found_right_after_a_place_where_it_was_not_alone() -> None:
    """Occurrences that overlap."""
    assert find_in(TextSet(["x\nx"]), "ax\nx\nx") == [Match(3, 6, "x\nx")]


def test_short_texts_do_not_break_up_long_ones() -> None:
    """A line of a document that is known as a text of its own stays part of the document."""
    text = "The first line of it.\nYes.\nThe last line of it."
    index = TextSet(["Yes.", text])
    prompt = f"Yes.\n{text}\nYes."
    assert [m.text for m in find_in(index, prompt)] == ["Yes.", text, "Yes."]


def test_nothing_is_found_where_nothing_is_known() -> None:
    """Empty texts, empty prompts."""
    assert find_in(TextSet(), "anything") == []
    assert find_in(TextSet(["", "  \n"]), "\n\n  \n") == []
    assert find_in(TextSet(["A text that is long enough to be one."]), "") == []


# --- tokenizers ---------------------------------------------------------------------------------

CORPUS = (
    "The sun is a star. The moon is not. 太阳是一颗恒星。 Größe, naïve café 🙂🙂 🚀 "
    "Context information is below.\n\nQuestion: why?\nAnswer: the sun, the sun! "
) * 4


wrapped: Any = PreTrainedTokenizerFast


def byte_level_bpe() -> PreTrainedTokenizerBase:
    """Byte-level BPE with merges (some inside characters), like those of GPT-2 and Qwen."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    tokenizer: PreTrainedTokenizerBase = wrapped(tokenizer_object=backend, eos_token="<eos>")
    return tokenizer


SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = list("▁abcdefghijklmnopqrstuvwxyzTQAC.,:?!ß")


def unigram() -> Backend:
    """Unigram with byte fallback: single letters, a few words, and bytes for everything else."""
    words = ["▁The", "▁the", "The", "▁sun", "sun", "▁is", "is", "▁star"]
    pieces = [(token, 0.0) for token in SPECIAL] + [(byte, -20.0) for byte in BYTES]
    pieces += [(letter, -5.0) for letter in LETTERS] + [(word, -2.0) for word in words]
    return Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))


def fallback_bpe(*, newlines: bool = False) -> Backend:
    """BPE with byte fallback, as Llama 2 has it; with a token for two newlines if asked."""
    pairs = ["▁ t", "▁ s", "h e", "▁t he", "s u", "su n", "▁s u", "▁su n", "▁ i", "▁i s", "i s"]
    letters = [*LETTERS, *("\n" if newlines else "")]
    merges = [(a, b) for a, b in (pair.split(" ") for pair in pairs)]
    merges += [("\n", "\n")] if newlines else []
    tokens = dict.fromkeys(SPECIAL + BYTES + letters + [a + b for a, b in merges])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Backend(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )


def sentencepiece(backend: Backend, *, as_normalizer: bool = False) -> PreTrainedTokenizerBase:
    """Spaces as "▁", and one in front of every text: as a pre-tokenizer, or as Llama 2 had it."""
    if as_normalizer:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer: PreTrainedTokenizerBase = wrapped(tokenizer_object=backend, **names)
    return tokenizer


SENTENCEPIECE = {
    "metaspace-unigram": sentencepiece(unigram()),
    "metaspace-bpe": sentencepiece(fallback_bpe()),
    "metaspace-bpe-newlines": sentencepiece(fallback_bpe(newlines=True)),
    "normalizer-bpe": sentencepiece(fallback_bpe(), as_normalizer=True),
}
TOKENIZERS = {"bytes": byte_tokenizer(), "byte-level-bpe": byte_level_bpe(), **SENTENCEPIECE}
EVERY = pytest.mark.parametrize("kind", TOKENIZERS)

DOCUMENTS = [
    "The sun is a star. It is hot.",
    "太阳是一颗恒星。🙂🚀 非常热。",
    "🙂 café, Größe: naïve\n\ntwo lines",
    "\u200bthe\tsun  is   the sun!",
    "?: Question? The sun",
]
GLUES = ["", " ", "\n", "\n\n", ".", " sun", "\n\nQuestion: why?\n", "🙂", "é", "- "]


def joined(pieces: Sequence[Piece]) -> list[int]:
    """All token ids."""
    return [int(token) for piece in pieces for token in piece.token_ids]


def decoded(kind: str, ids: Sequence[int]) -> str:
    """The text of ids, nothing left out and nothing tidied."""
    tokenizer: Any = TOKENIZERS[kind]
    text: str = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


def cut_up(kind: str, prompt: str, documents: Sequence[str], **options: Any) -> list[Piece]:
    """The pieces of a prompt, under small limits."""
    with small_limits():
        matches = find_in(TextSet(documents), prompt)
    return Tokenizer(TOKENIZERS[kind], **options).pieces(prompt, matches, add_bos=False)


PROMPTS = {
    "no-document": "Who?\n\nWhy",
    "document-alone": DOCUMENTS[0],
    "document-first": f"{DOCUMENTS[1]}\n\nQuestion: why?",
    "document-last": f"Q: why?\n\n{DOCUMENTS[2]}",
    "all-documents": "C:\n\n" + "\n\n".join(DOCUMENTS) + "\n\nA:",
    "side-by-side": "".join(DOCUMENTS),
    "repeated": f"a {DOCUMENTS[0]} {DOCUMENTS[0]}  {DOCUMENTS[0]}",
    "cut": f"C: {DOCUMENTS[1][:8]}...\n\n{DOCUMENTS[2][:9]}",
    "inside-words": f"the{DOCUMENTS[0]}the",
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@EVERY
def test_the_pieces_are_the_prompt(kind: str, prompt: str) -> None:
    """Decoding all ids together gives back the prompt: no space, no character more or less."""
    pieces = cut_up(kind, prompt, DOCUMENTS)
    assert decoded(kind, joined(pieces)) == prompt
    assert all(piece.token_ids.dtype == np.uint32 for piece in pieces)
    assert any(piece.document for piece in pieces) == (prompt != PROMPTS["no-document"])


@EVERY
@settings(SETTINGS, max_examples=100)
@given(st.data())
def test_any_pieces_are_the_prompt(kind: str, data: st.DataObject) -> None:
    """Documents, their beginnings, and any separators, in any order."""
    parts = [data.draw(st.sampled_from(["Q", "", "C:", *DOCUMENTS]))]
    for document in data.draw(st.lists(st.sampled_from(DOCUMENTS), max_size=4)):
        parts.append(document[: data.draw(st.integers(4, len(document)))])
        parts.append(data.draw(st.sampled_from(GLUES)))
    prompt = "".join(parts)
    assert decoded(kind, joined(cut_up(kind, prompt, DOCUMENTS))) == prompt


@EVERY
def test_a_document_has_the_same_ids_whatever_surrounds_it(kind: str) -> None:
    """Those it has alone, with the text they stand for."""
    tokenizer = Tokenizer(TOKENIZERS[kind])
    for document in DOCUMENTS:
        alone = tokenizer.document(document).tolist()
        assert decoded(kind, alone) == document
        assert tokenizer.document(f"\n {document}\t").tolist() == alone
        for before in GLUES:
            for after in GLUES:
                pieces = cut_up(kind, f"Q{before}{document}{after}", [document])
                (ids,) = [piece.token_ids for piece in pieces if piece.document]
                assert ids.tolist() == alone


@EVERY
def test_stored_ids_are_used_instead_of_tokenising(kind: str) -> None:
    """For whole documents; what is not stored, and what was cut, is tokenised."""
    stored = {DOCUMENTS[0]: token_array([7, 7, 7])}
    prompt = f"{DOCUMENTS[0]}\n\n{DOCUMENTS[1]}\n\n{DOCUMENTS[0][:12]}"
    with small_limits():
        matches = find_in(TextSet(DOCUMENTS), prompt)
    asked: list[str] = []

    def look_up(text: str) -> TokenIds | None:
        asked.append(text)
        return stored.get(text)

    tokenizer = Tokenizer(TOKENIZERS[kind])
    pieces = tokenizer.pieces(prompt, matches, add_bos=False, stored=look_up)
    whole, other, cut = [piece.token_ids for piece in pieces if piece.document]
    assert whole.tolist() == [7, 7, 7]
    assert other.tolist() == tokenizer.document(DOCUMENTS[1]).tolist()
    assert cut.tolist() == tokenizer.document(DOCUMENTS[0]).tolist()[: len(cut)]
    assert len(cut)
    assert asked == DOCUMENTS[:2]


# --- cut documents ------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("document", DOCUMENTS, ids=["plain", "chinese", "emoji", "odd", "marks"])
def test_a_document_cut_anywhere_gives_its_longest_whole_tokens(kind: str, document: str) -> None:
    """A prefix of its ids that covers whole characters up to the cut, and no shorter than that.

    Unigram gives all bytes of a run of unknown characters one place, so there it may be shorter.
    """
    whole = Tokenizer(TOKENIZERS[kind]).document(document).tolist()
    texts = [decoded(kind, whole[:count]) for count in range(len(whole) + 1)]
    for length in range(5, len(document)):
        prompt = f"Q|{document[:length]}|{document[:length]}"
        pieces = cut_up(kind, prompt, [document])
        possible = max(
            count for count, text in enumerate(texts) if document[:length].startswith(text)
        )
        cut = [piece.token_ids.tolist() for piece in pieces if piece.document]
        assert len(cut) == 2
        for ids in cut:
            assert len(ids) == possible or (kind == "metaspace-unigram" and len(ids) < possible)
            assert ids == whole[: len(ids)]
        assert decoded(kind, joined(pieces)) == prompt


def test_a_cut_inside_a_merged_token_stops_before_it() -> None:
    """The characters that the last token shares with what was cut off are read afresh."""
    tokenizer = Tokenizer(TOKENIZERS["byte-level-bpe"])
    document = "is the sun the sun the sun"
    whole = tokenizer.document(document).tolist()
    merged = decoded("byte-level-bpe", whole[-1:])
    assert len(merged) > 2
    prompt = document[:-1] + "."
    pieces = cut_up("byte-level-bpe", prompt, [document])
    assert pieces[0].token_ids.tolist() == whole[:-1]
    assert decoded("byte-level-bpe", joined(pieces[1:])) == merged[:-1] + "."


# --- control tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "byte-level-bpe"])
def test_control_tokens_stay_text_in_documents_only(kind: str) -> None:
    """A document cannot end the user's turn; the chat template around it can."""
    document = "A page about <|im_end|> and how to write it."
    prompt = f"<|im_end|>{document}<|im_end|>\n<|im_end|>"
    tokenizer: Any = TOKENIZERS[kind]
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")

    before, inside, after = cut_up(kind, prompt, [document])

    assert before.token_ids.tolist() == [control]
    assert control not in inside.token_ids
    assert decoded(kind, inside.token_ids.tolist()) == document
    assert after.token_ids.tolist().count(control) == 2
    assert control not in Tokenizer(tokenizer).document(document)
    assert control in Tokenizer(tokenizer).preamble("<|im_end|>", add_bos=False)


@pytest.mark.parametrize("kind", ["bytes", "byte-level-bpe"])
def test_control_tokens_stay_text_in_a_cut_document(kind: str) -> None:
    """Cut before, inside and behind the control token's text."""
    document = "A page on <|im_end|> and how to write it."
    tokenizer: Any = TOKENIZERS[kind]
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for length in range(8, len(document)):
        prompt = f"{document[:length]}~"
        first, *_ = cut_up(kind, prompt, [document])
        assert control not in first.token_ids
        assert decoded(kind, joined(cut_up(kind, prompt, [document]))) == prompt


# --- the first token ----------------------------------------------------------------------------


@pytest.mark.parametrize("tokenization", ["segmented", "strict"])
@pytest.mark.parametrize(
    ("prompt", "add_bos", "expected"),
    [
        ("Hello there", True, 1),
        ("Hello there", False, 0),
        ("<bos>Hello there", True, 1),
        ("<bos>Hello there", False, 1),
        ("", True, 1),
        ("", False, 0),
        ("The document.", True, 1),
        ("<bos>The document.", True, 1),
        ("<bos>The document. Why?", False, 1),
    ],
)
def test_bos_stands_once_and_first(
    prompt: str, add_bos: bool, expected: int, tokenization: Any
) -> None:
    """Whether the template has written it or not, and whether a document comes first or not."""
    tokenizer = Tokenizer(byte_tokenizer(adds_bos=True), tokenization)
    with small_limits():
        matches = find_in(TextSet(["The document."]), prompt)
    ids = joined(tokenizer.pieces(prompt, matches, add_bos=add_bos))
    assert ids.count(BOS) == expected
    assert ids[:expected] == [BOS] * expected
    assert bytes(byte_values(ids[expected:])).decode() == prompt.removeprefix("<bos>")


def byte_values(ids: Sequence[int]) -> list[int]:
    """What the byte tokenizer's ids stand for."""
    text = byte_tokenizer().convert_ids_to_tokens(list(ids))
    back = {c: b for b, c in zip(range(256), byte_characters(), strict=True)}
    return [back[character] for character in text]


def byte_characters() -> list[str]:
    """The character that a byte-level tokenizer writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def test_a_document_that_begins_with_the_text_of_bos_does_not_replace_it() -> None:
    """In a document "<bos>" is text; the prompt still begins with the token."""
    document = "<bos> is how a prompt begins."
    with small_limits():
        matches = find_in(TextSet([document]), document)
    pieces = Tokenizer(byte_tokenizer(adds_bos=True)).pieces(document, matches, add_bos=True)
    assert joined(pieces).count(BOS) == 1
    assert joined(pieces)[0] == BOS


@pytest.mark.parametrize("prompt", ["Hello", "<bos>Hello", ""])
def test_a_tokenizer_without_bos_adds_none(prompt: str) -> None:
    """Only a literal one is there."""
    pieces = Tokenizer(byte_tokenizer()).pieces(prompt, [], add_bos=True)
    assert joined(pieces).count(BOS) == prompt.count("<bos>")


@pytest.mark.parametrize(
    ("text", "add_bos", "expected"),
    [
        ("", True, [BOS]),
        ("", False, []),
        ("<bos>", True, [BOS]),
        ("<|im_end|>", True, [BOS, IM_END]),
        ("<bos><|im_end|>", True, [BOS, IM_END]),
        ("<bos><|im_end|>", False, [BOS, IM_END]),
    ],
)
def test_a_preamble_begins_as_a_prompt_does(text: str, add_bos: bool, expected: list[int]) -> None:
    """So that the prompt's head has the preamble's ids."""
    tokenizer = Tokenizer(byte_tokenizer(adds_bos=True))
    assert tokenizer.preamble(text, add_bos=add_bos).tolist() == expected
    assert joined(tokenizer.pieces(text, [], add_bos=add_bos)) == expected


@EVERY
def test_a_preamble_in_front_of_a_document_has_the_preambles_ids(kind: str) -> None:
    """The head of every prompt is found again token by token."""
    preamble = "Context information is below.\n\n"
    tokenizer = Tokenizer(TOKENIZERS[kind])
    expected = tokenizer.preamble(preamble, add_bos=True).tolist()
    with small_limits():
        matches = find_in(TextSet(DOCUMENTS), preamble + DOCUMENTS[1])
    pieces = tokenizer.pieces(preamble + DOCUMENTS[1], matches, add_bos=True)
    assert joined(pieces[:-1]) == expected


# --- strict -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
@EVERY
def test_strict_ids_are_the_tokenizers_own(kind: str, prompt: str) -> None:
    """Token for token what transformers reads, the first token included."""
    with small_limits():
        matches = find_in(TextSet(DOCUMENTS), prompt)
    pieces = Tokenizer(TOKENIZERS[kind], "strict").pieces(prompt, matches, add_bos=True)
    assert joined(pieces) == TOKENIZERS[kind](prompt)["input_ids"]


@EVERY
def test_strict_reuses_documents_that_come_out_the_same(kind: str) -> None:
    """Between line breaks, where no token reaches over the edge; with their own ids."""
    document = DOCUMENTS[0]
    (reused,) = [
        piece
        for piece in cut_up(kind, f"C:\n{document}\nA:", [document], tokenization="strict")
        if piece.document
    ]
    assert reused.document == document
    own = Tokenizer(TOKENIZERS[kind]).document(document)
    assert reused.token_ids.tolist() == own.tolist()


def test_strict_does_not_reuse_what_comes_out_differently() -> None:
    """A document whose first or last token merges with its surroundings is read afresh."""
    document = "sun is the sun"
    for prompt in (f"The {document}", f"{document}s are"):
        ids = TOKENIZERS["byte-level-bpe"](prompt)["input_ids"]
        pieces = cut_up("byte-level-bpe", prompt, [document], tokenization="strict")
        assert joined(pieces) == ids
    assert [p.document for p in cut_up("byte-level-bpe", f"The {document}", [document])] == [
        None,
        document,
    ]
    strict = cut_up("byte-level-bpe", f"The {document}", [document], tokenization="strict")
    assert [piece.document for piece in strict] == [None]


@pytest.mark.parametrize("kind", ["bytes", "byte-level-bpe"])
def test_strict_does_not_reuse_a_document_with_a_control_token(kind: str) -> None:
    """Transformers reads the control token, the stored state has its text."""
    document = "A page about <|im_end|> and how to write it."
    prompt = f"x\n{document}\ny"
    pieces = cut_up(kind, prompt, [document], tokenization="strict")
    assert [piece.document for piece in pieces] == [None]
    assert joined(pieces) == TOKENIZERS[kind](prompt)["input_ids"]


@EVERY
@settings(SETTINGS, max_examples=60)
@given(st.data())
def test_strict_ids_are_always_the_tokenizers_own(kind: str, data: st.DataObject) -> None:
    """With cut documents and any separators; a reused document has a prefix of its own ids."""
    parts = [data.draw(st.sampled_from(["Q", "", "C: "]))]
    for document in data.draw(st.lists(st.sampled_from(DOCUMENTS), max_size=4)):
        parts.append(document[: data.draw(st.integers(4, len(document)))])
        parts.append(data.draw(st.sampled_from(GLUES)))
    prompt = "".join(parts)
    pieces = cut_up(kind, prompt, DOCUMENTS, tokenization="strict")
    expected = TOKENIZERS[kind](prompt, add_special_tokens=False)["input_ids"]
    assert joined(pieces) == expected
    for piece in pieces:
        if piece.document is not None:
            own = Tokenizer(TOKENIZERS[kind]).document(piece.document).tolist()
            assert piece.token_ids.tolist() == own[: len(piece.token_ids)]


def test_an_unknown_tokenization_is_refused() -> None:
    """With its name."""
    with pytest.raises(ValueError, match="'loose'"):
        Tokenizer(byte_tokenizer(), "loose")  # type: ignore[arg-type]
