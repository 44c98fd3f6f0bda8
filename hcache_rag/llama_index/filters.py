"""LlamaIndex's metadata filters, nested ones too, as a test of one node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

Test = Callable[[dict[str, Any]], bool]


def passing(filters: MetadataFilters) -> Callable[[BaseNode], bool]:
    """Whether a node passes.

    A single filter means what it means to LlamaIndex's `SimpleVectorStore`: without a value for its
    key only `!=`, `nin` and `is_empty` pass. The ids of a node's document can be filtered as
    `doc_id`, `document_id` and `ref_doc_id`.

    Raises:
        ValueError: a condition that is not known.
    """
    test = _test_of(filters)

    def passes(node: BaseNode) -> bool:
        source = node.ref_doc_id or "None"
        ids = {"doc_id": source, "document_id": source, "ref_doc_id": source}
        return test({**node.metadata, **ids})

    return passes


def _test_of(filters: MetadataFilters | MetadataFilter) -> Test:
    if isinstance(filters, MetadataFilter):
        alone = MetadataFilters(filters=[filters])
        return lambda metadata: build_metadata_filter_fn(lambda _: metadata, alone)("")
    tests = [_test_of(each) for each in filters.filters]
    condition = filters.condition or FilterCondition.AND
    if not tests:
        return lambda _: True
    if condition == FilterCondition.AND:
        return lambda metadata: all(test(metadata) for test in tests)
    if condition == FilterCondition.OR:
        return lambda metadata: any(test(metadata) for test in tests)
    if condition == FilterCondition.NOT:
        return lambda metadata: not any(test(metadata) for test in tests)
    raise ValueError(f"the condition {condition!r} of a filter is not known")
