"""Run by a test in a network namespace of its own: what is read at each rate of its one device.

    unshare -rn python in_namespace.py FOLDER

Prints the bytes that were read of remote states, from the fastest rate to the slowest.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import fsspec
import torch
from far import PASSAGES, PROMPT, engine_on
from moto.server import ThreadedMotoServer
from test_remote_s3 import MACHINE, server_at
from wire import Wire

from hcache_rag import StateStore
from hcache_rag.store.manifest import Manifest
from hcache_rag.store.remote import export_shard
from hcache_rag.store.sharded import ShardedStore

RATES = ("800mbit", "32mbit", "4mbit")


def shape(rate: str) -> None:
    """Let the loopback device carry so many bits a second, in both directions together."""
    queue = ["tbf", "rate", rate, "burst", "64kb", "latency", "2s"]
    subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", *queue], check=True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable()
    subprocess.run(["ip", "link", "set", "lo", "up", "mtu", "1500"], check=True)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    wire = Wire(server.get_host_and_port()[1], delay_s=0.005)
    fsspec.config.conf["s3"] = server_at(wire.port)
    fsspec.filesystem("s3").mkdir("states")
    local = Manifest.create(folder / "local", 1)
    with StateStore.open(local.path) as store:
        engine = engine_on(store)
        engine.precompute(PASSAGES)
        expected = engine.generate(PROMPT).text
    (shard,) = local.shards
    shard.publish()
    export_shard(shard, "s3://states/shard")
    (folder / "shards.json").write_text('{"format": 1, "id": "x", "shards": ["s3://states/shard"]}')
    num_bytes = []
    for rate in RATES:
        shape(rate)
        with StateStore.open(folder) as far:
            assert isinstance(far, ShardedStore)
            assert far.near is not None
            found = engine_on(far, MACHINE).generate(PROMPT)
            assert found.text == expected
            num_bytes.append(found.provenance.bytes_read)
            far.near.clear()
    sys.stdout.write(json.dumps(num_bytes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
