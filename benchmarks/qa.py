"""Question-answering records in the layouts of public datasets, and how answers are scored."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """A question, the passages that come with it, and the answers that count."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    kind: str = ""


def read_records(path: Path, distractors: int = 7) -> list[Record]:
    """The records of a file, whatever its layout: HotpotQA, SQuAD, MuSiQue, NQ-open or LongBench.

    Args:
        distractors: other passages that a SQuAD question gets, from the same file.

    Raises:
        SystemExit: it has none of these layouts.
    """
    text = path.read_text()
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(data, dict) and "data" in data:
        return list(_squad(data["data"], distractors))
    layouts: dict[str, Callable[[dict[str, Any]], Record]] = {
        "supporting_facts": _hotpotqa,
        "paragraphs": _musique,
        "ctxs": _natural_questions,
        "all_classes": _longbench,
    }
    for field, record_of in layouts.items():
        if isinstance(data, list) and data and field in data[0]:
            return [record_of(item) for item in data]
    raise SystemExit(f"{path} has no layout that is known: {', '.join(layouts)}, or SQuAD's data")


def _hotpotqa(item: dict[str, Any]) -> Record:
    passages = [f"{title}: {''.join(lines).strip()}" for title, lines in item["context"]]
    return Record(
        item["_id"], item["question"], (item["answer"],), tuple(passages), item.get("type", "")
    )


def _squad(articles: Sequence[dict[str, Any]], distractors: int) -> Iterator[Record]:
    paragraphs = [p for article in articles for p in article["paragraphs"]]
    contexts = [p["context"].strip() for p in paragraphs]
    for number, paragraph in enumerate(paragraphs):
        others = [contexts[(number + step) % len(contexts)] for step in range(1, distractors + 1)]
        place = number % (distractors + 1)  # the right one stands anywhere
        passages = (*others[:place], contexts[number], *others[place:])
        for qa in paragraph["qas"]:
            answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
            if answers and not qa.get("is_impossible"):
                yield Record(qa["id"], qa["question"], answers, passages)


def _musique(item: dict[str, Any]) -> Record:
    passages = [f"{p['title']}: {p['paragraph_text'].strip()}" for p in item["paragraphs"]]
    answers = (item["answer"], *item.get("answer_aliases", ()))
    return Record(item["id"], item["question"], answers, tuple(passages))


def _natural_questions(item: dict[str, Any]) -> Record:
    passages = [f"{c['title']}: {c['text'].strip()}" for c in item["ctxs"]]
    return Record(
        str(item.get("id", item["question"])),
        item["question"],
        tuple(item["answers"]),
        tuple(passages),
    )


def _longbench(item: dict[str, Any]) -> Record:
    parts = re.split(r"(?=Passage \d+:\n)", item["context"])
    passages = [part.strip() for part in parts if part.strip()]
    return Record(item["_id"], item["input"], tuple(item["answers"]), tuple(passages))


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
