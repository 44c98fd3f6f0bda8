"""A store that an early commit of format 1 has written stays readable, bit for bit.

tests/data/store-v1.mdb.gz was made by tests/data/make_store_v1.py with commit ff4051f, and is never
made anew: a test that fails here tells of a changed format, which needs another number. The second
half of the tests reads the file with `lmdb`, `struct` and `json` alone, as docs/design.md has it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
import xxhash
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from data.make_store_v1 import (
    COUNTED,
    FILE,
    GONE,
    KEY,
    MAX_BYTES,
    NAMED,
    NAMESPACE_MAX_BYTES,
    OTHER_ROOT,
    PLAIN,
    ROOT,
    SEALED,
    Stored,
)

from hcache_rag import codec
from hcache_rag.errors import DamagedStateError, StoreError, StoreOpenError
from hcache_rag.state import StateKey
from hcache_rag.store import StateStore, StoredModel
from hcache_rag.store.tables import Counters, Totals
from hcache_rag.texts import find_texts

TABLES = {
    *("meta", "namespaces", "records", "entries", "chunks", "texts", "anchors"),
    *("owners", "owned", "totals", "models"),
}
NUMBERS = {"default": struct.pack(">I", 1), "sealed": struct.pack(">I", 2)}
"""What the keys of each namespace begin with."""
STATES = {"default": PLAIN, "sealed": SEALED}
NAMES = {each.name: each for each in (*PLAIN, *SEALED)}
namespaces = pytest.mark.parametrize("namespace", STATES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file as somebody has kept it, in a folder of its own."""
    (tmp_path / "data.mdb").write_bytes(gzip.decompress(FILE.read_bytes()))
    return tmp_path


def open_store(path: Path, namespace: str = "default", **more: Any) -> StateStore:
    """A namespace: the one that one gets without asking, or the other with its key."""
    asked: dict[str, Any] = {} if namespace == "default" else {"namespace": namespace, "key": KEY}
    return StateStore.open(path, **{**asked, **more})


def is_value(each: Stored, layer: int, chunk: int, shape: codec.ChunkShape, value: Any) -> bool:
    """Whether a value's arrays are those that were written."""
    arrays = codec.decode(shape, each.record.key, layer, chunk, value)
    return all(
        array.tobytes() == each.array(layer, chunk, part, array.nbytes)
        for part, array in enumerate(arrays)
    )


# --- read by the library ------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
@namespaces
def test_every_record_is_what_was_written(namespace: str, read_only: bool, path: Path) -> None:
    """Key, parent, root, token ids, text, layout, time and kind; no others are there."""
    with open_store(path, namespace, read_only=read_only) as store:
        found = {record.key: record for record in store.records()}
        assert len(found) == len(STATES[namespace])
        for each in STATES[namespace]:
            record = found[each.record.key]
            assert (record.parent, record.root) == (each.parent, each.root)
            assert record.token_ids.tolist() == each.token_ids()
            assert len(each.token_ids()) == each.tokens
            assert record.text == each.text
            assert record.layout.layers == each.formats()
            assert record.layout.chunk_tokens == 16
            assert (record.created_s, record.is_preamble) == (each.created_s, each.is_preamble)
        assert GONE.record.key not in store


@namespaces
def test_every_value_is_what_was_written(namespace: str, path: Path) -> None:
    """Every bit of every array, of every form that a layer can be kept in."""
    with open_store(path, namespace) as store, store.reading() as reader:
        for each in STATES[namespace]:
            for layer, chunk, shape in each.places():
                value = reader.value(each.record.key, layer, chunk)
                assert is_value(each, layer, chunk, shape, value), (each.name, layer, chunk)


@namespaces
def test_everything_is_whole(namespace: str, path: Path) -> None:
    """`verify` looks at all states and all values."""
    places = [place for each in STATES[namespace] for place in each.places()]
    with open_store(path, namespace) as store:
        report = store.verify()
    assert report.is_whole
    assert (report.states, report.values) == (len(STATES[namespace]), len(places))
    assert report.num_bytes == sum(48 + shape.payload_bytes for _, _, shape in places)


@namespaces
def test_texts_are_found(namespace: str, path: Path) -> None:
    """By themselves and in a prompt; two models' states of one text both."""
    states = [each for each in STATES[namespace] if not each.is_preamble]
    with open_store(path, namespace) as store:
        for each in states:
            alike = {other.record.key for other in states if other.text == each.text}
            assert {record.key for record in store.find(each.text)} == alike
        prompt = "\n".join(each.text for each in states)
        assert [match.text for match in find_texts(prompt, [store])] == [s.text for s in states]
        assert find_texts(f"{GONE.text}\n", [store]) == []


@namespaces
def test_owners_uses_and_counters_are_what_they_were(namespace: str, path: Path) -> None:
    states = STATES[namespace]
    with open_store(path, namespace) as store:
        for owner in ("a.md", "größe.md"):
            keys = {each.record.key for each in states if owner in each.owners}
            assert set(store.keys_of(owner)) == keys
        for each in states:
            entry = store.entry(each.record.key)
            assert entry is not None
            assert (entry.hits, entry.used_s > 0) == (each.hits, each.hits > 0)
            assert (entry.num_tokens, entry.is_preamble) == (each.tokens, each.is_preamble)
            assert (entry.root, entry.created_s) == (each.root, each.created_s)
            assert entry.saved_s == each.saved_s
            assert entry.priority == (1 + each.hits) * each.saved_s / entry.num_bytes
        counted = COUNTED if namespace == "default" else {}
        hits, sequence = sum(each.hits for each in states), len(states) + 1  # and one is gone
        assert store.counters() == Counters(sequence=sequence, hits=hits, **counted)


def test_models_sums_and_limits_are_what_they_were(path: Path) -> None:
    with open_store(path) as store, open_store(path, "sealed") as sealed:
        assert store.namespaces() == ["default", "sealed"]
        assert store.max_bytes == sealed.max_bytes == MAX_BYTES
        assert store._session._its.max_bytes == NAMESPACE_MAX_BYTES
        assert sealed._session._its.max_bytes is None
        assert store.models() == {ROOT: StoredModel(*NAMED)}
        assert sealed.models() == {}
        num_bytes = {key: entry.num_bytes for key, entry in store.entries()}
        for root in (ROOT, OTHER_ROOT):
            states = [each for each in PLAIN if each.root == root]
            assert store.totals()[root] == Totals(
                documents=sum(not each.is_preamble for each in states),
                preambles=sum(each.is_preamble for each in states),
                num_tokens=sum(each.tokens for each in states),
                num_bytes=sum(num_bytes[each.record.key] for each in states),
            )


@pytest.mark.parametrize("key", [None, bytes(32)], ids=["none", "another"])
def test_without_its_key_nothing_of_a_namespace_is_found(key: bytes | None, path: Path) -> None:
    """Nothing can be written to it either; with the key, all of it is still there."""
    with open_store(path, "sealed", key=key) as store:
        assert list(store.records()) == store.find(SEALED[0].text) == []
        assert store.keys_of("a.md") == []
        assert find_texts(SEALED[0].text, [store]) == []
        assert store.verify().states == 0
        with pytest.raises(StoreError, match="another key"):
            store.put_all([GONE.state()])
    with open_store(path, "sealed") as store:
        assert store.verify().states == len(SEALED)


def test_reading_leaves_the_file_as_it_is(path: Path) -> None:
    before = (path / "data.mdb").read_bytes()
    with open_store(path, read_only=True) as store:
        assert store.verify().is_whole
    assert (path / "data.mdb").read_bytes() == before


@namespaces
def test_it_can_be_written_on(namespace: str, path: Path) -> None:
    """A new state, one in another one's place, one that is deleted; the others stay."""
    gone, changed, *rest = (
        STATES[namespace][1:] if namespace == "default" else (SEALED[0], SEALED[1])
    )
    changed = replace(changed, layers=("kv int8", "kv float16", "hidden int8-smooth"))
    with open_store(path, namespace) as store:
        store.put_all([GONE.state(), changed.state()])
        assert store.delete(gone.record.key)
    with open_store(path, namespace) as store:
        with store.reading() as reader:
            for each in (GONE, changed, *rest):
                for layer, chunk, shape in each.places():
                    value = reader.value(each.record.key, layer, chunk)
                    assert is_value(each, layer, chunk, shape, value)
        assert gone.record.key not in store
        assert store.verify().is_whole
        entry = store.entry(GONE.record.key)
        assert entry is not None
        assert entry.sequence == len(STATES[namespace]) + 1


# --- read without the library -------------------------------------------------------------------


@contextmanager
def tables(path: Path, *, write: bool = False) -> Iterator[dict[str, dict[bytes, bytes]]]:
    """Everything in the file, by table; with `write`, what the block changes is written."""
    with lmdb.open(str(path), max_dbs=16, readonly=not write) as env:
        databases = {name: env.open_db(name.encode(), create=False) for name in TABLES}
        with env.begin() as txn:
            found = {name: dict(txn.cursor(db)) for name, db in databases.items()}
        before = {name: dict(rows) for name, rows in found.items()}
        yield found
        if write:
            with env.begin(write=True) as txn:
                for name, db in databases.items():
                    for key, value in found[name].items():
                        if before[name].get(key) != value:
                            txn.put(key, value, db=db)


def sealed_json(value: bytes) -> Any:
    """A small value: a checksum, then JSON."""
    assert xxhash.xxh3_64_digest(value[8:]) == value[:8]
    return json.loads(value[8:])


def opened(sealed: bytes, place: bytes) -> bytes:
    """A record or value of the encrypted namespace: nonce, ciphertext and tag."""
    key = hashlib.blake2b(b"values", digest_size=32, key=KEY, person=b"hcache-rag").digest()
    data: bytes = AESGCM(key).decrypt(sealed[:12], sealed[12:], place)
    return data


def digest(data: bytes, size: int = 16, **more: Any) -> bytes:
    return hashlib.blake2b(data, digest_size=size, **more).digest()


def key_of(each: Stored) -> StateKey:
    """A hash of the parent's key and the token ids."""
    return digest(each.parent + struct.pack(f"<{each.tokens}I", *each.token_ids()))


def test_the_tables_are_these_and_no_others(path: Path) -> None:
    with lmdb.open(str(path), max_dbs=16, readonly=True) as env, env.begin() as txn:
        assert {name.decode() for name, _ in txn.cursor()} == TABLES


def test_a_root_is_a_hash_of_both_fingerprints_and_the_format() -> None:
    assert digest(b"hcache-rag/1\0model\0tokenizer") == ROOT
    assert digest(b"hcache-rag/1\0other model\0tokenizer") == OTHER_ROOT
    assert ROOT.hex() == "1ad8224f14c5c0b40d165e1a53e224b8"


def test_the_store_describes_itself_and_its_namespaces(path: Path) -> None:
    with tables(path) as found:
        description = json.loads(found["meta"][b"store"])
        assert found["meta"].keys() == {b"store", b"namespaces"}
        assert found["meta"][b"namespaces"] == b"2"
        known = {name: sealed_json(value) for name, value in found["namespaces"].items()}
    assert len(bytes.fromhex(description.pop("id"))) == 16
    assert description == {"format": 1, "max_bytes": MAX_BYTES}
    derived = digest(b"check", 32, key=KEY, person=b"hcache-rag").hex()
    assert known == {
        b"default": {"number": 1, "max_bytes": NAMESPACE_MAX_BYTES, "key_check": None},
        b"sealed": {"number": 2, "max_bytes": None, "key_check": derived},
    }


HEADERS = {
    # magic    version repr dtype layer tokens chunk heads width, bytes of the payload
    ("1", 0, 0): "48435331 0100 02 01 0000 1000 00000000 02000000 08000000 0008000000000000",
    ("3", 2, 1): "48435331 0100 02 04 0200 0100 01000000 02000000 08000000 6800000000000000",
    ("5", 1, 0): "48435331 0100 01 05 0100 0900 00000000 00000000 20000000 6801000000000000",
    ("5", 2, 0): "48435331 0100 02 03 0200 0900 00000000 02000000 08000000 4002000000000000",
    ("4", 2, 0): "48435331 0100 01 02 0200 0700 00000000 00000000 20000000 dc01000000000000",
    ("s1", 0, 1): "48435331 0100 01 06 0000 0100 01000000 00000000 20000000 a800000000000000",
}
ARRAYS = {
    ("1", 0, 0): (1024, 1024),  # K, V: 2 heads, 16 tokens, 8 channels of four bytes
    ("3", 2, 1): (16, 16, 64, 8),  # in one byte, and scales of 2 x 8 channels, of 2 x 1 tokens
    ("5", 1, 0): (288, 36, 36),  # rows of 32, 1 / rms, and a scale for each (not yet 64) channels
    ("5", 2, 0): (288, 288),
    ("4", 2, 0): (448, 28),
    ("s1", 0, 1): (32, 4, 4, 128),  # rows, 1 / rms, scales of rows, scales of channels
}


@pytest.mark.parametrize(("name", "layer", "chunk"), HEADERS)
def test_a_value_is_a_header_and_its_arrays(name: str, layer: int, chunk: int, path: Path) -> None:
    """48 bytes, field by field, then one array after another."""
    each, namespace = NAMES[name], "sealed" if name.startswith("s") else "default"
    place = NUMBERS[namespace] + key_of(each) + struct.pack(">HI", layer, chunk)
    with tables(path) as found:
        value = found["chunks"][place]
    if namespace == "sealed":
        value = opened(value, place)
    header, payload = value[:32], value[48:]
    assert header == bytes.fromhex(HEADERS[name, layer, chunk])
    checksum = xxhash.xxh3_64_intdigest(key_of(each) + header + payload)
    assert value[32:48] == struct.pack("<QQ", checksum, 0)
    arrays = [each.array(layer, chunk, i, n) for i, n in enumerate(ARRAYS[name, layer, chunk])]
    assert payload == b"".join(arrays)
    magic, version, kind, dtype, its_layer, tokens, its_chunk, heads, width, size = struct.unpack(
        "<4sHBBHHIIIQ", header
    )
    assert (magic, version, its_layer, its_chunk, size) == (b"HCS1", 1, layer, chunk, len(payload))
    assert tokens == min(16, each.tokens - 16 * chunk)
    representation, _, stored_as = each.layers[layer].partition(" ")
    assert kind == {"hidden": 1, "kv": 2}[representation]
    dtypes = ["float32", "bfloat16", "float16", "int8", "int8-g64", "int8-smooth"]
    assert dtypes[dtype - 1] == stored_as
    assert (heads, width) == ((0, 32) if kind == 1 else (2, 8))


@pytest.mark.parametrize("each", NAMES.values(), ids=NAMES)
def test_a_record_is_json_token_ids_and_a_hash(each: Stored, path: Path) -> None:
    namespace = "sealed" if each in SEALED else "default"
    place = NUMBERS[namespace] + key_of(each)
    with tables(path) as found:
        data = found["records"][place]
    if namespace == "sealed":
        data = opened(data, place)
    head, _, rest = data.partition(b"\n")
    assert rest[:-16] == struct.pack(f"<{each.tokens}I", *each.token_ids())
    assert rest[-16:] == digest(key_of(each) + data[:-16])
    layout = json.loads(head)["layout"]
    runs = [tuple(run) for run in layout["runs"]]
    kept = [f"{kind} {dtype}".strip() for kind, dtype, count in runs for _ in range(count)]
    assert (kept, layout["chunk_tokens"]) == ([*each.layers], 16)
    assert json.loads(head) == {
        "version": 1,
        "parent": each.parent.hex(),
        "root": each.root.hex(),
        "text": each.text,
        "layout": layout,
        "created_s": each.created_s,
        "is_preamble": each.is_preamble,
    }


def test_what_else_is_known_of_a_state_is_a_struct(path: Path) -> None:
    """Number, bytes, tokens, kind, root, three times, hits, priority, and the text's part."""
    each = NAMES["1"]
    with tables(path) as found:
        value = found["entries"][NUMBERS["default"] + key_of(each)]
    assert xxhash.xxh3_64_digest(value[8:]) == value[:8]
    size = struct.calcsize("<QQI?16sdddId")
    sequence, num_bytes, tokens, is_preamble, root, saved_s, created_s, used_s, hits, priority = (
        struct.unpack("<QQI?16sdddId", value[8 : 8 + size])
    )
    assert (sequence, tokens, is_preamble, root) == (2, each.tokens, False, ROOT)
    assert num_bytes > sum(48 + shape.payload_bytes for _, _, shape in each.places())
    assert (saved_s, created_s, hits) == (each.saved_s, each.created_s, each.hits)
    assert priority == 3 * saved_s / num_bytes
    assert math.isfinite(used_s)
    assert value[8 + size :] == each.text.encode()[:480]


def hashed(name: str) -> bytes:
    """What stands for a text or an owner in keys of the encrypted namespace."""
    names = digest(b"names", 32, key=KEY, person=b"hcache-rag")
    return digest(name.encode(), 32, key=names)


def test_texts_stand_in_their_order_or_hashed(path: Path) -> None:
    """Their first 480 bytes, a zero as two bytes, and whether that is all; then the state's key."""
    expected = {NUMBERS["sealed"] + hashed(s.text) + b"\0\1" + key_of(s): b"+" for s in SEALED}
    for each in PLAIN[1:]:
        encoded = each.text.encode("utf-8", "surrogatepass").replace(b"\0", b"\0\xff")
        row_key = NUMBERS["default"] + encoded[:480] + b"\0\1" + key_of(each)
        expected[row_key] = b"" if len(encoded) < 480 else b"+"
    with tables(path) as found:
        assert found["texts"] == expected
        lines = found["anchors"]
    plain = [lines[NUMBERS["default"] + struct.pack(">Q", 1 + i)] for i in range(1, len(PLAIN))]
    assert [value[:1] for value in plain] == [b"a", b"a", b"s", b"a", b"a", b"s", b"s"]
    assert {len(value) for value in plain if value[:1] == b"a"} == {9}
    assert plain[2] == b"sA short text."
    sealed = [lines[NUMBERS["sealed"] + struct.pack(">Q", 1 + i)] for i in range(len(SEALED))]
    assert sealed == [b"k" + key_of(each) for each in SEALED]
    assert len(lines) == len(plain) + len(sealed)


def test_owners_and_states_stand_in_two_tables(path: Path) -> None:
    """From owners to states, and back."""
    pairs = [(digest(o.encode()), NUMBERS["default"], key_of(s)) for s in PLAIN for o in s.owners]
    pairs += [(hashed(o)[:16], NUMBERS["sealed"], key_of(s)) for s in SEALED for o in s.owners]
    with tables(path) as found:
        assert found["owners"] == {number + owner + key: b"" for owner, number, key in pairs}
        assert found["owned"] == {number + key + owner: b"" for owner, number, key in pairs}


def test_models_sums_and_counters_are_json(path: Path) -> None:
    plain, sealed = NUMBERS["default"], NUMBERS["sealed"]
    with tables(path) as found:
        models = {key: json.loads(value) for key, value in found["models"].items()}
        totals = {key: sealed_json(value) for key, value in found["totals"].items()}
    assert models == {plain + ROOT: dict(zip(("name", "layout", "reason"), NAMED, strict=True))}
    roots = {plain + ROOT, plain + OTHER_ROOT, sealed + ROOT}
    assert totals.keys() == {plain, sealed, *roots}
    zeros = {"evictions": 0, "evicted_bytes": 0, "clock": 0.0}
    assert totals[plain] == {"sequence": 9, "hits": 6, **COUNTED, **zeros}
    sums = totals[plain + OTHER_ROOT]
    assert sums.pop("num_bytes") > 0
    assert sums == {"documents": 1, "preambles": 0, "num_tokens": NAMES["7"].tokens}


# --- what is of another format ------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_store_of_another_format_is_refused(version: object, read_only: bool, path: Path) -> None:
    """It says which format it has and which one is read; nothing is changed."""
    with tables(path, write=True) as found:
        description = json.loads(found["meta"][b"store"])
        found["meta"][b"store"] = json.dumps({**description, "format": version}).encode()
    before = (path / "data.mdb").read_bytes()
    expected = f"has store format {version}, this release reads format 1"
    with pytest.raises(StoreOpenError, match=expected) as caught:
        open_store(path, read_only=read_only)
    assert str(path) in str(caught.value)
    assert (path / "data.mdb").read_bytes() == before


def test_a_record_of_another_version_is_a_miss(path: Path) -> None:
    """Whole, and yet not read; found by `verify`; the others are as they were."""
    each = NAMES["3"]
    with tables(path, write=True) as found:
        place = NUMBERS["default"] + key_of(each)
        data = found["records"][place][:-16].replace(b'"version": 1,', b'"version": 2,')
        found["records"][place] = data + digest(key_of(each) + data)
    with open_store(path) as store:
        assert store.record(each.record.key) is None
        assert each.record.key not in store
        assert [record.root for record in store.find(each.text)] == [NAMES["6"].root]
        assert len(list(store.records())) == len(PLAIN) - 1
        (damage,) = store.verify().damaged
        assert damage.key == each.record.key


def test_a_value_of_another_version_is_damaged(path: Path) -> None:
    """Its checksum is right."""
    each = NAMES["1"]
    layer, chunk, shape = next(each.places())
    with tables(path, write=True) as found:
        place = NUMBERS["default"] + key_of(each) + struct.pack(">HI", layer, chunk)
        value = found["chunks"][place]
        header = value[:4] + struct.pack("<H", 2) + value[6:32]
        checksum = xxhash.xxh3_64_intdigest(key_of(each) + header + value[48:])
        found["chunks"][place] = header + struct.pack("<QQ", checksum, 0) + value[48:]
    with open_store(path) as store:
        with store.reading() as reader, pytest.raises(DamagedStateError, match="header"):
            is_value(each, layer, chunk, shape, reader.value(each.record.key, layer, chunk))
        (damage,) = store.verify().damaged
        assert (damage.key, damage.text) == (each.record.key, each.text)
