"""The command line: what it does, what it says, and that failures are one line.

Most tests call `main` in this process with a tiny model; two run it for real.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome, Run, assert_one_error_line, assert_usage_error
from fakes import save_mamba, save_tiny_model
from tiny import Shape, byte_tokenizer, tiny_model

from hcache_rag import StateStore, __version__
from hcache_rag.llama_index.persisted import load_index
from hcache_rag.store.manifest import Manifest

COMMANDS = {
    "index": [
        "FOLDER",
        "--store",
        "--model",
        "--dtype",
        "--device",
        "--representation",
        "--storage-dtype",
        "--context-at-index",
        "--shards",
        "--check-fidelity",
        "--no-measure",
        "--json",
    ],
    "fidelity": [
        "--store",
        "--data",
        "--questions",
        "--model",
        "--dtype",
        "--device",
        "--context-at-index",
        "--share",
        "--tolerance",
        "--records",
        "(default: 20, with --quick 4, or all --questions)",
        "--top-k",
        "--max-new-tokens",
        "--quick",
        "--write",
        "--figure",
        "--json",
    ],
    "ask": ["QUESTION", "--store", "--top-k", "--max-new-tokens", "--device", "--json"],
    "stats": ["--store", "--json"],
    "doctor": ["--store", "--model", "--json"],
    "profile": ["--store", "--model", "--dtype", "--device", "--quick", "--json"],
    "plan": [
        "--model",
        "--tokens",
        "--documents",
        "--fresh",
        "--hardware",
        "--objective",
        "--hidden-dtype",
        "--kv-dtype",
        "--store",
        "--draw",
        "--trace",
        "--list",
        "--json",
    ],
    "simulate": ["--json"],
}
TEXTS = {
    "a.txt": "Mercury is the smallest planet and the closest one to the Sun.",
    "b.txt": "Venus is the hottest planet because of its thick atmosphere.",
    "sub/c.txt": "Earth is the only planet known to have life and liquid oceans.",
}
START = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from hcache_rag.cli import main; main()"
)
"""As the installed command starts, except that a parent which ignores SIGINT does not matter."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), chat=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "docs", TEXTS)


def write(folder: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def in_a_process(*arguments: str | Path) -> Outcome:
    """Runs a command as a process of its own, with nothing replaced."""
    done = subprocess.run(
        [sys.executable, "-c", START, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


# Help.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(run: Run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run(command, "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    for word in COMMANDS[command]:
        assert word.lower() in outcome.out.lower()


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_commands_are_listed(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert all(command in outcome.out + outcome.err for command in COMMANDS)
    if arguments:
        assert outcome.code == 0


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom hcache_rag.cli import main\nsys.argv = ['hcache-rag', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "sys.exit(int('torch' in sys.modules or 'llama_index' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The commands on a tiny model.


def test_an_index_is_made_once(run: Run, model: str, folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    first = run("index", folder, "--store", store, "--model", model)
    assert first.code == 0
    assert "3 document(s) read, 0 were there already, 0 file(s) skipped" in first.out
    assert 'hcache-rag ask "..." --store' in first.out
    assert sorted(n.get_content() for n in load_index(store).nodes) == sorted(TEXTS.values())
    second = run("index", folder, "--store", store, "--model", model)
    assert second.code == 0
    assert "0 document(s) read, 3 were there already, 0 file(s) skipped" in second.out
    write(folder, {"new.txt": "Mars is a cold desert planet with the tallest volcano."})
    third = run("index", folder, "--store", store, "--model", model)
    assert "1 document(s) read, 3 were there already, 0 file(s) skipped" in third.out
    assert "going on: 3 of 4 documents have their states already" in third.err


def test_an_index_keeps_its_states_in_shards(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    """As many as were asked for first; all commands read them."""
    store = tmp_path / "store"
    arguments = ("index", folder, "--store", store, "--model", model, "--no-measure")
    assert run(*arguments, "--shards", "2").code == 0
    assert len(Manifest.open(store / "states").shards) == 2
    assert "0 document(s) read, 3 were there already" in run(*arguments).out
    assert json.loads(run("stats", "--store", store, "--json").out)["documents"] == 3
    assert_one_error_line(run(*arguments, "--shards", "3"), "has 2 shards")
    assert_usage_error(run(*arguments, "--shards", "0"), "--shards")


def test_json_is_one_object_and_nothing_else(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    outcome = run("index", folder, "--store", store, "--model", model, "--json")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert (result["stored"], result["reused"], result["files"]) == (3, 0, 3)
    assert result["files_skipped"] == [["picture.png", "binary"]]
    assert result["stored_tokens"] == sum(map(len, TEXTS.values()))
    assert result["store"] == str(store)
    assert result["model"] == model
    assert outcome.complaints == []

    outcome = run("ask", "Which planet is hot?", "--store", store, "--top-k", "2", "--json")
    assert outcome.code == 0
    answer = json.loads(outcome.out)
    assert answer["sources"][0] == "b.txt"
    assert len(answer["sources"]) == 2
    assert answer["provenance"]["documents_restored"] == 2
    assert answer["provenance"]["exact_tokens"] > len(TEXTS["b.txt"])
    assert 0 < answer["first_text_s"] <= answer["seconds"]
    assert outcome.complaints == []

    outcome = run("stats", "--store", store, "--json")
    assert outcome.code == 0
    counts = json.loads(outcome.out)
    assert (counts["documents"], counts["preambles"]) == (3, 1)
    assert counts["models"] == {model: 3}
    assert counts["file_bytes"] > 0


def test_ask_prints_the_answer_and_what_it_came_from(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run("index", folder, "--store", store, "--model", model)
    outcome = run("ask", "Which planet is hot?", "--store", store, "--max-new-tokens", "5")
    assert outcome.code == 0
    flat = " ".join(outcome.err.split())
    assert re.search(r"first text after [\d,]+ ms · [\d,]+ of [\d,]+ prompt tokens restored", flat)
    assert "b.txt" in flat
    assert "warning" not in flat


def test_ask_uses_the_model_of_the_index(
    run: Run, model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was named relative to the folder that `index` was run in."""
    monkeypatch.chdir(Path(model).parent)
    run("index", folder, "--store", tmp_path / "store", "--model", Path(model).name)
    monkeypatch.chdir(tmp_path)
    outcome = run("ask", "Which planet?", "--store", "store", "--max-new-tokens", "2", "--json")
    assert outcome.err == ""
    assert outcome.code == 0


def test_an_empty_question_is_one_line(run: Run, model: str, folder: Path, tmp_path: Path) -> None:
    run("index", folder, "--store", tmp_path / "store", "--model", model)
    assert_one_error_line(run("ask", " ", "--store", tmp_path / "store"), "question is empty")


def test_ask_without_its_states_reads_and_says_so(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run("index", folder, "--store", store, "--model", model)
    before = run("ask", "Which?", "--store", store, "--json", "--fidelity", "exact")
    shutil.rmtree(store / "states")
    outcome = run("ask", "Which?", "--store", store, "--json", "--fidelity", "exact")
    assert outcome.code == 0
    answer = json.loads(outcome.out)
    assert answer["provenance"]["documents_missed"] == 3
    assert answer["text"] == json.loads(before.out)["text"]


def test_ask_takes_a_share_as_its_fidelity(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    """So many of the relocated tokens are read again; what is no share is refused."""
    run("index", folder, "--store", tmp_path / "store", "--model", model)
    asked = ("ask", "Which?", "--store", tmp_path / "store")
    found = json.loads(run(*asked, "--json", "--fidelity", "0.5").out)["provenance"]
    relocated = found["relocated_tokens"] + found["repaired_tokens"]
    assert found["repaired_tokens"] == round(0.5 * relocated) > 0
    for wrong in ("2", "-0.1", "nan", "half"):
        outcome = run(*asked, "--fidelity", wrong)
        assert outcome.code == 2
        assert "--fidelity" in outcome.err


def test_the_version_is_shown(run: Run) -> None:
    outcome = run("--version")
    assert (outcome.code, outcome.out.strip()) == (0, f"hcache-rag {__version__}")


def test_stats_prints_a_table(run: Run, model: str, folder: Path, tmp_path: Path) -> None:
    run("index", folder, "--store", tmp_path / "store", "--model", model)
    outcome = run("stats", "--store", tmp_path / "store")
    assert outcome.code == 0
    assert re.search(r"documents\W+3\b", outcome.out)
    assert re.search(r"tokens.*\W[\d,]+", outcome.out)


def test_doctor_examines_a_model_and_a_store(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    run("index", folder, "--store", store, "--model", model)
    checks = checks_of(run("doctor", "--model", model, "--store", store, "--json"))
    assert checks["versions"]["ok"]
    assert checks["store"]["ok"]
    assert "3 passages indexed, 3 with states" in checks["store"]["detail"]
    assert checks["model and self-check"]["ok"], checks["model and self-check"]["detail"]


def test_doctor_fails_where_something_does(run: Run, folder: Path, tmp_path: Path) -> None:
    outcome = run("doctor", "--model", folder, "--store", tmp_path / "nowhere", "--json")
    assert outcome.code == 1
    checks = checks_of(outcome)
    assert "holds no index" in checks["store"]["detail"]
    assert "is not a model" in checks["model and self-check"]["detail"]
    assert not checks["store"]["ok"]
    assert not checks["model and self-check"]["ok"]
    assert not (tmp_path / "nowhere").exists()
    table = run("doctor", "--model", folder, "--store", tmp_path / "nowhere")
    assert table.code == 1
    assert table.out.count("FAILED") >= 2


def checks_of(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(outcome.out)["checks"]}


# Files that are passed over.


def test_files_without_text_are_counted_and_named(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "sub" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    outcome = run("index", folder, "--store", tmp_path / "store", "--model", model)
    assert outcome.code == 0
    skipped = [line for line in outcome.err.splitlines() if line.startswith("skipped ")]
    assert skipped == [
        "skipped empty.txt: empty",
        "skipped picture.png: binary",
        "skipped sub/latin.txt: not UTF-8 text",
    ]
    assert "3 document(s) read, 0 were there already, 3 file(s) skipped" in outcome.out


def test_a_store_among_the_documents_is_not_read_as_one(
    run: Run, model: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hcache-rag index .` puts its store into the folder that it reads the next time."""
    monkeypatch.chdir(folder)
    first = run("index", ".", "--model", model, "--json")
    second = run("index", ".", "--model", model, "--json")
    assert (first.code, second.code) == (0, 0)
    result = json.loads(second.out)
    assert (result["files"], result["stored"], result["reused"]) == (3, 0, 3)
    assert second.complaints in ([], ["going on: 3 of 3 documents have their states already"])


NAMES = {
    "long": f"{'a-long-name-' * 10}.bin",
    "brackets": "notes [draft].bin",
    "a closing tag": "notes [/draft].bin",  # a file in the folder "notes ["
    "an emoji code": "notes :apple:.bin",
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_skipped_file_is_named_as_it_is_called(
    run: Run, model: str, folder: Path, tmp_path: Path, kind: str
) -> None:
    write(folder, {NAMES[kind]: "\0"})
    outcome = run("index", folder, "--store", tmp_path / "store", "--model", model)
    assert outcome.code == 0
    assert f"skipped {NAMES[kind]}: binary" in outcome.err.splitlines()


# Failures.


@pytest.mark.parametrize("kind", ["missing", "empty", "binary", "file"])
def test_a_wrong_folder_is_one_line_and_leaves_nothing(
    run: Run, model: str, tmp_path: Path, kind: str
) -> None:
    folder, store = tmp_path / "docs", tmp_path / "store"
    if kind != "missing":
        folder.mkdir()
    if kind == "binary":
        (folder / "a.png").write_bytes(b"\0")
        (folder / "b.txt").write_bytes(b"\xff\xfe")
    if kind == "file":
        folder = write(folder, {"a.txt": "text"}) / "a.txt"
    expected = {
        "missing": f"{folder}: no such folder",
        "empty": f"nothing to index: {folder} holds no files",
        "binary": "holds 2 file(s) that hold no text, first a.png: binary",
        "file": f"{folder} is a file; give the folder that holds it",
    }
    outcome = run("index", folder, "--store", store, "--model", model)
    assert_one_error_line(outcome, expected[kind])
    assert outcome.code == 1
    assert not store.exists()


@pytest.mark.parametrize("name", ["docs [draft]", "docs [/draft]", "docs :apple:", "d" * 120])
def test_an_error_names_the_folder_as_it_is_called(
    run: Run, model: str, tmp_path: Path, name: str
) -> None:
    outcome = run("index", tmp_path / name, "--model", model)
    assert_one_error_line(outcome, f"{tmp_path / name}: no such folder")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("kind", ["missing", "not a model", "no weights", "family"])
def test_a_wrong_model_is_one_line_and_leaves_nothing(
    run: Run, folder: Path, tmp_path: Path, kind: str, *, as_json: bool
) -> None:
    path, store = tmp_path / "model", tmp_path / "store"
    if kind == "not a model":
        path = folder
    if kind == "no weights":
        (save_tiny_model(path) / "model.safetensors").unlink()
    if kind == "family":
        save_mamba(path)
    expected = {
        "missing": f"{path} is not a model: ",
        "not a model": f"{path} is not a model: ",
        "no weights": f"{path} cannot be loaded: ",
        "family": "is of family 'mamba', which cannot be served",
    }
    options = ["--json"] if as_json else []
    outcome = run("index", folder, "--store", store, "--model", path, *options)
    assert_one_error_line(outcome, expected[kind])
    assert outcome.code == 1
    assert not store.exists()


def test_a_store_that_is_a_file_is_one_line_and_stays(
    run: Run, model: str, folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.write_text("text")
    outcome = run("index", folder, "--store", store, "--model", model)
    assert_one_error_line(outcome, str(store))
    assert store.read_text() == "text"


@pytest.mark.parametrize("command", ["ask", "stats"])
@pytest.mark.parametrize("kind", ["missing", "empty", "other files", "file"])
def test_a_folder_without_an_index_is_one_line_and_stays_as_it_was(
    run: Run, tmp_path: Path, command: str, kind: str
) -> None:
    store = tmp_path / "store"
    if kind == "file":
        store.write_text("text")
    elif kind != "missing":
        store.mkdir()
    if kind == "other files":
        write(store, TEXTS)
    before = sorted(tmp_path.rglob("*"))
    question = ["Which planet?"] if command == "ask" else []
    outcome = run(command, *question, "--store", store)
    assert_one_error_line(outcome, str(store))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_was_not_finished_can_be_asked_nothing(
    run: Run, model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hcache_rag.llama_index.persisted.IndexFolder.save", interrupted)
    store = tmp_path / "store"
    outcome = run("index", folder, "--store", store, "--model", model)
    assert outcome.code == 130
    said = "interrupted; what was stored stays, the next run goes on from there"
    assert said in " ".join(outcome.err.split())
    assert_one_error_line(run("ask", "Which?", "--store", store), "holds no index")


def test_an_index_whose_model_is_gone_is_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", chat=True)
    run("index", folder, "--store", tmp_path / "store", "--model", model)
    shutil.rmtree(model)
    outcome = run("ask", "Which planet?", "--store", tmp_path / "store")
    assert_one_error_line(outcome, f"{model} is not a model: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["index", "docs", "--dtype", "float17"],
            "'float17' is not one of float32, bfloat16, auto",
        ),
        (["index", "docs", "--dtype", "float16"], "'float16' is not one of"),
        (["index", "docs", "--representation", "pixels"], "not one of auto, hidden, kv"),
        (["index"], "Missing argument"),
        (["index", "docs", "more"], "more"),
        (["ask"], "Missing argument"),
        (["ask", "Which?", "--top-k", "0"], "--top-k"),
        (["ask", "Which?", "--max-new-tokens", "x"], "--max-new-tokens"),
        (["stats", "--stroe", "x"], "--stroe"),
        (["bogus"], "bogus"),
    ],
)
def test_wrong_arguments_are_one_error_and_no_traceback(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(folder.parent)
    assert_usage_error(run(*arguments), expected)
    assert not (folder.parent / "hcache-store").exists()


# For real.


@pytest.mark.slow
def test_the_real_model_end_to_end(tmp_path: Path, solar_system: list[str]) -> None:
    chosen = [text for text in solar_system if re.search("^(Apollo 11|Pluto|Venus) ", text)]
    assert len(chosen) == 3
    folder = write(tmp_path / "docs", {f"{i}.md": text for i, text in enumerate(chosen)})
    store = tmp_path / "store"

    first = in_a_process("index", folder, "--store", store)
    assert first.code == 0, first.err
    assert "3 document(s) read, 0 were there already, 0 file(s) skipped" in first.out
    assert "Traceback" not in first.err
    assert "Loading weights" not in first.err

    second = in_a_process("index", folder, "--store", store, "--json")
    assert second.code == 0, second.err
    result = json.loads(second.out)
    assert (result["stored"], result["reused"]) == (0, 3)
    assert result["model"] == "SmolLM2-135M-Instruct"
    assert "Traceback" not in second.err

    asked = in_a_process("ask", "When did Apollo 11 land on the Moon?", "--store", store, "--json")
    assert asked.code == 0, asked.err
    answer = json.loads(asked.out)
    assert "1969" in answer["text"]
    assert chosen[int(answer["sources"][0][0])].startswith("Apollo 11")
    assert answer["provenance"]["documents_restored"] == 3
    assert answer["provenance"]["documents_missed"] == 0
    assert answer["provenance"]["exact_tokens"] > 0
    assert answer["provenance"]["warnings"] == []
    assert asked.err == ""

    counted = in_a_process("stats", "--store", store, "--json")
    assert counted.code == 0, counted.err
    counts = json.loads(counted.out)
    assert counts["models"] == {"SmolLM2-135M-Instruct": 3}

    examined = in_a_process("doctor", "--store", store, "--json")
    assert examined.err == ""
    checks = checks_of(examined)
    assert checks["store"]["ok"]
    assert checks["model and self-check"]["ok"], checks["model and self-check"]["detail"]
    assert "same answer as full prefill" in checks["model and self-check"]["detail"]


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_stored_and_the_next_run_goes_on(run: Run, tmp_path: Path) -> None:
    count = 48
    size = Shape("slow enough", hidden_size=256, heads=4, head_dim=64, layers=8)
    tiny_model(size).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    sentence = "is a planet of no particular interest, and much is said about it. "
    texts = {f"{i}.txt": f"Number {i} {sentence * 7}" for i in range(count)}
    folder, store = write(tmp_path / "docs", texts), tmp_path / "store"
    arguments = ["index", str(folder), "--store", str(store), "--model", str(tmp_path / "model")]

    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(terminal)
    try:
        seen = read_until(screen, rf"reading documents\D+[1-9]\d*/{count}")
        process.send_signal(signal.SIGINT)
        seen += read_until(screen, None)
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
        process.wait()
        os.close(screen)
    assert "Traceback" not in seen
    said = "interrupted; what was stored stays, the next run goes on from there"
    assert said in " ".join(seen.split())

    with StateStore.open(store / "states", read_only=True) as states:
        kept = states.stats().documents
    assert 0 < kept < count
    outcome = run(*arguments)
    assert outcome.code == 0
    assert f"going on: {kept} of {count} documents have their states already" in outcome.err
    assert f"{count - kept} document(s) read, {kept} were there already" in outcome.out


def read_until(screen: int, pattern: str | None) -> str:
    """What a terminal shows, without its colours, up to a pattern or to the program's end."""
    shown = b""
    while True:
        ready, _, _ = select.select([screen], [], [], 300)
        assert ready, f"nothing was shown for 300 s after {shown!r}"
        try:
            data = os.read(screen, 4096)
        except OSError:  # Linux says EIO where the other side is closed
            data = b""
        shown += data
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))
        if pattern is not None and re.search(pattern, text):
            return text
        if not data:
            assert pattern is None, f"ended before {pattern!r}: {text}"
            return text
