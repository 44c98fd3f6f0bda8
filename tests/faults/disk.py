"""Full disks."""

from __future__ import annotations

import os
import random
import resource
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from faults.documents import Known, a_record, a_state, is_whole
from faults.files import PAGE
from faults.looking import is_well, look, opened
from faults.outcomes import Outcome, Sight
from faults.processes import Child, Report, one_by_one
from hcache_rag.errors import StoreError
from hcache_rag.store import Durability, NewState, StateStore


def disk_full(count: int, seed: int) -> Outcome:
    """Files may not grow beyond some byte of a write; `refused` are writes that failed of it.

    `lost` are documents that were there before and are not, then or afterwards, for the writing
    process or for another one.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        records = [a_record(number, tokens=80) for number in range(12)]
        more = [a_state(a_record(100 + number, tokens=200)) for number in range(6)]
        again = [a_state(a_record(number, tokens=80, layout=(number + 1) % 3)) for number in (1, 2)]
        new = [state.record for state in (*more, *again)]
        gone = [records[4], *(state.record for state in more)]
        before = Known.of((*records, *new), without=gone)
        with StateStore.open(folder / "original") as store:
            store.put_all([a_state(record) for record in records])
            store.delete(records[4].key)  # leaves free pages
        data = (folder / "original" / "data.mdb").read_bytes()

        def work(number: int) -> Sight:
            source = random.Random(f"{seed}/{number}")
            path = folder / f"{number}"
            path.mkdir()
            (path / "data.mdb").write_bytes(data)
            states = [*more[: source.randint(1, 6)], *again[: source.randint(0, 2)]]
            growth = sum(len(value) for state in states for _, _, value in state.values)
            limit = source.randrange(2 * PAGE, len(data) + 3 * growth)
            durability: Durability = source.choice(("fsync", "fast"))
            sight = _fill(path, states, limit, before, durability, folder)
            shutil.rmtree(path)
            return sight

        about = "[seed {}, number {}]".format
        outcome = one_by_one(Outcome("disk full"), work, partial(about, seed), count, folder)
        outcome.acknowledged = outcome.count * len(before.expected)
        return outcome


def _fill(
    path: Path,
    new: Sequence[NewState],
    limit: int,
    before: Known,
    durability: Durability,
    folder: Path,
) -> Sight:
    """Write while files may not grow beyond `limit` bytes, and once more when they may."""
    sight = Sight()
    lost = {"missed": "lost", "refused": "lost"}
    go, told = os.pipe()

    def beside(report: Report) -> None:
        os.close(told)
        os.read(go, 1)
        seen = Sight()
        with opened(seen, path, read_only=True) as store:
            if store is not None:
                look(store, before, seen)
        report(asdict(seen))

    other = Child.start(beside, folder / "beside")  # forked before the store is open
    os.close(go)
    refusal = ""
    with opened(sight, path, durability=durability) as store:
        if store is None:
            raise RuntimeError(f"a whole store cannot be opened: {sight}")
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with sight.step("put_all"):
            try:
                store.put_all(new)
            except StoreError as error:  # StoreFullError among them
                refusal = str(error)
        sight.take(look(store, before), as_kind=lost)
        for state in new:
            is_new = state.record.key not in before.expected
            if is_whole(store, state.record) == bool(refusal) and (is_new or not refusal):
                sight.add("wrong", "a write is there in part", refusal)
        os.write(told, b".")
        for report in other.reports():
            sight.take(Sight(**report), as_kind=lost)
        end = other.end()
        if end:
            sight.add("wrong", f"another process: {end}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        with sight.step("writing on"):
            try:
                store.put_all(new)
            except StoreError as error:
                sight.add("wrong", "cannot write on", f"after {refusal!r}: {error}")
            else:
                if not all(is_whole(store, state.record) for state in new):
                    sight.add("wrong", "what is written then is not there")
        sight.take(look(store, before), as_kind=lost)
    os.close(told)
    sight.take(is_well(path, before))
    if refusal:
        sight.add("refused", refusal)
    return sight
