"""Models and their configurations from folders, offline."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag.errors import ModelNotFoundError, UnsupportedModelError
from hcache_rag.models.computing import device_named, dtype_named
from hcache_rag.models.configuration import why_refused


def load_config(path: str) -> Any:
    """The configuration of the model in a folder, without its weights, offline.

    Raises:
        ModelNotFoundError: the folder holds no model.
        UnsupportedModelError: models of its kind cannot be served.
    """
    from transformers import AutoConfig

    if not os.path.isdir(path):
        raise ModelNotFoundError(
            f"{path} is not a model: no such folder; none is downloaded, give a model's folder"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"{path} is not a model: {reason}") from error
    refused = why_refused(config)
    if refused is not None:
        raise UnsupportedModelError(
            f"{path} is of family {config.model_type!r}, which cannot be served: {refused}"
        )
    return config


def load_model(
    path: str, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder, offline.

    Args:
        dtype: "float32", "bfloat16", or "auto": bfloat16 where it pays, see `pays_bfloat16`.
        device: "cpu", "cuda", "cuda:1", or "auto": the GPU where torch sees one, else the CPU.

    Raises:
        ValueError: there is no such device here, or the dtype does not go there.
        ModelNotFoundError: the folder holds no model that transformers can load.
        UnsupportedModelError: models of its kind cannot be served.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = device_named(device)
    its_dtype = dtype_named(dtype, place)
    load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=its_dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"{path} cannot be loaded: {reason}") from error
    model.eval()
    model.to(place)
    return model, tokenizer
