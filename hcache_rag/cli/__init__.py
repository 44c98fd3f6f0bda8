"""The command line `hcache-rag`. It alone prints."""

from hcache_rag.cli.app import main

__all__ = ["main"]
