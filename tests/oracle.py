"""What transformers itself computes, and a look into a restored cache to hold against it.

Nothing here but `restore` runs any code of the library: prompts are tokenised part by part by the
tokenizer, read by the model's own forward pass, and rotated by transformers' own RoPE.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hcache_rag import HCacheEngine
from hcache_rag.compose import Composition
from hcache_rag.executor import open_restoring


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt.

    Args:
        text: as it stands in the prompt.
        document: the whole text that `text` is the beginning of; None for what is not a document.
    """

    text: str
    document: str | None = None


def document(text: str, cut: int | None = None) -> Part:
    """A document, or its first `cut` characters."""
    return Part(text[:cut], text)


def joined(parts: Sequence[Part]) -> str:
    """The prompt that these parts make."""
    return "".join(part.text for part in parts)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, is_document: bool) -> list[int]:
    """The token ids of one part on its own; control tokens in a document stay text."""
    call: Any = tokenizer
    encoded = call(text, add_special_tokens=False, split_special_tokens=is_document)
    return list(encoded["input_ids"])


def encode_part(tokenizer: PreTrainedTokenizerBase, part: Part) -> list[int]:
    """The token ids of a part; those of a cut document are the first ones of the whole."""
    if part.document is None:
        return encode(tokenizer, part.text, is_document=False)
    ids = encode(tokenizer, part.document, is_document=True)
    if part.text == part.document:
        return ids
    call: Any = tokenizer
    options = {"add_special_tokens": False, "split_special_tokens": True}
    offsets = call(part.document, return_offsets_mapping=True, **options)["offset_mapping"]
    return ids[: sum(end <= len(part.text) for _, end in offsets)]


def encode_parts(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part]) -> list[int]:
    """The token ids of a prompt, each part tokenised on its own."""
    return [token for part in parts for token in encode_part(tokenizer, part)]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a model has after reading n tokens, positions in order.

    Args:
        keys, values: K after RoPE, and V, of all layers: (L, G, n, D).
        logits: of the last position, (vocabulary,).
    """

    keys: Tensor
    values: Tensor
    logits: Tensor

    def between(self, begin: int, end: int | None = None) -> Tensor:
        """K and V of some positions, (2, L, G, end - begin, D)."""
        return torch.stack((self.keys, self.values))[..., begin:end, :]


@torch.no_grad()
def prefill(model: PreTrainedModel, *steps: Sequence[int]) -> Reading:
    """Transformers' own prefill on its own cache, in one step or in several one after another."""
    cache = DynamicCache(config=model.config)
    logits = torch.empty(0)
    for ids in steps:
        logits = _forward(model, ids, cache)
    return _reading(cache, logits)


def greedy(
    model: PreTrainedModel, ids: Sequence[int], new_tokens: int, **options: Any
) -> list[int]:
    """Transformers' own greedy `generate` with no cache given; the new tokens."""
    return generate(model, ids, new_tokens, do_sample=False, **options)


def generate(
    model: PreTrainedModel, ids: Sequence[int], new_tokens: int, **options: Any
) -> list[int]:
    """Transformers' own `generate` with no cache given; the new tokens."""
    prompt = torch.tensor([list(ids)])
    call: Any = model.generate
    sequences = call(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        pad_token_id=0,
        **options,
    )
    return [int(token) for token in sequences[0, prompt.shape[1] :]]


@dataclass(frozen=True, slots=True, eq=False)
class DocumentState:
    """A document read after the preamble alone: K before RoPE, and V, (L, G, T, D)."""

    keys: Tensor
    values: Tensor


@torch.no_grad()
def document_state(
    model: PreTrainedModel, preamble: Sequence[int], ids: Sequence[int]
) -> DocumentState:
    """Read the preamble and then one document; K is caught where `k_proj` gives it."""
    cache = DynamicCache(config=model.config)
    if preamble:
        _forward(model, preamble, cache)
    caught: list[Tensor] = []
    layers: Any = model.get_submodule("model.layers")
    handles = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda _module, _inputs, output: caught.append(output)
        )
        for layer in layers
    ]
    try:
        _forward(model, ids, cache)
    finally:
        for handle in handles:
            handle.remove()
    values = torch.stack([layer.values[0] for layer in _cache_layers(cache)])
    num_heads, head_dim = values.shape[1], values.shape[3]
    keys = torch.stack([k[0].view(len(ids), num_heads, head_dim).transpose(0, 1) for k in caught])
    return DocumentState(keys, values[:, :, len(preamble) :])


@torch.no_grad()
def rotate(model: PreTrainedModel, keys: Tensor, position: int) -> Tensor:
    """Transformers' own RoPE on K before RoPE, (L, G, T, D), standing at `position`."""
    rotary: Any = model.get_submodule("model.rotary_emb")
    positions = torch.arange(position, position + keys.shape[2])
    cos, sin = rotary(keys, positions.unsqueeze(0))
    rotated: Tensor = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
    return rotated


def block_prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preamble: str,
    parts: Sequence[Part],
    *,
    new_tokens: int = 0,
    suppressed: Sequence[int] = (),
) -> tuple[Reading, list[int]]:
    """Read a prompt in which documents see only the preamble, and all other text sees everything.

    The cache grows in the order of positions: a document is read after the preamble alone and its
    K rotated to where it stands; everything else, and the prompt's last token, goes through the
    model's own causal forward pass.

    Returns:
        What the model has after the prompt, and its greedy continuation, token by token.
    """
    cache, logits = _block_prefill(model, tokenizer, preamble, parts)
    reading, tokens = _reading(cache, logits.clone()), list[int]()
    while len(tokens) < new_tokens:
        logits[list(suppressed)] = -torch.inf
        tokens.append(int(logits.argmax()))
        if len(tokens) < new_tokens:
            logits = _forward(model, tokens[-1:], cache)
    return reading, tokens


@torch.no_grad()
def block_prefill_by_mask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preamble: str,
    parts: Sequence[Part],
) -> Tensor:
    """The last position's logits by other means: one pass of all that is not a document.

    The pass goes under a 4D mask over positions, behind the documents.
    """
    head = encode(tokenizer, preamble, is_document=False)
    cache = DynamicCache(config=model.config)
    restored: list[int] = []
    fresh: list[tuple[int, int]] = []
    position = 0
    for part in parts:
        ids = encode_part(tokenizer, part)
        if part.document is None:
            fresh += enumerate(ids, position)
        else:
            state = document_state(model, head, ids)
            _append(cache, rotate(model, state.keys, position), state.values)
            restored += range(position, position + len(ids))
        position += len(ids)
    positions = torch.tensor([at for at, _ in fresh])
    slots = torch.cat((torch.tensor(restored, dtype=torch.long), positions))
    mask = torch.zeros((1, 1, len(fresh), len(slots)))
    mask.masked_fill_(slots[None, :] > positions[:, None], torch.finfo(torch.float32).min)
    call: Any = model
    output = call(
        input_ids=torch.tensor([[token for _, token in fresh]]),
        position_ids=positions.unsqueeze(0),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = output.logits[0, -1]
    return logits


@torch.no_grad()
def repaired_prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preamble: str,
    parts: Sequence[Part],
    repaired: Collection[int],
) -> tuple[Reading, Tensor | None]:
    """Read a prompt as a whole, with K and V of documents exchanged on the way.

    In every layer, what the projections give for a document's tokens is replaced by what they give
    when it is read after the preamble alone, but for `repaired` positions and the prompt's last
    one. So no mask, no order of keys and no positions are made here: the pass is plain causal
    attention. What the replaced tokens themselves come to is used nowhere.

    Returns:
        What the model has after the prompt, and the attention that the last position pays each
        (N,), summed over layers and heads; None if the model's attention does not tell.
    """
    head = encode(tokenizer, preamble, is_document=False)
    token_ids = encode_parts(tokenizer, parts)
    fresh = {*repaired, len(token_ids) - 1}
    at, states = list[int](), list[DocumentState]()
    for position, part, ids in _placed(tokenizer, parts):
        if part.document is None:
            continue
        kept = [n for n in range(len(ids)) if position + n not in fresh]
        whole = document_state(model, head, encode(tokenizer, part.document, is_document=True))
        at += [position + n for n in kept]
        states.append(DocumentState(whole.keys[:, :, kept], whole.values[:, :, kept]))
    handles = []
    for layer, module in enumerate(model.get_submodule("model.layers").children()):
        its = [(s.keys[layer], s.values[layer]) for s in states]
        for name, sides in zip(("k_proj", "v_proj"), zip(*its, strict=True), strict=False):
            rows = torch.cat(sides, 1).transpose(0, 1).flatten(1)
            projection = module.get_submodule(f"self_attn.{name}")
            handles.append(projection.register_forward_hook(_exchanging(at, rows)))
    cache = DynamicCache(config=model.config)
    call: Any = model
    is_eager = model.config._attn_implementation == "eager"
    try:
        output = call(
            input_ids=torch.tensor([token_ids]), past_key_values=cache, output_attentions=is_eager
        )
    finally:
        for handle in handles:
            handle.remove()
    reading = _reading(cache, output.logits[0, -1])
    if not is_eager:
        return reading, None
    return reading, torch.stack([row[0, :, -1].sum(0) for row in output.attentions]).sum(0)


def _exchanging(at: list[int], rows: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    def exchange(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        return output.index_copy(1, torch.tensor(at, dtype=torch.long), rows[None])

    return exchange


def restore(engine: HCacheEngine, prompt: str) -> tuple[Composition, Reading]:
    """Our path: what the library's cache holds after the first forward pass over a prompt."""
    composition = engine.bound.compose(engine.bound.resolve(prompt).pieces)
    ids = torch.tensor([composition.token_ids.tolist()])
    model: Any = engine.adapter.model
    with (
        torch.no_grad(),
        engine.answering.buffers.borrow(ids.shape[1]) as buffers,
        open_restoring(
            engine.adapter,
            composition,
            buffers,
            engine.store,
            reference_mode=engine.answering.reference_mode,
        ) as (cache, _),
    ):
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1]
        pairs = [cache.by_position(layer) for layer in range(engine.adapter.spec.num_layers)]
    keys, values = (torch.cat(side) for side in zip(*pairs, strict=True))
    return composition, Reading(keys, values, logits)


def largest_and_rms(difference: Tensor) -> Mapping[str, float]:
    """Two sizes of an error."""
    return {
        "largest": float(difference.abs().max()),
        "rms": float(difference.pow(2).mean().sqrt()),
    }


def _block_prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    preamble: str,
    parts: Sequence[Part],
) -> tuple[DynamicCache, Tensor]:
    head = encode(tokenizer, preamble, is_document=False)
    num_tokens = len(encode_parts(tokenizer, parts))
    cache = DynamicCache(config=model.config)
    logits = torch.empty(0)
    for position, part, ids in _placed(tokenizer, parts):
        is_last = position + len(ids) == num_tokens
        if part.document is None:
            logits = _forward(model, ids, cache)
            continue
        whole = encode(tokenizer, part.document, is_document=True)
        restored = len(ids) - is_last
        if restored:
            state = document_state(model, head, whole)
            keys = rotate(model, state.keys[:, :, :restored], position)
            _append(cache, keys, state.values[:, :, :restored])
        if is_last:
            logits = _forward(model, ids[-1:], cache)
    return cache, logits


def _placed(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part]
) -> Iterator[tuple[int, Part, list[int]]]:
    position = 0
    for part in parts:
        ids = encode_part(tokenizer, part)
        if ids:
            yield position, part, ids
        position += len(ids)


@torch.no_grad()
def _forward(model: PreTrainedModel, ids: Sequence[int], cache: DynamicCache) -> Tensor:
    call: Any = model
    output = call(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
    logits: Tensor = output.logits[0, -1]
    return logits


def _append(cache: DynamicCache, keys: Tensor, values: Tensor) -> None:
    for layer in range(keys.shape[0]):
        cache.update(keys[layer].unsqueeze(0), values[layer].unsqueeze(0), layer)


def _reading(cache: DynamicCache, logits: Tensor) -> Reading:
    layers = _cache_layers(cache)
    keys = torch.cat([layer.keys for layer in layers])
    return Reading(keys, torch.cat([layer.values for layer in layers]), logits)


def _cache_layers(cache: DynamicCache) -> list[Any]:
    return list(cache.layers)
