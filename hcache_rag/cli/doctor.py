"""`hcache-rag doctor`: is everything here, does it fit, and does it work."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hcache_rag.errors import HCacheError

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "llama-index-core",
    "lmdb",
    "faiss-cpu",
    "sentence-transformers",
)
_MIN_FREE_BYTES = 1 << 30
_PASSAGES = (
    "The harbour of Saltmere has a red lighthouse that was built in 1862. It is 31 metres tall.",
    "The library of Saltmere opens at nine in the morning and closes at six in the evening.",
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    ok: bool
    detail: str


def examine(model: str | None, store: Path | None) -> list[Check]:
    """Run all checks; none of them raises."""
    checks = [_versions(), *_room(store)]
    if store is not None:
        checks.append(_guarded("store", lambda: _store(store)))
    checks.append(_guarded("model and self-check", lambda: _self_check(model)))
    return checks


def _guarded(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, True, check())
    except (HCacheError, OSError, ValueError, RuntimeError) as error:
        return Check(name, False, str(error))


def _versions() -> Check:
    found, missing = [f"python {platform.python_version()}"], []
    for package in ("hcache-rag", *_PACKAGES):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Check("versions", False, f"not installed: {', '.join(missing)}")
    return Check("versions", True, ", ".join(found))


def _room(store: Path | None) -> list[Check]:
    place = store or Path.cwd()
    while not place.exists():
        place = place.parent
    disk = shutil.disk_usage(place).free
    checks = [Check("disk", disk >= _MIN_FREE_BYTES, f"{disk / 2**30:.1f} GiB free at {place}")]
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        checks.append(Check("memory", memory >= _MIN_FREE_BYTES, f"{memory / 2**30:.1f} GiB free"))
    return checks


def _store(store: Path) -> str:
    from hcache_rag.llama_index.folder import open_states
    from hcache_rag.llama_index.model_choice import STATES
    from hcache_rag.llama_index.persisted import load_index
    from hcache_rag.profile import PROFILE_NAME, HardwareProfile

    nodes = len(load_index(store).nodes)
    profile = store / STATES / PROFILE_NAME
    if profile.is_file():
        HardwareProfile.load(profile)
    with open_states(store) as states:
        found = states.stats()
    return f"{nodes} passages indexed, {found.documents} with states ({found.tokens} tokens)"


def _self_check(model: str | None) -> str:
    """Store two passages, restore the one that is exact, compare with full prefill."""
    from hcache_rag import GenerationOptions, HCacheEngine, StateStore
    from hcache_rag.bundled import MODEL_NAME, default_model_path
    from hcache_rag.models import load_model

    loaded, tokenizer = load_model(model or str(default_model_path()))
    name = model or MODEL_NAME
    preamble = "Read this and answer the question.\n"
    prompt = f"{preamble}{_PASSAGES[0]}\nQuestion: How tall is it?\nAnswer: The lighthouse is"
    options = GenerationOptions(max_new_tokens=8, temperature=0)
    with tempfile.TemporaryDirectory(prefix="hcache-rag-") as folder:
        answers = []
        for part, texts in (("full", ()), ("restored", _PASSAGES)):
            with StateStore.open(Path(folder) / part) as store:
                engine = HCacheEngine(
                    loaded, tokenizer, store, preamble=preamble, fidelity="exact", name=name
                )
                engine.precompute(texts)
                answers.append(engine.generate(prompt, options=options))
    full, restored = answers
    if not restored.provenance.exact_tokens:
        raise RuntimeError(f"{name}: nothing was restored")
    if restored.token_ids != full.token_ids:
        raise RuntimeError(f"{name}: restored {restored.text!r}, full prefill {full.text!r}")
    tokens = restored.provenance
    return (
        f"{name}: {tokens.exact_tokens} of {tokens.prompt_tokens} tokens restored, "
        f"same answer as full prefill ({restored.text.strip()!r})"
    )
