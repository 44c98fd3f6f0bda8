"""How answers to questions are scored."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence


def normalised(text: str) -> str:
    """As SQuAD's script does: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(answer: str, golds: Sequence[str]) -> float:
    """The best over the gold answers."""
    return max(_overlap(normalised(answer).split(), normalised(gold).split()) for gold in golds)


def _overlap(found: list[str], expected: list[str]) -> float:
    if not found or not expected:
        return float(found == expected)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected))


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """Whether it is one of the gold answers."""
    return float(normalised(answer) in {normalised(gold) for gold in golds})


def substring_match(answer: str, golds: Sequence[str]) -> float:
    """Whether a gold answer stands in it."""
    return float(any(normalised(gold) in normalised(answer) for gold in golds))
