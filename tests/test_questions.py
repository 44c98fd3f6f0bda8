"""Question-answering files: read in their own layouts, and refused in one sentence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hcache_rag.errors import SourceError
from hcache_rag.questions import read_questions, read_records

LAYOUTS: dict[str, Any] = {
    "hotpotqa": [
        {
            "_id": "1",
            "question": "Q?",
            "answer": "A",
            "type": "bridge",
            "supporting_facts": [["T", 0]],
            "context": [["T", ["One. ", "Two."]], ["U", ["Three."]]],
        }
    ],
    "musique": [
        {
            "id": "1",
            "question": "Q?",
            "answer": "A",
            "answer_aliases": ["B"],
            "paragraphs": [
                {"title": "T", "paragraph_text": "One. Two."},
                {"title": "U", "paragraph_text": "Three."},
            ],
        }
    ],
    "nq-open": [
        {
            "question": "Q?",
            "answers": ["A"],
            "ctxs": [{"title": "T", "text": "One. Two."}, {"title": "U", "text": "Three."}],
        }
    ],
    "longbench": [
        {
            "_id": "1",
            "input": "Q?",
            "answers": ["A"],
            "all_classes": None,
            "context": "Passage 1:\nT: One. Two.\n\nPassage 2:\nU: Three.",
        }
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_lines", [False, True])
def test_datasets_are_read_in_their_own_layouts(
    layout: str, as_lines: bool, tmp_path: Path
) -> None:
    data = LAYOUTS[layout]
    text = "\n".join(map(json.dumps, data)) if as_lines else json.dumps(data)
    if as_lines:
        text = text + "\n" + text
    (tmp_path / "data").write_text(text)
    record = read_records(tmp_path / "data")[0]
    assert (record.question, record.answers[0]) == ("Q?", "A")
    assert [passage.split("\n")[-1] for passage in record.passages] == ["T: One. Two.", "U: Three."]


def test_squad_questions_get_other_passages_of_the_file(shared_data: Path) -> None:
    """The right one is among them, in turn at each place; unanswerable questions are left out."""
    records = read_records(shared_data / "squad_small.json", distractors=3)
    assert len(records) == 293
    assert {len(record.passages) for record in records} == {4}
    assert all(any(a in p for p in r.passages) for r in records for a in r.answers[:1])
    assert len(read_records(shared_data / "hotpotqa_100.json")) == 100


def refused(path: Path, text: str | bytes) -> str:
    """The one line that a file is refused with."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError) as caught:
        read_records(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " is empty"),
        (" \n", " is empty"),
        (b"\xff\xfe", " is not UTF-8 text"),
        ("nonsense", " is not JSON: Expecting value"),
        ('[{"question": ]', " is not JSON: Expecting value"),
        ("[" * 100_000, " is not JSON: JSON that goes too deep"),
        ('{"a": 1}\n\n{"a": 2', ", line 3 is not JSON: "),
        ("[]", " holds no list of records"),
        ("3", " holds no list of records"),
        ('["x"]', " holds no list of records"),
        ('[{"text": "x"}]', " has no layout that is known: supporting_facts, paragraphs"),
        ('{"data": []}', " holds no question with an answer"),
        ('{"data": 3}', ": 'data' is 3, not a list"),
        ('{"data": [3]}', ", data 1 is no object but 3"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', ", data 1, paragraphs 1 has no 'context'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert refused(tmp_path / "data", text).startswith(expected)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "nowhere"
    for read in (read_records, read_questions):
        with pytest.raises(SourceError, match=f"^{path} cannot be read: "):
            read(path)


WRONG: dict[str, tuple[str, str, Any, str]] = {
    "number as question": ("hotpotqa", "question", 3, "'question' is 3, not a text"),
    "blank question": ("nq-open", "question", " ", "'question' is ' ', not a text"),
    "no question": ("musique", "question", None, "'question' is None, not a text"),
    "list as answer": ("hotpotqa", "answer", ["A"], "'answer' is ['A'], not a text"),
    "text as answers": ("nq-open", "answers", "A", "'answers' is 'A', not a list"),
    "number in answers": ("longbench", "answers", [1], "'answers' is [1], not a list of texts"),
    "list as id": ("longbench", "_id", [], "'_id' is [], not an id"),
    "text as context": ("hotpotqa", "context", "T", "'context' is 'T', not a list"),
    "half a passage": ("hotpotqa", "context", [["T"]], "['T'] is no title with its sentences"),
    "numbers as lines": (
        "hotpotqa",
        "context",
        [["T", [1]]],
        "['T', [1]] is no title with its sentences",
    ),
    "no passages": ("nq-open", "ctxs", [], "has no passage"),
    "text as passage": ("musique", "paragraphs", ["T"], "is no object but 'T'"),
    "blank passage": (
        "nq-open",
        "ctxs",
        [{"title": "T", "text": ""}],
        "'text' is '', not a text",
    ),
    "list as context": ("longbench", "context", [], "'context' is [], not a text"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_field_is_named_with_its_record(tmp_path: Path, wrong: str) -> None:
    layout, field, value, expected = WRONG[wrong]
    right = LAYOUTS[layout][0]
    items = [right, {**copy.deepcopy(right), field: value}]
    message = refused(tmp_path / "data", json.dumps(items))
    assert message.startswith(", record 2")
    assert message.endswith(expected)
    missing = {name: part for name, part in right.items() if name != field}
    path = tmp_path / "missing"
    path.write_text(json.dumps([right, missing]))
    if field in ("answer", "answers"):
        assert [record.answers[:1] for record in read_records(path)] == [("A",), ()]
    else:
        with pytest.raises(SourceError, match=f", record 2 has no '{field}'$"):
            read_records(path)


def test_one_record_may_stand_alone(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(json.dumps(LAYOUTS["hotpotqa"][0]))
    assert [record.question for record in read_records(tmp_path / "data")] == ["Q?"]


def test_questions_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "questions"
    path.write_text("\ufeffWhich one?\n\n  And why? \n", encoding="utf-8")
    assert read_questions(path) == ["Which one?", "And why?"]
    path.write_text("\n \n")
    with pytest.raises(SourceError, match=f"^{path} is empty$"):
        read_questions(path)
