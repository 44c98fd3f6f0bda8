"""What differs between model families, and the model's part of capturing and restoring.

A family is an entry of `FAMILIES`: where its modules are. Nothing of a model is changed; hooks
are removed when their block ends. Knows neither storage nor plans.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from hcache_kernels import fold_projection
from hcache_rag.errors import ModelNotFoundError, UnsupportedModelError
from hcache_rag.identity import model_fingerprint, signs_of_change, unwrapped
from hcache_rag.layout import Representation
from hcache_rag.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Family:
    """Where a model family keeps what capturing and restoring need, as attribute paths."""

    decoder: str = "model"
    layers: str = "layers"
    rotary: str = "rotary_emb"
    norm: str = "input_layernorm"
    norm_eps: str = "variance_epsilon"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"


FAMILIES = {"llama": Family(), "mistral": Family(), "qwen2": Family()}
"""The families that can be restored, by transformers' `model_type`."""


@dataclass(frozen=True, slots=True)
class CapturedLayer:
    """A layer of a captured batch: (hidden (B, T, E), None) or (K before RoPE, V) (B, T, G * D).

    Both are None where nothing was to be caught.
    """

    first: Tensor | None
    second: Tensor | None


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer's way from its input to K and V, see `hcache_kernels.project_kv`."""

    weight: Tensor
    bias: Tensor | None


class ModelAdapter:
    """A loaded decoder, seen as capturing and restoring see it.

    Args:
        model: a transformers causal language model of one of `FAMILIES`, or a `PeftModel` of one.
        name: what a person calls it; by default the path that it was loaded from.

    Raises:
        UnsupportedModelError: the family, or a feature of this model, cannot be restored.
    """

    def __init__(self, model: PreTrainedModel, name: str | None = None) -> None:
        model = unwrapped(model)
        config = model.config
        family = FAMILIES.get(config.model_type)
        if family is None:
            known = ", ".join(sorted(FAMILIES))
            raise UnsupportedModelError(
                f"models of family {config.model_type!r} are not supported; supported: {known}"
            )
        self.model = model
        self.family = family
        self.decoder: Any = model.get_submodule(family.decoder)
        self.layers = list(self.decoder.get_submodule(family.layers).children())
        self.rotary: Any = self.decoder.get_submodule(family.rotary)
        self.norms: list[Any] = [layer.get_submodule(family.norm) for layer in self.layers]
        self.key_projections: list[Any] = [x.get_submodule(family.key) for x in self.layers]
        self.value_projections: list[Any] = [x.get_submodule(family.value) for x in self.layers]
        self.query_projections: list[Any] = [x.get_submodule(family.query) for x in self.layers]
        self.spec = spec_of(
            config,
            name or str(config.name_or_path or config.model_type),
            str(model.dtype).removeprefix("torch."),
        )
        _check_projections(self)
        self._signs = signs_of_change(model)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch_dtype(self.spec.dtype)

    @cached_property
    def fingerprint(self) -> str:
        """See `hcache_rag.identity.model_fingerprint`."""
        return model_fingerprint(self.model)

    @property
    def is_changed(self) -> bool:
        """Whether weights, or which adapters are in use, are others than when this was made."""
        return signs_of_change(self.model) != self._signs

    def position_embeddings(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own RoPE cosines and sines, (T, D) each, at `positions` (T,)."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            cos, sin = self.rotary(probe, positions.unsqueeze(0))
        return cos[0], sin[0]

    def norm(self, layer: int) -> tuple[Tensor, float]:
        """Gain (E,) and epsilon of the norm in front of layer `layer`'s attention."""
        norm = self.norms[layer]
        return norm.weight.detach(), float(getattr(norm, self.family.norm_eps))

    @cached_property
    def projections(self) -> list[Projection]:
        """The folded projection of every layer; made once, costs `2 * G * D * E` elements each."""
        return [self._fold(layer) for layer in range(self.spec.num_layers)]

    def _fold(self, layer: int) -> Projection:
        key, value = self.key_projections[layer], self.value_projections[layer]
        weight = fold_projection(self.norm(layer)[0], key.weight.detach(), value.weight.detach())
        biases = [b.detach() for b in (key.bias, value.bias) if b is not None]
        return Projection(weight, torch.cat(biases) if biases else None)

    @torch.no_grad()
    def prefill(self, token_ids: Sequence[int]) -> DynamicCache:
        """The KV cache of `token_ids`, read from position 0."""
        cache = DynamicCache(config=self.model.config)
        if len(token_ids):
            ids = torch.tensor([list(token_ids)], device=self.device)
            self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache

    def capture(
        self,
        batch: Sequence[Sequence[int]],
        representations: Sequence[Representation],
        after: DynamicCache,
    ) -> list[CapturedLayer]:
        """Read a batch of documents after a prefix, and catch the inputs or K and V of its layers.

        Args:
            batch: B documents' token ids; shorter ones are padded on the right, where causal
                attention keeps the padding from their tokens.
            representations: what is caught of the first layers; those behind are not computed.
            after: the KV cache of the prefix, batch of one; it is left as it was.

        Returns:
            One `CapturedLayer` per representation, padded to the longest document.
        """
        with self._catching(representations) as caught:
            self.read_batch(batch, after, num_layers=len(representations))
        return [CapturedLayer(*layer) for layer in caught]

    @torch.no_grad()
    def read_batch(
        self,
        batch: Sequence[Sequence[int]],
        after: DynamicCache,
        *,
        num_layers: int | None = None,
    ) -> None:
        """Run a padded batch of documents after a prefix through first layers, see `capture`."""
        longest = max(len(ids) for ids in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long, device=self.device)
        for row, document in enumerate(batch):
            ids[row, : len(document)] = torch.tensor(document, device=self.device)
        cache = _repeat(after, len(batch))
        with self._stopping_before(num_layers), suppress(_EnoughLayers):
            self.decoder(input_ids=ids, past_key_values=cache, use_cache=True)

    @contextmanager
    def _stopping_before(self, layer: int | None) -> Iterator[None]:
        """End this thread's forward pass when it comes to a layer, None for never."""
        if layer is None or layer >= self.spec.num_layers:
            yield
            return

        def stop(_input: Tensor) -> None:
            raise _EnoughLayers

        with inputs_of(self.layers[layer], stop):
            yield

    @contextmanager
    def _catching(self, representations: Sequence[Representation]) -> Iterator[list[list[Any]]]:
        caught: list[list[Any]] = [[None, None] for _ in representations]
        with ExitStack() as hooks:
            for i, representation in enumerate(representations):
                put = caught[i].__setitem__
                if representation is Representation.HIDDEN:
                    hooks.enter_context(inputs_of(self.norms[i], partial(put, 0)))
                elif representation is Representation.KV:
                    hooks.enter_context(outputs_of(self.key_projections[i], partial(put, 0)))
                    hooks.enter_context(outputs_of(self.value_projections[i], partial(put, 1)))
            yield caught


class _EnoughLayers(Exception):  # noqa: N818 - not an error: the answer to a layer too many
    """A forward pass has come to the first layer that nobody asked for."""


@contextmanager
def outputs_of(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass a module's outputs to `take`, on this thread only: others may share the model."""
    owner = threading.get_ident()

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if threading.get_ident() == owner:
            take(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def inputs_of(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Pass a module's first argument to `take`, on this thread only, see `outputs_of`."""
    owner = threading.get_ident()

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == owner:
            take(args[0])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def load_config(path: str) -> Any:
    """The configuration of the model in a folder, without its weights, offline.

    Raises:
        ModelNotFoundError: the folder holds no model.
        UnsupportedModelError: the family is not supported.
    """
    from transformers import AutoConfig

    if not os.path.isdir(path):
        raise ModelNotFoundError(f"{path} is not a model: no such folder")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"{path} is not a model: {reason}") from error
    if config.model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(
            f"{path} is of family {config.model_type!r}, which is not supported; supported: {known}"
        )
    return config


def load_model(
    path: str, *, dtype: str = "float32", device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a folder, offline.

    Raises:
        ModelNotFoundError: the folder holds no model that transformers can load.
        UnsupportedModelError: the family is not supported.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    load_config(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype(dtype))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"{path} cannot be loaded: {reason}") from error
    model.eval()
    model.to(torch.device(device))
    return model, tokenizer


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype


def tensor_of(words: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    """An array's memory as a tensor of elements of the same width; nothing is copied.

    The array may be read-only: the tensor must not be written then. It keeps the array alive, but
    not the transaction of a store that the array is a view into.
    """
    address = words.__array_interface__["data"][0]
    if address % dtype.itemsize:  # LMDB puts small values anywhere
        words = words.copy()
        return torch.from_numpy(words).view(dtype)
    memory: Any = (ctypes.c_char * words.nbytes).from_address(address)
    memory.owner = words  # the tensor keeps the memory, and so what it is a part of
    return torch.frombuffer(memory, dtype=dtype).view(words.shape)


def bit_words(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A CPU tensor's memory as unsigned integers of the same width, shape kept."""
    word = {4: torch.uint32, 2: torch.uint16}[tensor.element_size()]
    return tensor.view(word).numpy()


def spec_of(config: Any, name: str, dtype: str) -> ModelSpec:
    """The numbers of a model, from its transformers configuration.

    Raises:
        UnsupportedModelError: numbers that no decoder has.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = int(config.max_position_embeddings)
    sliding = getattr(config, "sliding_window", None)
    if sliding and getattr(config, "use_sliding_window", True):
        window = min(window, int(sliding))
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type") == "longrope":  # behind that, every position gets other factors
        window = min(window, int(rope.get("original_max_position_embeddings") or window))
    try:
        return _spec_of(config, name, dtype, head_dim, window)
    except ValueError as error:
        raise UnsupportedModelError(f"{name}: {error}") from error


def _spec_of(config: Any, name: str, dtype: str, head_dim: int, window: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=head_dim,
        window_tokens=window,
        dtype=dtype,
        mlp_size=int(config.intermediate_size),
    )


def _check_projections(adapter: ModelAdapter) -> None:
    spec = adapter.spec
    if len(adapter.layers) != spec.num_layers:
        raise UnsupportedModelError(
            f"the configuration names {spec.num_layers} layers, the model has {len(adapter.layers)}"
        )
    for i, (key, value) in enumerate(
        zip(adapter.key_projections, adapter.value_projections, strict=True)
    ):
        for module in (key, value):
            if type(module) is not nn.Linear or module.weight.shape != (
                spec.kv_width,
                spec.hidden_size,
            ):
                raise UnsupportedModelError(
                    f"layer {i} projects K or V with {module}, not with a plain "
                    f"{spec.hidden_size} -> {spec.kv_width} linear layer"
                )
        if (key.bias is None) != (value.bias is None):
            raise UnsupportedModelError(f"layer {i} has a bias on only one of K and V")


def _repeat(cache: DynamicCache, batch_size: int) -> DynamicCache:
    repeated = DynamicCache()
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if layer.is_initialized:
            repeated.update(
                layer.keys.expand(batch_size, -1, -1, -1),
                layer.values.expand(batch_size, -1, -1, -1),
                index,
            )
    return repeated
