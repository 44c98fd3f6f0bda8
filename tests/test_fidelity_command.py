"""`hcache-rag fidelity` and `index --check-fidelity`: from files to what an engine follows."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, Run, assert_one_error_line, assert_usage_error
from fakes import save_tiny_model
from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_rag import HCacheEngine, StateStore
from hcache_rag.llama_index import HCacheLLM
from hcache_rag.llama_index.cases import cases_of_index, cases_of_records, first_sentence
from hcache_rag.llama_index.model_choice import ModelChoice
from hcache_rag.questions import Record
from hcache_rag.trial import trying

TEXTS = {
    "a.txt": "Mercury is the smallest planet. It is the closest one to the Sun.",
    "b.txt": "Venus is the hottest planet! Its thick atmosphere is why.",
    "c.txt": "Earth has life. It is the only planet known to have it.",
    "d.txt": "Mars is cold and red",
}
RECORDS = [
    {
        "_id": str(number),
        "question": f"What of the {name}?",
        "answer": "nothing",
        "supporting_facts": [],
        "context": [[f"{name} {place}", [f"It is {place}.", " And so on."]] for place in range(3)],
    }
    for number, name in enumerate(("sun", "moon", "star"))
]
LOOSE, STRICT = ("--tolerance", "1000"), ("--tolerance", "1e-9")
FEW = ("--max-new-tokens", "2", "--json")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), chat=True))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.fixture
def store(run: Run, model: str, tmp_path: Path) -> Path:
    """An index of four documents."""
    return indexed(run, model, tmp_path, TEXTS)


def indexed(run: Run, model: str, tmp_path: Path, texts: dict[str, str], *options: str) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    arguments = ("--store", tmp_path / "store", "--model", model, "--no-measure")
    assert run("index", folder, *arguments, *options).code == 0
    return tmp_path / "store"


def said(outcome: Outcome) -> dict[str, Any]:
    """The one JSON object of a run that went well."""
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


def asked_for(store: Path) -> list[object]:
    """What the states of an index ask for, by model."""
    with StateStore.open(store / "states", read_only=True) as states:
        return [model.fidelity for model in states.models().values()]


# --- an index -----------------------------------------------------------------------------------


def test_what_is_written_is_what_ask_uses(run: Run, store: Path) -> None:
    report = said(run("fidelity", "--store", store, *LOOSE, "--write", *FEW))
    assert report["recommendation"] == "none"
    names = [row["position"] for row in report["positions"]]
    assert names == ["none", "fast", "balanced", "high", "exact"]
    assert (report["prompts"], report["documents"], report["source"]) == (4, 4, str(store))
    assert asked_for(store) == ["none"]
    provenance = said(run("ask", "Which planet?", "--store", store, "--json"))["provenance"]
    assert (provenance["fidelity"], provenance["repaired_tokens"]) == ("none", 0)
    named = said(run("ask", "Which?", "--store", store, "--json", "--fidelity", "high"))
    assert named["provenance"]["fidelity"] == "high"
    assert "none" in run("stats", "--store", store).out
    assert said(run("stats", "--store", store, "--json"))["fidelities"] == {report["model"]: "none"}
    llm = ModelChoice.of(store).load(store)
    assert (llm.fidelity, llm.engine.fidelity) == ("auto", "none")
    llm.close()


def test_nothing_is_written_unasked(run: Run, store: Path) -> None:
    said(run("fidelity", "--store", store, *LOOSE, *FEW))
    assert asked_for(store) == [None]


def test_exact_is_recommended_but_not_written(run: Run, store: Path) -> None:
    """The result is shown; the refusal says what to do instead."""
    outcome = run("fidelity", "--store", store, *STRICT, "--write", *FEW)
    assert outcome.code == 1
    assert json.loads(outcome.out)["recommendation"] == "exact"
    [line] = outcome.complaints
    assert line.startswith("error: not written: exact is recommended")
    assert "--fidelity exact" in line
    assert asked_for(store) == [None]


def test_a_person_reads_tables_and_a_sentence(run: Run, store: Path) -> None:
    outcome = run("fidelity", "--store", store, *LOOSE, "--share", "0.5", "--records", "3")
    assert outcome.code == 0
    flat = " ".join(outcome.out.split())
    assert flat.startswith("3 prompts of ")
    for word in ("none", "fast", "balanced", "high", "0.5", "exact", "ROUGE-L", "layer 0"):
        assert word in flat
    assert "recommended: none, the cheapest position whose mean KL from full prefill" in flat
    assert "note: 3 prompts give rough intervals" in " ".join(outcome.err.split())
    assert "…" not in outcome.out


def test_questions_may_be_given(run: Run, store: Path, tmp_path: Path) -> None:
    """All of them, or as many as are asked for; and so many documents for each."""
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(f"Question {n}?" for n in range(25)))
    given = ("fidelity", "--store", store, "--questions", questions, *FEW)
    assert said(run(*given, "--top-k", "2"))["prompts"] == 25
    few = said(run(*given, "--records", "2", "--top-k", "3"))
    assert few["prompts"] == 2
    assert few["documents"] in (3, 4)
    assert said(run(*given, "--quick"))["prompts"] == 4
    questions.write_text(" \n")
    assert_one_error_line(run(*given), f"{questions} is empty")


def test_one_document_in_a_prompt_says_nothing(run: Run, store: Path) -> None:
    assert_one_error_line(run("fidelity", "--store", store, "--top-k", "1"), "two documents in a")


def test_an_index_of_one_document_says_nothing(run: Run, model: str, tmp_path: Path) -> None:
    store = indexed(run, model, tmp_path, {"a.txt": TEXTS["a.txt"]})
    outcome = run("fidelity", "--store", store)
    assert_one_error_line(outcome, f"the index in {store} holds 1 document(s)")


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_no_index_is_one_line(run: Run, tmp_path: Path, kind: str) -> None:
    if kind == "empty":
        (tmp_path / "store").mkdir()
    before = sorted(tmp_path.rglob("*"))
    outcome = run("fidelity", "--store", tmp_path / "store")
    assert_one_error_line(outcome, f"{tmp_path / 'store'} holds no index")
    assert sorted(tmp_path.rglob("*")) == before


def test_without_its_states_nothing_can_be_compared(run: Run, store: Path) -> None:
    shutil.rmtree(store / "states")
    assert_one_error_line(run("fidelity", "--store", store), "no document with a usable state")


def test_another_model_than_the_indexs_is_an_error(
    run: Run, store: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which names both; the same one may be named in another way."""
    other = save_tiny_model(tmp_path / "other", chat=True)
    outcome = run("fidelity", "--store", store, "--model", other)
    assert_one_error_line(outcome, f"was made with {model}, not with {other}")
    outcome = run("fidelity", "--store", store, "--dtype", "bfloat16")
    assert_one_error_line(outcome, "was made in float32, not in bfloat16")
    monkeypatch.chdir(Path(model).parent)
    same = run("fidelity", "--store", store, "--model", Path(model).name, *FEW)
    assert said(same)["prompts"] == 4


# --- a file of questions with passages ----------------------------------------------------------


def test_a_file_needs_no_index(
    run: Run, model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves none; each question has its own passages."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    report = said(run("fidelity", "--data", data, "--model", model, "--dtype", "bfloat16", *FEW))
    assert (report["prompts"], report["documents"]) == (3, 9)
    assert report["source"] == str(data)
    assert sorted(tmp_path.rglob("*")) == before


def test_passages_may_be_retrieved(run: Run, model: str, data: Path) -> None:
    report = said(run("fidelity", "--data", data, "--model", model, "--top-k", "2", *FEW))
    assert report["prompts"] == 3
    assert 2 <= report["documents"] <= 6


def test_what_a_file_says_may_be_written_into_an_index(
    run: Run, store: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose model is used, also where the store is the default one."""
    given = ("fidelity", "--data", data, *LOOSE, "--write", *FEW)
    assert said(run(*given, "--store", store))["source"] == str(data)
    assert asked_for(store) == ["none"]
    store.rename(store.parent / "hcache-store")
    monkeypatch.chdir(store.parent)
    with StateStore.open("hcache-store/states") as states:
        [root] = states.models()
        states.set_fidelity(root, None)
    assert said(run(*given))["recommendation"] == "none"
    assert asked_for(store.parent / "hcache-store") == ["none"]


def test_writing_needs_an_index_before_anything_is_measured(
    run: Run, model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run("fidelity", "--data", data, "--model", model, "--write")
    assert_one_error_line(outcome, "hcache-store holds no index")


def test_a_wrong_file_is_one_line(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    given = ("fidelity", "--data", path, "--model", model)
    assert_one_error_line(run(*given), f"{path} cannot be read: No such file")
    path.write_text('{"a": 1}\n{')
    assert_one_error_line(run(*given), f"{path}, line 2 is not JSON")
    path.write_text(json.dumps([{**RECORDS[0], "question": 3}]))
    assert_one_error_line(run(*given), f"{path}, record 1: 'question' is 3, not a text")


@pytest.mark.parametrize("context", ["none", "documents"])
def test_passages_may_be_read_behind_others(
    model: str, data: Path, context: str, tmp_path: Path
) -> None:
    """Then states differ, and no document is exact behind the preamble but the very first."""
    records = [Record(str(n), f"Q {n}?", ("A",), (f"One {n}.", f"Two {n}.")) for n in range(3)]
    with StateStore.open(tmp_path / "states") as states:
        llm = HCacheLLM(model, store=states, fidelity="none", context_at_index=context)  # type: ignore[arg-type]
        cases = cases_of_records(llm, records)
        exact = []
        for case in cases:
            assert case.gold == "A"
            with trying(llm.engine, case.prompt, 1) as trial:
                spans = [s for s in trial.composition.spans if not s.record.is_preamble]
                assert len(spans) == 2
                exact += [span.is_exact for span in spans]
    assert sum(exact) == (3 if context == "none" else pytest.approx(0, abs=1))


def test_the_option_says_what_passages_are_read_after(
    run: Run, model: str, data: Path, store: Path
) -> None:
    given = ("fidelity", "--data", data, "--model", model, *FEW)
    alone, behind = (
        said(run(*given, "--context-at-index", context))["positions"][0]["kl_first"]
        for context in ("none", "documents")
    )
    assert alone != behind
    assert alone == said(run(*given))["positions"][0]["kl_first"]
    outcome = run("fidelity", "--store", store, "--context-at-index", "documents")
    assert_usage_error(outcome, "--context-at-index")


# --- the figure ---------------------------------------------------------------------------------


def test_a_figure_is_drawn(run: Run, store: Path, tmp_path: Path) -> None:
    outcome = run("fidelity", "--store", store, "--figure", tmp_path / "quality", *FEW)
    assert said(outcome)["prompts"] == 4
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert outcome.err == f"drawn: {tmp_path / 'quality.png'}\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "it is a folder"),
        ("nowhere/quality.png", "no such folder"),
        ("quality.bogus", "a figure is one of"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_found_out_first(
    run: Run, tmp_path: Path, name: str, message: str
) -> None:
    """Before the index is looked for, which is not there."""
    outcome = run("fidelity", "--store", tmp_path / "nowhere", "--figure", tmp_path / name)
    assert_one_error_line(outcome, message)


def test_matplotlib_may_be_missing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = run("fidelity", "--store", tmp_path, "--figure", tmp_path / "quality.png")
    assert_one_error_line(outcome, "pip install 'hcache-rag[plot]'")


# --- wrong arguments, and an end before the end -------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--records", "1"], "--records"),
        (["--top-k", "0"], "--top-k"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--share", "1.5"], "--share"),
        (["--tolerance", "0"], "--tolerance"),
        (["--tolerance", "nan"], "--tolerance"),
        (["--dtype", "float17"], "'float17' is not one of float32, bfloat16"),
        (["--data", "d", "--context-at-index", "title"], "not one of none, documents"),
        (["--data", "d", "--questions", "q"], "--data has its own questions"),
        (["more"], "more"),
    ],
)
def test_wrong_arguments_are_one_error(run: Run, arguments: list[str], expected: str) -> None:
    assert_usage_error(run("fidelity", *arguments), expected)


@pytest.mark.parametrize("as_data", [True, False])
def test_ctrl_c_leaves_nothing_half_written(
    run: Run,
    store: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    as_data: bool,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hcache_rag.fidelity.Judge", interrupted)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(path for path in tmp_path.rglob("*") if path.suffix != ".mdb")
    source = ("--data", data) if as_data else ()
    target = tmp_path / "quality.png"
    outcome = run("fidelity", "--store", store, *source, "--write", "--figure", target, *FEW)
    assert (outcome.code, outcome.out, outcome.err) == (130, "", "interrupted\n")
    assert sorted(path for path in tmp_path.rglob("*") if path.suffix != ".mdb") == before
    assert asked_for(store) == [None]


# --- on first use -------------------------------------------------------------------------------


def test_index_checks_what_it_has_made(run: Run, model: str, tmp_path: Path) -> None:
    """And asks for what is recommended from then on."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    given = ("index", tmp_path, "--store", tmp_path / "store", "--model", model, "--no-measure")
    found = said(run(*given, "--check-fidelity", "--json"))["fidelity"]
    names = [row["position"] for row in found["positions"]]
    assert names == ["none", "fast", "balanced", "high"]
    assert found["tolerance_nats"] == 0.1
    assert (found["prompts"], found["written"], found["error"]) == (4, True, None)
    assert asked_for(tmp_path / "store") == [found["recommendation"]]
    outcome = run(*given, "--check-fidelity")
    assert f"recommended: {found['recommendation']}, " in outcome.out
    assert outcome.out.index("recommended") < outcome.out.index("now try")
    assert "fidelity" not in said(run(*given, "--json"))


def test_index_says_why_it_cannot_check(run: Run, model: str, tmp_path: Path) -> None:
    """The index is made all the same."""
    (tmp_path / "a.txt").write_text(TEXTS["a.txt"])
    given = ("index", tmp_path, "--store", tmp_path / "store", "--model", model, "--no-measure")
    outcome = run(*given, "--check-fidelity")
    assert outcome.code == 0
    assert "1 document(s) read" in outcome.out
    assert "fidelity: the index in" in outcome.err
    assert "holds 1 document(s)" in outcome.err
    found = said(run(*given, "--check-fidelity", "--json"))["fidelity"]
    assert not found["written"]
    assert "holds 1 document(s)" in found["error"]
    assert asked_for(tmp_path / "store") == [None]


def test_index_remembers_what_documents_are_read_after(
    run: Run, model: str, tmp_path: Path
) -> None:
    """Until it is told otherwise; and such an index can be asked for exact answers."""
    store = indexed(run, model, tmp_path, TEXTS, "--context-at-index", "documents")
    assert ModelChoice.of(store).context_at_index == "documents"
    given = ("--store", store, "--model", model, "--no-measure")
    (tmp_path / "docs" / "e.txt").write_text("Jupiter is the largest of all.")
    assert said(run("index", tmp_path / "docs", *given, "--json"))["stored"] == 1
    with StateStore.open(store / "states", read_only=True) as states:
        parents = {record.parent for record in states.records() if not record.is_preamble}
        assert len(parents) > 1
    assert ModelChoice.of(store).context_at_index == "documents"
    asked = said(run("ask", "Which?", "--store", store, "--json", "--fidelity", "exact"))
    assert asked["provenance"]["repaired_tokens"] == 0
    run("index", tmp_path / "docs", *given, "--context-at-index", "none")
    assert ModelChoice.of(store).context_at_index == "none"
    outcome = run("index", tmp_path / "docs", *given, "--context-at-index", "title")
    assert_usage_error(outcome, "'title' is not one of none, documents")


# --- the prompts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One is 1.5 of it. Two.", "One is 1.5 of it."),
        ("# Venus\n\nVenus is\nhot! Very.", "Venus Venus is hot!"),
        ("no end", "no end"),
        ("x" * 400, "x" * 300),
        ("Why? Because.", "Why?"),
    ],
)
def test_the_first_sentence_of_a_text(text: str, expected: str) -> None:
    assert first_sentence(text) == expected


def test_questions_to_an_index_are_the_same_each_time(store: Path) -> None:
    llm = ModelChoice.of(store).load(store, fidelity="none")
    questions = {first_sentence(text) for text in TEXTS.values()}
    first = cases_of_index(store, llm, count=3)
    assert first == cases_of_index(store, llm, count=3)
    assert len({case.prompt for case in first}) == 3
    asked = {q for q in questions for case in first if case.prompt.count(q) > 1}
    assert len(asked) == 3  # in its document, and as the question
    assert all(sum(text in case.prompt for text in TEXTS.values()) == 4 for case in first)
    llm.close()


def test_an_llm_that_reads_documents_behind_others_says_so(tmp_path: Path) -> None:
    """To its engine; and what contradicts it is refused at once."""
    given: dict[str, Any] = {"model": tiny_model(SHAPES[1]), "tokenizer": byte_tokenizer()}
    llm = HCacheLLM(**given, store=tmp_path / "a", context_at_index="documents")
    assert isinstance(llm.engine, HCacheEngine)
    assert llm.engine.context_at_index == "documents"
    llm.close()
    given |= {"store": tmp_path / "b", "context_at_index": "documents"}
    wrongs: list[dict[str, Any]] = [{"context_at_index": "title"}, {"fidelity": "exact"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"context_at_index|not exact"):
            HCacheLLM(**{**given, **wrong})
