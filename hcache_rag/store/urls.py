"""Where remote shards are: their file systems, and what may be said of a URL. The door to fsspec.

A URL may hold a password or a signature. Errors and logs name it without these; that a file system
puts it into errors of its own is why these are not passed on as they are.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urlsplit

from hcache_rag.errors import StoreOpenError

_USER = re.compile(r"(?<=://)[^/\s'\"@]+@")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        StoreOpenError: fsspec, or what it needs for this protocol, is not installed.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise StoreOpenError(
            f"{without_secrets(url)}: pip install 'hcache-rag[remote]' to reach it"
        ) from None
    fs, root = url_to_fs(url)
    return fs, str(root).rstrip("/")


def host_of(url: str) -> str:
    """What is reached over one link: protocol and host, or bucket."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def without_secrets(text: str) -> str:
    """A text whose URLs have neither a user and password nor a query."""
    return _QUERY.sub(r"\1?***", _USER.sub("***@", text))


def told(error: Exception, url: str) -> str:
    """An error of a file system, without what is secret of the URL that it was about."""
    text, parts = without_secrets(repr(error)), urlsplit(url)
    secrets = (parts.query, parts.password, parts.password and unquote(parts.password))
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return text
