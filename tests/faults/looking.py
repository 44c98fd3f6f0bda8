"""What a user of a store gets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.documents import Known, a_record, a_state, is_content, is_whole, places
from faults.outcomes import Sight
from hcache_rag.errors import MissingStateError
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store import StateStore
from hcache_rag.store.backend import Table
from hcache_rag.texts import TextSet, find_texts


@contextmanager
def opened(sight: Sight, path: Path, **options: Any) -> Iterator[StateStore | None]:
    """A store, or None where it cannot be opened."""
    store = None
    with sight.step("open"):
        store = StateStore.open(path, **options)
    yield store
    with sight.step("close"):
        if store is not None:
            store.close()


def look(store: StateStore, known: Known, sight: Sight | None = None) -> Sight:
    """Do with a store whatever reads, and compare with what was stored."""
    sight = sight or Sight()
    found: dict[StateKey, StateRecord] = {}

    def check(record: StateRecord) -> None:
        if not known.may_be(record):
            sight.add("wrong", "a record that was not stored", record.text[-20:])

    with sight.step("records"):
        for record in store.records():
            check(record)
    for key, text in known.texts.items():
        with sight.step("record"):
            its = store.record(key)
            if its is not None:
                check(its)
                found[key] = its
            elif key in known.expected:
                sight.add("missed", "a record", text[-20:])
        with sight.step("find"):
            alike = store.find(text)
            for record in alike:
                check(record)
            if key in found and key not in [record.key for record in alike]:
                sight.add("missed", "a text", text[-20:])
    with sight.step("find_texts"):
        prompt = "Read this.\n" + "\n".join(sorted(known.texts.values())) + "\nWhat is it?"
        matches = find_texts(prompt, [store])
        for match in matches:
            if not match.text.startswith(prompt[match.start : match.end]):
                sight.add("wrong", "a match that is none", match.text[-20:])
        if matches != find_texts(prompt, [TextSet(known.texts[key] for key in found)]):
            sight.add("missed", "matches")
    with sight.step("reading"):
        _look_at_values(store, found.values(), sight)
    for name, use in _readings(store).items():
        with sight.step(name):
            use()
    return sight


def _look_at_values(store: StateStore, records: Iterable[StateRecord], sight: Sight) -> None:
    with store.reading() as reader:
        for record in records:
            before = len(sight.found)
            for layer, chunk, shape in places(record):
                with sight.step("value"):
                    try:
                        value = reader.value(record.key, layer, chunk)
                        if not is_content(record, layer, chunk, shape, value):
                            sight.add("wrong", "a value that was not stored", record.text[-20:])
                    except MissingStateError:
                        sight.add("missed", "a value", record.text[-20:])
            if len(sight.found) == before:
                sight.present.append(record.key.hex())


def _readings(store: StateStore) -> dict[str, Callable[[], object]]:
    """Whatever else can be read."""
    return {
        "stats": store.stats,
        "entries": lambda: list(store.entries()),
        "totals": store.totals,
        "counters": store.counters,
        "models": store.model_names,
        "namespaces": store.namespaces,
        "keys_of": lambda: store.keys_of("somebody"),
        "verify": store.verify,
    }


def complaints(store: StateStore) -> list[str]:
    """Rows that belong to no whole state, and sums that are not those of a recount."""
    found, prefix = [], store._rows.prefix
    records = {record.key: record for record in store.records()}
    entries = dict(store.entries())
    expected: dict[Table, set[bytes]] = {
        "records": set(entries),
        "entries": set(records),
        "texts": set(records),
        "anchors": {struct.pack(">Q", entry.sequence) for entry in entries.values()},
        "chunks": {
            record.key + struct.pack(">HI", layer, chunk)
            for record in records.values()
            for layer, chunk, _ in places(record)
        },
    }
    with store._live.reading() as txn:
        for table, wanted in expected.items():
            length = 16 if table == "texts" else 0
            there = {key[-length or len(prefix) :] for key, _ in txn.scan(table, prefix)}
            if there != wanted:
                more, less = len(there - wanted), len(wanted - there)
                found.append(f"{table}: {more} rows too many, {less} missing")
    for root, totals in store.totals().items():
        its = [entries[k] for k, record in records.items() if record.root == root and k in entries]
        recount = [len(its), sum(e.num_tokens for e in its), sum(e.num_bytes for e in its)]
        if recount != [totals.documents, totals.num_tokens, totals.num_bytes]:
            found.append(f"totals {totals}, recounted {recount}")
    if not store.verify().is_whole:
        found.append(f"verify: {store.verify()}")
    return found


def is_well(path: Path, known: Known, **options: Any) -> Sight:
    """Look at a store in which nothing may be damaged, and write to it."""
    seen, more = Sight(), a_state(a_record(900))
    with opened(seen, path, **options) as store:
        if store is not None:
            look(store, known, seen)
            for what in complaints(store):
                seen.add("wrong", what)
            with seen.step("writing on"):
                store.put_all([more])
                if not is_whole(store, more.record):
                    seen.add("wrong", "what is written then is not there")
                store.delete(more.record.key)
    sight = Sight(present=seen.present)
    sight.take(seen, as_kind={"refused": "wrong", "missed": "lost"})
    return sight
