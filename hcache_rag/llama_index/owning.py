"""Whose states they are, in LlamaIndex's terms: of the documents that nodes were cut from."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llama_index.core.schema import BaseNode

from hcache_rag.llama_index.llm import HCacheLLM
from hcache_rag.llama_index.text import llm_text, source_of
from hcache_rag.state import StateKey


def claim(llm: HCacheLLM, nodes: Sequence[BaseNode]) -> None:
    """Let the states of nodes belong to their documents, besides others that do."""
    if not llm.engine.store.read_only:
        llm.engine.store.assign_all(_keys(llm, nodes), add=True)


def settle(llm: HCacheLLM, nodes: Sequence[BaseNode]) -> None:
    """Let no others belong to these documents: what belongs to nobody then is deleted.

    Those are states of what the documents were before, and states that were made with other options
    of the same model: another preamble, or another `context_at_index`.
    """
    if not llm.engine.store.read_only:
        llm.engine.store.assign_all(_keys(llm, nodes), delete=True)


def _keys(llm: HCacheLLM, nodes: Sequence[BaseNode]) -> dict[str, list[StateKey]]:
    """The states of nodes by document: this model's as it is set now, and other models'."""
    engine, found = llm.engine, dict[str, list[StateKey]]()
    for node in nodes:
        text = llm_text(node)
        others = [r.key for r in engine.store.find(text) if r.root != engine.root]
        keys = found.setdefault(source_of(node), [])
        keys += [record.key for record in engine.states_of(text)] + others
    return found


def own(llm: HCacheLLM, nodes: Sequence[BaseNode], collection: str) -> None:
    """Let states belong to their nodes, these to their documents, and those to a collection."""
    store = llm.engine.store
    if store.read_only:
        return
    by_source: dict[str, dict[str, list[StateKey]]] = {}
    for node in nodes:
        keys = [record.key for record in llm.engine.states_of(llm_text(node))]
        by_source.setdefault(source_of(node), {})[_part(node.node_id)] = keys
    documents = {
        source: {key for keys in parts.values() for key in keys}
        for source, parts in by_source.items()
    }
    store.assign_all(documents, add=True, within=_whole(collection))
    for source, parts in by_source.items():
        store.assign_all(parts, delete=True, within=source)


def disown(
    llm: HCacheLLM,
    *,
    sources: Collection[str] = (),
    nodes: Collection[str] = (),
    collection: str | None = None,
) -> None:
    """Documents, nodes, or a whole collection are gone; states that nobody has then are deleted."""
    names = [*sources, *map(_part, nodes), *([] if collection is None else [_whole(collection)])]
    if names and not llm.engine.store.read_only:
        llm.engine.store.delete_owner(*names)


def _part(node_id: str) -> str:
    return f"node\x1f{node_id}"


def _whole(collection: str) -> str:
    return f"collection\x1f{collection}"
