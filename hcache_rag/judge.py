"""How far readings of one prompt are from full prefill's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hcache_rag.engine import HCacheEngine
from hcache_rag.generation import end_tokens
from hcache_rag.quality import kl, log_likelihood, relative_error, rouge_l
from hcache_rag.trial import Reader, Reading, Trial


@dataclass(frozen=True, slots=True)
class Judgement:
    """A reading, compared with full prefill.

    Args:
        kl_first: KL(full || this) of the first token of the answer, in nats.
        kl: its mean over the tokens of full prefill's answer, each behind those before it.
        top1: 1 if the most probable first token is the same, else 0.
        nll: negative log-likelihood of the gold answer (of full prefill's where there is none), per
            token, less that of full prefill; in nats.
        rouge_l: ROUGE-L of the answer against full prefill's.
        answer: the greedy answer.
        tokens: that the model read.
        seconds: to the first token.
    """

    kl_first: float
    kl: float
    top1: float
    nll: float
    rouge_l: float
    answer: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """The relative error (Frobenius norm) of restored tokens' K and V, layer by layer, (L,) each.

    K is compared as it is used at its position.
    """

    keys: tuple[float, ...]
    values: tuple[float, ...]


class Judge:
    """Compares readings of one prompt with full prefill's.

    Args:
        reader, reading: full prefill, see `hcache_rag.trial.read_as_a_whole`.
        gold: the right answer, as it would follow the prompt.
        max_new_tokens: of an answer.
        is_line: answers end with their line, as those of models that know no end of an answer.
    """

    def __init__(
        self,
        engine: HCacheEngine,
        reader: Reader,
        reading: Reading,
        *,
        gold: str = "",
        max_new_tokens: int,
        is_line: bool = False,
    ) -> None:
        self._engine = engine
        self._max_new_tokens = max_new_tokens
        self._is_line = is_line
        self._ends = end_tokens(engine.adapter.model, engine.tokenizer)
        self._reader = reader
        first = reading.first
        self._answer = reader.answer(first, max_new_tokens, self._ends)
        self._text = self._text_of(self._answer)
        self._target = (
            gold_tokens(engine, gold) or self._answer or [int(first.argmax())]  # which ends it
        )
        self._logits = self._behind(reader, first, self._answer)
        self._likelihood = self._likelihood_of(reader, first)
        self.full = Judgement(0.0, 0.0, 1.0, 0.0, 1.0, self._text, reading.tokens, reading.seconds)
        """Full prefill, compared with itself."""

    def judge(self, reader: Reader, reading: Reading, *, decodes: bool = True) -> Judgement:
        """Compare a reading that `reader` holds now.

        Args:
            decodes: its own answer is decoded; otherwise that is "", and ROUGE-L not a number.
        """
        first, reference = reading.first, self._logits[0]
        answer = reader.answer(first, self._max_new_tokens, self._ends) if decodes else []
        text = self._text_of(answer)
        return Judgement(
            kl_first=float(kl(reference[None], first[None])[0]),
            kl=float(kl(self._logits, self._behind(reader, first, self._answer)).mean()),
            top1=float(int(first.argmax()) == int(reference.argmax())),
            nll=self._likelihood - self._likelihood_of(reader, first),
            rouge_l=rouge_l(self._text.split(), text.split()) if decodes else math.nan,
            answer=text,
            tokens=reading.tokens,
            seconds=reading.seconds,
        )

    def layer_errors(self, trial: Trial) -> LayerErrors:
        """Compare K and V of the restored tokens, as they are now in the cache."""
        at = torch.from_numpy(trial.composition.restored_positions)
        keys, values = [], []
        for layer in range(self._engine.adapter.spec.num_layers):
            pairs = zip(self._reader.layer(layer), trial.layer(layer), strict=True)
            key, value = (relative_error(full[:, at], its[:, at]) for full, its in pairs)
            keys.append(key)
            values.append(value)
        return LayerErrors(tuple(keys), tuple(values))

    def _behind(self, reader: Reader, first: Tensor, token_ids: Sequence[int]) -> Tensor:
        """The logits in front of each of some tokens, (n, V); those of the first one at least."""
        return torch.cat((first[None], reader.behind(token_ids[:-1])))

    def _likelihood_of(self, reader: Reader, first: Tensor) -> float:
        return log_likelihood(self._behind(reader, first, self._target), self._target)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        text = str(self._engine.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        return (text.partition("\n")[0] if self._is_line else text).strip()


def gold_tokens(engine: HCacheEngine, gold: str) -> list[int]:
    """The token ids of an answer, as they follow a prompt."""
    ids: list[int] = engine.tokenizer(gold, add_special_tokens=False)["input_ids"]
    return ids
