"""Offline indexing jobs. Nothing imports them."""
