"""`stats`, `verify` and `gc` on a real index, and what becomes of changed documents' states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import Run, assert_one_error_line
from fakes import save_tiny_model
from test_store import a_record, values
from test_store_compact import another_process

from hcache_rag import StateStore

TEXTS = {
    "a.txt": "Mercury is the smallest planet and the closest one to the Sun.",
    "b.txt": "Venus is the hottest planet because of its thick atmosphere.",
    "c.txt": "Earth is the only planet known to have life and liquid oceans.",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), chat=True))


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def index(run: Run, model: str, docs: Path, tmp_path: Path) -> Path:
    """A folder with an index of `docs`."""
    assert run("index", docs, "--store", tmp_path / "kept", "--model", model).code == 0
    return tmp_path / "kept"


def open_states(index: Path) -> StateStore:
    return StateStore.open(index / "states")


def texts_in(index: Path) -> set[str]:
    with open_states(index) as store:
        return {record.text for record in store.records() if not record.is_preamble}


def damage(index: Path, name: str) -> None:
    """Change one byte of a document's state in the file of the store."""
    with open_states(index) as store, store.reading() as reader:
        (record,) = store.find(TEXTS[name])
        value = bytes(reader.value(record.key, 1, 0))
    path = index / "states" / "data.mdb"
    content = bytearray(path.read_bytes())
    at = content.find(value)
    assert at > 0
    content[at + len(value) // 2] ^= 1
    path.write_bytes(content)


def as_json(run: Run, *arguments: Any) -> dict[str, Any]:
    outcome = run(*arguments, "--json")
    found: dict[str, Any] = json.loads(outcome.out)
    return {**found, "code": outcome.code}


def test_stats_count_what_is_there_and_how_it_is_used(run: Run, index: Path) -> None:
    run("ask", "Which planet is the hottest?", "--store", index, "--max-new-tokens", 2)
    found = as_json(run, "stats", "--store", index)
    assert (found["documents"], found["preambles"]) == (3, 1)
    assert (found["hits"], found["misses"], found["evictions"], found["damaged"]) == (3, 0, 0, 0)
    assert found["namespaces"] == ["default"]
    assert 0 < found["state_bytes"] <= found["used_bytes"] <= found["file_bytes"]
    assert found["free_bytes"] == found["file_bytes"] - found["used_bytes"]
    table = run("stats", "--store", index).out
    assert "100% of 3" in table


def test_verify_says_that_all_is_well(run: Run, index: Path) -> None:
    outcome = run("verify", "--store", index)
    assert outcome.code == 0
    assert "all is well" in outcome.out
    assert as_json(run, "verify", "--store", index)["states"] == 4


def test_verify_names_what_is_damaged_and_changes_nothing(run: Run, index: Path) -> None:
    damage(index, "b.txt")
    for _ in range(2):
        outcome = run("verify", "--store", index)
        assert outcome.code == 1
        assert TEXTS["b.txt"][:30] in outcome.out
        assert "fails its checksum" in outcome.out
    assert TEXTS["b.txt"] in texts_in(index)


def test_verify_repairs_by_reading_again(run: Run, index: Path) -> None:
    damage(index, "b.txt")
    found = as_json(run, "verify", "--repair", "--store", index)
    assert (found["code"], len(found["damaged"]), found["read_again"]) == (0, 1, 1)
    assert run("verify", "--store", index).code == 0
    assert texts_in(index) == set(TEXTS.values())


def test_verify_finds_what_belongs_to_nothing_and_sums_that_are_wrong(
    run: Run, index: Path
) -> None:
    with open_states(index) as store, store._writing() as txn:
        (record,) = store.find(TEXTS["a.txt"])
        txn.put("chunks", store._rows.prefix + bytes(16) + bytes(6), b"stray")
        txn.delete("totals", store._rows.prefix + record.root)
    found = as_json(run, "verify", "--store", index)
    assert (found["code"], found["strays"], found["is_sum_right"]) == (1, 1, False)
    assert "belong to no state" in run("verify", "--store", index).out
    assert run("verify", "--repair", "--store", index).code == 0
    assert as_json(run, "verify", "--store", index)["is_whole"]
    assert as_json(run, "stats", "--store", index)["documents"] == 3


@pytest.mark.parametrize("command", ["stats", "verify", "gc"])
def test_without_an_index_there_is_nothing_to_look_at(
    run: Run, tmp_path: Path, command: str
) -> None:
    assert_one_error_line(run(command, "--store", tmp_path / "none"), "holds no index")
    assert not (tmp_path / "none").exists()


def test_indexing_again_drops_the_states_of_documents_that_are_gone(
    run: Run, model: str, docs: Path, index: Path
) -> None:
    """Changed documents' too; what did not change is not read again."""
    (docs / "a.txt").unlink()
    (docs / "b.txt").write_text("Venus has no moon at all, and neither has Mercury, we think.")
    found = as_json(run, "index", docs, "--store", index, "--model", model)
    assert (found["stored"], found["reused"]) == (1, 1)
    assert texts_in(index) == {(docs / "b.txt").read_text(), TEXTS["c.txt"]}
    assert as_json(run, "gc", "--store", index)["deleted"] == 0


def test_a_text_of_two_documents_stays_until_both_are_gone(
    run: Run, model: str, docs: Path, index: Path
) -> None:
    (docs / "twin.txt").write_text(TEXTS["a.txt"])
    run("index", docs, "--store", index, "--model", model)
    (docs / "a.txt").unlink()
    run("index", docs, "--store", index, "--model", model)
    assert TEXTS["a.txt"] in texts_in(index)
    (docs / "twin.txt").unlink()
    run("index", docs, "--store", index, "--model", model)
    assert TEXTS["a.txt"] not in texts_in(index)


def test_gc_deletes_what_the_index_does_not_hold(run: Run, index: Path) -> None:
    """Such as the states of a program that used the same folder."""
    with open_states(index) as store:
        (record,) = store.find(TEXTS["a.txt"])
        assert store.delete(record.key)
        store.put(a_record(1), values(1))
    found = as_json(run, "gc", "--store", index)
    assert (found["code"], found["deleted"]) == (0, 1)
    assert texts_in(index) == {TEXTS["b.txt"], TEXTS["c.txt"]}
    assert "0 state(s) deleted" in run("gc", "--store", index).out


def test_gc_gives_the_disk_what_is_free(run: Run, index: Path) -> None:
    """As much as the file gets smaller, and what is left is whole."""
    with open_states(index) as store:
        store.put(a_record(1), values(1, 900_000))
        before = store.file_bytes()
    found = as_json(run, "gc", "--store", index, "--compact")
    with open_states(index) as store:
        assert found["returned_bytes"] == before - store.file_bytes() > 900_000
    assert run("verify", "--store", index).code == 0
    assert "given back to the disk" in run("gc", "--store", index, "--compact").out


def test_gc_says_what_it_deleted_where_compacting_is_refused(run: Run, index: Path) -> None:
    """Somebody else has the store open."""
    with open_states(index) as store:
        store.put(a_record(1), values(1))
    with another_process(index / "states"):
        found = run("gc", "--store", index, "--compact")
    assert found.code == 1
    assert "1 state(s) deleted" in found.out
    assert "not compacted: another process has" in found.complaints[-1]
