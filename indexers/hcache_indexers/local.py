"""The offline indexing job on one machine: states for a folder of documents, without a retriever.

For programs that retrieve with an index of their own: `hcache-index FOLDER --states DIR` fills a
state store that `HCacheLLM(store=DIR)` reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from hcache_rag.errors import HCacheError
from hcache_rag.indexing import PrecomputeReport
from hcache_rag.sources import read_folder


def index_states(
    folder: Path, states: Path, *, model: str | None = None, show_progress: bool = False
) -> PrecomputeReport:
    """Store the states of every file of `folder`, each as one document.

    Raises:
        SourceError, ModelError, StoreError: see there.
    """
    from hcache_rag.llama_index import HCacheLLM

    contents = read_folder(folder)
    texts = [file.text for file in contents.files]
    llm = HCacheLLM(model, store=states)
    try:
        with tqdm(total=len(texts), unit="doc", disable=not show_progress) as bar:

            def advance(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            report = llm.engine.precompute(texts, on_progress=advance)
            return replace(report, skipped=(*contents.skipped, *report.skipped))
    finally:
        llm.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the job."""
    parser = argparse.ArgumentParser(prog="hcache-index", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of text files, one document each")
    parser.add_argument("--states", type=Path, required=True, help="folder of the state store")
    parser.add_argument("--model", help="folder of a transformers model")
    options = parser.parse_args(arguments)
    try:
        report = index_states(
            options.folder, options.states, model=options.model, show_progress=True
        )
    except HCacheError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was stored stays, the next run goes on from there\n")
        sys.exit(130)
    for name, reason in report.skipped:
        sys.stderr.write(f"skipped {name}: {reason}\n")
    sys.stdout.write(
        f"{report.stored} stored, {report.reused} were there already, "
        f"{len(report.skipped)} skipped\n"
    )


if __name__ == "__main__":
    main()
