"""What tests/data/store-v1.mdb.gz holds, and how it was made, by an early commit of format 1:

    git worktree add /tmp/old ff4051f
    PYTHONPATH=/tmp/old .venv/bin/python tests/data/make_store_v1.py

The file stays as it is: who makes it anew gives up the promise that it can be read. Its arrays
follow from names and places by SHAKE-256, which is the same for ever.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from hcache_rag import codec
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.spec import ModelSpec
from hcache_rag.state import StateKey, StateRecord, child_key, root_key, token_array
from hcache_rag.store import NewState, StateStore

FILE = Path(__file__).parent / "store-v1.mdb.gz"
KEY = bytes(range(32))
"""Of the namespace `sealed`."""
MAX_BYTES, NAMESPACE_MAX_BYTES = 1 << 28, 1 << 27
SPEC = ModelSpec("toy", "llama", 3, 32, 4, 2, 8, 4096, "float32")
ROOT, OTHER_ROOT = root_key("model", "tokenizer"), root_key("other model", "tokenizer")
CHUNK_TOKENS = 16


@dataclass(frozen=True)
class Stored:
    """A state of the file.

    Args:
        name: what its arrays and token ids follow from.
        layers: representation and dtype of each.
        hits: how often it was restored.
        saved_s: seconds that restoring it saves.
    """

    name: str
    text: str
    tokens: int
    layers: tuple[str, str, str]
    parent: StateKey
    root: StateKey = ROOT
    is_preamble: bool = False
    owners: tuple[str, ...] = ()
    hits: int = 0
    saved_s: float = 0.5

    @property
    def created_s(self) -> float:
        return 1_790_000_000.25 + self.tokens

    def token_ids(self) -> list[int]:
        """Some of them need all four bytes."""
        first = self.name.encode()
        return [*first, *range(2**32 - self.tokens + len(first), 2**32)]

    def formats(self) -> tuple[LayerFormat, ...]:
        pairs = (layer.partition(" ") for layer in self.layers)
        return tuple(LayerFormat(Representation(kind), dtype) for kind, _, dtype in pairs)

    @property
    def record(self) -> StateRecord:
        ids = token_array(self.token_ids())
        layout = StateLayout(self.formats(), CHUNK_TOKENS)
        key, about = child_key(self.parent, ids), (self.created_s, self.is_preamble)
        return StateRecord(key, self.parent, self.root, ids, self.text, layout, *about)

    def places(self) -> Iterator[tuple[int, int, codec.ChunkShape]]:
        """Layer, chunk and shape of every value."""
        for layer, fmt in enumerate(self.formats()):
            for chunk in range(-(-self.tokens // CHUNK_TOKENS) if fmt.dtype else 0):
                tokens = min(CHUNK_TOKENS, self.tokens - chunk * CHUNK_TOKENS)
                yield layer, chunk, codec.ChunkShape(fmt, tokens, SPEC)

    def array(self, layer: int, chunk: int, part: int, num_bytes: int) -> bytes:
        """The bytes of one array of a value."""
        place = f"{self.name} {layer} {chunk} {part}"
        return hashlib.shake_256(place.encode()).digest(num_bytes)

    def state(self) -> NewState:
        record, values = self.record, []
        for layer, chunk, shape in self.places():
            blank = shape.arrays(bytearray(shape.payload_bytes))
            arrays = [
                np.frombuffer(self.array(layer, chunk, i, a.nbytes), a.dtype).reshape(a.shape)
                for i, a in enumerate(blank)
            ]
            value = codec.encode(shape, record.key, layer, chunk, arrays)
            values.append((layer, chunk, value))
        return NewState(record, values, self.saved_s, self.owners)


HEAD = Stored("head", "Answer from:", 9, ("kv int8",) * 3, ROOT, is_preamble=True, hits=3)
LONG = "file_path: /home/a/größe/🙂.md\n\n" * 20
"""More than what stands of a text in a key."""
_AFTER, _SMOOTH = HEAD.record.key, "hidden int8-smooth"
PLAIN = (  # in the namespace that one gets without asking
    HEAD,
    Stored("1", f"{LONG}one", 17, ("kv float32",) * 3, _AFTER, owners=("a.md",), hits=2),
    Stored("2", f"{LONG}two", 17, (_SMOOTH,) * 3, _AFTER, owners=("a.md", "größe.md")),
    Stored("3", "A short text.", 17, ("kv int8",) * 3, _AFTER, owners=("größe.md",), hits=1),
    Stored("4", "\0, \ud800 and \n are characters too.", 7, ("hidden bfloat16",) * 3, _AFTER),
    Stored("5", f"{LONG}three", 9, ("none", "hidden int8-g64", "kv float16"), _AFTER, saved_s=7.0),
    Stored("6", "A short text.", 5, ("hidden int8", "kv bfloat16", "kv int8"), ROOT),
    Stored("7", "Another model's.", 3, ("hidden float32",) * 3, OTHER_ROOT, OTHER_ROOT),
)
SEALED = (
    Stored("s1", f"{LONG}one", 17, (_SMOOTH, "kv int8", "kv float16"), ROOT, owners=("a.md",)),
    Stored("s2", "A secret.", 5, ("none", "hidden bfloat16", "kv int8"), ROOT, hits=1),
)
NAMED = ("SmolLM2 größer", "3 x kv (int8)", "fewest bytes")
"""Name, layout and reason of the model behind `ROOT`."""
GONE = Stored("gone", "Stored, and deleted again.", 5, ("kv int8",) * 3, ROOT)
COUNTED: dict[str, Any] = {"misses": 2, "missed_tokens": 30, "hit_tokens": 50, "damaged": 1}
"""In the namespace of `PLAIN`, beside the hits of its states."""


def fill(store: StateStore, states: tuple[Stored, ...]) -> None:
    """Store states, and one that is deleted again."""
    store.put_all([each.state() for each in (GONE, *states)])
    store.delete(GONE.record.key)
    for each in states:
        for _ in range(each.hits):
            store.count_use([each.record.key])
    store.flush_uses()


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, copy = Path(place) / "store", Path(place) / "copy"
        limits: dict[str, Any] = {
            "max_bytes": MAX_BYTES,
            "namespace_max_bytes": NAMESPACE_MAX_BYTES,
        }
        with StateStore.open(folder, **limits) as store:
            fill(store, PLAIN)
            store.name_model(ROOT, *NAMED)
            store.count_use(**COUNTED)
        with StateStore.open(folder, namespace="sealed", key=KEY) as store:
            fill(store, SEALED)
        copy.mkdir()
        with lmdb.open(str(folder), max_dbs=16, readonly=True) as env:
            env.copy(str(copy), compact=True)
        FILE.write_bytes(gzip.compress((copy / "data.mdb").read_bytes(), 9, mtime=0))


if __name__ == "__main__":
    main()
