"""Long conversations are kept in few states, which are to the bit what the many were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes import PRINTABLE
from oracle import encode, generate
from tiny import SHAPES, byte_tokenizer, tiny_model

from hcache_rag import GenerationOptions, HCacheEngine, StateStore, codec
from hcache_rag.joining import MAX_STEPS, last_ones
from hcache_rag.layout import LayerFormat, Representation, StateLayout
from hcache_rag.state import StateRecord, child_key, root_key, token_array
from hcache_rag.store import PATHS

TOKENIZER = byte_tokenizer()
GREEDY = GenerationOptions(max_new_tokens=8, temperature=0.0, extra=PRINTABLE)
ROOT = root_key("model", "tokenizer")
TURNS = 24


def engine_on(store: StateStore, **options: Any) -> HCacheEngine:
    its: dict[str, Any] = {"fidelity": "none", "add_bos": False}
    return HCacheEngine(tiny_model(SHAPES[1]), TOKENIZER, store, **its | options)


def talk(engine: HCacheEngine, turns: int = TURNS) -> tuple[list[int], str]:
    """How many states each turn goes on from, and the prompt of the next one."""
    prompt, steps = "", []
    for turn in range(turns):
        prompt += f"user: turn {turn}, please!<|im_end|>assistant: "
        steps.append(len(engine.bound.resolve(prompt).walked))
        answer = engine.generate(prompt, options=GREEDY, remember=True)
        engine.flush()
        prompt += f"{answer.text}<|im_end|>"
    return steps, prompt + "user: and now?<|im_end|>assistant: "


def state(number: int, tokens: int, *, is_approximate: bool = False) -> StateRecord:
    ids = token_array([number, *range(tokens - 1)])
    layout = StateLayout((LayerFormat(Representation.KV, "float32"),))
    key = child_key(ROOT, ids)
    return StateRecord(key, ROOT, ROOT, ids, "text", layout, 0.0, is_approximate=is_approximate)


@pytest.mark.parametrize(
    ("sizes", "new", "joined"),
    [
        ([], 5, 0),
        ([5] * (MAX_STEPS - 1), 5, 0),
        ([5] * MAX_STEPS, 5, MAX_STEPS),
        ([5] * MAX_STEPS, 4, 0),
        ([50, 5, 5, 5, 5, 5, 5, 5], 5, 7),
        ([50, 20, 5, 5, 5, 5, 5, 5], 5, 8),
        ([1, 9, 8, 7, 6, 5, 4, 3], 2, 0),
    ],
)
def test_last_states_are_joined_as_long_as_none_is_larger_than_all_behind_it(
    sizes: list[int], new: int, joined: int
) -> None:
    path = [state(number, size) for number, size in enumerate(sizes)]
    found = last_ones(path, new, is_approximate=False)
    assert found == path[len(path) - joined :]


def test_what_is_approximate_is_joined_with_nothing_else() -> None:
    path = [state(number, 5, is_approximate=number > 3) for number in range(MAX_STEPS)]
    assert last_ones(path, 5, is_approximate=True) == path[4:]
    assert last_ones(path, 5, is_approximate=False) == []


def test_a_long_conversation_goes_on_from_few_states(store: StateStore) -> None:
    engine = engine_on(store)
    steps, prompt = talk(engine)
    assert max(steps) <= MAX_STEPS + 1
    assert steps[MAX_STEPS + 1] == 1
    answer = engine_on(store).generate(prompt, options=GREEDY)
    ids = encode(TOKENIZER, prompt, is_document=False)
    expected = generate(engine.adapter.model, ids, 8, do_sample=False, **PRINTABLE)
    assert list(answer.token_ids) == expected
    assert answer.provenance.exact_tokens > 0.9 * len(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_states_are_to_the_bit_what_they_are_made_of(
    store: StateStore, dtype: torch.dtype
) -> None:
    model = tiny_model(SHAPES[1], dtype=dtype)
    engine = HCacheEngine(model, TOKENIZER, store, fidelity="none", add_bos=False)
    _, prompt = talk(engine, MAX_STEPS + 1)
    walked = [step.record for step in engine.bound.resolve(prompt).walked]
    with store.beside(PATHS) as paths:
        small = {record.parent: record for record in paths.records() if record.key != walked[0].key}
        joined, parts, key = walked[0], list[StateRecord](), walked[0].parent
        while key in small:
            parts.append(small[key])
            key = parts[-1].key
        assert len(parts) == MAX_STEPS
        for layer in range(engine.adapter.spec.num_layers):
            whole = values_of(engine, paths, joined, layer)
            pieces = [values_of(engine, paths, part, layer) for part in parts]
            for side in range(2):
                many = np.concatenate([piece[side] for piece in pieces], 1)
                np.testing.assert_array_equal(whole[side][:, : many.shape[1]], many)


def values_of(
    engine: HCacheEngine, paths: StateStore, record: StateRecord, layer: int
) -> list[Any]:
    """K and V of a state of one chunk, (G, T, D) as words."""
    assert record.layout.num_chunks(record.num_tokens) == 1
    shape = codec.ChunkShape(record.layout.layers[layer], record.num_tokens, engine.adapter.spec)
    with paths.reading() as reader:
        value = reader.value(record.key, layer, 0)
        return [part.copy() for part in codec.decode(shape, record.key, layer, 0, value)]


def test_states_that_cannot_be_joined_are_left_as_they_are(store: StateStore) -> None:
    """One is damaged: the new turn is kept alone, and the conversation goes on."""
    engine = engine_on(store)
    talk(engine, MAX_STEPS)
    with store.beside(PATHS) as paths, paths._writing() as txn:
        first = next(iter(paths.records()))
        for key, value in txn.scan("chunks", paths._rows.prefix + first.key):
            txn.put("chunks", key, value[:-1] + bytes([value[-1] ^ 1]))
    steps, prompt = talk(engine, MAX_STEPS + 2)
    assert steps[-1] >= 1
    ids = encode(TOKENIZER, prompt, is_document=False)
    answer = engine.generate(prompt, options=GREEDY)
    assert list(answer.token_ids) == generate(
        engine.adapter.model, ids, 8, do_sample=False, **PRINTABLE
    )
