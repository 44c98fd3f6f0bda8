"""What came of faults, counted."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

from hcache_rag.errors import HCacheError

BAD = ("lost", "wrong", "escaped")
"""Kinds of what must not happen to a process that lives."""


@dataclass
class Outcome:
    """What came of some faults.

    Args:
        count: faults.
        right: of these, how often all that was stored was found, and right.
        missed: how often something was not found, and nothing worse.
        refused: how often something ended in an error of this library, and nothing worse.
        acknowledged, lost: documents whose write had returned, and those of them that were gone.
        wrong: how often something was given out that was never stored.
        escaped: how often there was an error that is not of this library.
        crashes, hangs: processes that a signal ended, and that were silent for `HANG_S`.
        notes: what happened of all that must not, and to which faults.
    """

    fault: str
    count: int = 0
    right: int = 0
    missed: int = 0
    refused: int = 0
    acknowledged: int = 0
    lost: int = 0
    wrong: int = 0
    escaped: int = 0
    crashes: int = 0
    hangs: int = 0
    notes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def failures(self) -> int:
        """How often something happened that must not."""
        return self.lost + self.wrong + self.escaped + self.crashes + self.hangs

    def __str__(self) -> str:
        """The notes, for people."""
        return "\n".join(
            f"{len(faults)} x {what}: {'; '.join(faults[:2])}"
            for what, faults in self.notes.items()
        )

    def note(self, what: str, fault: str) -> None:
        """Remember what happened."""
        self.notes.setdefault(what, []).append(fault)

    def count_sight(self, sight: Sight, fault: str) -> None:
        """A fault was done and its process lived."""
        self.count += 1
        self.lost += sum(kind == "lost" for kind, _, _ in sight.found)
        verdict = sight.verdict
        if verdict != "lost":
            setattr(self, verdict, getattr(self, verdict) + 1)
        for kind, what, detail in sight.found:
            if kind in BAD:
                self.note(f"{kind}: {what}", f"{fault} {detail}".strip())

    def count_end(self, end: str, fault: str) -> None:
        """A fault was done and its process came to a bad end."""
        self.count += 1
        if end.startswith("hang"):
            self.hangs += 1
        else:
            self.crashes += 1
        self.note(end, fault)

    def add(self, other: Outcome) -> None:
        """Count in what another process has counted."""
        for name in (each.name for each in fields(self) if each.name not in ("fault", "notes")):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for what, faults in other.notes.items():
            self.notes.setdefault(what, []).extend(faults)


@dataclass
class Sight:
    """What was seen in a store.

    Args:
        found: (kind, what, detail), a kind being "lost", "wrong", "escaped", "refused", "missed".
        present: the keys of documents that are whole.
    """

    found: list[tuple[str, str, str]] = field(default_factory=list)
    present: list[str] = field(default_factory=list)

    def add(self, kind: str, what: str, detail: str = "") -> None:
        """Something was seen."""
        self.found.append((kind, what, detail))

    def take(self, other: Sight, *, as_kind: Mapping[str, str] | None = None) -> None:
        """See what another one has seen, some kinds as others."""
        for kind, what, detail in other.found:
            self.add((as_kind or {}).get(kind, kind), what, detail)

    @property
    def verdict(self) -> str:
        """The worst of it."""
        kinds = {kind for kind, _, _ in self.found}
        return next((kind for kind in (*BAD, "refused", "missed") if kind in kinds), "right")

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Something that a user does, which may fail."""
        try:
            yield
        except HCacheError as error:
            self.add("refused", type(error).__name__, f"{name}: {error}")
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno} {last.name}"
            self.add(
                "escaped", f"{type(error).__name__} in {place}", f"({name}: {str(error)[:80]})"
            )
