"""Restored caches against transformers' own prefill, on SmolLM2-135M-Instruct and real text."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    Part,
    Reading,
    block_prefill,
    document,
    document_state,
    encode,
    encode_part,
    encode_parts,
    greedy,
    joined,
    largest_and_rms,
    prefill,
    restore,
    rotate,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import GenerationOptions, HCacheEngine, StateStore

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

PREAMBLE = (
    "<|im_start|>system\nYou answer questions from the passages that you are given.<|im_end|>\n"
    "<|im_start|>user\n"
)
QUESTION = "\n\nWhat do we learn here?<|im_end|>\n<|im_start|>assistant\n"
END = 2
REPRESENTATIONS = ["hidden", "kv"]
ROUNDING = 2e-4
"""What float32 sums in another order may differ by, where K goes up to 20 and logits to 30."""


pytestmark = pytest.mark.usefixtures("one_thread")


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=ROUNDING)


def assert_close(ours: Reading, theirs: Reading) -> None:
    """K, V and logits agree but for rounding."""
    assert_near(ours.keys, theirs.keys)
    assert_near(ours.values, theirs.values)
    assert_near(ours.logits, theirs.logits)


def options(new_tokens: int) -> GenerationOptions:
    """Greedy, and not ending early."""
    return GenerationOptions(
        max_new_tokens=new_tokens, temperature=0, extra={"suppress_tokens": [END]}
    )


@pytest.fixture(scope="module", params=REPRESENTATIONS)
def representation(request: pytest.FixtureRequest) -> str:
    """Both, one after another."""
    return str(request.param)


@pytest.fixture(scope="module")
def passages(solar_system: list[str], shared_data: Path, representation: str) -> list[str]:
    """Three passages, other ones for each representation, of SQuAD and of those shipped."""
    data = json.loads((shared_data / "squad_small.json").read_text())["data"]
    contexts = [p["context"].strip() for article in data for p in article["paragraphs"]]
    short = sorted((text for text in contexts if len(text) > 320), key=len)[:3]
    shipped = sorted(solar_system, key=len)[:3]
    return [*short, *shipped][REPRESENTATIONS.index(representation) :: 2]


@pytest.fixture(scope="module")
def context(shared_data: Path) -> list[str]:
    """The four shortest passages of one HotpotQA question, title first, but none too short."""
    record = json.loads((shared_data / "hotpotqa_100.json").read_text())[0]
    texts = [f"{title}\n{''.join(sentences)}".strip() for title, sentences in record["context"]]
    return sorted((text for text in texts if len(text) > 320), key=len)[:4]


@pytest.fixture(scope="module")
def engines(
    smollm2: Loaded,
    passages: list[str],
    context: list[str],
    representation: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, HCacheEngine]]:
    """Engines in either mode on one store, which has read the passages one by one."""
    model, tokenizer = smollm2
    with StateStore.open(tmp_path_factory.mktemp("states") / representation) as store:
        keep: dict[str, Any] = {
            "preamble": PREAMBLE,
            "representation": representation,
            "storage_dtype": "float32",
            "fidelity": "none",
        }
        reference = HCacheEngine(model, tokenizer, store, reference_mode=True, **keep)
        for text in (*passages, *context):
            assert reference.precompute([text]).stored == 1
        yield {
            "reference": reference,
            "folded": HCacheEngine(model, tokenizer, store, **keep),
        }


def test_reference_mode_is_prefill_bit_for_bit(
    engines: dict[str, HCacheEngine], passages: list[str]
) -> None:
    """Transformers' prefill in the same steps / restored in reference mode: all bits equal.

    From transformers' prefill in one step they differ by rounding only.
    """
    engine, text = engines["reference"], passages[-1]
    model, tokenizer = engine.adapter.model, engine.tokenizer
    parts = [Part(PREAMBLE), document(text), Part(QUESTION)]
    steps = [encode_part(tokenizer, part) for part in parts]
    composition, ours = restore(engine, joined(parts))
    assert composition.token_ids.tolist() == [token for step in steps for token in step]
    assert composition.num_exact == len(steps[0]) + len(steps[1])
    theirs = prefill(model, *steps)
    assert torch.equal(ours.between(0), theirs.between(0))
    assert torch.equal(ours.logits, theirs.logits)
    assert_close(ours, prefill(model, [token for step in steps for token in step]))


@pytest.fixture(scope="module")
def float64_and_own(smollm2: Loaded, context: list[str]) -> tuple[Tensor, Tensor]:
    """K and V of the preamble and a passage, in float64 and by transformers' own path.

    In one step or in two, transformers' largest float32 errors differ by up to 1.5 themselves: the
    own path goes in the same steps.
    """
    model, tokenizer = smollm2
    steps = [encode_part(tokenizer, part) for part in (Part(PREAMBLE), document(context[0]))]
    double: Any = copy.deepcopy(model)
    exact = prefill(double.double(), [token for step in steps for token in step])
    return exact.between(0), prefill(model, *steps).between(0).double()


def test_folded_mode_is_as_near_to_float64_as_transformers(
    engines: dict[str, HCacheEngine],
    context: list[str],
    float64_and_own: tuple[Tensor, Tensor],
) -> None:
    """Error of transformers' prefill in the same steps / of the restored one: at most 1.5 times.

    Both against a float64 prefill with the same weights, over all layers of the restored tokens.
    """
    composition, ours = restore(engines["folded"], PREAMBLE + context[0] + QUESTION)
    exact, theirs = float64_and_own
    assert composition.num_restored == exact.shape[-2]
    for name, side in (("K", 0), ("V", 1)):
        restored = ours.between(0, composition.num_restored)[side].double()
        error = largest_and_rms(restored - exact[side])
        bound = largest_and_rms(theirs[side] - exact[side])
        for kind, size in error.items():
            assert size <= 1.5 * bound[kind], f"{kind} error of {name}: {size}, {bound[kind]}"


@pytest.mark.parametrize("index", range(3))
def test_greedy_answer_of_64_tokens(
    index: int, engines: dict[str, HCacheEngine], passages: list[str]
) -> None:
    """Transformers' `generate` with no cache / the engine's: the same 64 tokens and their text.

    In folded mode, which users get.
    """
    engine, text = engines["folded"], passages[index]
    parts = [Part(PREAMBLE), document(text), Part(QUESTION)]
    ids = encode_parts(engine.tokenizer, parts)
    answer = engine.generate(joined(parts), options=options(64))
    theirs = greedy(engine.adapter.model, ids, 64, suppress_tokens=[END])
    assert list(answer.token_ids) == theirs
    assert answer.text == engine.tokenizer.decode(theirs, skip_special_tokens=True)
    assert answer.provenance.exact_tokens == len(encode_parts(engine.tokenizer, parts[:2]))
    assert answer.provenance.relocated_tokens == 0


def four_documents(context: list[str]) -> list[Part]:
    """A prompt of four passages in another order than they were read in."""
    middle = [
        piece
        for text in (context[i] for i in (2, 0, 3))
        for piece in (document(text), Part("\n\n"))
    ]
    return [Part(PREAMBLE), *middle, document(context[1]), Part(QUESTION)]


@pytest.fixture(scope="module")
def relocated(smollm2: Loaded, context: list[str]) -> dict[int, Tensor]:
    """By position, K and V of documents that transformers read after the preamble alone.

    K is taken before RoPE and rotated by transformers' own RoPE to where the document stands.
    """
    model, tokenizer = smollm2
    head = encode(tokenizer, PREAMBLE, is_document=False)
    position, found = 0, {}
    for part in four_documents(context):
        ids = encode_part(tokenizer, part)
        if part.document is not None:
            state = document_state(model, head, ids)
            found[position] = torch.stack((rotate(model, state.keys, position), state.values))
        position += len(ids)
    return found


@pytest.mark.parametrize("mode", ["reference", "folded"])
def test_each_document_is_what_it_is_after_the_preamble_alone(
    mode: str,
    engines: dict[str, HCacheEngine],
    context: list[str],
    relocated: dict[int, Tensor],
) -> None:
    """Transformers' prefill of the preamble and one document / restored: equal where it stands.

    In reference mode all bits are equal, in folded mode all but rounding.
    """
    engine, parts = engines[mode], four_documents(context)
    composition, ours = restore(engine, joined(parts))
    assert composition.token_ids.tolist() == encode_parts(engine.tokenizer, parts)
    assert len(relocated) == 4
    for position, theirs in relocated.items():
        restored = ours.between(position, position + theirs.shape[-2])
        if mode == "reference":
            assert torch.equal(restored, theirs)
        else:
            assert_near(restored, theirs)


@pytest.fixture(scope="module")
def block_reference(smollm2: Loaded, context: list[str]) -> tuple[Reading, list[int]]:
    """What transformers has after reading four documents that see only the preamble."""
    model, tokenizer = smollm2
    parts = four_documents(context)
    return block_prefill(model, tokenizer, PREAMBLE, parts, new_tokens=32, suppressed=[END])


def test_four_documents_are_block_attention(
    engines: dict[str, HCacheEngine],
    context: list[str],
    block_reference: tuple[Reading, list[int]],
) -> None:
    """Transformers' prefill in which documents see only the preamble / restored: within rounding.

    Compared are K and V of all positions, the last position's logits, and the greedy answer.
    """
    theirs, tokens = block_reference
    parts = four_documents(context)
    for engine in engines.values():
        _, ours = restore(engine, joined(parts))
        assert_close(ours, theirs)
    answer = engines["folded"].generate(joined(parts), options=options(32))
    assert list(answer.token_ids) == tokens
    provenance = answer.provenance
    lengths = [len(encode_part(engines["folded"].tokenizer, part)) for part in parts]
    assert provenance.prompt_tokens == sum(lengths)
    assert provenance.exact_tokens == lengths[0] + lengths[1]
    assert provenance.relocated_tokens == lengths[3] + lengths[5] + lengths[7]
    assert provenance.fresh_tokens == lengths[2] + lengths[4] + lengths[6] + lengths[8]
    assert provenance.documents_restored == 4


@pytest.mark.parametrize("cut", [150, 299])
def test_a_document_cut_inside_a_word(
    cut: int, engines: dict[str, HCacheEngine], context: list[str]
) -> None:
    """Transformers' prefill of the cut document's own tokens / restored: equal, and no more.

    The tokens that lie in the cut text whole are restored, what is left of it is read afresh.
    """
    engine, text = engines["folded"], context[1]
    model, tokenizer = engine.adapter.model, engine.tokenizer
    prompt = PREAMBLE + text[:cut] + "..." + QUESTION
    kept = encode_part(tokenizer, document(text, cut))
    rest = prompt[len(PREAMBLE) + len(tokenizer.decode(kept)) :]
    steps = [
        encode(tokenizer, PREAMBLE, is_document=False),
        kept,
        encode(tokenizer, rest, is_document=False),
    ]
    composition, ours = restore(engine, prompt)
    assert composition.token_ids.tolist() == [token for step in steps for token in step]
    assert composition.num_exact == len(steps[0]) + len(kept)
    assert tokenizer.decode(composition.token_ids.tolist()) == prompt
    assert_close(ours, prefill(model, *steps))


def test_control_tokens_in_a_document_stay_text(smollm2: Loaded, store: StateStore) -> None:
    """Transformers' prefill of `split_special_tokens=True` ids / restored: the same ids, K and V.

    In all other text of the prompt they are control tokens.
    """
    model, tokenizer = smollm2
    text = "In the chat format <|im_start|>user opens a turn and <|im_end|> ends it.<|im_end|>"
    parts = [Part(PREAMBLE), document(text), Part(QUESTION)]
    engine = HCacheEngine(
        model,
        tokenizer,
        store,
        preamble=PREAMBLE,
        storage_dtype="float32",
        reference_mode=True,
    )
    engine.precompute([text])
    composition, ours = restore(engine, joined(parts))
    steps = [encode_part(tokenizer, part) for part in parts]
    assert composition.token_ids.tolist() == [token for step in steps for token in step]
    assert END not in steps[1]
    assert END in steps[0]
    assert END in steps[2]
    theirs = prefill(model, *steps)
    assert torch.equal(ours.between(0), theirs.between(0))
    assert torch.equal(ours.logits, theirs.logits)


def test_an_empty_store_answers_as_transformers(
    smollm2: Loaded, store: StateStore, solar_system: list[str]
) -> None:
    """Transformers' `generate` on its own tokenisation / a strict engine's on no states: equal."""
    model, tokenizer = smollm2
    engine = HCacheEngine(model, tokenizer, store, preamble=PREAMBLE, tokenization="strict")
    engine.announce(solar_system)
    prompt = PREAMBLE + solar_system[9] + QUESTION
    call: Any = tokenizer
    ids = call(prompt)["input_ids"]
    answer = engine.generate(prompt, options=GenerationOptions(max_new_tokens=16))
    theirs = greedy(model, ids, 16)
    assert list(answer.token_ids) == theirs
    assert answer.text == tokenizer.decode(theirs, skip_special_tokens=True)
    assert answer.provenance.fresh_tokens == answer.provenance.prompt_tokens == len(ids)
