"""Finished prompt text to pieces of token ids, cut where documents were found in it.

Documents are tokenised on their own, so that a document always has the same token ids. Knows
neither models nor tensors.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from hcache_rag.state import TokenIds, token_array
from hcache_rag.texts import Match

Tokenization = Literal["segmented", "strict"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the prompt's tokens: a known document (or its beginning), or a gap.

    Args:
        token_ids: shape (T,).
        document: the known text whose first T tokens these are; None for a gap.
    """

    token_ids: TokenIds
    document: str | None


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
        self._lock = threading.Lock()
        first = tokenizer.convert_ids_to_tokens(self._encode("a")[0])
        # SentencePiece tokenizers begin an isolated text with a space that is not in it.
        self._adds_space = bool(first) and first[0].startswith("▁")
        with_special = self._tokenizer("a")["input_ids"]
        self._bos = with_special[: len(with_special) - len(first)]
        if self._bos + self._encode("a")[0] != with_special:
            self._bos = []

    def document(self, text: str) -> TokenIds:
        """The token ids of a document, shape (T,); control tokens in it stay text."""
        return token_array(self._inner(text.strip(), split_special=True)[0])

    def gap(self, text: str) -> TokenIds:
        """The token ids of what stands between two documents, shape (T,)."""
        return token_array(self._inner(text, split_special=False)[0])

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
    ) -> list[Piece]:
        """Cut a prompt at `matches` and tokenise it.

        Args:
            add_bos: put the tokenizer's own first token in front, unless it stands there already.
            stored: the token ids of a document where they are known, to save tokenising it.
        """
        literal = not matches or matches[0].start > 0
        start = self._start(prompt if literal else "", add_bos)
        if self.tokenization == "strict":
            return self._strict(prompt, matches, start, stored)
        pieces = [Piece(token_array(start), None)] if start else []
        at = 0
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
                text,
                add_special_tokens=False,
                split_special_tokens=split_special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])
