"""Prompts to measure the fidelity on: as a query engine makes them, of a file or of an index."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from llama_index.core.schema import Document

from hcache_rag.bundled import MODEL_NAME
from hcache_rag.errors import SourceError
from hcache_rag.fidelity import Case, FidelityReport, keep_recommendation, measure_fidelity
from hcache_rag.llama_index.folder import open_states
from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.model_choice import ModelChoice, has_index
from hcache_rag.llama_index.persisted import load_index
from hcache_rag.llama_index.retriever import HCacheRetriever
from hcache_rag.llama_index.text import llm_texts
from hcache_rag.questions import Record
from hcache_rag.repair import FIDELITY_SHARES

TOP_K = 4
PROMPTS, QUICK_PROMPTS = 20, 4
ANSWER_TOKENS, QUICK_ANSWER_TOKENS = 32, 8
CHECK_PROMPTS, CHECK_ANSWER_TOKENS = 12, 1
QUICK_S = 45.0
"""The short forms begin no prompt after that, but four."""

_QUESTION_CHARS = 300
_T = TypeVar("_T")


def model_for(
    persist_dir: Path,
    model: str | None,
    dtype: str | None,
    *,
    needs_index: bool,
    context_at_index: str | None = None,
) -> ModelChoice:
    """Which model is measured: that of an index, or one that needs none.

    Args:
        model, dtype: what was asked for; None is the index's, or else the library's default.
        needs_index: whether the model has to be that of the index in `persist_dir`.
        context_at_index: instead of the index's.

    Raises:
        SourceError: there is no index but one is needed, or it was made with another model.
    """
    if needs_index or (model is None and has_index(persist_dir)):
        choice = ModelChoice.of(persist_dir)
        named = os.path.realpath(model) if model is not None else None
        made_with = os.path.realpath(choice.model) if choice.model is not None else None
        if named is not None and named != made_with:
            raise SourceError(
                f"the index in {persist_dir} was made with {choice.model or MODEL_NAME}, "
                f"not with {model}"
            )
        if dtype is not None and dtype != choice.dtype:
            raise SourceError(
                f"the index in {persist_dir} was made in {choice.dtype}, not in {dtype}"
            )
    else:
        choice = ModelChoice(model and os.path.abspath(model), dtype or "float32")
    return replace(choice, context_at_index=context_at_index or choice.context_at_index)


def cases_of_records(
    llm: HCacheLLM,
    records: Sequence[Record],
    *,
    count: int = PROMPTS,
    top_k: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Case]:
    """Prompts of some records, the states of their passages stored.

    Args:
        llm: its store gets the states; without one, a temporary folder does.
        count: so many records, drawn at random; the same ones each time.
        top_k: so many passages in a prompt, retrieved among those of all these records; None puts
            a record's own ones into its prompt.
        on_progress: called with (passages read, passages to read).
    """
    chosen = _some(records, count)
    passages = list(dict.fromkeys(p for record in chosen for p in record.passages))
    random.Random(0).shuffle(passages)  # not in the order of the prompts
    if top_k is None:
        llm.engine.precompute(passages, on_progress=on_progress)
        found = [record.passages for record in chosen]
    else:
        retriever = HCacheRetriever.from_documents(
            [Document(text=passage) for passage in passages],
            llm=llm,
            similarity_top_k=top_k,
            transformations=[],
            on_progress=on_progress,
        )
        found = [_retrieved(retriever, record.question) for record in chosen]
    return [
        Case(llm.qa_prompt(documents, record.question), record.answers[0] if record.answers else "")
        for record, documents in zip(chosen, found, strict=True)
    ]


def cases_of_index(
    persist_dir: Path,
    llm: HCacheLLM,
    *,
    count: int = PROMPTS,
    top_k: int = TOP_K,
    questions: Sequence[str] = (),
) -> list[Case]:
    """Prompts of questions to an index.

    Args:
        llm: with the states of the index.
        count: so many questions.
        top_k: documents in a prompt.
        questions: by default the first sentences of documents, drawn at random; the same ones each
            time.

    Raises:
        SourceError: there is no index, or fewer than two documents in it.
    """
    texts = list(dict.fromkeys(llm_texts(load_index(persist_dir).nodes)))
    if len(texts) < 2:
        raise SourceError(
            f"the index in {persist_dir} holds {len(texts)} document(s); what fidelity changes "
            "shows where two are in a prompt"
        )
    asked = questions[:count] or [first_sentence(text) for text in _some(texts, count)]
    retriever = HCacheRetriever.from_persist_dir(persist_dir, llm=llm, similarity_top_k=top_k)
    return [Case(llm.qa_prompt(_retrieved(retriever, q), q)) for q in asked]


def check_index(
    persist_dir: Path,
    llm: HCacheLLM,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """What a recommendation takes, and no more, in a minute: no answers are written.

    Raises:
        SourceError: see `cases_of_index` and `measure_fidelity`.
    """
    return measure_fidelity(
        llm.engine,
        cases_of_index(persist_dir, llm, count=CHECK_PROMPTS),
        FIDELITY_SHARES,
        max_new_tokens=CHECK_ANSWER_TOKENS,
        budget_s=QUICK_S,
        on_progress=on_progress,
    )


def write_recommendation(persist_dir: Path, llm: HCacheLLM, report: FidelityReport) -> None:
    """Put a report's recommendation into the states of an index, for the model of `llm`.

    Raises:
        HCacheError: see `keep_recommendation`; StoreOpenError: they cannot be written.
    """
    with open_states(persist_dir, read_only=False) as states:
        keep_recommendation(report, states, llm.engine)


def first_sentence(text: str) -> str:
    """A text's first sentence, without its heading's marks, as a question of a few words."""
    lines = re.sub(r"^[#>*\s]+", "", text)
    match = re.match(r".+?[.!?](?=\s|$)", lines, re.DOTALL)
    return " ".join((match[0] if match else lines).split())[:_QUESTION_CHARS]


def _some(items: Sequence[_T], count: int) -> list[_T]:
    return random.Random(0).sample(list(items), min(count, len(items)))


def _retrieved(retriever: HCacheRetriever, question: str) -> tuple[str, ...]:
    return tuple(llm_texts([found.node for found in retriever.retrieve(question)]))
