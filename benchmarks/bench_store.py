"""How fast is the store, against the disk itself, and with a million documents in it?

    python benchmarks/bench_store.py [--quick] [--json] [--documents N]

  reading    a document's values in the order of a restore, verified, against reading a plain file
             of the same bytes from its beginning to its end; warm, and with the page cache dropped
  unverified the same without checksums: what verifying costs
  encrypted  verified and warm, from an encrypted namespace, against a plain one of the same store
  namespaces verified and warm, from the last of fifty namespaces, against the first of them
  writing    documents in batches, each batch synced, against writing and syncing plain files
  opening    a process opens a store of so many documents and searches its first prompt; its memory
  matching   searching a prompt that holds ten of them, and reading their records

A and B take turns; ratios are of pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, at_least, at_most, finish, machine, ratio_of_pairs, summary

from hcache_rag import codec
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.measure import drop_page_cache, noise
from hcache_rag.presets import MODELS
from hcache_rag.state import StateRecord, child_key, root_key, token_array
from hcache_rag.store import NewState, StateStore
from hcache_rag.texts import find_texts

SPEC = MODELS["llama-3-8b"]
LAYOUT = StateLayout.of(SPEC, [LayerFormat(Representation.KV, "int8")] * SPEC.num_layers)
ROOT = root_key("a model", "a tokenizer")
TOKENS = 512
KEY = bytes(range(32))
WORDS = [a + b for a in ("ba", "ko", "mi", "tu", "re", "sa") for b in ("n", "rt", "lla", "s", "xi")]


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, help="default 1,000,000, with --quick 20,000")
    parser.add_argument("--open", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(opened(Path(options.open), options.documents)))
        return
    documents = options.documents or (20_000 if options.quick else 1_000_000)
    rows: list[dict[str, Any]] = []
    targets = []
    with tempfile.TemporaryDirectory(prefix="bench-store-", dir=".") as place:
        folder = Path(place)
        found = reading_and_writing(folder, 6 if options.quick else 24, 3 if options.quick else 9)
        found |= namespaces(folder / "namespaces", 2 if options.quick else 8, 9)
        for name, (ours, plain, bound) in found.items():
            ratio = ratio_of_pairs(ours, plain)
            rows.append(
                {"what": name, "ours": summary(ours), "plain": summary(plain), "ratio": ratio}
            )
            print(f"{name:32} {_rate(ours)} against {_rate(plain)}: {ratio:.2f} of it")
            if bound:
                targets.append(at_least(f"{name} / plain", ratio, bound))
        row = many(folder / "many", documents)
        rows.append(row)
        targets += [
            at_most(f"{documents:,} documents: open and search, s", row["first_s"], 2.0),
            at_most(f"{documents:,} documents: memory, MB", row["memory_mb"], 300.0),
            at_most("searching a prompt, ms", row["find_ms"], 1.0),
        ]
    finish(rows, targets, machine(), options.json)


def document(number: int) -> NewState:
    """A document of `TOKENS` tokens as Llama-3-8B's states in eight-bit integers, 32 MB or so."""
    ids = token_array([number, *range(TOKENS - 1)])
    key = child_key(ROOT, ids)
    record = StateRecord(key, ROOT, ROOT, ids, f"document {number}", LAYOUT, 0.0)
    shape = codec.ChunkShape(LAYOUT.layers[0], min(TOKENS, LAYOUT.chunk_tokens), SPEC)
    arrays = noise(shape)
    values = [
        (layer, chunk, codec.encode(shape, key, layer, chunk, arrays))
        for layer in range(SPEC.num_layers)
        for chunk in range(LAYOUT.num_chunks(TOKENS))
    ]
    return NewState(record, values)


Compared = tuple[list[float], list[float], float]


def reading_and_writing(folder: Path, count: int, repeats: int) -> dict[str, Compared]:
    """Bytes a second of the store and of plain files, in pairs."""
    states = [document(number) for number in range(count)]
    plain = folder / "plain"
    found: dict[str, Compared] = {}
    ours, theirs = list[float](), list[float]()
    for repeat in range(repeats + 2):
        with StateStore.open(folder / f"store-{repeat}") as store:
            ours.append(_rated(states, partial(_put, store, states)))
        theirs.append(_rated(states, partial(_write_plain, plain, states)))
        if repeat:
            _delete(folder / f"store-{repeat}")
    found["writing"] = (ours[2:], theirs[2:], 0.60)  # the first rounds fill what the disk keeps
    for name, is_cold, verify, bound in (
        ("reading, cold", True, True, 0.80),
        ("reading, warm", False, True, 0.80),
        ("reading, warm, not verified", False, False, 0.0),
    ):
        ours, theirs = [], []
        for _ in range(repeats + 1):
            if is_cold:
                drop_page_cache(folder / "store-0" / "data.mdb")
            ours.append(_rated(states, partial(_read, folder / "store-0", states, verify)))
            if is_cold:
                drop_page_cache(plain)
            theirs.append(_rated(states, partial(_read_plain, plain)))
        found[name] = (ours[1:], theirs[1:], bound)  # the first round warms up
    return found


def namespaces(folder: Path, count: int, repeats: int) -> dict[str, Compared]:
    """Bytes a second from an encrypted namespace and from the last of many, without a target.

    In pairs with a plain one and with the first. The namespaces in between hold a part of a
    document each.
    """
    states = [document(number) for number in range(count)]
    part = NewState(states[0].record, list(states[0].values)[:4])
    first, *between, last = (f"namespace {number}" for number in range(1, 51))
    for name in (first, *between, last, "sealed"):
        key = KEY if name == "sealed" else None
        with StateStore.open(folder, namespace=name, key=key, durability="fast") as store:
            store.put_all([part] if name in between else states)
    found: dict[str, Compared] = {}
    for what, name, key in (
        ("reading, warm, encrypted", "sealed", KEY),
        ("reading, warm, 50th namespace", last, None),
    ):
        ours, theirs = [], []
        for _ in range(repeats + 1):
            ours.append(_rated(states, partial(_read, folder, states, True, name, key)))
            theirs.append(_rated(states, partial(_read, folder, states, True, first)))
        found[what] = (ours[1:], theirs[1:], 0.0)
    return found


def _rated(states: Sequence[NewState], work: Callable[[], object]) -> float:
    """Bytes a second."""
    num_bytes = sum(len(value) for state in states for _, _, value in state.values)
    started = time.perf_counter()
    work()
    return num_bytes / (time.perf_counter() - started)


def _put(store: StateStore, states: Sequence[NewState]) -> None:
    for begin in range(0, len(states), 2):
        store.put_all(states[begin : begin + 2])


def _write_plain(path: Path, states: Sequence[NewState]) -> None:
    with path.open("wb", buffering=0) as file:
        for index, state in enumerate(states):
            for _, _, value in state.values:
                file.write(value)
            if index % 2:
                os.fsync(file.fileno())


def _read(
    path: Path,
    states: Sequence[NewState],
    verify: bool,
    namespace: str = "default",
    key: bytes | None = None,
) -> None:
    with (
        StateStore.open(path, namespace=namespace, key=key, read_only=True) as store,
        store.reading() as reader,
    ):
        for state in states:
            shape = codec.ChunkShape(LAYOUT.layers[0], min(TOKENS, LAYOUT.chunk_tokens), SPEC)
            for layer, chunk, _ in state.values:
                value = reader.value(state.record.key, layer, chunk)
                if verify:
                    codec.decode(shape, state.record.key, layer, chunk, value)


def _read_plain(path: Path) -> None:
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _delete(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def texts(count: int) -> Iterator[str]:
    """Passages of some 700 characters; a quarter of them begin alike."""
    chance = random.Random(0)
    for number in range(count):
        head = "file_path: /docs/page.md\n\n" if number % 4 == 0 else ""
        yield f"{head}{number} " + " ".join(chance.choices(WORDS, k=150))


def many(folder: Path, documents: int) -> dict[str, Any]:
    """A store of many documents without values, opened and searched by another process."""
    started = time.perf_counter()
    some: list[str] = []
    with StateStore.open(folder, durability="fast") as store:
        batch: list[NewState] = []
        for number, text in enumerate(texts(documents)):
            ids = token_array(np.arange(number, number + 200))
            record = StateRecord(child_key(ROOT, ids), ROOT, ROOT, ids, text, LAYOUT, 0.0)
            batch.append(NewState(record, ()))
            if number % max(1, documents // 10) == 0:
                some.append(text)
            if len(batch) == 2000 or number + 1 == documents:
                store.put_all(batch)
                batch = []
    made_s = time.perf_counter() - started
    (folder / "prompt.txt").write_text("Read this.\n\n" + "\n\n".join(some[:10]) + "\n\nQ: what?")
    command = [sys.executable, __file__, "--open", str(folder), "--documents", str(documents)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    row.update(what="many", documents=documents, made_us_per_document=made_s / documents * 1e6)
    print(
        f"{documents:,} documents: open and first search {row['first_s']:.2f} s, "
        f"{row['memory_mb']:.0f} MB of memory ({row['file_mb']:.0f} MB of it mapped file); "
        f"a prompt of {row['prompt_chars']:,.0f} characters is searched in "
        f"{row['find_ms']:.2f} ms, {row['matches']:.0f} documents found, their records read in "
        f"{row['records_ms']:.2f} ms"
    )
    return row


def opened(folder: Path, _documents: int) -> dict[str, float]:
    """In a process of its own: open, search, and what that takes."""
    prompt = (folder / "prompt.txt").read_text()
    before = _memory_mb("RssAnon")
    started = time.perf_counter()
    with StateStore.open(folder) as store:
        matches = find_texts(prompt, [store])
        first_s = time.perf_counter() - started
        memory, mapped = _memory_mb("RssAnon") - before, _memory_mb("RssFile")
        find_s, records_s = [], []
        for _ in range(20):
            begin = time.perf_counter()
            matches = find_texts(prompt, [store])
            middle = time.perf_counter()
            for match in matches:
                store.find(match.text)
            find_s.append(middle - begin)
            records_s.append(time.perf_counter() - middle)
    return {
        "first_s": first_s,
        "memory_mb": memory,
        "file_mb": mapped,
        "find_ms": statistics.median(find_s) * 1e3,
        "records_ms": statistics.median(records_s) * 1e3,
        "matches": float(len(matches)),
        "prompt_chars": float(len(prompt)),
    }


def _memory_mb(kind: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _rate(samples: Sequence[float]) -> str:
    return f"{statistics.median(samples) / 1e9:6.2f} GB/s"


if __name__ == "__main__":
    main()
