"""Question-answering records in the layouts of public datasets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcache_rag.errors import SourceError
from hcache_rag.state import read_json


@dataclass(frozen=True)
class Record:
    """A question, the passages that come with it, and the answers that count, if any are known."""

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    kind: str = ""


def read_records(path: Path, distractors: int = 7) -> list[Record]:
    """The records of a file, whatever its layout: HotpotQA, SQuAD, MuSiQue, NQ-open or LongBench.

    One JSON text, or one object a line.

    Args:
        distractors: other passages that a SQuAD question gets, from the same file.

    Raises:
        SourceError: the file cannot be read, has none of these layouts, or a field of a record is
            missing or is not what it should be; the message names file and record.
    """
    data = _parsed(path, _text_of(path))
    if isinstance(data, dict) and "data" in data:
        records = list(_squad(_Fields(data, str(path)), distractors))
    else:
        items = [data] if isinstance(data, dict) else data
        if not isinstance(items, list) or not items or not isinstance(items[0], dict):
            raise SourceError(f"{path} holds no list of records")
        record_of = next((f for field, f in _LAYOUTS.items() if field in items[0]), None)
        if record_of is None:
            known = ", ".join(_LAYOUTS)
            raise SourceError(f"{path} has no layout that is known: {known}, or SQuAD's data")
        records = [
            record_of(_Fields(item, f"{path}, record {number}"))
            for number, item in enumerate(items, 1)
        ]
    if not records:
        raise SourceError(f"{path} holds no question with an answer")
    return records


def read_questions(path: Path) -> list[str]:
    """The questions in a text file, one a line; blank lines are passed over.

    Raises:
        SourceError: the file cannot be read, or holds none.
    """
    return [line.strip() for line in _text_of(path).splitlines() if line.strip()]


def _text_of(path: Path) -> str:
    """A file's text, in which there is something.

    Raises:
        SourceError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 text") from error
    if not text.strip():
        raise SourceError(f"{path} is empty")
    return text


def _parsed(path: Path, text: str) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        lines = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        if len(lines) == 1 or not text.lstrip().startswith("{"):
            raise SourceError(f"{path} is not JSON: {error}") from error
    items = []
    for number, line in lines:
        try:
            items.append(read_json(line))
        except ValueError as error:
            raise SourceError(f"{path}, line {number} is not JSON: {error}") from error
    return items


class _Fields:
    """An object of a file whose fields are asked for by type.

    Args:
        place: where it stands, for messages.
    """

    def __init__(self, value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise SourceError(f"{place} is no object but {value!r:.40}")
        self._value = value
        self.place = place

    def text(self, name: str, default: str | None = None) -> str:
        """A text that is not blank, unless there is a default."""
        value = self._value.get(name, default)
        if not isinstance(value, str) or not (value.strip() or default is not None):
            raise self._wrong(name, "a text")
        return value

    def id(self, name: str, default: str | None = None) -> str:
        """A text or a whole number."""
        value = self._value.get(name, default)
        if not isinstance(value, str | int):
            raise self._wrong(name, "an id")
        return str(value)

    def values(self, name: str, default: list[Any] | None = None) -> list[Any]:
        """A list."""
        value = self._value.get(name, default)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def texts(self, name: str, default: list[Any] | None = None) -> tuple[str, ...]:
        """A list of texts."""
        found = self.values(name, default)
        if not all(isinstance(text, str) for text in found):
            raise self._wrong(name, "a list of texts")
        return tuple(found)

    def objects(self, name: str) -> list[_Fields]:
        """A list of objects."""
        parts = enumerate(self.values(name), 1)
        return [_Fields(value, f"{self.place}, {name} {number}") for number, value in parts]

    def has(self, name: str) -> bool:
        """Whether there is such a field, and something in it."""
        return bool(self._value.get(name))

    def _wrong(self, name: str, expected: str) -> SourceError:
        if name not in self._value:
            return SourceError(f"{self.place} has no {name!r}")
        return SourceError(f"{self.place}: {name!r} is {self._value[name]!r:.40}, not {expected}")

    def record(
        self, identity: str, question: str, answers: tuple[str, ...], passages: list[str]
    ) -> Record:
        """A record of what was found.

        Raises:
            SourceError: without a passage.
        """
        kept = tuple(passage for passage in passages if passage)
        if not kept:
            raise SourceError(f"{self.place} has no passage")
        given = tuple(answer for answer in answers if answer.strip())
        return Record(identity, question, given, kept, self.text("type", ""))

    def answer(self) -> tuple[str, ...]:
        """The field "answer", if there is one."""
        return (self.text("answer", ""),)


def _hotpotqa(item: _Fields) -> Record:
    passages = []
    for entry in item.values("context"):
        match entry:
            case [str(title), [*lines]] if all(isinstance(line, str) for line in lines):
                passages.append(f"{title}: {''.join(lines).strip()}")
            case _:
                raise SourceError(f"{item.place}: {entry!r:.40} is no title with its sentences")
    return item.record(item.id("_id"), item.text("question"), item.answer(), passages)


def _squad(data: _Fields, distractors: int) -> Iterator[Record]:
    paragraphs = [p for article in data.objects("data") for p in article.objects("paragraphs")]
    contexts = [paragraph.text("context").strip() for paragraph in paragraphs]
    for number, paragraph in enumerate(paragraphs):
        others = [contexts[(number + step) % len(contexts)] for step in range(1, distractors + 1)]
        place = number % (distractors + 1)  # the right one stands anywhere
        passages = [*others[:place], contexts[number], *others[place:]]
        for qa in paragraph.objects("qas"):
            answers = tuple(dict.fromkeys(answer.text("text") for answer in qa.objects("answers")))
            if answers and not qa.has("is_impossible"):
                yield qa.record(qa.id("id"), qa.text("question"), answers, passages)


def _musique(item: _Fields) -> Record:
    passages = [_titled(part, "paragraph_text") for part in item.objects("paragraphs")]
    answers = (*item.answer(), *item.texts("answer_aliases", []))
    return item.record(item.id("id"), item.text("question"), answers, passages)


def _natural_questions(item: _Fields) -> Record:
    passages = [_titled(part, "text") for part in item.objects("ctxs")]
    question = item.text("question")
    return item.record(item.id("id", question), question, item.texts("answers", []), passages)


def _longbench(item: _Fields) -> Record:
    parts = re.split(r"(?=Passage \d+:\n)", item.text("context"))
    passages = [part.strip() for part in parts]
    return item.record(item.id("_id"), item.text("input"), item.texts("answers", []), passages)


def _titled(part: _Fields, field: str) -> str:
    return f"{part.text('title')}: {part.text(field).strip()}"


_LAYOUTS: dict[str, Callable[[_Fields], Record]] = {
    "supporting_facts": _hotpotqa,
    "paragraphs": _musique,
    "ctxs": _natural_questions,
    "all_classes": _longbench,
}
