"""What cannot be an argument is refused where it is given, and the message names the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fakes import WordEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.schema import Document
from llama_index.core.vector_stores import SimpleVectorStore
from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.errors import HCacheError, ModelNotFoundError
from hcache_rag.llama_index import (
    HCacheLLM,
    HCachePrecompute,
    HCacheRetriever,
    HCacheVectorStore,
)
from hcache_rag.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL: dict[str, Any] = {"model": tiny_model(SHAPES[1]), "tokenizer": byte_tokenizer()}


@pytest.fixture
def llm() -> Iterator[HCacheLLM]:
    with HCacheLLM(**MODEL, store=StateStore.in_memory()) as made:
        yield made


@pytest.fixture
def retriever(llm: HCacheLLM) -> HCacheRetriever:
    documents = [Document(text="Mars is a planet.", id_="mars")]
    return HCacheRetriever.from_documents(documents, llm=llm, embed_model=WordEmbedding())


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"fidelity": "hgih"}, "auto, exact, none, fast, balanced, high, not 'hgih'"),
        ({"fidelity": 2}, "share from 0 to 1"),
        ({"representation": "hiden"}, "unknown representation 'hiden'; known: auto, hidden, kv"),
        ({"representation": ["kv"]}, "1 representations were given"),
        ({"storage_dtype": "int4"}, "states cannot be stored as 'int4'; known: float32"),
        ({"chat_memory": "on"}, "chat_memory is 'auto', 'always' or 'never'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, not str"),
        ({"max_new_token": 5}, "did you mean max_new_tokens?"),
        ({"fidelty": "high"}, "unknown argument(s): fidelty; did you mean fidelity?"),
    ],
)
def test_an_llm_refuses_at_once(wrong: dict[str, Any], expected: str) -> None:
    """No store is named, so that an engine would only be made at the first question."""
    with pytest.raises((ValueError, TypeError)) as error:
        HCacheLLM(**MODEL, **wrong)
    assert expected in str(error.value)


def test_a_model_that_is_nowhere_is_not_looked_for_on_a_hub() -> None:
    with pytest.raises(ModelNotFoundError, match="none is downloaded, give a model's folder"):
        load_model("HuggingFaceTB/SmolLM2-135M-Instruct")


MAR = Document(text="Mars is red.", id_="mars")
WORDS = WordEmbedding()
BAD_CALLS: dict[str, tuple[Callable[[HCacheLLM], object], str]] = {
    "strings": (
        lambda llm: HCacheRetriever.from_documents(["a text"], llm=llm),  # type: ignore[list-item]
        "documents[0] must be BaseNode, not str; Document(text=..., id_=...) makes one",
    ),
    "one string": (
        lambda llm: HCacheRetriever.from_documents("a text", llm=llm),  # type: ignore[arg-type]
        "documents must be a list of them, not str",
    ),
    "another LLM": (
        lambda llm: HCacheRetriever.from_documents([MAR], llm=MockLLM()),  # type: ignore[arg-type]
        "llm must be HCacheLLM, not MockLLM",
    ),
    "an embedding's name": (
        lambda llm: HCacheRetriever.from_documents(
            [MAR],
            llm=llm,
            embed_model="local",  # type: ignore[arg-type]
        ),
        "embed_model must be BaseEmbedding, not str",
    ),
    "no neighbours": (
        lambda llm: HCacheRetriever.from_documents(
            [MAR], llm=llm, embed_model=WORDS, similarity_top_k=0
        ),
        "similarity_top_k must be positive, not 0",
    ),
    "wrapping an LLM": (
        lambda llm: HCacheRetriever.wrap(llm, llm=llm),  # type: ignore[arg-type]
        "retriever must be BaseRetriever, not HCacheLLM; an index has one: index.as_retriever()",
    ),
    "a step without an LLM": (
        lambda llm: HCachePrecompute("model"),  # type: ignore[arg-type]
        "llm must be HCacheLLM, not str",
    ),
    "a typo in a step": (
        lambda llm: HCachePrecompute(llm, on_eror="raise"),
        "unknown argument(s): on_eror; did you mean on_error?",
    ),
    "a vector store, turned round": (
        lambda llm: HCacheVectorStore(llm, SimpleVectorStore()),  # type: ignore[arg-type]
        "inner must be BasePydanticVectorStore, not HCacheLLM; HCacheVectorStore(",
    ),
    "a typo in a vector store": (
        lambda llm: HCacheVectorStore(SimpleVectorStore(), llm, colection="a"),
        "did you mean collection?",
    ),
    "one text": (lambda llm: llm.engine.precompute("a text"), "texts are a list of strings"),
    "no texts": (
        lambda llm: llm.engine.precompute(["a", MAR]),  # type: ignore[list-item]
        "texts are strings, but texts[1] is Document",
    ),
    "two prompts": (
        lambda llm: llm.engine.generate(["a", "b"]),  # type: ignore[arg-type]
        "prompt must be one string, not list",
    ),
    "a model's name": (
        lambda llm: HCacheEngine("m", MODEL["tokenizer"], StateStore.in_memory()),  # type: ignore[arg-type]
        "model must be a loaded transformers model, not str; hcache_rag.models.load_model(folder)",
    ),
    "no number of tokens": (
        lambda llm: GenerationOptions(max_new_tokens="5"),  # type: ignore[arg-type]
        "max_new_tokens must be a whole number",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_wrong_argument_is_named(llm: HCacheLLM, name: str) -> None:
    call, expected = BAD_CALLS[name]
    with pytest.raises((TypeError, ValueError)) as error:
        call(llm)
    assert expected in str(error.value)


@pytest.mark.parametrize("method", ["insert", "update", "delete", "refresh"])
def test_changes_take_documents_and_their_ids(retriever: HCacheRetriever, method: str) -> None:
    """What is refused changes nothing."""
    wrong: dict[str, tuple[Any, str]] = {
        "insert": ("a text", "document must be BaseNode, not str; Document(text=..., id_=...)"),
        "update": ("a text", "document must be BaseNode, not str; Document(text=..., id_=...)"),
        "delete": (MAR, "ref_doc_id must be str, not Document; a document's is its id_"),
        "refresh": (MAR, "documents must be a list of them, not Document"),
    }
    value, expected = wrong[method]
    with pytest.raises(TypeError) as error:
        getattr(retriever, method)(value)
    assert expected in str(error.value)
    assert [node.get_content() for node in retriever.nodes] == ["Mars is a planet."]


def test_a_closed_llm_says_so(llm: HCacheLLM) -> None:
    llm.engine.store.close()
    with pytest.raises(HCacheError, match="is closed"):
        llm.complete("Mars")
