"""The offline job: a folder of files to a state store, without a retriever."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import PRINTABLE, save_mamba, save_tiny_model
from llama_index.core.schema import TextNode

from hcache_indexers.job import node_documents
from hcache_indexers.local import index_states, main
from hcache_indexers.workers import Worker, worker_of
from hcache_rag import ModelNotFoundError, SourceError, StateStore, StoreOpenError
from hcache_rag.corpus import Document
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.llama_index import HCacheLLM
from hcache_rag.llama_index.folder import collect_garbage, open_states
from hcache_rag.state import StateRecord
from hcache_rag.store.manifest import Manifest

TEXTS = {
    "a.txt": "The first of three documents, on its own line.",
    "b.txt": "The second of three documents, a little longer than the first.\n",
    "sub/c.txt": "  The third of three documents, with space around it.  ",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "docs", TEXTS)


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def documents(states: Path) -> list[StateRecord]:
    with StateStore.open(states, read_only=True) as store:
        return [record for record in store.records() if not record.is_preamble]


def run(arguments: Sequence[str | Path]) -> object:
    """The exit status of the command line: what `sys.exit` was called with, or None."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code
    return None


def test_every_file_is_one_document(model: Path, folder: Path, tmp_path: Path) -> None:
    report = index_states(folder, tmp_path / "states", model=str(model))
    assert (report.stored, report.reused, report.skipped) == (3, 0, ())
    records = documents(tmp_path / "states")
    assert sorted(r.text for r in records) == sorted(t.strip() for t in TEXTS.values())
    assert report.stored_tokens == sum(r.num_tokens for r in records)


def test_the_second_run_reads_nothing_and_a_new_file_alone(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    states = tmp_path / "states"
    index_states(folder, states, model=str(model))
    report = index_states(folder, states, model=str(model))
    assert (report.stored, report.reused, report.stored_tokens) == (0, 3, 0)
    write(folder, {"new.txt": "A fourth document has come."})
    report = index_states(folder, states, model=str(model))
    assert (report.stored, report.reused) == (1, 3)


def test_an_llm_on_the_folder_restores_what_the_job_stored(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    index_states(folder, tmp_path / "states", model=str(model))
    llm = HCacheLLM(model, store=tmp_path / "states", max_new_tokens=4, generate_kwargs=PRINTABLE)
    text = TEXTS["a.txt"]
    answer = llm.complete(f"{llm.preamble}{text}\n\nWhat is it?")
    account = answer.additional_kwargs["hcache"]
    assert account["exact_tokens"] == len(llm.preamble) + len(text)
    llm.close()


def test_the_store_is_closed_when_the_job_ends(model: Path, folder: Path, tmp_path: Path) -> None:
    """An environment that is still open for writing could not be opened for reading only."""
    index_states(folder, tmp_path / "states", model=str(model))
    with StateStore.open(tmp_path / "states", read_only=True) as store:
        assert store.read_only
        with pytest.raises(StoreOpenError, match="read-only"):
            StateStore.open(tmp_path / "states")


def test_main_says_what_it_did(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[str | Path] = [folder, "--states", tmp_path / "states", "--model", model]
    assert run(arguments) is None
    assert capsys.readouterr().out == "3 stored, 0 were there already, 0 skipped\n"
    assert run(arguments) is None
    assert capsys.readouterr().out == "0 stored, 3 were there already, 0 skipped\n"


def test_a_file_of_json_lines_needs_no_shards(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its text may stand in any column, and the model be loaded as either dtype."""
    rows = [{"body": "Mars is red."}, {"body": ""}, {"body": "Venus is hot."}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    states = tmp_path / "states"
    its: list[str | Path] = [tmp_path / "rows.jsonl", "--states", states, "--model", model]
    assert run([*its, "--text-column", "body", "--dtype", "bfloat16"]) is None
    captured = capsys.readouterr()
    assert captured.out == "2 stored, 0 were there already, 1 skipped\n"
    assert "rows.jsonl:2" in captured.err
    assert "Loading weights" not in captured.err
    assert {record.text for record in documents(states)} == {"Mars is red.", "Venus is hot."}
    with HCacheLLM(str(model), dtype="bfloat16", store=states) as llm:
        assert llm.engine.precompute(["Mars is red."]).reused == 1
    with HCacheLLM(str(model), dtype="float32", store=states) as llm:
        assert llm.engine.precompute(["Mars is red."]).reused == 0


def test_stats_and_gc_take_the_folder_that_the_job_filled(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    index_states(folder, tmp_path / "states", model=str(model))
    with open_states(tmp_path / "states") as states:
        assert states.stats().documents == 3
    assert collect_garbage(tmp_path / "states", compact=True).deleted == 0
    with open_states(tmp_path / "states") as states:
        assert states.stats().documents == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--publish"], "--publish goes with --shards"),
        (["--unit-documents", "5"], "--unit-documents goes with --shards"),
        (["--shards", "0"], "invalid positive number value: '0'"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    expected: str,
) -> None:
    assert run([folder, "--states", tmp_path / "states", *options]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "states").exists()


def test_main_counts_the_files_that_it_passed_over(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert run([folder, "--states", tmp_path / "states", "--model", model]) is None
    captured = capsys.readouterr()
    assert "3 stored, 0 were there already, 1 skipped" in captured.out
    assert "picture.png" in captured.err + captured.out


@pytest.mark.parametrize("case", ["folder", "model", "family", "states"])
def test_main_says_what_is_wrong_in_one_line(
    case: str, model: Path, folder: Path, tmp_path: Path
) -> None:
    states = tmp_path / "states"
    arguments: dict[str, list[str | Path]] = {
        "folder": [tmp_path / "missing", "--states", states, "--model", model],
        "model": [folder, "--states", states, "--model", folder],
        "family": [folder, "--states", states, "--model", save_mamba(tmp_path / "mamba")],
        "states": [folder, "--states", folder / "a.txt", "--model", model],
    }
    expected = {
        "folder": f"error: {tmp_path / 'missing'}: no such folder",
        "model": f"error: {folder} is not a model: ",
        "family": "which cannot be served",
        "states": f"error: {folder / 'a.txt'} is a file; a state store is a folder",
    }
    code = run(arguments[case])  # sys.exit prints a string to stderr and exits with 1
    assert isinstance(code, str)
    assert code.startswith("error: ")
    assert expected[case] in code
    assert "\n" not in code
    assert not states.exists(), "a store was left behind"


def test_wrong_arguments_exit_with_two(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run([tmp_path]) == 2
    assert "--states" in capsys.readouterr().err


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("folder", "--states", "--model"))


def test_ctrl_c_says_that_nothing_is_lost(
    model: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> PrecomputeReport:
        raise KeyboardInterrupt

    monkeypatch.setattr("hcache_rag.engine.HCacheEngine.precompute", interrupted)
    assert run([folder, "--states", tmp_path / "states", "--model", model]) == 130
    said = "interrupted; what was stored stays, the next run goes on from there"
    assert said in capsys.readouterr().err


def test_the_errors_of_the_function_are_the_library_s_own(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError):
        index_states(tmp_path / "missing", tmp_path / "states", model=str(model))
    with pytest.raises(ModelNotFoundError):
        index_states(folder, tmp_path / "states", model=str(tmp_path / "missing"))
    with pytest.raises(StoreOpenError):
        index_states(folder, folder / "a.txt", model=str(model))


def test_a_failing_job_closes_the_store(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> PrecomputeReport:
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr("hcache_rag.engine.HCacheEngine.precompute", failing)
    with pytest.raises(RuntimeError, match="on fire"):
        index_states(folder, tmp_path / "states", model=str(model))
    with StateStore.open(tmp_path / "states", read_only=True) as store:
        assert store.stats().documents == 0
        with pytest.raises(StoreOpenError):  # it would open if the job's were still open
            StateStore.open(tmp_path / "states")


# --- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/5", {}, Worker(2, 5)),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, Worker(3, 4)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "11",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            Worker(1, 3),
        ),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, Worker(1, 2)),
        ("auto/7", {"JOB_COMPLETION_INDEX": "6"}, Worker(6, 7)),
    ],
)
def test_a_worker_is_numbered_by_hand_or_by_its_launcher(
    text: str, environment: dict[str, str], expected: Worker
) -> None:
    assert worker_of(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("3", {}, "is i/n, auto or auto/n, not '3'"),
        ("a/b", {}, "is i/n"),
        ("5/5", {}, "worker 5 of 5: numbers are from 0 to 4"),
        ("-1/5", {}, "worker -1 of 5"),
        ("auto", {}, "none of their variables is set"),
        ("auto", {"JOB_COMPLETION_INDEX": "6"}, "give it as --shard auto/N"),
    ],
)
def test_a_worker_that_is_none_is_an_error(
    text: str, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        worker_of(text, environment)


@pytest.mark.parametrize(("workers", "total"), [(1, 16), (3, 16), (16, 16)])
def test_workers_share_all_shards(workers: int, total: int) -> None:
    """Each shard has one of them, and none has many more than another."""
    shares = [Worker(number, workers).shards(total) for number in range(workers)]
    assert sorted(number for share in shares for number in share) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_workers_than_shards_are_an_error() -> None:
    with pytest.raises(ValueError, match="17 workers for 16 shards"):
        Worker(0, 17).shards(16)


def test_workers_on_the_command_line_fill_one_store(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each its own shards; together, what one worker alone does, and it is published at the end."""
    write(folder, {f"{n}.txt": f"Document {n} of a few more." for n in range(9)})
    common: list[str | Path] = [folder, "--model", model, "--shards", "4", "--unit-documents", "2"]
    for number in range(2):
        worker: list[str | Path] = [
            "--states",
            tmp_path / "two",
            "--shard",
            f"{number}/2",
            "--publish",
        ]
        assert run([*common, *worker]) is None
    assert run([*common, "--states", tmp_path / "one", "--price-per-hour", "3600"]) is None
    out = capsys.readouterr().out
    assert "12 documents" in out
    assert "it pays from" in out or "it never pays" in out
    assert "an hour" in out
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert all(shard.is_published for shard in Manifest.open(tmp_path / "two").shards)
    assert run([folder, "--model", model, "--states", tmp_path / "one"]) is None
    assert "0 of them now" in capsys.readouterr().out


def shard_bytes(states: Path) -> dict[tuple[str, bytes], bytes]:
    """All values of every shard."""
    found = {}
    for shard in Manifest.open(states).shards:
        with StateStore.open(shard.folder, read_only=True) as store, store.reading() as reader:
            for record in store.records():
                found[shard.name, record.key] = b"".join(
                    bytes(reader.value(record.key, layer, chunk))
                    for layer in range(len(record.layout.layers))
                    for chunk in range(record.layout.num_chunks(record.num_tokens))
                )
    return found


def test_another_number_of_shards_is_an_error(model: Path, folder: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = [folder, "--states", tmp_path / "states", "--model", model]
    assert run([*arguments, "--shards", "2"]) is None
    code = run([*arguments, "--shards", "3"])
    assert isinstance(code, str)
    assert "has 2 shards of units of 256 documents, not 3 of 256" in code


def test_nodes_are_documents_with_the_text_of_prompts() -> None:
    node = TextNode(text="The text.", id_="a", metadata={"title": "T"})
    (document,) = node_documents([node])
    assert document == Document("a", "title: T\n\nThe text.")
