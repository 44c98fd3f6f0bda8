"""The pipeline on a simulated device: every order that streams and events allow is right.

And every synchronisation in it is needed: taken out one by one, or put in the wrong place, each is
found. Work on the model's stream is made up here; the whole engine follows in test_device_engine.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hcache_rag import pipeline as pipeline_module
from hcache_rag.device import Event, simulated
from hcache_rag.device import ring as ring_module
from hcache_rag.device.races import POISON, RaceError, byte_runs
from hcache_rag.device.ring import Ring
from hcache_rag.device.simulated import SimulatedDevice
from hcache_rag.device.threads import ThreadDevice
from hcache_rag.layout import LayerFormat, Representation
from hcache_rag.pipeline import Pipeline
from hcache_rag.schedule import ChunkUse, Piece
from hcache_rag.spec import ModelSpec
from hcache_rag.staging import Chunk, StagedPiece

ROOT = Path(__file__).parent.parent
SEEDS = 1000
SEEDS_OF_A_MUTANT = 25
G, D = 2, 4
SPEC = ModelSpec("sim", "llama", 2, 8, 2, G, D, 64, "float32", 8)
FORMATS = [
    LayerFormat(Representation.KV, "float32"),
    LayerFormat(Representation.HIDDEN, "float32"),
    LayerFormat(Representation.HIDDEN, "int8-smooth"),
]

pytestmark = pytest.mark.usefixtures("one_thread")


def random_chunk(fmt: LayerFormat, tokens: int, source: random.Random) -> Chunk:
    """A chunk's arrays, with small whole numbers in them."""
    parts = []
    for part in fmt.parts(SPEC, tokens):
        dtype = torch.int8 if part.element_bytes == 1 else torch.float32
        count = torch.Size(part.shape).numel()
        numbers = [source.randrange(100) for _ in range(count)]
        parts.append(torch.tensor(numbers).to(dtype).view(part.shape))
    return tuple(parts)


def restored(piece: Piece, chunks: tuple[Chunk, ...]) -> tuple[Tensor, Tensor]:
    """What stands for K and V here: something that needs every byte of every chunk."""
    keys, values = [], []
    for use, chunk in zip(piece.chunks, chunks, strict=True):
        if piece.fmt.representation is Representation.KV:
            keys.append(2 * chunk[0])
            values.append(chunk[1] + 1)
            continue
        rows = chunk[0].float() * chunk[1][:, None]
        for scale in chunk[2:]:
            rows = rows * (scale[:, None] if len(scale) == use.tokens else scale)
        keys.append(rows.view(use.tokens, G, D).transpose(0, 1))
        values.append(-keys[-1])
    return torch.cat(keys, 1), torch.cat(values, 1)


def write_restored(keys: Tensor, values: Tensor, piece: Piece, staged: StagedPiece) -> None:
    """The work of the projecting stream."""
    made = restored(piece, staged.chunks)
    keys.copy_(made[0])
    values.copy_(made[1])


def random_pieces(source: random.Random) -> tuple[list[list[Piece]], int]:
    """Each layer's pieces, and how many rows they have."""
    layers: list[list[Piece]] = []
    counts = [source.randrange(1, 4) for _ in range(source.randrange(1, 7))]
    while counts:
        row, uses, layer, fmt = 0, [], [], source.choice(FORMATS)
        for index, tokens in enumerate(counts):
            uses.append(ChunkUse(0, index, tokens, row))
            row += tokens
            if source.random() < 0.6 or index == len(counts) - 1:
                layer.append(Piece(fmt, tuple(uses)))
                uses = []
        layers.append(layer)
        if len(layers) == SPEC.num_layers:
            return layers, row
    raise AssertionError


class MadeUpError(Exception):
    """A launch did not go."""


@contextmanager
def failing_launch(device: Any, verb: str) -> Iterator[None]:
    """In the block, launching a kind of work fails when some of it is on its way."""
    launch = device.launch

    def launching(*args: Any, name: str, **kwargs: Any) -> None:
        launch(*args, name=name, **kwargs)
        if name == f"hcache {verb}":
            raise MadeUpError

    device.launch = launching
    try:
        yield
    finally:
        del device.launch


class Session:
    """Some requests on one ring, with a model that is made up."""

    def __init__(self, device: Any, seed: int) -> None:
        self.device = device
        self.source = random.Random(seed)
        self.ring = Ring(device, self.source.randrange(1, 5))
        self.model = device.current_stream()
        self.cache: tuple[Tensor, Tensor] | None = None
        self.checks: list[tuple[Tensor, Tensor]] = []
        self.fails = ""

    def acting_as(self, name: str) -> Any:
        return self.device.acting_as(name)

    def run(self) -> None:
        """Several requests; then what the model's stream saw is what it should have seen.

        Raises:
            RaceError, AssertionError: a bug was found.
        """
        for number in range(self.source.randrange(1, 4)):
            with self.acting_as("model"):
                if self.source.random() < 0.2:
                    self.drop_ring()
                self.request(number)
        with self.acting_as("model"):
            self.device.record(self.model).wait()
        for seen, expected in self.checks:
            assert torch.equal(seen, expected)

    def drop_ring(self) -> None:
        """As when a pool lets go of buffers: device memory goes to whom the model's stream serves.

        Pinned memory is let go by torch when the copies that it knows of have ended.
        """
        for slot in self.ring._slots:
            self.device.free(slot.memory)
        self.ring = Ring(self.device, self.source.randrange(1, 5))

    def on_model(
        self, work: Callable[[], object], reads: list[Tensor], writes: list[Tensor], name: str
    ) -> None:
        self.device.launch(self.model, work, reads=reads, writes=writes, name=name)

    def buffers(self, rows: int) -> tuple[Tensor, Tensor]:
        """K and V (L, G, rows + 1, D): those of the last request, or new ones."""
        keeps = self.source.random() < 0.5
        if keeps and self.cache is not None and self.cache[0].shape[2] > rows:
            return self.cache
        for side in self.cache or ():
            self.device.free(side)
        shape = (SPEC.num_layers, G, rows + 1, D)
        size = 4 * torch.Size(shape).numel()
        made = [self.device.memory(size).view(torch.float32).view(shape) for _ in range(2)]
        self.cache = (made[0], made[1])
        return self.cache

    def request(self, number: int) -> None:
        """Submit and join in a random order, or stop half way; then decode a token."""
        layers, rows = random_pieces(self.source)
        keys, values = self.buffers(rows)
        pipeline = Pipeline(self.ring, SPEC)
        todo = [(layer, piece) for layer, pieces in enumerate(layers) for piece in pieces]
        submitted: dict[tuple[int, int], Event] = {}
        expected: dict[int, list[tuple[Tensor, Tensor]]] = {}
        stop_after = self.source.randrange(len(todo)) if self.source.random() < 0.3 else None
        fail_after = self.source.randrange(len(todo)) if self.source.random() < 0.3 else None
        with suppress(MadeUpError), pipeline.running(piece for layer in layers for piece in layer):
            joined = 0
            while joined < len(todo) and joined != stop_after:
                at = len(submitted)
                if at < len(todo) and (at == joined or self.source.random() < 0.6):
                    layer, piece = todo[at]
                    self.fails = self.source.choice(("copy", "restore")) if at == fail_after else ""
                    with self.acting_as(f"reading {number}"):
                        event, made = self.submit(pipeline, layer, piece, keys, values)
                    submitted[layer, at] = event
                    expected.setdefault(layer, []).append(made)
                    continue
                layer, _ = todo[joined]
                pipeline.join(submitted[layer, joined])
                joined += 1
                if joined == len(todo) or todo[joined][0] != layer:
                    self.attend(layer, rows, keys, values, expected[layer])
        self.decode(rows, keys, values)

    def submit(
        self, pipeline: Pipeline, layer: int, piece: Piece, keys: Tensor, values: Tensor
    ) -> tuple[Event, tuple[Tensor, Tensor]]:
        """Submit a piece whose chunks on the host are gone afterwards."""
        chunks = tuple(random_chunk(piece.fmt, use.tokens, self.source) for use in piece.chunks)
        made = restored(piece, chunks)
        targets = [side[layer, :, piece.start : piece.stop] for side in (keys, values)]
        work = partial(write_restored, targets[0], targets[1], piece)
        with failing_launch(self.device, self.fails):
            event = pipeline.submit(piece, chunks, work, targets)
        for chunk in chunks:
            for part in chunk:
                part.view(-1).view(torch.uint8).fill_(POISON)
        return event, made

    def attend(
        self,
        layer: int,
        rows: int,
        keys: Tensor,
        values: Tensor,
        expected: list[tuple[Tensor, Tensor]],
    ) -> None:
        """The model reads a layer's K and V."""
        reads = [keys[layer, :, :rows], values[layer, :, :rows]]
        seen = torch.zeros(2, G, rows, D)
        sides = zip(*expected, strict=True)
        self.on_model(lambda: seen.copy_(torch.stack(reads)), reads, [seen], f"attend {layer}")
        self.checks.append((seen, torch.stack([torch.cat(x, 1) for x in sides])))

    def decode(self, rows: int, keys: Tensor, values: Tensor) -> None:
        """The model reads K and V, and writes those of a new token."""
        fresh = [side[:, :, rows] for side in (keys, values)]
        self.on_model(lambda: [side.fill_(7) for side in fresh], [], fresh, "decode")
        total = torch.zeros(1)
        old = [keys[:, :, :rows], values[:, :, :rows]]
        self.on_model(lambda: total.add_(1), [*old, *fresh], [total], "attend all")


def run(seed: int, **options: Any) -> SimulatedDevice:
    device = SimulatedDevice(seed, **options)
    Session(device, seed).run()
    return device


# --- as it is, it is right --------------------------------------------------------------------


@pytest.mark.parametrize("part", range(10))
def test_no_order_of_the_work_is_wrong(part: int) -> None:
    """A thousand seeds: no race, and the model reads what was restored."""
    for seed in range(part * SEEDS // 10, (part + 1) * SEEDS // 10):
        run(seed)


def test_work_touches_what_it_declares_and_nothing_else() -> None:
    """So that a race cannot hide behind a wrong declaration."""
    for seed in range(40):
        run(seed, checks_declarations=True)


def test_a_device_of_threads_does_the_same() -> None:
    """Real concurrency, a thread for each stream; the values are right."""
    for seed in range(20):
        with ThreadDevice() as device:
            session = Session(device, seed)
            session.acting_as = lambda name: ExitStack()  # type: ignore[method-assign]
            session.run()


def test_an_error_of_a_stream_comes_out_where_the_model_waits() -> None:
    """Not lost in a thread."""
    with ThreadDevice() as device:
        stream = device.new_stream("copying")

        def fail() -> None:
            raise OSError("made up")

        device.launch(stream, fail, reads=[], writes=[], name="fail")
        with pytest.raises(OSError, match="made up"):
            device.current_stream().wait_event(device.record(stream))


# --- and nothing of it may be missing ---------------------------------------------------------

Site = tuple[str, int]
"""A file's name and a line in it."""


def site() -> Site:
    """The line of the pipeline or of the ring that has called what calls this."""
    frame: Any = sys._getframe(2)
    place = ("", 0)
    while frame is not None and not is_ours(place):
        place = frame.f_code.co_filename.rpartition("/")[2], frame.f_lineno
        frame = frame.f_back
    return place


def is_ours(place: Site) -> bool:
    return place[0] in ("pipeline.py", "ring.py")


@contextmanager
def patched(patches: list[tuple[Any, str, Any]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in patches:
            patch.setattr(owner, name, value)
        yield


WAITS: list[tuple[Any, str]] = [(simulated._Queue, "wait_event"), (simulated._Point, "wait")]


def without_wait(target: Site | None, seen: set[Site]) -> list[tuple[Any, str, Any]]:
    """Waiting, of a stream or of the host, is left out at one place."""

    def leaving_out(original: Any) -> Any:
        def wait(*args: Any) -> None:
            place = site()
            if is_ours(place):
                seen.add(place)
            if place != target:
                original(*args)

        return wait

    return [(owner, name, leaving_out(getattr(owner, name))) for owner, name in WAITS]


def recorded_early(target: Site | None, seen: set[Site]) -> list[tuple[Any, str, Any]]:
    """At one place an event is recorded in front of the last work instead of behind it."""
    launch, record = SimulatedDevice.launch, SimulatedDevice.record
    early: dict[int, Event] = {}

    def launching(self: SimulatedDevice, stream: Any, *args: Any, **kwargs: Any) -> None:
        early[id(stream)] = record(self, stream)
        launch(self, stream, *args, **kwargs)

    def recording(self: SimulatedDevice, stream: Any) -> Event:
        place = site()
        if is_ours(place) and id(stream) in early:
            seen.add(place)
        if place != target or id(stream) not in early:
            return record(self, stream)
        return early[id(stream)]

    return [(SimulatedDevice, "launch", launching), (SimulatedDevice, "record", recording)]


def on_another_stream(target: Site | None, seen: set[Site]) -> list[tuple[Any, str, Any]]:
    """At one place work goes to a stream that nobody else uses."""
    launch = SimulatedDevice.launch

    def launching(self: SimulatedDevice, stream: Any, *args: Any, **kwargs: Any) -> None:
        place = site()
        if is_ours(place):
            seen.add(place)
        launch(self, self.new_stream("other") if place == target else stream, *args, **kwargs)

    return [(SimulatedDevice, "launch", launching)]


MUTATIONS = {
    "a wait left out": without_wait,
    "an event recorded early": recorded_early,
    "work on a wrong stream": on_another_stream,
}


def sites(mutation: Any) -> list[Site]:
    """All places where a mutation can be made."""
    seen: set[Site] = set()
    with patched(mutation(None, seen)):
        for seed in range(20):
            run(seed)
    return sorted(seen)


def found(patches: list[tuple[Any, str, Any]], **options: Any) -> int:
    """In how many seeds a mutant is found."""
    count = 0
    with patched(patches):
        for seed in range(SEEDS_OF_A_MUTANT):
            try:
                run(seed, **options)
            except AssertionError:
                count += 1
    return count


@pytest.mark.parametrize("kind", MUTATIONS)
def test_every_synchronisation_is_needed_and_its_absence_is_found(kind: str) -> None:
    """Each line that waits, records or launches, broken alone."""
    mutation = MUTATIONS[kind]
    places = sites(mutation)
    assert len(places) == {"a wait left out": 8}.get(kind, 4), places
    missed = [place for place in places if not found(mutation(place, set()))]
    assert missed == []


ORDERS = {
    "filling a slot": {"slot.copied.wait()"},
    "freeing pinned memory": {"slot.copied.wait()"},
    "a copy": {"ring.copying.wait_event(slot.used)"},
    "a kernel": {"ring.projecting.wait_event(slot.copied)"},
    "the model's layer": {"self._device.current_stream().wait_event(restored)"},
    "a request's first copy": {"ring.copying.wait_event(device.record(model))"},
    "what follows a request": {"model.wait_event(copied)", "model.wait_event(used)"},
}
"""The rows of the table in docs/gpu.md, and the lines that make them."""


def test_the_orders_of_the_docs_are_the_waits_that_there_are() -> None:
    """No row without a line, no line without a row; each is broken alone in the test before."""
    text = (ROOT / "docs" / "gpu.md").read_text()
    table = text.partition("These are all orders that there are:")[2].partition("\n\nA request")[0]
    rows = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert rows == list(ORDERS)
    places = {"pipeline.py": pipeline_module, "ring.py": ring_module}
    lines = [
        inspect.getsource(places[name]).splitlines()[number - 1].partition("#")[0].strip()
        for name, number in sites(without_wait)
    ]
    assert sorted(lines) == sorted(line for its in ORDERS.values() for line in its)


@dataclass(frozen=True)
class Bug:
    """Something else that one can do wrong."""

    label: str
    patches: Callable[[], list[tuple[Any, str, Any]]]
    checks_declarations: bool = False


def slots_share(side: str) -> list[tuple[Any, str, Any]]:
    """The first two slots of a ring have the same memory."""
    fit = Ring.fit

    def fitting(self: Ring, num_bytes: int) -> None:
        fit(self, num_bytes)
        if len(self._slots) > 1:
            setattr(self._slots[1], side, getattr(self._slots[0], side))

    return [(Ring, "fit", fitting)]


def a_freed_ring_is_used() -> list[tuple[Any, str, Any]]:
    """Growing frees the slots, and goes on with them."""
    fit = Ring.fit

    def fitting(self: Ring, num_bytes: int) -> None:
        old = list(self._slots)
        fit(self, num_bytes)
        if old and old[0] is not self._slots[0]:
            self._turn = iter(old * 100)

    return [(Ring, "fit", fitting)]


def failures_are_forgotten() -> list[tuple[Any, str, Any]]:
    """A slot whose work was launched in part counts as it was before."""
    return [(Ring, "settle", lambda *_: None)]


def filling_is_launched() -> list[tuple[Any, str, Any]]:
    """The pinned memory is filled some time later, when the store's map may be gone."""

    def later(self: SimulatedDevice, work: Any, **kwargs: Any) -> None:
        copying = next(s for s in self._streams if s.name.startswith("copying"))
        self.launch(copying, work, **kwargs)

    return [(SimulatedDevice, "on_host", later)]


def nothing_is_declared(which: str) -> list[tuple[Any, str, Any]]:
    """Work reads, or writes, more than it says."""
    launch = SimulatedDevice.launch

    def launching(self: SimulatedDevice, stream: Any, work: Any, **kwargs: Any) -> None:
        if kwargs["name"].startswith("hcache"):
            kwargs[which] = []
        launch(self, stream, work, **kwargs)

    return [(SimulatedDevice, "launch", launching)]


def joining_the_piece_before() -> list[tuple[Any, str, Any]]:
    """The model waits for an event that is one behind."""
    submit = Pipeline.submit

    def submitting(self: Any, *args: Any) -> Event:
        before: Event | None = getattr(self, "last", None)
        self.last = made = submit(self, *args)
        return before or made

    return [(Pipeline, "submit", submitting)]


def one_stream_waits_for_the_other() -> list[tuple[Any, str, Any]]:
    """Two streams wait for each other."""

    def recording(self: SimulatedDevice, stream: Any) -> Any:
        return simulated._Point(self, {})  # never reached

    return [(SimulatedDevice, "record", recording)]


BUGS = [
    Bug("two slots share pinned memory", lambda: slots_share("pinned")),
    Bug("two slots share device memory", lambda: slots_share("memory")),
    Bug("a ring that was freed is used", a_freed_ring_is_used),
    Bug("what failed half way is forgotten", failures_are_forgotten),
    Bug("pinned memory is filled later", filling_is_launched),
    Bug("reads are not declared", lambda: nothing_is_declared("reads"), True),
    Bug("writes are not declared", lambda: nothing_is_declared("writes"), True),
    Bug("the model joins the piece before", joining_the_piece_before),
    Bug("streams wait in vain", one_stream_waits_for_the_other),
]


@pytest.mark.parametrize("bug", BUGS)
def test_other_bugs_are_found(bug: Bug) -> None:
    """As a race, or as K and V that are not what was stored."""
    assert found(bug.patches(), checks_declarations=bug.checks_declarations)


def test_a_ring_needs_no_more_than_its_slots() -> None:
    """Memory is made once for each slot, and again only when a larger piece comes."""
    device = SimulatedDevice()
    ring = Ring(device, 3)
    for num_bytes in (64, 32, 64, 128, 128):
        ring.fit(num_bytes)
    sizes = sorted(len(memory) for memory in device.races.alive.values())
    assert sizes == sorted([64] * 6 + [128] * 6)
    assert ring_module.SLOTS > 1


# --- the simulated device itself --------------------------------------------------------------


def test_bytes_of_a_view() -> None:
    """Stretches, for any strides."""
    whole = torch.zeros(2, 3, 4)
    assert byte_runs(whole) == [(0, 96)]
    assert byte_runs(whole[:, 1:2]) == [(16, 32), (64, 80)]
    assert byte_runs(whole[1, :, 1]) == [(52, 56), (68, 72), (84, 88)]
    assert byte_runs(whole.transpose(0, 2)) == [(0, 96)]
    assert byte_runs(whole[:0]) == []


def test_touching_different_bytes_is_no_race() -> None:
    """Two streams may write two halves."""
    device = SimulatedDevice()
    whole = torch.zeros(8)
    for number, part in enumerate((whole[:4], whole[4:])):
        stream = device.new_stream(str(number))
        device.launch(stream, lambda: None, reads=[], writes=[part], name="write")
    with pytest.raises(RaceError, match="in no order"):
        device.on_host(lambda: None, reads=[whole[3:4]], writes=[], name="read")
