"""Finished prompt text to pieces of token ids, cut where documents were found in it.

Documents are tokenised on their own, so that a document always has the same token ids. Knows
neither models nor tensors.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from hcache_rag.forks import ForkedLock
from hcache_rag.identity import tokenizer_fingerprint
from hcache_rag.state import TokenIds, common_prefix, token_array
from hcache_rag.texts import Match

Tokenization = Literal["segmented", "strict"]

_PARTIAL = "\ufffd"
"""What the bytes of a character that is not whole are decoded as."""
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character: texts that were read wrongly hold it, and tokenizers refuse it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the prompt's tokens: a known document (or its beginning), or a gap.

    Args:
        token_ids: shape (T,).
        document: the known text whose first T tokens these are; None for a gap.
        is_known: they are the beginning of the token ids that were known.
    """

    token_ids: TokenIds
    document: str | None
    is_known: bool = False


class Tokenizer:
    """A fast transformers tokenizer as prompts need it. Thread-safe.

    Args:
        tokenizer: the model's tokenizer.
        tokenization: "segmented" tokenises gaps and documents each on their own; "strict"
            tokenises the whole prompt as transformers would, and reuses a document only where
            its tokens come out the same.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tokenization: Tokenization = "segmented"
    ) -> None:
        if tokenization not in ("segmented", "strict"):
            raise ValueError(f"tokenization is 'segmented' or 'strict', not {tokenization!r}")
        self.tokenization = tokenization
        self._tokenizer: Any = tokenizer
        self._lock = ForkedLock()
        first = tokenizer.convert_ids_to_tokens(self._encode("a")[0])
        # SentencePiece tokenizers begin an isolated text with a space that is not in it.
        self._adds_space = bool(first) and first[0].startswith("▁")
        with_special = self._tokenizer("a")["input_ids"]
        self._bos = with_special[: len(with_special) - len(first)]
        if self._bos + self._encode("a")[0] != with_special:
            self._bos = []

    @property
    def fingerprint(self) -> str:
        """See `hcache_rag.identity.tokenizer_fingerprint`."""
        return tokenizer_fingerprint(self._tokenizer)

    @property
    def is_literal(self) -> bool:
        """Whether tokens say the same text wherever they stand."""
        return not self._adds_space

    def document(self, text: str) -> TokenIds:
        """The token ids of a document, shape (T,); control tokens in it stay text."""
        return token_array(self._inner(text.strip(), split_special=True)[0])

    def gap(self, text: str) -> TokenIds:
        """The token ids of what stands between two documents, shape (T,)."""
        return token_array(self._inner(text, split_special=False)[0])

    def first(self, prompt: str, *, add_bos: bool) -> str:
        """The text of the tokens that `add_bos` puts in front of a prompt."""
        return self.text(self._start(prompt, add_bos))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, control tokens included."""
        with self._lock:
            return str(
                self._tokenizer.decode(
                    list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )

    def tokens_within(self, token_ids: TokenIds, text: str) -> int:
        """How many of some token ids are tokens of a text's beginning, as it is written."""
        low, high = 0, len(token_ids)
        while low < high:
            middle = (low + high + 1) // 2
            if text.startswith(self.text(token_ids[:middle].tolist()).rstrip(_PARTIAL)):
                low = middle
            else:
                high = middle - 1
        while low and not text.startswith(self.text(token_ids[:low].tolist())):
            low -= 1
        return low

    def preamble(self, text: str, *, add_bos: bool) -> TokenIds:
        """The token ids of a prompt's head, shape (T,)."""
        ids = self._encode(text)[0] if text else []
        return token_array(self._start(text, add_bos) + ids)

    def pieces(
        self,
        prompt: str,
        matches: Sequence[Match],
        *,
        add_bos: bool,
        stored: Callable[[str], TokenIds | None] = lambda _text: None,
        known: tuple[TokenIds, int] | None = None,
    ) -> list[Piece]:
        """Cut a prompt at `matches` and tokenise it.

        Args:
            add_bos: put the tokenizer's own first token in front, unless it stands there already.
            stored: the token ids of a document where they are known, to save tokenising it.
            known: token ids, those that `add_bos` puts in front included, of so many first
                characters, which are in no match: they become a piece of their own; none that
                transformers would not tokenise so are taken if tokenisation is strict.
        """
        literal = not matches or matches[0].start > 0
        start = self._start(prompt if literal else "", add_bos)
        if self.tokenization == "strict":
            pieces = self._strict(prompt, matches, start, stored)
            return pieces if known is None else _split(pieces, known[0])
        pieces = [Piece(token_array(start), None)] if start else []
        at = 0
        if known is not None:
            pieces, at = [Piece(known[0], None, is_known=True)], known[1]
        for match in matches:
            ids, end = self._cut(match, stored)
            if at < match.start:
                pieces.append(self._gap(prompt[at : match.start], is_first=at == 0))
            pieces.append(Piece(ids, match.text))
            at = match.start + end
        if at < len(prompt):
            pieces.append(self._gap(prompt[at:], is_first=at == 0))
        return pieces

    def _gap(self, text: str, *, is_first: bool) -> Piece:
        return Piece(token_array(self._encode(text)[0]) if is_first else self.gap(text), None)

    def _cut(self, match: Match, stored: Callable[[str], TokenIds | None]) -> tuple[TokenIds, int]:
        """The ids of a match, and how many of its characters they cover."""
        length = match.end - match.start
        if length == len(match.text):
            known = stored(match.text)
            return self.document(match.text) if known is None else known, length
        ids, offsets = self._inner(match.text, split_special=True)
        whole = 0
        # Byte-level tokens may share a character: count only tokens after which all is covered.
        for index, (_, end) in enumerate(offsets):
            following = offsets[index + 1][0] if index + 1 < len(offsets) else len(match.text)
            if end > length:
                break
            if following >= end:
                whole = index + 1
        return token_array(ids[:whole]), offsets[whole - 1][1] if whole else 0

    def _strict(
        self,
        prompt: str,
        matches: Sequence[Match],
        start: list[int],
        stored: Callable[[str], TokenIds | None],
    ) -> list[Piece]:
        ids, offsets = self._encode(prompt)
        pieces = [Piece(token_array(start), None)] if start else []
        at = 0
        starts = [begin for begin, _ in offsets]
        for match in matches:
            first = bisect_left(starts, match.start)
            expected = self._cut(match, stored)[0]
            last = first + len(expected)
            aligned = first < len(ids) and starts[first] == match.start
            if not aligned or first < at or ids[first:last] != expected.tolist():
                continue
            if first > at:
                pieces.append(Piece(token_array(ids[at:first]), None))
            pieces.append(Piece(expected, match.text))
            at = last
        if at < len(ids):
            pieces.append(Piece(token_array(ids[at:]), None))
        return pieces

    def _start(self, prompt: str, add_bos: bool) -> list[int]:
        bos = self._tokenizer.bos_token
        if not add_bos or (bos and prompt.startswith(bos)):
            return []
        return list(self._bos)

    def _inner(self, text: str, *, split_special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode a text that stands inside a prompt, with offsets into it."""
        if not self._adds_space:
            return self._encode(text, split_special=split_special)
        for anchor in ("\n", "a", ".", "|"):
            head = self._encode(anchor)[0]
            ids, offsets = self._encode(anchor + text, split_special=split_special)
            count = len(head)
            if ids[:count] == head and all(end > 1 for _, end in offsets[count:]):
                rest = [(max(begin - 1, 0), end - 1) for begin, end in offsets[count:]]
                return ids[count:], rest
        return self._encode(text, split_special=split_special)

    def _encode(
        self, text: str, *, split_special: bool = False
    ) -> tuple[list[int], list[tuple[int, int]]]:
        with self._lock:
            encoded = self._tokenizer(
                readable(text),
                add_special_tokens=False,
                split_special_tokens=split_special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])


def readable(text: str) -> str:
    """A text of as many characters that tokenizers take: half a character is an unknown one."""
    return _SURROGATE.sub(_PARTIAL, text)


def _split(pieces: Sequence[Piece], known: TokenIds) -> list[Piece]:
    """Pieces whose first tokens, as far as they are the known ones and in no match, are one."""
    left, found, number = known, list[TokenIds](), 0
    while number < len(pieces) and pieces[number].document is None and len(left):
        ids = pieces[number].token_ids
        common = common_prefix(ids, left)
        found.append(ids[:common])
        if common < len(ids):
            rest = [Piece(ids[common:], None), *pieces[number + 1 :]]
            break
        left = left[common:]
        number += 1
    else:
        rest = list(pieces[number:])
    joined = np.concatenate(found) if found else token_array([])
    return [Piece(joined, None, is_known=True), *rest] if len(joined) else list(pieces)
