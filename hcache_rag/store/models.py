"""The models that have stored states: what they are called, what they keep, and which fidelity."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from hcache_rag.state import read_json
from hcache_rag.store.backend import Transaction


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that has stored states: its name, what they keep, and why that was chosen.

    `fidelity`: the position of the dial, or the share, that `StateStore.set_fidelity` was given;
    `measured_with`: what it was measured with.
    """

    name: str
    layout: str = ""
    reason: str = ""
    fidelity: str | float | None = None
    measured_with: str | None = None

    def to_bytes(self) -> bytes:
        """JSON; without a fidelity it is what releases before `set_fidelity` write and read."""
        fields = {k: v for k, v in asdict(self).items() if v is not None}
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> StoredModel:
        """What `to_bytes` gave; a damaged entry is a model without a name."""
        try:
            found: dict[str, Any] = dict(read_json(data))
        except (ValueError, TypeError):
            return UNKNOWN
        texts: tuple[Any, Any, Any] = (
            found.get("name"),
            found.get("layout", ""),
            found.get("reason", ""),
        )
        fidelity, measured_with = found.get("fidelity"), found.get("measured_with")
        if not all(isinstance(text, str) for text in texts) or not is_fidelity(fidelity):
            return UNKNOWN
        if not isinstance(measured_with, str | None):
            return UNKNOWN
        return cls(*texts, fidelity, measured_with)

    def fidelity_with(self, measured_with: str) -> str | float | None:
        """The fidelity, where it was measured so, or where that is not known; else None."""
        is_its = self.measured_with is None or self.measured_with == measured_with
        return self.fidelity if is_its else None


UNKNOWN = StoredModel("an unknown model")


def is_fidelity(value: object) -> bool:
    """A name, a share from 0 to 1, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0 <= value <= 1
    return value is None or isinstance(value, str)


def change_model(txn: Transaction, key: bytes, **fields: str | float | None) -> None:
    """Change what is known of a model, and leave the rest.

    Args:
        key: of its row.
        fields: of `StoredModel`.
    """
    data = txn.get("models", key)
    known = UNKNOWN if data is None else StoredModel.from_bytes(bytes(data))
    changed = replace(known, **fields)  # type: ignore[arg-type]
    txn.put("models", key, changed.to_bytes())
