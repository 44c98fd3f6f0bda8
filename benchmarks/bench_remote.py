"""Are states behind a slow link ever much slower than reading again?

    python benchmarks/bench_remote.py [--quick] [--json] [--delay SECONDS]

SmolLM2-135M-Instruct on the CPU, three passages of some 512 tokens (--quick: two, at two rates,
once), their states on an S3 server (moto's, in a process of its own) behind a TCP relay of each
rate. Interleaved for each rate, seconds to the first token of a prompt that no state is near for:

full      no states: the whole prompt is read
fetched   all states are fetched, whatever that takes (no profile, so nothing is planned)
planned   the planner chooses by the link's rate as it was seen

and the share of the stored bytes that the plan reads. Targets: at every rate `planned` takes at
most 1.15x of the better one of the others, and it reads no more than at the next faster rate.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import torch
from bench_index import passages
from common import ROOT, Target, arguments, at_most, finish, machine, quiet_transformers, summary

from hcache_rag import GenerationOptions, HCacheEngine, StateStore
from hcache_rag.bundled import default_model_path
from hcache_rag.measure import measure
from hcache_rag.models import load_model
from hcache_rag.store.manifest import Manifest
from hcache_rag.store.remote import export_shard
from hcache_rag.store.sharded import ShardedStore

MB = 1_000_000
RATES = (5 * MB, 10 * MB, 20 * MB, 40 * MB, 80 * MB)
BOUND = 1.15


def main() -> None:
    parser = arguments(__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--delay", type=float, default=0.005, help="seconds, of each direction")
    options = parser.parse_args()
    quiet_transformers()
    torch.set_num_threads(1)
    repeats, rates, count = (1, RATES[1::2], 2) if options.quick else (5, RATES, 3)
    wires = [sys.executable, str(ROOT / "benchmarks" / "wire.py"), *map(str, rates)]
    wires += ["--delay", str(options.delay)]
    with (
        tempfile.TemporaryDirectory() as name,
        subprocess.Popen(wires, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as far,
    ):
        assert far.stdin is not None
        assert far.stdout is not None
        ports = json.loads(far.stdout.readline())
        bench = _Bench(Path(name), ports[-1], repeats, count)
        rows = [bench.at(rate, port) for rate, port in zip((*rates, None), ports, strict=True)]
        far.stdin.close()
    finish(rows, _targets(rows), machine(), options.json)


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    found = [
        at_most(f"planned, of the better one, {row['link']}", row["of_better"], BOUND)
        for row in rows
    ]
    shares = [row["share_read"] for row in rows]
    drops = [before - after for before, after in pairwise(shares)]
    return [*found, at_most("most that a faster link reads less, in shares", max(drops), 0.1)]


class _Bench:
    """A model, states on a server, and a prompt of `count` passages."""

    def __init__(self, folder: Path, server_port: int, repeats: int, count: int) -> None:
        self.folder, self.repeats = folder, repeats
        self.model, self.tokenizer = load_model(str(default_model_path()))
        self.texts = passages(count)
        self.prompt = "Read this.\n\n" + "\n\n".join(self.texts) + "\n\nWhat is it about?"
        local = Manifest.create(folder / "local", 1)
        with StateStore.open(local.path) as store:
            engine = self._engine(store, None)
            engine.precompute(self.texts)
            self.profile = measure(engine.adapter, folder, quick=True)
        reach(server_port)
        fsspec.filesystem("s3").mkdir("states")
        local.shards[0].publish()
        export_shard(local.shards[0], "s3://states/shard")

    def _engine(self, store: StateStore, profile: Any) -> HCacheEngine:
        return HCacheEngine(
            self.model,
            self.tokenizer,
            store,
            preamble="Read this.\n\n",
            fidelity="none",
            profile=profile,
            representation="kv",
            storage_dtype="int8",
        )

    def at(self, rate: float | None, port: int) -> dict[str, Any]:
        """The three ways in turns, over one link."""
        reach(port)
        manifest = self.folder / f"at {port}" / "shards.json"
        manifest.parent.mkdir()
        manifest.write_text('{"format": 1, "id": "x", "shards": ["s3://states/shard"]}')
        taken: dict[str, list[float]] = {"full": [], "fetched": [], "planned": []}
        shares: list[float] = []
        with StateStore.in_memory() as nothing, StateStore.open(manifest) as store:
            assert isinstance(store, ShardedStore)
            assert store.near is not None
            ways = {
                "full": self._engine(nothing, None),
                "fetched": self._engine(store, None),
                "planned": self._engine(store, self.profile),
            }
            total = sum(entry.num_bytes for _, entry in store.entries() if not entry.is_preamble)
            for number in range(self.repeats + 1):
                for way, engine in ways.items():
                    store.near.clear()
                    found = engine.generate(
                        self.prompt, options=GenerationOptions(max_new_tokens=1)
                    ).provenance
                    if number:  # the first one warms up
                        taken[way].append(found.seconds["first_token"])
                    if number and way == "planned":
                        shares.append(found.bytes_read / total)
            store.near.clear()
        p50 = {way: summary(seconds)["p50"] for way, seconds in taken.items()}
        better = [min(pair) for pair in zip(taken["full"], taken["fetched"], strict=True)]
        pairs = zip(taken["planned"], better, strict=True)
        row = {
            "link": f"{rate / MB:g} MB/s" if rate else "no limit",
            **{way: round(seconds, 3) for way, seconds in p50.items()},
            "share_read": round(statistics.median(shares), 2),
            "of_better": statistics.median(mine / other for mine, other in pairs),
        }
        print(
            f"{row['link']:>9}: full {p50['full']:.2f} s, fetched {p50['fetched']:.2f} s, planned "
            f"{p50['planned']:.2f} s, {row['share_read']:.0%} read, {row['of_better']:.2f}x"
        )
        return row


def reach(port: int) -> None:
    """Let fsspec's S3 be a server of this machine."""
    address = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "test", "secret": "test"}
    fsspec.config.conf["s3"] = address


if __name__ == "__main__":
    main()
