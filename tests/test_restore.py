"""Restored caches against transformers' own prefill, on tiny random models of every layout.

One token is one byte here, and answers are kept printable, so that texts can be compared.
"""

from __future__ import annotations

import gc
import logging
import random
import shutil
import string
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    Part,
    Reading,
    block_prefill,
    block_prefill_by_mask,
    document,
    document_state,
    encode,
    encode_part,
    encode_parts,
    generate,
    greedy,
    joined,
    largest_and_rms,
    prefill,
    restore,
    rotate,
)
from threads import own_threads
from tiny import SHAPES, VOCABULARY, Shape, byte_tokenizer, tiny_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import GenerationOptions, HCacheEngine, PromptTooLongError, StateStore
from hcache_rag.choice import choose_layout, fixed_layout
from hcache_rag.compose import MIN_PREAMBLE_TOKENS
from hcache_rag.executor import open_restoring
from hcache_rag.layout import StateLayout
from hcache_rag.models import ModelAdapter
from hcache_rag.repair import last_row_scores
from hcache_rag.state import StateRecord
from hcache_rag.store.backend import Transaction
from hcache_rag.texts import ANCHOR_CHARS, MIN_CUT_CHARS

TOKENIZER = byte_tokenizer()
PREAMBLE = "Answer from the passages below.\n\n"
QUESTION = "\n\nQuestion: what is it?\nAnswer:"
GAP = "\n\n"
SUPPRESSED = range(94, VOCABULARY)
PRINTABLE = {"suppress_tokens": list(SUPPRESSED)}
REPRESENTATIONS = ["hidden", "kv"]
WITH_MIXED = [*REPRESENTATIONS, "mixed"]
CHUNK_TOKENS = 64
ROUNDING = 1e-5
"""What float32 sums in another order may differ by, where K and V are of order 1."""
FAR = max(SHAPES, key=lambda shape: shape.layers)
"""The shape whose first and last layer are furthest apart."""


pytestmark = pytest.mark.usefixtures("one_thread")


def words(length: int, seed: int = 0) -> str:
    """Pseudo-words of exactly `length` characters, the same for the same seed."""
    source = random.Random(seed)
    text = ""
    while len(text) < length:
        text += "".join(source.choices(string.ascii_lowercase, k=source.randint(2, 8))) + " "
    return text[: length - 1] + "." if length > 1 else text[:length]


A, B, C = (words(length, seed) for seed, length in enumerate((250, 131, 310)))


@cache
def model_of(
    shape: Shape, attention: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model that tests share and leave as it is."""
    return tiny_model(shape, attention=attention, dtype=dtype)


@cache
def transformers_answer(shape: Shape, text: str, new_tokens: int) -> tuple[int, ...]:
    """Transformers' greedy answer to a text in which nothing is a control token."""
    ids = ids_of(text)
    return tuple(greedy(model_of(shape), ids, new_tokens, **PRINTABLE))


def ids_of(text: str) -> list[int]:
    """Token ids of text that is not a document."""
    return encode(TOKENIZER, text, is_document=False)


def engine_of(
    model: PreTrainedModel,
    store: StateStore | Path,
    representation: str = "auto",
    *,
    tokenizer: PreTrainedTokenizerBase = TOKENIZER,
    **more: Any,
) -> HCacheEngine:
    """An engine that restores every document as it was stored; `mixed` alternates layers."""
    keep: dict[str, Any] = {
        "preamble": PREAMBLE,
        "representation": layout_of(model, representation),
        "fidelity": "none",
    }
    return HCacheEngine(model, tokenizer, store, **{**keep, **more})


def layout_of(model: PreTrainedModel, representation: str) -> StateLayout:
    """All layers in one representation, or `mixed`; chunks so small that documents have several."""
    spec = ModelAdapter(model).spec
    mixed = [("hidden", "kv")[i % 2] for i in range(spec.num_layers)]
    if representation == "auto":
        chosen = choose_layout(spec, hidden_dtype=spec.dtype, kv_dtype=spec.dtype)
    else:
        asked = mixed if representation == "mixed" else representation
        chosen = fixed_layout(spec, asked, spec.dtype)
    return StateLayout(chosen.layout.layers, CHUNK_TOKENS)


def block_reading(
    model: PreTrainedModel, parts: Sequence[Part], new_tokens: int
) -> tuple[Reading, list[int]]:
    """The reference for relocated documents, and its printable greedy answer."""
    return block_prefill(
        model, TOKENIZER, PREAMBLE, parts, new_tokens=new_tokens, suppressed=SUPPRESSED
    )


def options(new_tokens: int = 24, **more: Any) -> GenerationOptions:
    """Greedy and printable."""
    return GenerationOptions(
        max_new_tokens=new_tokens, **{"temperature": 0.0, "extra": PRINTABLE, **more}
    )


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


def assert_close(ours: Reading, theirs: Reading) -> None:
    """K, V and logits agree but for rounding."""
    assert_near(ours.keys, theirs.keys)
    assert_near(ours.values, theirs.values)
    assert_near(ours.logits, theirs.logits)


def num_hooks(model: PreTrainedModel) -> int:
    """Hooks on any module of a model."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@contextmanager
def on_forward(
    model: PreTrainedModel, call: Callable[[int], object], module: str = ""
) -> Iterator[None]:
    """Call `call` with 0, 1, ... before every forward pass of a module."""
    count = 0

    def hook(_module: object, _inputs: object) -> None:
        nonlocal count
        count += 1
        call(count - 1)

    handle = model.get_submodule(module).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reading_elsewhere(model: PreTrainedModel, ids: Sequence[int]) -> Iterator[None]:
    """While this thread's forward pass is in its last layer, another thread makes a whole one."""
    caller = threading.current_thread()

    def read(_count: int) -> None:
        if threading.current_thread() is caller:
            other = threading.Thread(target=prefill, args=(model, ids))
            other.start()
            other.join()

    last = model.config.num_hidden_layers - 1
    with on_forward(model, read, f"model.layers.{last}.mlp"):
        yield


class InterruptedPassError(Exception):
    """What a test lets a forward pass fail with."""


def fail_at(number: int) -> Callable[[int], None]:
    """For `on_forward`: fail at one pass."""

    def call(count: int) -> None:
        if count == number:
            raise InterruptedPassError(f"pass {number}")

    return call


# 1. One document right after the preamble


@pytest.mark.parametrize("representation", WITH_MIXED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_mode_is_prefill_bit_for_bit(
    shape: Shape,
    attention: str,
    representation: str,
    store: StateStore,
) -> None:
    """Transformers' prefill in the same steps / restored in reference mode: all bits equal.

    The steps are the preamble, the document, the question: with the same shapes in every matrix
    product, K, V and logits of all layers and positions have no reason to differ at all. From
    transformers' prefill in one step they differ by rounding only.
    """
    model = model_of(shape, attention)
    engine = engine_of(model, store, representation, reference_mode=True)
    engine.precompute([A])
    composition, ours = restore(engine, PREAMBLE + A + QUESTION)
    steps = [ids_of(text) for text in (PREAMBLE, A, QUESTION)]
    theirs = prefill(model, *steps)
    assert composition.num_restored == composition.num_exact == len(PREAMBLE + A)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)
    assert torch.equal(ours.logits, theirs.logits)
    assert_close(ours, prefill(model, [token for step in steps for token in step]))


def test_reference_mode_is_prefill_bit_for_bit_on_two_threads(store: StateStore) -> None:
    """Transformers' prefill in the same steps / restored in reference mode: all bits equal."""
    torch.set_num_threads(2)
    try:
        test_reference_mode_is_prefill_bit_for_bit(SHAPES[0], "sdpa", "mixed", store)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("representation", WITH_MIXED)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_folded_mode_is_prefill_but_for_rounding(
    shape: Shape,
    attention: str,
    representation: str,
    store: StateStore,
) -> None:
    """Transformers' prefill in one step / restored in folded mode: K, V, logits within rounding."""
    model = model_of(shape, attention)
    engine = engine_of(model, store, representation)
    engine.precompute([A])
    prompt = PREAMBLE + A + QUESTION
    _, ours = restore(engine, prompt)
    assert_close(ours, prefill(model, ids_of(prompt)))


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_folded_mode_is_as_near_to_float64_as_transformers(
    shape: Shape,
    attention: str,
    dtype: torch.dtype,
    representation: str,
    store: StateStore,
) -> None:
    """Error of transformers' prefill in the same steps / of the restored one: at most 1.5 times.

    In the same dtype, both against a float64 prefill with the same weights, over all layers of the
    restored tokens.
    """
    text = words(600)
    model = model_of(shape, attention, dtype)
    engine = engine_of(model, store, representation)
    engine.precompute([text])
    composition, ours = restore(engine, PREAMBLE + text + QUESTION)
    assert composition.num_restored == len(PREAMBLE + text)
    exact, theirs = _float64_and_own_prefill(shape, attention, dtype, text)
    for name, side in (("K", 0), ("V", 1)):
        restored = ours.between(0, composition.num_restored)[side].double()
        error = largest_and_rms(restored - exact[side])
        bound = largest_and_rms(theirs[side] - exact[side])
        for kind, size in error.items():
            assert size <= 1.5 * bound[kind], f"{kind} error of {name}: {size}, {bound[kind]}"


@cache
def _float64_and_own_prefill(
    shape: Shape, attention: str, dtype: torch.dtype, text: str
) -> tuple[Tensor, Tensor]:
    double: Any = tiny_model(shape, attention=attention, dtype=dtype)
    exact = prefill(double.double(), ids_of(PREAMBLE + text)).between(0)
    own = prefill(model_of(shape, attention, dtype), ids_of(PREAMBLE), ids_of(text))
    return exact, own.between(0).double()


@pytest.mark.parametrize("reference_mode", [True, False], ids=["reference", "folded"])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_answer_of_64_tokens(
    shape: Shape,
    representation: str,
    reference_mode: bool,
    store: StateStore,
) -> None:
    """Transformers' `generate` with no cache / the engine's: the same 64 tokens and their text."""
    engine = engine_of(model_of(shape), store, representation, reference_mode=reference_mode)
    engine.precompute([A])
    prompt = PREAMBLE + A + QUESTION
    answer = engine.generate(prompt, options=options(64))
    theirs = transformers_answer(shape, prompt, 64)
    assert answer.provenance.exact_tokens == len(PREAMBLE + A)
    assert answer.token_ids == theirs
    assert answer.text == TOKENIZER.decode(list(theirs), skip_special_tokens=True)
    assert len(answer.token_ids) == 64
    assert answer.finish_reason == "length"


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 128, 1000])
def test_document_of_any_length(length: int, representation: str, store: StateStore) -> None:
    """Transformers' prefill in the same steps / restored in reference mode: all bits equal.

    A matrix product of one to three rows may take another path than one of many, so that hidden
    states of so few tokens, projected together with the preamble's, agree within rounding only.
    """
    model, text = model_of(SHAPES[0]), words(length)
    engine = engine_of(model, store, representation, reference_mode=True)
    engine.precompute([text])
    composition, ours = restore(engine, PREAMBLE + text + QUESTION)
    steps = [ids_of(part) for part in (PREAMBLE, text, QUESTION)]
    theirs = prefill(model, *steps)
    assert composition.num_exact == len(PREAMBLE) + length
    if length > 3 or representation == "kv":
        assert torch.equal(ours.between(0), theirs.between(0))
        assert torch.equal(ours.logits, theirs.logits)
    assert_close(ours, theirs)


@pytest.mark.parametrize("preamble", ["", "Short:\n", PREAMBLE], ids=["none", "short", "usual"])
@pytest.mark.parametrize("adds_bos", [False, True], ids=["no-bos", "bos"])
def test_preambles_and_first_tokens(preamble: str, adds_bos: bool, store: StateStore) -> None:
    """Transformers' prefill in the same steps / restored in reference mode: all bits equal."""
    model, tokenizer = model_of(SHAPES[0]), byte_tokenizer(adds_bos=adds_bos)
    engine = engine_of(model, store, preamble=preamble, tokenizer=tokenizer, reference_mode=True)
    engine.precompute([A])
    composition, ours = restore(engine, preamble + A + QUESTION)
    head = [256] * adds_bos + encode(tokenizer, preamble, is_document=False)
    steps = [head, *(encode(tokenizer, text, is_document=False) for text in (A, QUESTION))]
    theirs = prefill(model, *(step for step in steps if step))
    assert composition.token_ids.tolist() == [token for step in steps for token in step]
    assert composition.num_exact == len(A) + len(head) * (len(head) >= MIN_PREAMBLE_TOKENS)
    if composition.num_exact == len(A) + len(head):
        assert torch.equal(ours.between(0), theirs.between(0))
        assert torch.equal(ours.logits, theirs.logits)
    assert_close(ours, theirs)


# 2. Several documents


@pytest.mark.parametrize("reference_mode", [True, False], ids=["reference", "folded"])
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_document_is_what_it_is_after_the_preamble_alone(
    shape: Shape,
    representation: str,
    reference_mode: bool,
    store: StateStore,
) -> None:
    """Transformers' prefill of the preamble and one document / restored: equal where it stands.

    K is taken before RoPE and rotated by transformers' own RoPE to the new positions. In
    reference mode all bits are equal, in folded mode all but rounding.
    """
    model = model_of(shape)
    engine = engine_of(model, store, representation, reference_mode=reference_mode)
    for text in (A, B, C):  # one by one, as the reference path reads them
        engine.precompute([text])
    prompt = PREAMBLE + GAP.join((B, C, A)) + QUESTION
    composition, ours = restore(engine, prompt)
    assert len(composition.spans) == 4
    head = ids_of(PREAMBLE)
    for text in (A, B, C):
        state = document_state(model, head, encode(TOKENIZER, text, is_document=True))
        position = prompt.index(text)
        theirs = torch.stack((rotate(model, state.keys, position), state.values))
        restored = ours.between(position, position + len(text))
        if reference_mode:
            assert torch.equal(restored, theirs)
        else:
            assert_near(restored, theirs)


@pytest.mark.parametrize("reference_mode", [True, False], ids=["reference", "folded"])
@pytest.mark.parametrize("representation", WITH_MIXED)
@pytest.mark.parametrize("shape", SHAPES)
def test_several_documents_are_block_attention(
    shape: Shape,
    representation: str,
    reference_mode: bool,
    store: StateStore,
) -> None:
    """Transformers' prefill in which documents see only the preamble / restored: within rounding.

    Compared are K and V of all positions, the last position's logits, and the greedy answer.
    """
    model = model_of(shape)
    engine = engine_of(model, store, representation, reference_mode=reference_mode)
    engine.precompute([A, B, C])
    prompt = joined(SEVERAL)
    _, ours = restore(engine, prompt)
    theirs, tokens = _block_reference(shape)
    assert_close(ours, theirs)
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == tokens


SEVERAL = [
    Part(PREAMBLE),
    document(B),
    Part("\n---\n"),
    document(C),
    Part(GAP),
    document(A),
    Part(QUESTION),
]


@cache
def _block_reference(shape: Shape) -> tuple[Reading, tuple[int, ...]]:
    reading, tokens = block_reading(model_of(shape), SEVERAL, 24)
    return reading, tuple(tokens)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_block_reference_is_a_mask_over_positions(shape: Shape) -> None:
    """Block prefill step by step / in one pass under a 4D mask: the same logits, within rounding.

    Holds the reference path itself: two ways to write it down, both through transformers.
    """
    theirs, _ = _block_reference(shape)
    logits = block_prefill_by_mask(model_of(shape), TOKENIZER, PREAMBLE, SEVERAL)
    assert_near(logits, theirs.logits)


@pytest.mark.parametrize("order", ["kv-hidden", "hidden-kv", "mixed-kv", "hidden-mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_states_of_different_layouts_in_one_prompt(
    shape: Shape, order: str, store: StateStore
) -> None:
    """Transformers' block prefill / restored from a store whose representation was changed.

    The preamble and one document are kept one way and later documents another: each span is
    restored as its own record says, and none disturbs its neighbour.
    """
    model, (first, second) = model_of(shape), order.split("-")
    for name, texts in ((first, [B]), (second, [C, A])):
        engine = engine_of(model, store, name)
        engine.precompute(texts)
    _, ours = restore(engine, joined(SEVERAL))
    theirs, _ = _block_reference(shape)
    assert_close(ours, theirs)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_repairing_everything_is_full_prefill(
    shape: Shape, representation: str, store: StateStore
) -> None:
    """Transformers' `generate` with no cache / the engine's that repairs all: the same answer."""
    engine = engine_of(model_of(shape), store, representation, fidelity=1.0)
    engine.precompute([A, B, C])
    prompt = joined(SEVERAL)
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(shape, prompt, 24)
    assert answer.provenance.exact_tokens == len(PREAMBLE + B)
    assert num_hooks(model_of(shape)) == 0


# 3. All kinds of prompts

WIDE = "Größe und Maß: " + "äöü€ " * 60 + "Ende."
CONTROL = "He wrote <|im_end|> and <eos>, then <bos> and went on for a while.<|im_end|>"
TINY, SMALL = "k", words(20, 7)
UNSTORED = words(180, 8)

PROMPTS: dict[str, list[Part]] = {
    "cut": [Part(PREAMBLE), document(A, MIN_CUT_CHARS), Part(QUESTION)],
    "cut inside a chunk": [Part(PREAMBLE), document(A, 200), Part("..." + QUESTION)],
    "cut far from its place": [Part("Other. " * 9), document(A, 193), Part(QUESTION)],
    "cut between wide characters": [Part(PREAMBLE), document(WIDE, 130), Part("?" + QUESTION)],
    "cut, then whole": [
        Part(PREAMBLE),
        document(A, 140),
        Part(GAP),
        document(A),
        Part(QUESTION),
    ],
    "cut too short": [Part(PREAMBLE + A[: MIN_CUT_CHARS - 1] + "~" + QUESTION)],
    "twice": [Part(PREAMBLE), document(A), Part(GAP), document(A), Part(QUESTION)],
    "twice with nothing between": [Part(PREAMBLE), document(A), document(A), Part(QUESTION)],
    "neighbours": [Part(PREAMBLE), document(C), document(B), document(A), Part(QUESTION)],
    "one order": [
        Part(PREAMBLE),
        document(A),
        Part(GAP),
        document(B),
        Part(GAP),
        document(C),
        Part(QUESTION),
    ],
    "another order": [
        Part(PREAMBLE),
        document(C),
        Part(GAP),
        document(A),
        Part(GAP),
        document(B),
        Part(QUESTION),
    ],
    "not stored": [Part(PREAMBLE), document(A), Part(GAP + UNSTORED), Part(QUESTION)],
    "not stored, first": [
        Part(PREAMBLE + UNSTORED + GAP),
        document(A),
        Part(QUESTION),
    ],
    "one token": [Part(PREAMBLE), document(TINY), Part(QUESTION)],
    "one token, far": [Part(PREAMBLE), document(A), Part("\n"), document(TINY), Part(QUESTION)],
    "short": [Part(PREAMBLE), document(SMALL), Part("\n"), document(TINY), Part(QUESTION)],
    "short, but inside a line": [Part(PREAMBLE + SMALL + " and " + TINY + QUESTION)],
    "wide characters": [Part(PREAMBLE), document(A), Part(GAP), document(WIDE), Part(QUESTION)],
    "control tokens": [Part(PREAMBLE), document(CONTROL), Part("<|im_end|>" + QUESTION)],
    "control tokens, far": [
        Part(PREAMBLE),
        document(A),
        Part("<|im_end|>\n"),
        document(CONTROL),
        Part(QUESTION),
    ],
    "no document": [Part(PREAMBLE + QUESTION)],
    "query alone": [Part("What is it?")],
    "one token alone": [Part("?")],
    "preamble alone": [Part(PREAMBLE)],
    "beginning of the preamble": [Part(PREAMBLE[:20] + "other words. ")],
    "less of the preamble": [Part(PREAMBLE[: MIN_PREAMBLE_TOKENS - 1])],
    "no preamble": [document(A), Part(QUESTION)],
    "another preamble": [Part("Read this.\n\n"), document(A), Part(QUESTION)],
    "preamble and more": [Part(PREAMBLE + "First:\n"), document(A), Part(QUESTION)],
    "preamble twice": [Part(PREAMBLE + PREAMBLE), document(A), Part(QUESTION)],
    "preamble and document": [Part(PREAMBLE), document(A)],
    "preamble and one token": [Part(PREAMBLE), document(TINY)],
    "document alone": [document(A)],
    "one-token document alone": [document(TINY)],
    "ends in a document": [Part(PREAMBLE), document(A), Part(GAP), document(C)],
    "ends in a cut document": [Part(PREAMBLE), document(A, 200)],
    "ends in two documents": [Part(PREAMBLE), document(A), document(B), Part("\n"), document(TINY)],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_all_kinds(name: str, store: StateStore) -> None:
    """Transformers' block prefill / restored: token ids, K, V, logits and greedy answer.

    Documents' token ids are those with `split_special_tokens=True`: what looks like a control
    token in them stays text, while in all other text it is one.
    """
    parts, model = PROMPTS[name], model_of(SHAPES[1])
    engine = engine_of(model, store, "mixed")
    report = engine.precompute([A, "", B, "  \n", C, WIDE, CONTROL, TINY, SMALL])
    assert report.stored == 7
    assert [reason for _, reason in report.skipped] == ["empty", "empty"]

    composition, ours = restore(engine, joined(parts))
    theirs, tokens = block_reading(model, parts, 12)
    assert composition.token_ids.tolist() == encode_parts(TOKENIZER, parts)
    assert_close(ours, theirs)
    answer = engine.generate(joined(parts), options=options(12))
    assert list(answer.token_ids) == tokens

    is_document = [part.document is not None for part in parts for _ in range(num_tokens(part))]
    common = len(commonprefix(joined(parts), PREAMBLE))
    if common >= MIN_PREAMBLE_TOKENS:
        is_document[:common] = [True] * common
    is_document[-1] = False  # the last token gives the answer's first
    assert composition.num_restored == sum(is_document)
    fresh = [at for at, restored in enumerate(is_document) if not restored]
    assert composition.fresh_positions.tolist() == fresh


def num_tokens(part: Part) -> int:
    """Tokens of a part."""
    return len(encode_part(TOKENIZER, part))


def commonprefix(a: str, b: str) -> str:
    """What two texts begin with."""
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    return a[: min(len(a), len(b)) if length is None else length]


def test_documents_inside_a_strictly_tokenised_prompt(store: StateStore) -> None:
    """Transformers' token ids of the whole prompt / a strict engine's: the same, and restored.

    A document whose tokens come out differently, for its control tokens, is read afresh.
    """
    model = model_of(SHAPES[0])
    engine = engine_of(model, store, tokenization="strict")
    engine.precompute([A, CONTROL])
    prompt = PREAMBLE + A + GAP + CONTROL + QUESTION
    composition, ours = restore(engine, prompt)
    ids = ids_of(prompt)
    assert composition.token_ids.tolist() == ids
    assert composition.num_restored == composition.num_exact == len(PREAMBLE + A)
    assert_close(ours, prefill(model, ids))


def test_an_empty_prompt_is_refused(store: StateStore) -> None:
    """Nothing to read is a caller's mistake, also in a stream."""
    engine = engine_of(model_of(SHAPES[0]), store)
    with pytest.raises(ValueError, match="empty"):
        engine.generate("")
    with pytest.raises(ValueError, match="empty"):
        next(engine.stream(""))
    assert not own_threads()


def test_a_prompt_longer_than_the_window_is_refused_with_its_numbers(store: StateStore) -> None:
    """A prompt that leaves room for one token gets one; one that fills the window is refused."""
    model: Any = tiny_model(SHAPES[0])
    model.config.max_position_embeddings = 400
    engine = engine_of(model, store)
    engine.precompute([A])
    fits = PREAMBLE + A + "?" * (399 - len(PREAMBLE + A))
    answer = engine.generate(fits, options=options())
    ids = ids_of(fits)
    assert list(answer.token_ids) == greedy(model, ids, 1, **PRINTABLE)
    assert answer.finish_reason == "length"
    for prompt in (fits + "?", fits + "?" * 23):
        with pytest.raises(PromptTooLongError, match=rf"{len(prompt)} tokens.* 400 tokens") as info:
            engine.generate(prompt, options=options())
        assert (info.value.prompt_tokens, info.value.window_tokens) == (len(prompt), 400)
    report = engine.precompute([words(400 - len(PREAMBLE), 5), words(401 - len(PREAMBLE), 6)])
    assert (report.stored, len(report.skipped)) == (1, 1)


def values_of(store: StateStore, record: StateRecord) -> list[bytes]:
    """The stored values of a state, in order."""
    with store.reading() as reader:
        return [
            bytes(reader.value(record.key, layer, chunk))
            for layer in range(len(record.layout.layers))
            for chunk in range(record.layout.num_chunks(record.num_tokens))
        ]


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_odd_batch_gives_the_states_of_one_by_one(
    shape: Shape, representation: str, tmp_path: Path
) -> None:
    """Each document read alone / in one padded batch: the same restored K and V, but rounding."""
    model = model_of(shape)
    texts = [words(length, length) for length in (1, 17, 64, 65, 130, 131, 250)]
    with (
        StateStore.open(tmp_path / "batch") as batch_store,
        StateStore.open(tmp_path / "single") as single_store,
    ):
        batched, single = (
            engine_of(model, store, representation) for store in (batch_store, single_store)
        )
        batched.precompute(texts)
        for text in texts:
            single.precompute([text])
        for text in texts:
            prompt = PREAMBLE + text + QUESTION
            composition, ours = restore(batched, prompt)
            assert composition.num_exact == len(PREAMBLE + text)
            assert_close(ours, restore(single, prompt)[1])


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_of_one_length_stores_the_same_bits(
    shape: Shape, representation: str, tmp_path: Path
) -> None:
    """Each document read alone / in a batch without padding: the stored values are equal."""
    model = model_of(shape)
    texts = [words(128, seed) for seed in range(4)]
    with (
        StateStore.open(tmp_path / "batch") as batch_store,
        StateStore.open(tmp_path / "single") as single_store,
    ):
        batched, single = (
            engine_of(model, store, representation) for store in (batch_store, single_store)
        )
        batched.precompute(texts)
        for text in texts:
            single.precompute([text])
        records = list(batch_store.records())
        assert [r.key for r in records] == [r.key for r in single_store.records()]
        assert len(records) == 5
        for record in records:
            assert values_of(batch_store, record) == values_of(single_store, record)


# 4. Damaged, foreign and deleted states


def record_of(store: StateStore, text: str) -> StateRecord:
    """The stored state of a text."""
    return next(record for record in store.records() if record.text == text)


def chunk_key(record: StateRecord, layer: int, chunk: int) -> bytes:
    """Where a store keeps a value of its first namespace."""
    return struct.pack(">I16sHI", 1, record.key, layer, chunk)


@dataclass
class Chunks:
    """The stored values, past the store's own methods."""

    txn: Transaction

    def get(self, key: bytes) -> bytes:
        value = self.txn.get("chunks", key)
        assert value is not None
        return value

    def put(self, key: bytes, value: bytes) -> None:
        self.txn.put("chunks", key, value)

    def delete(self, key: bytes) -> bool:
        return self.txn.delete("chunks", key)


@contextmanager
def chunks(store: StateStore) -> Iterator[Chunks]:
    """Change them in one transaction."""
    with store._writing() as txn:
        yield Chunks(txn)


Damage = Callable[[StateStore, StateRecord, int], None]


def flip_first(store: StateStore, record: StateRecord, layer: int) -> None:
    """One bit of the first chunk's header."""
    with chunks(store) as txn:
        value = bytearray(txn.get(chunk_key(record, layer, 0)))
        value[0] ^= 1
        txn.put(chunk_key(record, layer, 0), bytes(value))


def flip_last(store: StateStore, record: StateRecord, layer: int) -> None:
    """One bit of the last chunk's last byte."""
    last = record.layout.num_chunks(record.num_tokens) - 1
    with chunks(store) as txn:
        value = bytearray(txn.get(chunk_key(record, layer, last)))
        value[-1] ^= 64
        txn.put(chunk_key(record, layer, last), bytes(value))


def cut_short(store: StateStore, record: StateRecord, layer: int) -> None:
    """A value that lost its end."""
    with chunks(store) as txn:
        value = bytes(txn.get(chunk_key(record, layer, 1)))
        txn.put(chunk_key(record, layer, 1), value[:-8])


def remove(store: StateStore, record: StateRecord, layer: int) -> None:
    """A value that is gone."""
    with chunks(store) as txn:
        assert txn.delete(chunk_key(record, layer, 1))


def exchange(store: StateStore, record: StateRecord, layer: int) -> None:
    """Two values, each whole, in each other's place."""
    keys = [chunk_key(record, layer, chunk) for chunk in (0, 1)]
    with chunks(store) as txn:
        values = [bytes(txn.get(key)) for key in keys]
        for key, value in zip(keys, reversed(values), strict=True):
            txn.put(key, value)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "header": (flip_first, "header that does not belong there"),
    "payload": (flip_last, "fails its checksum"),
    "short": (cut_short, "bytes, expected"),
    "missing": (remove, "is not in the store"),
    "misplaced": (exchange, "header that does not belong there"),
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the library logged as a warning."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "hcache_rag" and record.levelno == logging.WARNING
    ]


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("layer", [0, FAR.layers - 1], ids=["first-layer", "last-layer"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_state_is_read_afresh(
    kind: str,
    layer: int,
    representation: str,
    store: StateStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Transformers' `generate` with no cache / the engine's on a damaged state: the same answer.

    The last layer's damage is found when the forward pass has begun; the streamed pieces are the
    answer's all the same. The cause is named, the tokens are counted, the state is dropped and
    can be stored again.
    """
    engine = engine_of(model_of(FAR), store, representation)
    engine.precompute([A])
    damage, cause = DAMAGES[kind]
    damage(store, record_of(store, A), layer)
    prompt = PREAMBLE + A + QUESTION
    theirs = transformers_answer(FAR, prompt, 24)
    text = TOKENIZER.decode(list(theirs), skip_special_tokens=True)

    stream = engine.stream(prompt, options=options())
    assert "".join(stream) == stream.result.text == text
    assert stream.result.token_ids == theirs
    provenance = stream.result.provenance
    assert (provenance.missed_tokens, provenance.documents_missed) == (len(A), 1)
    assert (provenance.exact_tokens, provenance.relocated_tokens) == (len(PREAMBLE), 0)
    assert provenance.documents_restored == 0
    assert any(cause in warning for warning in provenance.warnings)
    assert any(cause in warning and f"layer {layer}" in warning for warning in warnings_of(caplog))
    assert len(warnings_of(caplog)) == 1

    again = engine.generate(prompt, options=options())
    assert again.token_ids == theirs
    assert again.provenance.missed_tokens == len(A)
    assert len(warnings_of(caplog)) == 1

    assert engine.precompute([A]).stored == 1
    healed = engine.generate(prompt, options=options())
    assert healed.token_ids == theirs
    assert healed.provenance.exact_tokens == len(PREAMBLE + A)
    assert not healed.provenance.warnings
    assert num_hooks(model_of(FAR)) == 0


def test_one_damaged_state_leaves_the_others_in_use(store: StateStore) -> None:
    """Transformers' block prefill in which the damaged document is plain text / ours: equal."""
    model = model_of(FAR)
    engine = engine_of(model, store)
    engine.precompute([A, B, C])
    flip_last(store, record_of(store, C), FAR.layers - 1)
    answer = engine.generate(joined(SEVERAL), options=options())
    parts = [Part(part.text) if part.document == C else part for part in SEVERAL]
    _, tokens = block_reading(model, parts, 24)
    assert list(answer.token_ids) == tokens
    provenance = answer.provenance
    assert (provenance.missed_tokens, provenance.documents_missed) == (len(C), 1)
    assert (provenance.exact_tokens, provenance.relocated_tokens) == (len(PREAMBLE + B), len(A))
    assert provenance.documents_restored == 2


@pytest.mark.parametrize("layer", [0, FAR.layers - 1], ids=["first-layer", "last-layer"])
def test_a_state_that_is_damaged_when_it_is_to_be_repaired(layer: int, store: StateStore) -> None:
    """Transformers' `generate` with no cache / the engine's that repairs all: the same answer."""
    engine = engine_of(model_of(FAR), store, fidelity=1.0)
    engine.precompute([A, B, C])
    flip_last(store, record_of(store, C), layer)
    prompt = joined(SEVERAL)
    stream = engine.stream(prompt, options=options())
    assert "".join(stream) == stream.result.text
    assert stream.result.token_ids == transformers_answer(FAR, prompt, 24)
    provenance = stream.result.provenance
    assert (provenance.missed_tokens, provenance.documents_missed) == (len(C), 1)
    assert num_hooks(model_of(FAR)) == 0


def test_several_damaged_states_in_one_prompt(
    store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers' `generate` with no cache / the engine's, all states damaged: the same."""
    engine = engine_of(model_of(FAR), store)
    engine.precompute([A, B, C])
    for text, layer in ((A, 4), (B, 0), (C, 2), (PREAMBLE, 3)):
        flip_last(store, record_of(store, text), layer)
    prompt = joined(SEVERAL)
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(FAR, prompt, 24)
    assert answer.provenance.fresh_tokens == len(prompt)
    assert (answer.provenance.missed_tokens, answer.provenance.documents_missed) == (
        len(A + B + C),
        3,
    )
    assert len(warnings_of(caplog)) == 4


def test_a_damaged_preamble_state_is_read_afresh(
    store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Transformers' `generate` with no cache / the engine's, preamble damaged: the same answer."""
    engine = engine_of(model_of(FAR), store)
    engine.precompute([A])
    flip_last(store, record_of(store, PREAMBLE), 2)
    prompt = PREAMBLE + A + QUESTION
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(FAR, prompt, 24)
    assert answer.provenance.restored_tokens == len(A)
    assert any("fails its checksum" in warning for warning in warnings_of(caplog))
    assert any("fails its checksum" in warning for warning in answer.provenance.warnings)


def test_a_document_stays_exact_without_its_preamble_state(store: StateStore) -> None:
    """A state is exact where the tokens in front are its own, even if they are read afresh."""
    engine = engine_of(model_of(FAR), store, fidelity="exact")
    engine.precompute([A])
    store.delete(record_of(store, PREAMBLE).key)
    prompt = PREAMBLE + A + QUESTION
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(FAR, prompt, 24)
    assert (answer.provenance.exact_tokens, answer.provenance.relocated_tokens) == (len(A), 0)


@pytest.mark.parametrize("damaged", [A, PREAMBLE], ids=["document", "preamble"])
def test_damage_in_a_store_that_cannot_be_written(damaged: str, tmp_path: Path) -> None:
    """Transformers' `generate` with no cache / a read-only engine's on damage: the same answer."""
    model, prompt = model_of(FAR), PREAMBLE + A + QUESTION
    with StateStore.open(tmp_path / "store") as store:
        engine_of(model, store).precompute([A])
        flip_last(store, record_of(store, damaged), 2)
    with StateStore.open(tmp_path / "store", read_only=True) as store:
        engine = engine_of(model, store)
        with on_forward(model, fail_at(100)):  # an engine that tries for ever
            answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(FAR, prompt, 24)
    assert any("fails its checksum" in warning for warning in answer.provenance.warnings)


def keeping(store: StateStore, dtype: str) -> HCacheEngine:
    """An engine that was asked to keep K and V in a dtype."""
    return HCacheEngine(
        model_of(FAR),
        TOKENIZER,
        store,
        preamble=PREAMBLE,
        representation="kv",
        storage_dtype=dtype,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_states_in_another_form_than_was_asked_for_are_stored_anew(
    store: StateStore, dtype: str
) -> None:
    """Once; without a wish, what is there will do."""
    assert keeping(store, "int8").precompute([A, B]).stored == 2
    plain = HCacheEngine(model_of(FAR), TOKENIZER, store, preamble=PREAMBLE)
    assert plain.precompute([A, B]).reused == 2
    asking = keeping(store, dtype)
    assert asking.precompute([A]).stored == 1
    assert asking.precompute([A]).reused == 1
    layouts = {r.text: str(r.layout) for r in store.records()}
    assert dtype in layouts[A]
    assert dtype in layouts[PREAMBLE]
    assert "int8" in layouts[B]


def test_an_exact_engine_stores_anew_what_lost_something(store: StateStore) -> None:
    """States that it would not use, and no others."""
    keeping(store, "int8").precompute([A])
    exact = HCacheEngine(model_of(FAR), TOKENIZER, store, preamble=PREAMBLE, fidelity="exact")
    assert exact.precompute([A]).stored == 1
    assert exact.precompute([A]).reused == 1
    answer = exact.generate(PREAMBLE + A + QUESTION, options=options())
    assert answer.provenance.exact_tokens == len(PREAMBLE + A)


def test_one_string_is_not_a_list_of_texts(store: StateStore) -> None:
    with pytest.raises(TypeError, match="not one string"):
        engine_of(model_of(FAR), store).precompute(A)


def test_a_stop_string_may_stand_alone(store: StateStore) -> None:
    """It is one string, not its letters."""
    engine = engine_of(model_of(FAR), store)
    whole = engine.generate(PREAMBLE, options=options()).text
    stop = whole[5:8]
    answer = engine.generate(PREAMBLE, options=options(stop=stop))
    assert answer.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("wrong", [{"top_p": 2.0}, {"top_p": 0.0}, {"top_k": 0}])
def test_sampling_limits_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        options(**wrong)


def test_a_damaged_record_is_stored_again(store: StateStore) -> None:
    """Transformers' `generate` with no cache / the engine's on a broken record: the same answer.

    Indexing the text again repairs it.
    """
    model, prompt = model_of(FAR), PREAMBLE + A + QUESTION
    engine_of(model, store).precompute([A])
    record = record_of(store, A)
    with store._writing() as txn:
        txn.put("records", struct.pack(">I", 1) + record.key, b"{" + record.to_bytes())
    engine = engine_of(model, store)
    engine.announce([A])
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(FAR, prompt, 24)
    assert (answer.provenance.missed_tokens, answer.provenance.documents_missed) == (len(A), 1)
    assert engine.precompute([A]).stored == 1
    assert engine.generate(prompt, options=options()).provenance.exact_tokens == len(PREAMBLE + A)


@pytest.mark.parametrize("foreign", ["weights", "tokenizer"])
def test_a_store_of_another_model_or_tokenizer(
    foreign: str,
    store: StateStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Transformers' `generate` with no cache / the engine's on a foreign store: the same answer.

    The other model differs in its weights alone, the other tokenizer in its first token alone.
    """
    other_model = tiny_model(FAR, seed=1) if foreign == "weights" else model_of(FAR)
    other_tokenizer = byte_tokenizer(adds_bos=foreign == "tokenizer")
    other = engine_of(other_model, store, name="the other", tokenizer=other_tokenizer)
    other.precompute([A, B])
    assert not warnings_of(caplog)

    engine = engine_of(model_of(FAR), store)
    assert any("another model or tokenizer" in warning for warning in warnings_of(caplog))
    prompt = PREAMBLE + A + GAP + B + QUESTION
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(FAR, prompt, 24)
    provenance = answer.provenance
    assert (provenance.missed_tokens, provenance.documents_missed) == (len(A + B), 2)
    assert (provenance.restored_tokens, provenance.bytes_read) == (0, 0)
    assert any("another model or tokenizer (the other)" in w for w in provenance.warnings)

    engine.precompute([A, B])  # both models' states live side by side
    answer = engine.generate(PREAMBLE + A + QUESTION, options=options())
    assert answer.token_ids == transformers_answer(FAR, PREAMBLE + A + QUESTION, 24)
    assert answer.provenance.exact_tokens == len(PREAMBLE + A)
    assert not answer.provenance.warnings


def delete_folder(folder: Path, engine: HCacheEngine) -> HCacheEngine:
    """A store's folder is deleted; the engine of the next start is told the texts."""
    engine.close()
    shutil.rmtree(folder)
    reopened = engine_of(model_of(FAR), folder)
    reopened.announce([A, B])
    return reopened


def test_a_deleted_store(tmp_path: Path) -> None:
    """Transformers' `generate` with no cache / the engine's on a deleted store: the same answer."""
    folder = tmp_path / "states"
    engine = engine_of(model_of(FAR), folder)
    engine.precompute([A, B])
    with delete_folder(folder, engine) as reopened:
        prompt = PREAMBLE + A + GAP + B + QUESTION
        answer = reopened.generate(prompt, options=options())
        assert answer.token_ids == transformers_answer(FAR, prompt, 24)
        provenance = answer.provenance
        assert (provenance.missed_tokens, provenance.documents_missed) == (len(A + B), 2)
        assert provenance.fresh_tokens == provenance.prompt_tokens == len(prompt)


def test_a_deleted_store_is_named_as_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Documents that were announced and have no state are warned about, not only counted."""
    folder = tmp_path / "states"
    engine = engine_of(model_of(FAR), folder)
    engine.precompute([A, B])
    with delete_folder(folder, engine) as reopened:
        answer = reopened.generate(PREAMBLE + A + QUESTION, options=options(1))
    assert any("no stored state" in warning for warning in answer.provenance.warnings)
    assert any("no stored state" in warning for warning in warnings_of(caplog))


def test_a_state_deleted_under_a_running_engine(store: StateStore) -> None:
    """Transformers' `generate` with no cache / the engine's after a deletion: the same answer.

    A text that is neither stored nor announced is no document any more.
    """
    engine = engine_of(model_of(FAR), store)
    engine.precompute([A])
    assert store.delete(record_of(store, A).key)
    prompt = PREAMBLE + A + QUESTION
    for missed in ((0, 0), (len(A), 1)):
        answer = engine.generate(prompt, options=options())
        assert answer.token_ids == transformers_answer(FAR, prompt, 24)
        provenance = answer.provenance
        assert (provenance.missed_tokens, provenance.documents_missed) == missed
        engine.announce([A])


def test_a_state_deleted_between_finding_and_reading_it(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers' `generate` with no cache / the engine's in a race: the same answer."""
    engine = engine_of(model_of(FAR), store)
    engine.precompute([A])
    key, composing = record_of(store, A).key, engine.bound.compose

    def compose_and_delete(pieces: Any) -> Any:
        composition = composing(pieces)
        store.delete(key)
        return composition

    monkeypatch.setattr(engine.bound, "compose", compose_and_delete)
    prompt = PREAMBLE + A + QUESTION
    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(FAR, prompt, 24)
    assert (answer.provenance.missed_tokens, answer.provenance.documents_missed) == (len(A), 1)
    assert any("is not in the store" in warning for warning in answer.provenance.warnings)


# 5. The account


def stored_bytes(store: StateStore, spans: Sequence[tuple[str, int]]) -> int:
    """Bytes of the values that hold the first tokens of these states, past its methods."""
    total = 0
    for text, tokens in spans:
        record = record_of(store, text)
        with chunks(store) as stored:
            for layer in range(FAR.layers):
                for chunk in range(-(-tokens // 64)):
                    total += len(stored.get(chunk_key(record, layer, chunk)))
    return total


@pytest.mark.parametrize("representation", WITH_MIXED)
@pytest.mark.parametrize(
    ("prompt", "exact", "relocated", "restored"),
    [
        (PREAMBLE + A + QUESTION, PREAMBLE + A, "", [(PREAMBLE, len(PREAMBLE)), (A, len(A))]),
        (
            PREAMBLE + B + GAP + A + QUESTION,
            PREAMBLE + B,
            A,
            [(PREAMBLE, len(PREAMBLE)), (B, len(B)), (A, len(A))],
        ),
        (
            PREAMBLE + "First: " + A + QUESTION,
            PREAMBLE,
            A,
            [(PREAMBLE, len(PREAMBLE)), (A, len(A))],
        ),
        (A + QUESTION, "", A, [(A, len(A))]),
        (
            PREAMBLE + A[:130] + "~" + QUESTION,
            PREAMBLE + A[:130],
            "",
            [(PREAMBLE, len(PREAMBLE)), (A, 130)],
        ),
        (
            PREAMBLE + A[:130] + B + QUESTION,
            PREAMBLE + A[:130],
            B,
            [(PREAMBLE, len(PREAMBLE)), (A, 130), (B, len(B))],
        ),
        (PREAMBLE + QUESTION, PREAMBLE, "", [(PREAMBLE, len(PREAMBLE))]),
        (PREAMBLE + A, PREAMBLE + A[:-1], "", [(PREAMBLE, len(PREAMBLE)), (A, len(A) - 1)]),
        (QUESTION, "", "", []),
    ],
    ids=["exact", "two", "not-next", "headless", "cut", "cut-two", "none", "last", "query"],
)
def test_the_account_of_tokens_and_bytes(
    prompt: str,
    exact: str,
    relocated: str,
    restored: list[tuple[str, int]],
    representation: str,
    store: StateStore,
) -> None:
    """Lengths of the texts, and values counted in LMDB / the provenance: the same numbers."""
    engine = engine_of(model_of(FAR), store, representation)
    engine.precompute([A, B])
    answer = engine.generate(prompt, options=options(2))
    provenance = answer.provenance
    assert provenance.prompt_tokens == len(prompt) == engine.count_tokens(prompt)
    assert provenance.exact_tokens == len(exact)
    assert provenance.relocated_tokens == len(relocated)
    assert provenance.restored_tokens == len(exact + relocated)
    assert provenance.fresh_tokens == len(prompt) - len(exact + relocated)
    assert provenance.documents_restored == sum(text != PREAMBLE for text, _ in restored)
    assert (provenance.missed_tokens, provenance.documents_missed) == (0, 0)
    assert provenance.bytes_read == stored_bytes(store, restored)
    assert (provenance.bytes_read > 0) == bool(restored)
    assert not provenance.warnings
    planned = engine.plan(prompt)
    for name in ("prompt_tokens", "exact_tokens", "relocated_tokens", "fresh_tokens"):
        assert getattr(planned, name) == getattr(provenance, name)
    assert provenance.to_dict()["restored_tokens"] == provenance.restored_tokens


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_fidelity_restores_only_what_answers_as_full_prefill(
    shape: Shape, representation: str, store: StateStore
) -> None:
    """Transformers' full prefill / restored with fidelity "exact": logits and greedy answer.

    Bit-equal in reference mode to prefill in the same steps, within rounding to prefill in one.
    """
    model = model_of(shape)
    engine = engine_of(model, store, representation, fidelity="exact", reference_mode=True)
    for text in (A, B):
        engine.precompute([text])
    prompt, rest = PREAMBLE + A + GAP + B + QUESTION, GAP + B + QUESTION
    composition, ours = restore(engine, prompt)
    assert composition.num_restored == composition.num_exact == len(PREAMBLE + A)
    steps = [ids_of(text) for text in (PREAMBLE, A, rest)]
    theirs = prefill(model, *steps)
    assert torch.equal(ours.between(0), theirs.between(0))
    assert torch.equal(ours.logits, theirs.logits)
    whole = prefill(model, [token for step in steps for token in step])
    assert_near(ours.logits, whole.logits)

    answer = engine.generate(prompt, options=options())
    assert answer.token_ids == transformers_answer(shape, prompt, 24)
    assert answer.provenance.relocated_tokens == 0
    headless = engine.generate(A + QUESTION, options=options())
    assert headless.token_ids == transformers_answer(shape, A + QUESTION, 24)
    assert headless.provenance.restored_tokens == 0


# 6. Streams, sampling, stops, threads


@pytest.fixture
def talker(store: StateStore) -> HCacheEngine:
    """An engine that has read A and B."""
    engine = engine_of(tiny_model(FAR), store)
    engine.precompute([A, B])
    return engine


PROMPT = PREAMBLE + A + QUESTION


def test_streamed_pieces_are_the_answer(talker: HCacheEngine) -> None:
    """`generate`'s text / the pieces of `stream`, and of `on_text`: equal, one piece a token."""
    answer = talker.generate(PROMPT, options=options(40))
    stream = talker.stream(PROMPT, options=options(40))
    pieces = list(stream)
    assert "".join(pieces) == answer.text == stream.result.text
    assert len(pieces) == 40
    told: list[str] = []
    talker.generate(PROMPT, options=options(40), on_text=told.append)
    assert told == pieces
    assert not own_threads()


@pytest.mark.parametrize("new_tokens", [1, 2, 5])
def test_streamed_pieces_are_the_answer_when_it_ends_inside_a_character(
    new_tokens: int, talker: HCacheEngine
) -> None:
    """`generate`'s text / the streamed pieces: equal, also when the last bytes are no character."""
    lead = ids_of("€")[:2]
    only = {"suppress_tokens": [token for token in range(VOCABULARY) if token not in lead]}
    stream = talker.stream(PROMPT, options=options(new_tokens, extra=only))
    pieces = list(stream)
    assert "".join(pieces) == stream.result.text


def test_a_closed_stream_has_stopped(talker: HCacheEngine) -> None:
    """After `close` no thread of the library is alive, and the next request is answered."""
    before = talker.generate(PROMPT, options=options())
    stream = talker.stream(PROMPT, options=options(500))
    with on_forward(talker.adapter.model, _wait_from(3, stream._computation._cancelled)), stream:
        assert next(stream) == before.text[0]
    assert not own_threads()
    assert stream.result.finish_reason == "cancelled"
    assert len(stream.result.token_ids) < 10
    assert num_hooks(talker.adapter.model) == 0
    with pytest.raises(StopIteration):
        next(stream)
    assert talker.generate(PROMPT, options=options()).text == before.text


def _wait_from(number: int, event: threading.Event) -> Callable[[int], object]:
    """For `on_forward`: from one pass on, wait for an event."""
    return lambda count: count < number or event.wait()


def test_a_stream_closed_before_it_began(talker: HCacheEngine) -> None:
    """Nothing was started, nothing is left."""
    with talker.stream(PROMPT):
        assert not own_threads()
    assert not own_threads()
    assert num_hooks(talker.adapter.model) == 0


def test_a_dropped_stream_stops(talker: HCacheEngine) -> None:
    """A stream that nobody holds any more stops generating without being closed."""
    passes, dropped = 0, threading.Event()

    def count(number: int) -> None:
        nonlocal passes
        passes = number
        if number == 3:
            dropped.wait()

    with on_forward(talker.adapter.model, count):
        stream = talker.stream(PROMPT, options=options(60))
        next(stream)
        del stream
        gc.collect()
        dropped.set()
        for thread in threading.enumerate():
            if thread.name == "hcache-generate":
                thread.join()
    assert passes < 10


@pytest.mark.parametrize("number", [0, 3], ids=["prefill", "decode"])
@pytest.mark.parametrize("module", ["", "model.layers.4"], ids=["model", "last-layer"])
def test_an_error_inside_generation_reaches_the_consumer(
    module: str, number: int, talker: HCacheEngine
) -> None:
    """The error is raised by `generate` and by the stream; nothing is left of the request."""
    model = talker.adapter.model
    before = talker.generate(PROMPT, options=options())
    with on_forward(model, fail_at(number), module), pytest.raises(InterruptedPassError):
        talker.generate(PROMPT, options=options())
    with on_forward(model, fail_at(number), module):
        stream = talker.stream(PROMPT, options=options())
        pieces = [next(stream) for _ in range(number)]
        with pytest.raises(InterruptedPassError):
            next(stream)
    assert "".join(pieces) == before.text[:number]
    assert list(stream) == []
    assert num_hooks(model) == 0
    assert not own_threads()
    assert talker.generate(PROMPT, options=options()).text == before.text


def test_an_error_of_the_listener_reaches_the_caller(talker: HCacheEngine) -> None:
    """What `on_text` raises ends the request and leaves nothing behind."""

    def listen(_text: str) -> None:
        raise InterruptedPassError("enough")

    with pytest.raises(InterruptedPassError):
        talker.generate(PROMPT, options=options(), on_text=listen)
    assert num_hooks(talker.adapter.model) == 0
    assert not own_threads()


def test_cancelling_ends_after_the_token_in_hand(talker: HCacheEngine) -> None:
    """Transformers' greedy tokens / the engine's until it is cancelled: the first of them.

    Transformers asks whether to stop before it passes a token on, so that one more may come.
    """
    cancelled = threading.Event()
    told: list[str] = []

    def listen(text: str) -> None:
        told.append(text)
        if len(told) == 5:
            cancelled.set()

    answer = talker.generate(PROMPT, options=options(), on_text=listen, cancelled=cancelled)
    assert answer.finish_reason == "cancelled"
    assert len(answer.token_ids) in (5, 6)
    assert answer.token_ids == transformers_answer(FAR, PROMPT, 24)[: len(answer.token_ids)]
    assert answer.text == "".join(told)


def test_temperature_zero_is_greedy_and_none_is_the_models_own(talker: HCacheEngine) -> None:
    """Transformers' `generate` on the same ids / the engine's, on a model that samples by default.

    With temperature 0 both are greedy; with None both sample as the generation config says, from
    the same seed.
    """
    model: Any = talker.adapter.model
    assert talker.generate(PROMPT, options=options(temperature=None)).token_ids == (
        transformers_answer(FAR, PROMPT, 24)
    )
    model.generation_config.do_sample = True
    model.generation_config.temperature = 1.3
    answer = talker.generate(PROMPT, options=options())
    assert answer.token_ids == transformers_answer(FAR, PROMPT, 24)

    sampled = talker.generate(PROMPT, options=options(temperature=None, seed=5))
    ids = ids_of(PROMPT)
    torch.manual_seed(5)
    assert list(sampled.token_ids) == generate(model, ids, 24, **PRINTABLE)
    assert sampled.token_ids != answer.token_ids


def test_sampling_is_reproducible(talker: HCacheEngine) -> None:
    """Transformers' sampling from a seed / the engine's: the same; other seeds, other texts."""
    ids = ids_of(PROMPT)
    texts = []
    for seed in range(4):
        chosen = options(temperature=0.8, seed=seed)
        first, second = (talker.generate(PROMPT, options=chosen) for _ in range(2))
        assert first.token_ids == second.token_ids
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": 0.8, **PRINTABLE}
        assert list(first.token_ids) == generate(talker.adapter.model, ids, 24, **sampling)
        texts.append(first.text)
    assert len(set(texts)) == 4


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("at", [0, 7, 19])
def test_stop_strings(at: int, length: int, talker: HCacheEngine) -> None:
    """The full answer cut before the stop string / the engine's: equal, streamed or not."""
    full = talker.generate(PROMPT, options=options()).text
    stop = full[at : at + length]
    chosen = options(stop=["never to be seen", stop])
    answer = talker.generate(PROMPT, options=chosen)
    assert answer.text == full[: full.index(stop)]
    assert answer.finish_reason == "stop"
    assert "".join(talker.stream(PROMPT, options=chosen)) == answer.text


def test_no_hooks_are_left(talker: HCacheEngine) -> None:
    """The model is as it was, after indexing, answering, streaming and planning."""
    model = talker.adapter.model
    assert num_hooks(model) == 0
    talker.generate(PROMPT, options=options(3))
    list(talker.stream(PROMPT, options=options(3)))
    talker.plan(PROMPT)
    talker.generate("no document", options=options(3))
    assert num_hooks(model) == 0
    assert not model._forward_pre_hooks
    assert not own_threads()


def test_requests_on_one_model_at_once(tmp_path: Path) -> None:
    """One request after another / from four threads and two engines at once: the same texts."""
    model = tiny_model(FAR)
    prompts = [
        PREAMBLE + A + QUESTION,
        PREAMBLE + A + GAP + B + QUESTION,
        PREAMBLE + B + QUESTION,
        PREAMBLE + C + GAP + A + GAP + B + QUESTION,
        PREAMBLE + QUESTION,
    ]
    switching = sys.getswitchinterval()
    with ExitStack() as stack:
        engines = [
            stack.enter_context(engine_of(model, tmp_path / name)) for name in ("one", "two")
        ]
        for engine in engines:
            engine.precompute([A, B, C])
        alone = [engines[0].generate(prompt, options=options(12)).text for prompt in prompts]
        results: dict[int, list[str]] = {}
        errors: list[BaseException] = []
        barrier = threading.Barrier(4)

        def ask(index: int) -> None:
            try:
                barrier.wait()
                order = range(index, index + len(prompts))
                texts = {
                    i % len(prompts): engines[index % 2]
                    .generate(prompts[i % len(prompts)], options=options(12))
                    .text
                    for i in order
                }
                results[index] = [texts[i] for i in range(len(prompts))]
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(switching)
    assert not errors
    assert results == dict.fromkeys(range(4), alone)
    assert num_hooks(model) == 0


def test_a_request_may_end_while_another_begins(talker: HCacheEngine) -> None:
    """A forward pass alone / while whose hooks are called another request ends: the same logits.

    The model collects the hooks of both requests before it calls the first.
    """
    model: Any = talker.adapter.model
    _, alone = restore(talker, PROMPT)
    composition = talker.bound.compose(talker.bound.resolve(PROMPT).pieces)
    ids = torch.tensor([composition.token_ids.tolist()])
    other = ExitStack()

    def open_cache(stack: ExitStack) -> Any:
        buffers = stack.enter_context(talker.answering.buffers.borrow(ids.shape[1]))
        opened = open_restoring(talker.adapter, composition, buffers, talker.store)
        return stack.enter_context(opened)[0]

    with torch.no_grad(), ExitStack() as stack, other:
        cache = open_cache(stack)
        stack.enter_context(on_forward(model, lambda _count: other.close()))
        open_cache(other)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert torch.equal(output.logits[0, -1], alone.logits)
    assert num_hooks(model) == 0


# 7. Capturing


@pytest.mark.parametrize("representation", WITH_MIXED)
@pytest.mark.parametrize("module", ["model.layers.0", "model.layers.4.mlp"], ids=["first", "last"])
def test_a_capture_that_fails_leaves_no_hooks(
    module: str, representation: str, store: StateStore
) -> None:
    """The error comes out, nothing is stored of the text, and indexing works again."""
    model = tiny_model(FAR)
    engine = engine_of(model, store, representation)
    engine.precompute([B])
    with on_forward(model, fail_at(0), module), pytest.raises(InterruptedPassError):
        engine.precompute([A])
    assert num_hooks(model) == 0
    assert all(record.text != A for record in store.records())
    assert engine.precompute([A]).stored == 1
    assert num_hooks(model) == 0
    answer = engine.generate(PROMPT, options=options())
    assert answer.token_ids == transformers_answer(FAR, PROMPT, 24)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_a_capture_is_not_disturbed_by_another_threads_forward_pass(representation: str) -> None:
    """A capture alone / while another thread runs the model: the same values.

    Indexing and answering share the model, so that hooks see both.
    """
    model = tiny_model(FAR)
    adapter = ModelAdapter(model)
    layout = fixed_layout(adapter.spec, representation).layout
    kinds = [fmt.representation for fmt in layout.layers]
    ids, others = (encode(TOKENIZER, text, is_document=True) for text in (A, C[: len(A)]))
    after = adapter.prefill([])
    alone = [_clone(layer.first, layer.second) for layer in adapter.capture([ids], kinds, after)]
    with reading_elsewhere(model, others):
        captured = adapter.capture([ids], kinds, after)
    for (first, second), layer in zip(alone, captured, strict=True):
        assert layer.first is not None
        assert torch.equal(layer.first, first)
        if second is not None:
            assert layer.second is not None
            assert torch.equal(layer.second, second)


def test_scores_for_repair_are_not_disturbed_by_another_threads_forward_pass(
    store: StateStore,
) -> None:
    """Scores alone / while another thread runs the model: the same."""
    model = tiny_model(FAR)
    engine = engine_of(model, store)
    engine.precompute([A, B, C])
    composition = engine.bound.compose(engine.bound.resolve(joined(SEVERAL)).pieces)

    def scores() -> list[float]:
        with (
            engine.answering.buffers.borrow(len(composition.token_ids)) as buffers,
            open_restoring(engine.adapter, composition, buffers, store) as (cache, _),
        ):
            return [float(score) for score in last_row_scores(engine.adapter, cache)]

    alone = scores()
    assert len(alone) == composition.num_restored
    with reading_elsewhere(model, ids_of(C)):
        assert scores() == alone


def _clone(first: Tensor | None, second: Tensor | None) -> tuple[Tensor, Tensor | None]:
    assert first is not None
    return first.clone(), None if second is None else second.clone()


def test_short_texts_are_short() -> None:
    """The prompts above hold what their names say."""
    assert len(TINY) == 1
    assert len(SMALL) < ANCHOR_CHARS <= len(CONTROL)
    assert all(len(text) > MIN_CUT_CHARS for text in (A, B, C, WIDE))
