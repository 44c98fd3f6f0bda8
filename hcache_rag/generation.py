"""Decoding by transformers' own `generate` on a given cache: options, streaming, cancelling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from hcache_rag.state import TokenIds
from hcache_rag.texts import common_length

_SET_HERE = (
    *("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids"),
    *("past_key_values", "cache_implementation", "max_new_tokens", "max_length"),
    *("stop_strings", "stopping_criteria", "streamer"),
    *("return_dict_in_generate", "prefill_chunk_size"),
)
"""Arguments of transformers' `generate` that restoring and streaming set themselves."""

_SPECULATIVE = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to decode.

    Args:
        max_new_tokens: the longest answer.
        temperature: 0 decodes greedily; None leaves it to the model's generation config.
        top_p, top_k: sampling limits; None leaves them to the model's generation config.
        stop: the answer ends before the first of these strings, or before the one.
        seed: seeds torch's global generator before sampling.
        extra: more arguments for transformers' `generate`.

    Raises:
        ValueError: one of them makes no sense, or cannot be used on a restored cache.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: Sequence[str] | str = ()
    seed: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.max_new_tokens, int):
            kind = type(self.max_new_tokens).__name__
            raise TypeError(f"max_new_tokens must be a whole number, not {kind}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, not {self.max_new_tokens}")
        if self.temperature is not None and not 0 <= self.temperature < inf:
            raise ValueError(
                f"temperature must be finite and not negative, but is {self.temperature}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p lies between 0 and 1, but is {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be positive, not {self.top_k}")
        if not all(isinstance(stop, str) for stop in self.stops):
            raise TypeError(f"stop strings are strings, not {self.stop!r}")
        self._check_extra()

    def _check_extra(self) -> None:
        set_here = [name for name in _SET_HERE if name in self.extra]
        if set_here:
            raise ValueError(
                f"{', '.join(set_here)}: set by the library, not by arguments for transformers' "
                "generate; see max_new_tokens and stop"
            )
        if not self.extra.get("use_cache", True):
            raise ValueError("use_cache=False: what is restored is the KV cache")
        for name in _SPECULATIVE:
            if self.extra.get(name) is not None:
                raise ValueError(f"{name}: speculative decoding cannot run on a restored cache")
        for name in ("num_beams", "num_return_sequences"):
            if self.extra.get(name, 1) not in (None, 1):
                raise ValueError(f"{name}={self.extra[name]}: only one sequence can be generated")

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def generate_kwargs(self) -> dict[str, Any]:
        """The same for transformers' `generate`, without the length and stop strings."""
        kwargs: dict[str, Any] = dict(self.extra)
        if self.temperature == 0:
            kwargs.update(do_sample=False, temperature=None, top_p=None, top_k=None)
            return kwargs
        limits = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        given = {name: value for name, value in limits.items() if value is not None}
        if given:
            kwargs.update(do_sample=True, **given)
        return kwargs


class _Cancel(StoppingCriteria):
    def __init__(self, cancelled: threading.Event) -> None:
        self._cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._cancelled.is_set(), dtype=torch.bool)


class _TokenStreamer(BaseStreamer):
    """Passes every new token on at once; transformers' text streamers wait for a word's end."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        for token in value.tolist():
            self._on_token(int(token))

    def end(self) -> None:
        pass


class _Detokenizer:
    """The text that each token completes.

    Where bytes are no character, what was said of them may change with the tokens that follow;
    `DecodeStream` ends there. From then on the whole is decoded each time.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._said = ""

    def step(self, token: int) -> str:
        """The text of one more token; empty in the middle of a character."""
        self._tokens.append(token)
        if self._stream is not None:
            try:
                return self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
            except Exception:  # tokenizers raises nothing narrower
                self._stream = None
                self._said = self._whole(self._tokens[:-1])
        whole = self._whole(self._tokens)
        return "" if whole.endswith("\ufffd") else self.rest(whole)

    def rest(self, whole: str) -> str:
        """What a text of all tokens goes on with behind what was said, if the stream has ended."""
        if self._stream is not None:
            return ""
        more = whole[common_length(self._said, whole) :]
        self._said = whole
        return more

    def _whole(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))


class TextAssembler:
    """Token ids to text, piece by piece, ending before the first stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokens = _Detokenizer(tokenizer)
        self._stop = [s for s in stop if s]
        self._text = ""
        self._emitted = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes and that no stop string can still take back."""
        if self.stopped:
            return ""
        self._text += self._tokens.step(token)
        cuts = [at for at in (self._text.find(s, self._emitted) for s in self._stop) if at >= 0]
        if cuts:
            self._text = self._text[: min(cuts)]
            self.stopped = True
            return self._emit(len(self._text))
        return self._emit(len(self._text) - self._held_back())

    def finish(self, whole: str) -> str:
        """What was held back, given the whole text: a stop string's beginning, half a character."""
        if not self.stopped and whole.startswith(self.text):
            self._text = whole
        elif not self.stopped:
            self._text += self._tokens.rest(whole)
        return self._emit(len(self._text))

    @property
    def text(self) -> str:
        """Everything so far."""
        return self._text[: self._emitted]

    def _emit(self, end: int) -> str:
        piece = self._text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return piece

    def _held_back(self) -> int:
        tail = self._text[self._emitted :]
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(tail)), longest, -1):
                if tail.endswith(stop[:length]):
                    longest = length
                    break
        return longest


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: TokenIds,
    cache: Cache,
    options: GenerationOptions,
    max_new_tokens: int,
    on_text: Callable[[str], None],
    cancelled: threading.Event,
) -> tuple[str, tuple[int, ...], str]:
    """Run transformers' `generate` on a cache.

    Args:
        token_ids: the whole prompt (N,), whatever part of it the cache already holds.
        on_text: called with each piece of text as soon as its token is known; the first call, an
            empty piece perhaps, marks the first token.
        cancelled: set it to end after the token that is being computed.

    Returns:
        The text, its token ids, and "stop", "length" or "cancelled".
    """
    assembler = TextAssembler(tokenizer, options.stops)
    tokens: list[int] = []
    ends = end_tokens(model, tokenizer)
    stopping = threading.Event()

    def on_token(token: int) -> None:
        tokens.append(token)
        on_text(assembler.push(token))
        if assembler.stopped or cancelled.is_set():
            stopping.set()

    if options.seed is not None:
        torch.manual_seed(options.seed)
    ids = torch.tensor(token_ids.tolist(), dtype=torch.long, device=model.device).unsqueeze(0)
    generate: Any = model.generate
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    sequences = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        streamer=_TokenStreamer(on_token),
        stopping_criteria=[_Cancel(cancelled), _Cancel(stopping)],
        **{"pad_token_id": padding, **options.generate_kwargs()},
    )
    generated = tuple(int(token) for token in sequences[0, ids.shape[1] :])
    text = str(tokenizer.decode(list(generated), skip_special_tokens=True))
    rest = assembler.finish(text)
    if rest:
        on_text(rest)
    if assembler.stopped:
        return assembler.text, generated, "stop"
    ended = bool(generated) and generated[-1] in ends
    reason = "stop" if ended else "cancelled" if cancelled.is_set() else "length"
    return text, generated, reason


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return set()
    return {ends} if isinstance(ends, int) else set(ends)
