"""The text of one file: plain text and Markdown as they are, HTML and PDF through their readers.

Beautiful Soup and pypdf are an extra (`pip install 'hcache-rag[readers]'`); without them such files
are passed over with that advice.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path

ADVICE = "pip install 'hcache-rag[readers]'"


class Unreadable(Exception):  # noqa: N818 - a reason to pass a file over, not an error of ours
    """A file that holds no text that can be read, and why."""


def text_of(path: Path) -> str:
    """The text of a file, not stripped.

    Raises:
        Unreadable: there is none.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Unreadable(f"unreadable: {error.strerror}") from error
    text = _READERS.get(path.suffix.lower(), _plain)(data)
    if not text.strip():
        raise Unreadable("empty")
    return text


def _plain(data: bytes) -> str:
    if b"\0" in data:
        raise Unreadable("binary")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable("not UTF-8 text") from error


def _html(data: bytes) -> str:
    """What a page shows, its blocks on lines of their own."""
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise Unreadable(f"HTML; {ADVICE}") from error
    page = BeautifulSoup(data, "html.parser")
    for hidden in page(["script", "style", "template", "noscript"]):
        hidden.decompose()
    text: str = page.get_text("\n", strip=True)
    return text


def _pdf(data: bytes) -> str:
    """The text of all pages, with an empty line between them."""
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise Unreadable(f"PDF; {ADVICE}") from error
    logging.getLogger("pypdf").setLevel(logging.ERROR)
    try:
        return "\n\n".join(
            page.extract_text().strip() for page in PdfReader(io.BytesIO(data)).pages
        )
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unreadable(f"damaged PDF ({error})") from error


_READERS: dict[str, Callable[[bytes], str]] = {
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".pdf": _pdf,
}
