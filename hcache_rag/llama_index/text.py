"""The text of a node as it will stand in a prompt, which is what states are kept for."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.schema import BaseNode, MetadataMode


def llm_text(node: BaseNode) -> str:
    """What response synthesizers put into the prompt for this node, stripped."""
    return node.get_content(metadata_mode=MetadataMode.LLM).strip()


def source_of(node: BaseNode) -> str:
    """The id of the document that a node was cut from, or its own."""
    return node.ref_doc_id or node.node_id


def file_of(node: BaseNode) -> str:
    """What a person calls where a node comes from: a file's name, or else the node's id."""
    named = node.metadata.get("file") or node.metadata.get("file_name")
    return str(named or node.node_id)


def llm_texts(nodes: Sequence[BaseNode]) -> list[str]:
    """`llm_text` of every node that has any."""
    return [text for text in map(llm_text, nodes) if text]
