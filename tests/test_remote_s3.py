"""Remote shards on a real S3 server (moto's), over a wire whose rate and delay are limited."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from far import PASSAGES, PROMPT, engine_on
from store_conformance import a_record, held, keys, put, stored, values
from wire import Wire

from hcache_rag import StateStore, StoreError, StoreOpenError
from hcache_rag.profile import HardwareProfile, Rates, ReadRate
from hcache_rag.store.manifest import Manifest
from hcache_rag.store.remote import VALUES, export_shard
from hcache_rag.store.sharded import ShardedStore

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")
import fsspec  # noqa: E402
from s3fs import S3FileSystem  # noqa: E402


@dataclass
class Far:
    """A bucket behind a wire, and the manifest that names its shards."""

    wire: Wire
    s3: Any
    path: Path

    def open(self) -> ShardedStore:
        store = StateStore.open(self.path)
        assert isinstance(store, ShardedStore)
        return store

    def objects(self, name: str) -> list[str]:
        return sorted(path for path in self.s3.find("states") if path.endswith(name))


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def wire(server_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    """What fsspec reaches S3 through."""
    wire = Wire(server_port)
    monkeypatch.setitem(fsspec.config.conf, "s3", server_at(wire.port))
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    yield wire
    wire.close()


def server_at(port: int) -> dict[str, Any]:
    """How fsspec reaches it."""
    config = {"connect_timeout": 5, "read_timeout": 5, "retries": {"max_attempts": 0}}
    address = {"endpoint_url": f"http://127.0.0.1:{port}", "key": "test", "secret": "test"}
    return {**address, "config_kwargs": config}


@pytest.fixture
def far(wire: Wire, server_port: int, tmp_path: Path) -> Iterator[Far]:
    """An empty bucket, and a manifest of no shards."""
    s3 = fsspec.filesystem("s3", **server_at(server_port))
    s3.mkdir("states")
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "shards.json"
    path.write_text('{"format": 1, "id": "x", "shards": []}')
    yield Far(wire, s3, path)
    s3.rm("states", recursive=True)


def export(far: Far, tmp_path: Path, shards: int = 2, *, near_max_bytes: int = 1 << 26) -> Manifest:
    """Publish and export what is in `tmp_path / "local"`."""
    local = Manifest.open(tmp_path / "local")
    manifest = Manifest.open(far.path).with_near_max_bytes(near_max_bytes)
    for shard in local.shards:
        shard.publish()
        export_shard(shard, f"s3://states/{shard.name}")
        manifest = manifest.with_shard(f"s3://states/{shard.name}")
    return manifest


def filled(far: Far, tmp_path: Path, *numbers: int, near_max_bytes: int = 1 << 26) -> None:
    with StateStore.open(Manifest.create(tmp_path / "local", 2).path) as store:
        put(store, *numbers)
    export(far, tmp_path, near_max_bytes=near_max_bytes)


def asked(far: Far) -> int:
    """How often values were asked for, so far."""
    return sum(path.partition("?")[0].endswith(VALUES) for path in far.wire.asked)


def test_states_come_from_an_s3_server(far: Far, tmp_path: Path) -> None:
    filled(far, tmp_path, *range(20))
    with far.open() as store:
        assert held(store) == keys(range(20))
        for number in range(20):
            assert stored(store, a_record(number).key) == values(number)
    before = asked(far)
    with far.open() as store:
        assert asked(far) == before + 1  # how fast is the link?
        for number in range(20):
            assert stored(store, a_record(number).key) == values(number)
    assert asked(far) == before + 1


def test_two_who_ask_at_once_are_one_request(far: Far, tmp_path: Path) -> None:
    filled(far, tmp_path, 1)
    with far.open() as store:
        before = asked(far)
        far.wire.is_cut = True
        found: list[object] = []
        ask = [
            threading.Thread(target=lambda: found.append(stored(store, a_record(1).key)))
            for _ in range(2)
        ]
        for thread in ask:
            thread.start()
        far.wire.is_cut = False
        for thread in ask:
            thread.join(60)
    assert found == [values(1)] * 2
    assert asked(far) == before + 1


def test_what_was_announced_is_not_asked_for_again(far: Far, tmp_path: Path) -> None:
    """Even by who began to read before it had come."""
    filled(far, tmp_path, 1, 2)
    with far.open() as store:
        before = asked(far)
        with store.reading([a_record(1).key]) as reader:
            store.prefetch([a_record(number).text for number in (1, 2)])
            assert store.near is not None
            store.near.flights.join(60)
            assert bytes(reader.value(a_record(1).key, 0, 0)) == values(1)[0][2]
        assert stored(store, a_record(2).key) == values(2)
    assert asked(far) == before + 2


def test_flipped_bytes_in_the_bucket_are_noticed(far: Far, tmp_path: Path) -> None:
    filled(far, tmp_path, 1, 2, 3)
    for path in far.objects(VALUES):
        data = bytearray(far.s3.cat_file(path))
        at = bytes(data).find(values(3)[0][2][:300])
        if at >= 0:
            data[at] ^= 1
        far.s3.pipe_file(path, bytes(data))
    with far.open() as store:
        assert stored(store, a_record(1).key) == values(1)
        assert [damage.key for damage in store.verify().damaged] == [a_record(3).key]


def test_what_is_near_has_a_limit(far: Far, tmp_path: Path) -> None:
    filled(far, tmp_path, *range(80), near_max_bytes=1 << 22)
    with far.open() as store:
        for number in range(80):
            assert stored(store, a_record(number).key) == values(number)
        assert store.near is not None
        assert store.near.store.used_bytes() <= 1 << 22
        assert 5 < len(held(store.near.store)) < 80


def test_a_shard_that_is_replaced_in_place_gives_no_old_values(far: Far, tmp_path: Path) -> None:
    """Who opens it anew has the new ones, and not those that were kept near."""
    filled(far, tmp_path, 1)
    with far.open() as store:
        assert stored(store, a_record(1).key) == values(1)
        new = [(layer, chunk, value[::-1]) for layer, chunk, value in values(1)]
        local = Manifest.open(tmp_path / "local")
        for shard in local.shards:
            shard.reopen()
        with StateStore.open(local.path) as other:
            other.put(a_record(1), new)
            put(other, 2)
        for shard in local.shards:
            shard.publish()
            export_shard(shard, f"s3://states/{shard.name}")
        assert stored(store, a_record(1).key) == values(1)  # near, and as its index says
    with far.open() as store:
        assert stored(store, a_record(1).key) == new
        assert stored(store, a_record(2).key) == values(2)


class _Refusing(BaseHTTPRequestHandler):
    """What S3 says to a key that it does not know."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        body = (
            b"<Error><Code>AccessDenied</Code><Message>The AWS Access Key Id you provided "
            b"does not exist in our records.</Message></Error>"
        )
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_wrong_credentials_are_told_without_them(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(far, tmp_path, 1)
    with serving(_Refusing) as port:
        wrong = server_at(port) | {"key": "nobody", "secret": "pa55word"}
        monkeypatch.setitem(fsspec.config.conf, "s3", wrong)
        with pytest.raises(StoreOpenError, match="PermissionError") as caught:
            far.open()
    assert "pa55word" not in str(caught.value)


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[int]:
    """The port of a server of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


# --- an engine ----------------------------------------------------------------------------------


MACHINE = HardwareProfile(
    "a test's", "none", ReadRate(1e9), ReadRate(1e9), Rates(1e9, 1e9, 1e9, 1e12)
)
"""A disk that is fast, and a processor that takes about as long as a link of some MB/s."""


@pytest.fixture
def expected(far: Far, tmp_path: Path) -> str:
    """The answer from local shards, which are exported."""
    with StateStore.open(Manifest.create(tmp_path / "local", 2).path) as local:
        engine = engine_on(local)
        engine.precompute(PASSAGES)
        text: str = engine.generate(PROMPT).text
    export(far, tmp_path)
    return text


@pytest.mark.usefixtures("one_thread")
def test_a_slower_link_makes_the_planner_compute_more(far: Far, expected: str) -> None:
    """At the first question already; the answers are the same at every rate."""
    shares = []
    for bytes_per_s in (None, 8e6, 2e6, 3e5):
        far.wire.bytes_per_s = bytes_per_s
        with far.open() as store:
            provenance = engine_on(store, MACHINE).plan(PROMPT)
            assert store.near is not None
            (link,) = store.near._links.values()
            assert link.rate is not None
            assert bytes_per_s is None or link.rate.bytes_per_s <= 1.2 * bytes_per_s
            found = engine_on(store, MACHINE).generate(PROMPT)
            assert found.text == expected
            assert found.provenance.restored_tokens == provenance.restored_tokens
            shares.append(found.provenance.bytes_read)
            store.near.clear()
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 2 * shares[-1]
    assert shares[-1] == 0


def test_it_does_so_in_a_network_namespace(tmp_path: Path) -> None:
    """The kernel's own queue limits the rate there; the relay adds the delay."""
    namespace = ["unshare", "--map-root-user", "--net"]
    for tool in ("unshare", "ip", "tc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    able = "ip link set lo up && tc qdisc add dev lo root tbf rate 1mbit burst 64kb latency 1s"
    tried = subprocess.run([*namespace, "sh", "-c", able], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespace with a limited rate here: {tried.stderr.decode().strip()}")
    here = Path(__file__).parent
    roots = [here, here.parent, *(here.parent / n for n in ("kernels", "indexers", "benchmarks"))]
    done = subprocess.run(
        [*namespace, sys.executable, str(here / "in_namespace.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    num_bytes = json.loads(done.stdout.splitlines()[-1])
    assert num_bytes == sorted(num_bytes, reverse=True)
    assert num_bytes[0] > 2 * num_bytes[-1]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("how", ["refused", "silent", "gone"])
def test_an_answer_comes_where_the_states_do_not(how: str, far: Far, expected: str) -> None:
    """Recomputed, counted and told; nobody waits for what did not come before."""
    with far.open() as store:
        assert store.near is not None
        store.near.flights.wait_s = 0.5
        engine = engine_on(store)
        before = asked(far)
        if how == "refused":
            far.wire.close()
        elif how == "silent":
            far.wire.is_cut = True
        else:
            for path in far.objects(VALUES):
                far.s3.rm(path)
        found = engine.generate(PROMPT)
        assert found.provenance.missed_tokens == sum(len(text.strip()) for text in PASSAGES)
        assert found.provenance.restored_tokens <= len("Read: ")
        assert found.provenance.documents_missed == len(PASSAGES)
        assert len(found.provenance.warnings) >= 1
        assert asked(far) <= before + (len(PASSAGES) if how == "gone" else 8)


@pytest.mark.usefixtures("one_thread")
def test_what_is_near_answers_while_the_server_is_away(far: Far, expected: str) -> None:
    """Opened by the index that was seen last."""
    with far.open() as store:
        assert engine_on(store).generate(PROMPT).text == expected
        assert store.near is not None
        store.near.flights.join(60)
    far.wire.is_cut = True
    near = "hcache_rag.store.near.WAIT_S"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, 0.3)
        with far.open() as store:
            found = engine_on(store).generate(PROMPT)
    assert found.text == expected
    assert found.provenance.documents_missed == 0


# --- a file server ------------------------------------------------------------------------------


class _Files(SimpleHTTPRequestHandler):
    """Files, and the ranges of files that are asked for."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            return super().do_GET()
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        data = Path(self.translate_path(self.path)).read_bytes()
        part = data[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def test_states_come_from_a_file_server_by_http(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And its URL's password is told to nobody."""
    pytest.importorskip("aiohttp")
    local = Manifest.create(tmp_path / "local", 1)
    with StateStore.open(local.path) as store:
        put(store, *range(5))
    (shard,) = local.shards
    shard.publish()
    export_shard(shard, f"file://{tmp_path}/files/{shard.name}")
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "shards.json"
    path.write_text('{"format": 1, "id": "x", "shards": []}')
    with serving(partial(_Files, directory=str(tmp_path / "files"))) as port:
        url = f"http://reader:pa55word@127.0.0.1:{port}/{shard.name}"
        manifest = Manifest.open(path).with_shard(url)
        with StateStore.open(path) as store:
            for number in range(5):
                assert stored(store, a_record(number).key) == values(number)
    for each in (tmp_path / "here" / "near").rglob("*.json"):
        assert "pa55word" not in each.read_text()
    for seen in (tmp_path / "here" / "near" / "index").glob("*.json"):
        seen.unlink()
    caplog.set_level(logging.DEBUG, logger="hcache_rag")
    with pytest.raises(StoreOpenError) as caught:
        StateStore.open(path)
    for said in (str(caught.value), repr(caught.value), repr(manifest), caplog.text):
        assert "pa55word" not in said
    assert caught.value.__cause__ is None
    assert "***@127.0.0.1" in str(caught.value)
    with pytest.raises(StoreError) as refused:
        export_shard(shard, url)
    assert "pa55word" not in str(refused.value)
