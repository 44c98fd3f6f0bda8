"""The nearest vectors against numpy, with deletions; filters against LlamaIndex's own store."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from fakes import WordEmbedding
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.schema import (
    NodeRelationship,
    NodeWithScore,
    QueryBundle,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores import SimpleVectorStore, VectorStoreQuery
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from hcache_rag.llama_index import nearest as module
from hcache_rag.llama_index.filters import passing
from hcache_rag.llama_index.nearest import Nearest, Vectors
from hcache_rag.llama_index.vectors import Change, VectorIndex

D = 24


def vectors(count: int, seed: int = 0) -> Vectors:
    found = np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32)
    normal: Vectors = found / np.linalg.norm(found, axis=1, keepdims=True)
    return normal


def brute_force(held: dict[int, Vectors], query: Vectors, top_k: int) -> list[int]:
    return sorted(held, key=lambda number: -float(held[number] @ query))[:top_k]


def numbers_of(found: Sequence[tuple[int, float]]) -> list[int]:
    return [number for number, _ in found]


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_what_is_found_is_what_brute_force_finds(kind: Any, tmp_path: Path) -> None:
    """After adding and removing in any order, and after writing and reading."""
    random, held = np.random.default_rng(1), dict[int, Vectors]()
    index, following = Nearest(kind), 0
    recalls = []
    for turn in range(30):
        new = vectors(int(random.integers(1, 40)), seed=turn)
        numbers = list(range(following, following + len(new)))
        following += len(new)
        index.add(numbers, new)
        held.update(zip(numbers, new, strict=True))
        gone = random.choice(list(held), size=len(held) // 4, replace=False).tolist()
        index.remove([*gone, 10**6])
        for number in gone:
            del held[number]
        if turn % 10 == 9:
            index.write(tmp_path / "vectors")
            index = Nearest.read(tmp_path / "vectors", held.keys(), kind)
        assert len(index) == len(held)
        for query in vectors(5, seed=1000 + turn):
            found = index.search(query, 10)
            assert set(numbers_of(found)) <= held.keys()
            assert len(found) == min(10, len(held))
            for number, score in found:
                assert score == pytest.approx(float(held[number] @ query), abs=1e-6)
            best = brute_force(held, query, 10)
            recalls.append(len(set(best) & set(numbers_of(found))) / len(best))
            if kind == "flat":
                assert numbers_of(found) == best
    assert np.mean(recalls) >= (1.0 if kind == "flat" else 0.98)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_deleting_all_leaves_an_index_that_can_be_filled(kind: Any) -> None:
    index = Nearest(kind)
    assert index.search(vectors(1)[0], 3) == []
    for first in (0, 10):
        index.add(range(first, first + 5), vectors(5))
        assert len(index.search(vectors(1)[0], 9)) == 5
        index.remove(range(first, first + 5))
        assert index.search(vectors(1)[0], 9) == []


def test_a_graph_of_mostly_deleted_vectors_still_finds_as_many_as_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_DEAD_SHARE", 1.0)
    index, held = Nearest("hnsw"), vectors(2000)
    index.add(range(2000), held)
    near = np.argsort(-(held @ held[0]))
    index.remove(near[:1900].tolist())  # all around the query
    assert index.is_graph
    assert set(numbers_of(index.search(held[0], 50))) == set(near[1900:1950].tolist())


def test_a_graph_is_built_anew_when_too_much_of_it_is_deleted() -> None:
    index = Nearest("hnsw")
    index.add(range(100), vectors(100))
    index.remove(range(25))
    assert index._faiss.ntotal == 100
    index.remove([25])
    assert index._faiss.ntotal == len(index) == 74


def test_many_vectors_become_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRAPH_FROM", 60)
    index = Nearest()
    index.add(range(60), vectors(60))
    assert not index.is_graph
    index.add([60], vectors(1, seed=9))
    assert index.is_graph
    assert numbers_of(index.search(vectors(1, seed=9)[0], 1)) == [60]
    assert not Nearest("flat").is_graph
    with pytest.raises(ValueError, match="'auto', 'flat' or 'hnsw', not 'ivf'"):
        Nearest("ivf")


def test_a_file_of_other_vectors_is_refused(tmp_path: Path) -> None:
    index = Nearest()
    index.add(range(5), vectors(5))
    index.write(tmp_path / "vectors")
    for numbers in (range(6), range(4), [1, 2, 3, 4, 5]):
        with pytest.raises(ValueError, match="embeddings"):
            Nearest.read(tmp_path / "vectors", numbers)


def test_rows_of_the_first_format_are_numbered(tmp_path: Path) -> None:
    index = faiss.IndexFlatIP(D)
    index.add(vectors(5))
    faiss.write_index(index, str(tmp_path / "vectors"))
    found = Nearest.read(tmp_path / "vectors", range(5))
    assert numbers_of(found.search(vectors(5)[3], 1)) == [3]
    found.remove([3])
    assert 3 not in numbers_of(found.search(vectors(5)[3], 5))


# --- filters --------------------------------------------------------------------------------------


def nodes() -> list[TextNode]:
    """Every combination of a few values, one of them missing."""
    made = []
    years: tuple[Any, ...] = (None, 1990, 2005.5)
    names: tuple[Any, ...] = (None, "", "Mars", "mars rover")
    tags: tuple[Any, ...] = (None, [], ["a"])
    for place, (year, name, tag) in enumerate(itertools.product(years, names, tags)):
        values = {"year": year, "name": name, "tags": tag}
        metadata = {key: value for key, value in values.items() if value is not None}
        node = TextNode(text=f"text {place}", id_=f"n{place}", metadata=metadata)
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=f"d{place % 2}")
        made.append(node)
    return made


OP = FilterOperator
FILTERS = [
    MetadataFilter(key="year", value=1990),
    *(MetadataFilter(key="year", value=1990, operator=op) for op in (OP.NE, OP.GT, OP.GTE)),
    *(MetadataFilter(key="year", value=2000.0, operator=op) for op in (OP.LT, OP.LTE)),
    MetadataFilter(key="name", value="Mars"),
    *(MetadataFilter(key="name", value=["Mars", "x"], operator=op) for op in (OP.IN, OP.NIN)),
    MetadataFilter(key="name", value="ars", operator=OP.TEXT_MATCH),
    MetadataFilter(key="name", value="MARS", operator=OP.TEXT_MATCH_INSENSITIVE),
    MetadataFilter(key="tags", value="a", operator=OP.CONTAINS),
    *(MetadataFilter(key="tags", value=["a", "b"], operator=op) for op in (OP.ANY, OP.ALL)),
    MetadataFilter(key="tags", value=None, operator=OP.IS_EMPTY),
    MetadataFilter(key="nobody has it", value=1, operator=OP.NE),
    MetadataFilter(key="ref_doc_id", value="d1"),
]


def test_every_operator_is_tried() -> None:
    assert {f.operator for f in FILTERS} == set(FilterOperator)


@pytest.fixture(scope="module")
def simple() -> SimpleVectorStore:
    store = SimpleVectorStore()
    store.add([node.model_copy(update={"embedding": [1.0, 0.0]}) for node in nodes()])
    return store


def ids_in(store: SimpleVectorStore, filters: MetadataFilters) -> set[str]:
    query = VectorStoreQuery([1.0, 0.0], similarity_top_k=999, filters=filters)
    return set(store.query(query).ids or ())


@pytest.mark.parametrize("condition", list(FilterCondition))
def test_filters_pass_what_llama_index_s_own_store_passes(
    simple: SimpleVectorStore, condition: FilterCondition
) -> None:
    """Alone and in pairs."""
    pairs = [*itertools.combinations(FILTERS, 2), *((f,) for f in FILTERS)]
    for some in pairs:
        filters = MetadataFilters(filters=list(some), condition=condition)
        passes = passing(filters)
        assert {n.node_id for n in nodes() if passes(n)} == ids_in(simple, filters), some


def test_nested_filters_are_what_sets_make_of_them(simple: SimpleVectorStore) -> None:
    """LlamaIndex's store refuses them, so that its single filters are put together here."""
    everything = {node.node_id for node in nodes()}
    first, second, third = (
        ids_in(simple, MetadataFilters(filters=[f])) for f in (FILTERS[0], FILTERS[9], FILTERS[-1])
    )
    either = MetadataFilters(filters=[FILTERS[0], FILTERS[9]], condition=FilterCondition.OR)
    none = MetadataFilters(filters=[either], condition=FilterCondition.NOT)
    cases = {
        MetadataFilters: (first | second) & third,
        None: (everything - (first | second)) | third,
    }
    both = MetadataFilters(filters=[either, FILTERS[-1]])
    other = MetadataFilters(filters=[none, FILTERS[-1]], condition=FilterCondition.OR)
    for filters, expected in zip((both, other), cases.values(), strict=True):
        passes = passing(filters)
        assert {n.node_id for n in nodes() if passes(n)} == expected
        assert 0 < len(expected) < len(everything)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_as_many_are_found_as_pass(kind: Any, top_k: int) -> None:
    """The best of those that pass, however far from the question they are."""
    texts = [f"word{i % 7} word{i % 11} other{i}" for i in range(200)]
    made = [TextNode(text=t, id_=str(i), metadata={"n": i}) for i, t in enumerate(texts)]
    for node in made:
        node.excluded_embed_metadata_keys = ["n"]
    embedding = WordEmbedding()
    index = VectorIndex.build(made, embedding, kind=kind)
    filters = MetadataFilters(
        filters=[MetadataFilter(key="n", value=170, operator=FilterOperator.GTE)]
    )
    query = embedding.get_query_embedding("word3 word5")
    found = index.search(query, top_k, filters)
    allowed = [n for n in index.search(query, 200) if n.node.metadata["n"] >= 170]
    assert len(found) == min(top_k, 30)
    assert [n.score for n in found] == pytest.approx([n.score for n in allowed[: len(found)]])
    assert all(n.node.metadata["n"] >= 170 for n in found)
    empty = MetadataFilters(filters=[])
    assert len(index.search(query, top_k, empty)) == top_k


def test_what_is_found_may_be_changed_without_harm() -> None:
    """Postprocessors set the text of nodes where they are."""
    node = TextNode(text="The sentence.", id_="n", metadata={"window": "More. The sentence."})
    embedding = WordEmbedding()
    index = VectorIndex.build([node], embedding)
    query = embedding.get_query_embedding("sentence")
    found: list[NodeWithScore] = index.search(query, 1)
    replaced = MetadataReplacementPostProcessor("window").postprocess_nodes(
        found, query_bundle=QueryBundle("sentence")
    )
    assert replaced[0].node.get_content() == "More. The sentence."
    found[0].node.metadata.clear()
    assert index.search(query, 1)[0].node.get_content() == "The sentence."
    assert index.nodes[0].metadata == {"window": "More. The sentence."}


def test_a_node_that_comes_again_takes_its_own_place() -> None:
    embedding = WordEmbedding()
    index = VectorIndex.build([TextNode(text="old words", id_="n")], embedding)
    new = [TextNode(text="first", id_="n"), TextNode(text="second", id_="n")]
    index.apply(Change((), new, index.embedded(new, embedding)))
    assert [node.get_content() for node in index.nodes] == ["second"]
    found = index.search(embedding.get_query_embedding("second"), 5)
    assert [n.node.get_content() for n in found] == ["second"]
    assert found[0].score == pytest.approx(1.0)
