"""Stores whose checksums are right and whose content is not."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import xxhash

from faults.documents import ROOT, Known, a_record, a_state, places
from faults.looking import _readings, look, opened
from faults.outcomes import Outcome, Sight
from faults.processes import one_by_one
from hcache_rag import codec
from hcache_rag.state import StateKey, StateRecord
from hcache_rag.store import StateStore
from hcache_rag.store.backend import TABLES, Table, Transaction
from hcache_rag.texts import find_texts

MEMORY_BYTES = 1 << 30
"""What a process may take on top of what it has before it opens a hostile store."""

FRAGMENTS = (
    *(b"null", b"true", b"-1", b"0", b"0.5", b"2147483648", b"18446744073709551616"),
    *(b"9" * 400, b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b"[]", b"{}", b'""', b'"word"'),
    *(b'"\\ud800"', b'"a\\u0000b"', b'"' + b"00" * 16 + b'"', b'"' + b"x" * (4 << 20) + b'"'),
    *(b"[" + b"0," * 200_000 + b"0]", b"[" * 100_000 + b"]" * 100_000, b"{", b'"\xff"'),
)
"""What stands in some field of a JSON object instead of what should."""

FIELDS = {
    "records": " version parent root text layout created_s is_preamble chunk_tokens runs",
    "totals": " documents num_bytes",
    "counters": " sequence hits evictions clock",
    "namespaces": " number max_bytes key_check",
    "meta": " format id max_bytes",
    "models": " name layout other",
}
"""Of JSON objects; the first of each is the whole object."""

ODD_RUNS = (
    *([["none", "", 3]], [["kv", "float32", 1]], [["kv", "float32", 30]], [["kv", "int3", 3]]),
    *([["kv", "float32", 10**9]], [["kv", "float32", 10**30]], [["kv", "float32", 1]] * 60_000),
    *([["kv", "float32", 0]], [["kv", "float32", -3]], [["kv", "float32", 2.5]]),
    *([["kv", "float32", float("nan")]], [["kv", "float32", float("inf")]], [["kv", "float32"]]),
    *([["kv", "float32", [3]]], [["kv", ["float32"], 3]], [[["kv"], "float32", 3]], ["kv"] * 3),
    [["kv", "float32", 1], ["none", "", 1], ["kv", "float32", 1]],
)
ODD_IDS = (b"", bytes(4), bytes(5), b"\xff" * 400, bytes(4_000_000))
ODD_VALUES = (
    *(b"", b"s", b"s\xff\xfe", bytes(100), b"\xff" * 100, b"9" * 23, b"-5"),
    b"s" + b"x" * (4 << 20),
)
ODD_KEYS = (
    *(b"\x01", bytes(15), b"\xff" * 16, b"\xfe" * 17, b"\x7f" * 20, b"z" * 470),
    *(b"\xff\xfe" * 8 + b"\0\1" + bytes(16), b"\xed\xa0\x80" * 20 + b"\0\1" + bytes(16)),
)
ODD_NUMBERS = (b"\0", b"\xff", struct.pack("<d", float("nan")), struct.pack("<d", 1e308))
HEADER_FIELDS = {4: 2, 6: 1, 7: 1, 8: 2, 10: 2, 12: 4, 16: 4, 20: 4, 24: 8}
"""Where the numbers of a chunk's header begin, and their bytes."""

Lie: TypeAlias = Callable[[Transaction, bytes, StateRecord], None]
"""Writes something into a namespace, most often about one record that is there."""


def lies() -> dict[str, Lie]:
    """Everything that is tried, by what it is."""
    found: dict[str, Lie] = {
        "texts: many alike": _many_texts,
        "texts: whole texts that are none": _whole_texts,
        "anchors: many short texts": _many_short_texts,
    }

    def add(about: str, odd: bytes, lie: Lie) -> None:
        shown = repr(odd[:20])[1:] + (f" of {len(odd):,} bytes" if len(odd) > 20 else "")
        found[f"{about} {shown}"] = lie

    for table, names in FIELDS.items():
        for name in names.split(" "):
            for odd in FRAGMENTS:
                add(f"{table}: {name or 'all'} is", odd, partial(_lie_in_json, table, name, odd))
    for runs in ODD_RUNS:
        odd = json.dumps(runs).encode()
        found[f"records: runs are {runs[:3]}"] = partial(_lie_in_json, "records", "runs", odd)
    for odd in ODD_IDS:
        add("records: token ids are", odd, partial(_lie_in_ids, odd))
    for each in TABLES:
        for odd in ODD_VALUES:
            add(f"{each}: a value is", odd, partial(_lie_in_value, each, odd))
            add(f"{each}: a sealed value is", odd, partial(_lie_in_value, each, sealed(odd)))
        for odd in ODD_KEYS:
            add(f"{each}: a key is", odd, partial(_add_key, each, odd))
    for odd in ODD_NUMBERS:
        add("chunks: payload of", odd, partial(_lie_in_chunks, 48, 0, odd))
        for at in range(0, 80, 4):
            add(f"entries: byte {at} is", odd, partial(_lie_in_entry, at, odd))
    for at, size in HEADER_FIELDS.items():
        for odd in (b"\0", b"\1", b"\x7f", b"\xff"):
            add(f"chunks: header byte {at} is", odd, partial(_lie_in_chunks, at, size, odd))
    return found


def sealed(data: bytes) -> bytes:
    """A small value with its checksum in front."""
    return xxhash.xxh3_64_digest(data) + data


def _with(head: bytes | None, name: str, odd: bytes) -> bytes:
    """A JSON object with something else in one field, or that alone."""
    if not name:
        return odd
    return json.dumps({**json.loads(head or b"{}"), name: "@"}).encode().replace(b'"@"', odd)


def _put_record(txn: Transaction, prefix: bytes, key: StateKey, data: bytes) -> None:
    txn.put("records", prefix + key, data + hashlib.blake2b(key + data, digest_size=16).digest())


def _lie_in_json(
    table: str, name: str, odd: bytes, txn: Transaction, prefix: bytes, record: StateRecord
) -> None:
    if table == "records":
        line, _, ids = record.to_bytes()[:-16].partition(b"\n")
        if name in ("chunk_tokens", "runs"):
            layout = json.dumps(json.loads(line)["layout"]).encode()
            name, odd = "layout", _with(layout, name, odd)
        _put_record(txn, prefix, record.key, _with(line, name, odd) + b"\n" + ids)
    elif table == "meta":
        txn.put("meta", b"store", _with(txn.get("meta", b"store"), name, odd))
    elif table == "models":
        key = prefix + record.root
        txn.put("models", key, _with(txn.get("models", key), name, odd))
    elif table == "namespaces":
        value = (txn.get("namespaces", b"default") or b"")[8:]
        for namespace in (b"default", b"another"):
            txn.put("namespaces", namespace, sealed(_with(value, name, odd)))
    else:
        key = prefix + (record.root if table == "totals" else b"")
        txn.put("totals", key, sealed(_with((txn.get("totals", key) or b"")[8:], name, odd)))


def _lie_in_ids(odd: bytes, txn: Transaction, prefix: bytes, record: StateRecord) -> None:
    """Under the key that would be theirs."""
    key = hashlib.blake2b(record.parent + odd, digest_size=16).digest()
    _put_record(txn, prefix, key, record.to_bytes().partition(b"\n")[0] + b"\n" + odd)
    txn.put("texts", _text_row(txn, prefix, record)[:-16] + key, b"+")


def _text_row(txn: Transaction, prefix: bytes, record: StateRecord) -> bytes:
    return next(key for key, _ in txn.scan("texts", prefix) if key.endswith(record.key))


def _lie_in_value(
    table: Table, odd: bytes, txn: Transaction, prefix: bytes, record: StateRecord
) -> None:
    """In the first row of a table."""
    row = next(iter(txn.scan(table, b"" if table in ("meta", "namespaces") else prefix)), None)
    if row is not None:
        txn.put(table, row[0], odd)
    if table == "meta":
        txn.put(table, b"namespaces", odd)
    if table in ("entries", "records"):
        txn.put(table, prefix + record.key, odd)


def _add_key(
    table: Table, odd: bytes, txn: Transaction, prefix: bytes, record: StateRecord
) -> None:
    row = next(iter(txn.scan(table)), (bytes(20), b""))
    heads = [b""] if table in ("meta", "namespaces") else [prefix]
    if table in ("owners", "owned", "chunks"):
        heads += [prefix + record.key, row[0][:20]]
    for number, head in enumerate(heads):
        txn.put(table, head + odd, row[1])
        txn.put(table, head + odd + b"%d" % number, b"")


def _lie_in_entry(
    at: int, odd: bytes, txn: Transaction, prefix: bytes, record: StateRecord
) -> None:
    data = bytearray(txn.get("entries", prefix + record.key) or b"")[8:]
    for begin in range(at, min(at + 8, len(data)), len(odd)):
        data[begin : begin + len(odd)] = odd
    txn.put("entries", prefix + record.key, sealed(bytes(data)))


def _lie_in_chunks(
    at: int, size: int, odd: bytes, txn: Transaction, prefix: bytes, record: StateRecord
) -> None:
    """With the checksum of what they say; up to their end, where `size` is 0."""
    rows = list(txn.scan("chunks", prefix + record.key))
    for place, data in rows:
        value = bytearray(data)
        length = size or len(value) - at
        value[at : at + length] = (odd * length)[:length]
        digest = xxhash.xxh3_64(record.key + bytes(value[:32]))
        digest.update(bytes(value[48:]))
        value[32:40] = struct.pack("<Q", digest.intdigest())
        txn.put("chunks", place, value)


def _many_texts(txn: Transaction, prefix: bytes, record: StateRecord) -> None:
    row = _text_row(txn, prefix, record)
    for number in range(3000):
        txn.put("texts", row[:-16] + number.to_bytes(16, "big"), b"+")


def _whole_texts(txn: Transaction, prefix: bytes, record: StateRecord) -> None:
    part = _text_row(txn, prefix, record)[len(prefix) : -18]
    for length in range(1, len(part), 13):
        txn.put("texts", prefix + part[:length] + b"\0\1" + record.key, b"")


def _many_short_texts(txn: Transaction, prefix: bytes, record: StateRecord) -> None:
    _lie_in_json("counters", "sequence", b"30000", txn, prefix, record)
    for number in range(20_000):
        txn.put("anchors", prefix + struct.pack(">Q", 1000 + number), b"s%d" % number)


def hostile(count: int, seed: int) -> Outcome:
    """A store is whole and says what cannot be: `count` of the lies, or all, if it is 0."""
    every = lies()
    names = random.Random(seed).sample(sorted(every), count or len(every))
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        records = [a_record(number) for number in (0, 1, 2)]
        with StateStore.open(folder / "original") as store:
            store.name_model(ROOT, "toy", "several", "to have some of each")
            store.put_all([a_state(record, ["somebody"]) for record in records])
        data = (folder / "original" / "data.mdb").read_bytes()
        known = Known.of((records[0], records[2]), is_all=False)

        def work(number: int) -> Sight:
            path = folder / f"{number}"
            path.mkdir()
            (path / "data.mdb").write_bytes(data)
            with StateStore.open(path, durability="fast") as store, store._writing() as txn:
                every[names[number]](txn, store._rows.prefix, records[1])
            _limit_memory()
            sight = Sight()
            for read_only in (True, False):
                with opened(sight, path, read_only=read_only, durability="fast") as opening:
                    if opening is not None:
                        look(opening, known, sight)
                        _use(opening, records[1], sight)
            shutil.rmtree(path)
            return sight

        about = "[{}]".format
        outcome = Outcome("hostile content")
        return one_by_one(outcome, work, lambda n: about(names[n]), len(names), folder)


def _limit_memory() -> None:
    """For the rest of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = num_pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _use(store: StateStore, victim: StateRecord, sight: Sight) -> None:
    """Do with a store, and with the document that is lied about, whatever one can."""

    def values() -> None:
        with store.reading() as reader:
            for layer, chunk, shape in places(victim):
                with sight.step("value"):
                    value = reader.value(victim.key, layer, chunk)
                    codec.decode(shape, victim.key, layer, chunk, value)

    def evict() -> None:
        with StateStore.open(store.path, durability="fast", max_bytes=1 << 22) as small:
            for number in range(50, 56):
                small.put_all([a_state(a_record(number, tokens=3000, layout=0, chunk_tokens=500))])

    def open_another() -> None:
        StateStore.open(store.path, namespace="n", durability="fast").close()

    readings: dict[str, Callable[[], object]] = {
        "its records": lambda: [record.to_bytes() for record in store.find(victim.text)],
        "its text": lambda: find_texts(f"One.\n{victim.text}\nTwo.", [store]),
        "half its text": lambda: find_texts(f"One.\n{victim.text[:300]}", [store]),
        "short texts": lambda: find_texts("a\n1\n2\n3\nx" * 100, [store]),
        "its values": values,
        "its entry": lambda: store.entry(victim.key),
    }
    writings: dict[str, Callable[[], object]] = {
        "count_use": lambda: store.count_use([victim.key], misses=1),
        "flush_uses": store.flush_uses,
        "name_model": lambda: store.name_model(ROOT, "other"),
        "assign": lambda: store.assign("somebody", [victim.key]),
        "put_all": lambda: store.put_all([a_state(a_record(7))]),
        "put it again": lambda: store.put_all([a_state(victim)]),
        "delete": lambda: store.delete(victim.key),
        "repair": lambda: store.repair(store.verify()),
        "gc": store.gc,
        "delete_owner": lambda: store.delete_owner("somebody"),
        "another namespace": open_another,
        "eviction": evict,
        **_readings(store),
        "delete_namespace": lambda: store.delete_namespace("n"),
    }
    for name, use in {**readings, **({} if store.read_only else writings)}.items():
        with sight.step(name):
            use()
