"""Answers as text, piece by piece, whatever bytes a model says."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hcache_rag.generation import TextAssembler

LETTERS = {letter: 300 + number for number, letter in enumerate("\u2581abc")}


def byte_fallback_tokenizer() -> PreTrainedTokenizerBase:
    """As SentencePiece's with bytes for what has no token: byte b is token b + 1."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, **LETTERS}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = fast(tokenizer_object=backend)
    return tokenizer


TOKENIZER = byte_fallback_tokenizer()


def pieces_of(tokens: list[int]) -> list[str]:
    """What a stream gives, and at the end the rest."""
    assembler = TextAssembler(TOKENIZER, ())
    pieces = [assembler.push(token) for token in tokens]
    return [*pieces, assembler.finish(str(TOKENIZER.decode(tokens)))]


def tokens_of(data: bytes) -> list[int]:
    return [byte + 1 for byte in data]


def test_characters_come_whole() -> None:
    assert pieces_of([*tokens_of("\u20ac".encode()), LETTERS["a"]]) == ["", "", "\u20ac", "a", ""]


@pytest.mark.parametrize("bad", [b"\xc3\xbf\xa9", b"\xc3\x82\x82", b"\xc3\xbf\xe2"])
def test_bytes_that_are_no_character_end_no_answer(bad: bytes) -> None:
    """What follows them is said, each token as soon as it is known."""
    pieces = pieces_of([*tokens_of(bad), LETTERS["b"], LETTERS["\u2581"], LETTERS["c"]])
    assert pieces[-4].endswith("b")
    assert pieces[-3:] == [" ", "c", ""]


def test_any_bytes_are_said_to_the_end() -> None:
    """Letters come in their order, none twice and none left out."""
    draw = random.Random(0)
    some = [*LETTERS.values(), *tokens_of(b"\xe2\x82\xac\x80\xff\xc3\xa9\xef\xbf\xbd")]
    for _ in range(3000):
        tokens = [draw.choice(some) for _ in range(draw.randrange(1, 12))]
        said = "".join(pieces_of(tokens))
        letters = "".join(letter for letter in said if letter in " abc")
        whole = str(TOKENIZER.decode(tokens))
        assert letters == "".join(letter for letter in whole if letter in " abc")
