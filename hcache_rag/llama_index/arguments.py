"""What cannot be an argument is refused where it is given, by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from llama_index.core.schema import BaseNode


def expect(name: str, value: Any, kind: type, advice: str = "") -> None:
    """Refuse a value of another kind.

    Raises:
        TypeError: naming both kinds.
    """
    if not isinstance(value, kind):
        behind = f"; {advice}" if advice else ""
        raise TypeError(f"{name} must be {kind.__name__}, not {type(value).__name__}{behind}")


def expect_documents(documents: Any) -> Sequence[BaseNode]:
    """A list of documents.

    Raises:
        TypeError: it is one document, or holds what is none.
    """
    if isinstance(documents, (BaseNode, str)) or not isinstance(documents, Iterable):
        raise TypeError(f"documents must be a list of them, not {type(documents).__name__}")
    found = list(documents)
    for number, document in enumerate(found):
        expect(f"documents[{number}]", document, BaseNode, "Document(text=..., id_=...) makes one")
    return found


def refuse_unknown(given: Collection[str], known: Collection[str]) -> None:
    """Refuse argument names that nobody knows.

    Raises:
        TypeError: naming them, and what may have been meant.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        near = [name for each in unknown for name in get_close_matches(each, known, 1)]
        meant = f"; did you mean {', '.join(near)}?" if near else ""
        raise TypeError(f"unknown argument(s): {', '.join(unknown)}{meant}")
