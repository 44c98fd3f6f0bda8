"""Encryption at rest: nothing can be read on disk, or used without the key."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from test_store import a_record, stored, values

from hcache_rag.errors import DamagedStateError, StoreError, StoreOpenError
from hcache_rag.store import StateStore
from hcache_rag.store.cipher import Cipher
from hcache_rag.texts import find_texts

KEY, OTHER = bytes(range(32)), bytes(32)
TEXT = a_record(1).text


def open_store(path: Path, key: bytes | None = KEY, namespace: str = "default") -> StateStore:
    return StateStore.open(path, key=key, namespace=namespace)


def test_what_is_stored_with_a_key_is_found_with_it(tmp_path: Path) -> None:
    """Values, records, texts in prompts, owners; also by a second opening."""
    with open_store(tmp_path) as store:
        assert store.put(a_record(1), values(1), owners=["a"]) == 6 * 4998
        for _ in range(2):
            assert stored(store, a_record(1).key) == list(values(1))
            assert [r.text for r in store.find(TEXT)] == [TEXT]
            assert [m.text for m in find_texts(f"Read:\n{TEXT}\n", [store])] == [TEXT]
            assert store.keys_of("a") == [a_record(1).key]
            store.close()
            store = open_store(tmp_path)
        report = store.verify()
        assert (report.strays, report.is_sum_right) == (0, True)
        store.close()


def test_what_others_store_is_found_in_prompts_too(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, open_store(tmp_path) as other:
        assert find_texts(TEXT, [store]) == []
        other.put(a_record(1), values(1))
        assert [m.text for m in find_texts(TEXT, [store])] == [TEXT]


def test_nothing_that_is_on_disk_can_be_read(tmp_path: Path) -> None:
    """Neither a text, nor a value, nor an owner's name; without a key all but the name can."""
    marker = b"\x05\x00\x01" * 30
    with open_store(tmp_path / "sealed") as store, StateStore.open(tmp_path / "open") as plain:
        for each in (store, plain):
            each.put(a_record(5), values(5), owners=["an owner's name"])
    sealed, opened = ((tmp_path / p / "data.mdb").read_bytes() for p in ("sealed", "open"))
    text = a_record(5).text.encode()
    assert (text in opened, marker in opened) == (True, True)
    assert (text in sealed, marker in sealed) == (False, False)
    assert b"an owner's name" not in sealed
    assert KEY not in sealed
    assert KEY.hex().encode() not in sealed


def test_one_value_is_never_sealed_alike_twice(tmp_path: Path) -> None:
    """Each has a nonce of its own."""
    cipher = Cipher(KEY)
    assert cipher.seal(b"x", b"place") != cipher.seal(b"x", b"place")


@pytest.mark.parametrize("key", [OTHER, None])
def test_with_another_key_or_none_everything_is_a_miss(
    tmp_path: Path, key: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    """Said when opening; what is stored stays and is found with its key again."""
    with open_store(tmp_path) as store:
        store.put(a_record(1), values(1))
    with caplog.at_level(logging.WARNING), open_store(tmp_path, key) as store:
        (warning,) = [r.getMessage() for r in caplog.records if r.name == "hcache_rag"]
        assert "made with another key, or with none" in warning
        assert KEY.hex() not in warning
        assert store.record(a_record(1).key) is None
        assert list(store.records()) == store.find(TEXT) == []
        assert find_texts(TEXT, [store]) == []
        assert stored(store, a_record(1).key) == []
        assert store.stats().documents == 0
        with pytest.raises(StoreError, match="another key"):
            store.put(a_record(2), values(2))
    with open_store(tmp_path) as store:
        assert stored(store, a_record(1).key) == list(values(1))


def test_a_key_does_not_fit_a_namespace_without_one(tmp_path: Path) -> None:
    """What is not encrypted does not become so by a key."""
    with open_store(tmp_path, None) as store:
        store.put(a_record(1), values(1))
    with open_store(tmp_path) as store:
        assert list(store.records()) == []
        with pytest.raises(StoreError, match="another key, or with none"):
            store.put(a_record(2), values(2))


def test_namespaces_have_keys_of_their_own(tmp_path: Path) -> None:
    with (
        open_store(tmp_path, KEY, "one") as one,
        open_store(tmp_path, OTHER, "other") as other,
        open_store(tmp_path, None, "plain") as plain,
    ):
        for number, store in enumerate((one, other, plain)):
            store.put(a_record(number), values(number))
        for number, store in enumerate((one, other, plain)):
            assert [r.key for r in store.records()] == [a_record(number).key]
            assert stored(store, a_record(number).key) == list(values(number))


def test_a_value_in_another_s_place_is_damaged(tmp_path: Path) -> None:
    """Each is sealed for its place: whole, with the right key, and yet not that value."""
    with open_store(tmp_path) as store:
        store.put(a_record(1), values(1))
        with store._writing() as txn:
            rows = list(txn.scan("chunks", store._rows.prefix))
            txn.put("chunks", rows[0][0], rows[1][1])
        with store.reading() as reader, pytest.raises(DamagedStateError) as caught:
            reader.value(a_record(1).key, 0, 0)
        assert "cannot be decrypted" in str(caught.value)


def test_states_of_a_namespace_without_its_key_can_be_evicted(tmp_path: Path) -> None:
    """By a store that has another key, or none: room is everybody's."""
    with open_store(tmp_path, KEY, "sealed") as sealed:
        for number in range(8):
            sealed.put(a_record(number), values(number, 20_000))
    with StateStore.open(tmp_path, namespace="plain", max_bytes=4 << 20) as plain:
        for number in range(20, 40):
            plain.put(a_record(number), values(number, 20_000))
        assert plain.used_bytes() <= 4 << 20
    with open_store(tmp_path, KEY, "sealed") as sealed:
        left = list(sealed.records())
        assert len(left) < 8
        assert sealed.stats().documents == len(left)
        report = sealed.verify()
        assert (report.strays, report.is_sum_right) == (0, True)
        assert len(find_texts("\n".join(a_record(n).text for n in range(8)), [sealed])) == len(left)


@pytest.mark.parametrize("content", [KEY, KEY.hex().encode(), KEY.hex().encode() + b"\n"])
def test_a_key_may_lie_in_a_file_or_come_from_a_callback(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    checks = {Cipher(source).check for source in (KEY, path, str(path), lambda: KEY)}
    assert checks == {Cipher(KEY).check}
    assert Cipher(OTHER).check not in checks


@pytest.mark.parametrize("key", [b"", b"short", bytes(33), "no/such/file"])
def test_what_is_no_key_is_refused(tmp_path: Path, key: bytes | str) -> None:
    with pytest.raises(StoreOpenError, match="key"):
        StateStore.open(tmp_path / "store", key=key)


def test_a_file_that_holds_no_key_is_named_but_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("not a key, but a secret")
    with pytest.raises(StoreOpenError) as caught:
        Cipher(path)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_without_cryptography_it_is_said_what_to_install() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from hcache_rag.store.cipher import Cipher\n"
        "from hcache_rag import StoreOpenError\n"
        "try:\n    Cipher(bytes(32))\n"
        "except StoreOpenError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hcache-rag[encryption]" in done.stdout


def test_a_store_in_memory_can_be_sealed_too() -> None:
    store = StateStore.in_memory(key=KEY)
    store.put(a_record(1), values(1))
    assert stored(store, a_record(1).key) == list(values(1))
    without = StateStore.in_memory(beside=store)
    assert without.find(TEXT) == []
