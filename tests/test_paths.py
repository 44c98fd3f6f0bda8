"""Exact paths: conversations that go on where they were, and rows of documents that recur."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import encode, generate, largest_and_rms, prefill
from tiny import SHAPES, VOCABULARY, Shape, byte_tokenizer, tiny_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import HCacheEngine, StateStore
from hcache_rag.cache import RestoringCache
from hcache_rag.errors import MissingStateError, StoreError
from hcache_rag.generation import GenerationOptions
from hcache_rag.keeper import MAX_WAITING, RECURS, Keeper
from hcache_rag.paths import Paths, Snapshot, captured_layers
from hcache_rag.provenance import Generation
from hcache_rag.resolved import Resolved, ResolvedPiece
from hcache_rag.state import token_array
from hcache_rag.store import PATHS

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENIZER = byte_tokenizer()
PATIENCE_S = 60.0
SHAPE = SHAPES[2]
PRINTABLE = {
    "suppress_tokens": [
        n for n in range(VOCABULARY) if not str(TOKENIZER.decode([n])).isalpha() and n != 257
    ]
}
"""A random model says any byte; letters can be said by text."""
GREEDY = GenerationOptions(max_new_tokens=24, temperature=0, extra=PRINTABLE)
PREAMBLE = "Answer from the passages below.\n\n"
DOCUMENTS = (
    "The first passage is about the planet Venus, which has no moon.",
    "A second one, somewhat longer, tells of Mars and of the two moons that it has.",
)
ASKED = PREAMBLE + "\n\n".join(DOCUMENTS) + "\n\nQuestion: how many moons?\nAnswer:"
SAID = ("Hello. I would like to know more about planets.", "And their moons?", "Go on!")


@cache
def model_of(shape: Shape, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_model(shape, dtype=dtype)


def engine_on(store: StateStore, shape: Shape = SHAPE, **options: Any) -> HCacheEngine:
    its: dict[str, Any] = {"storage_dtype": "float32", "fidelity": "none", "add_bos": False}
    return HCacheEngine(model_of(shape), TOKENIZER, store, **its | options)


def asked(engine: HCacheEngine, prompt: str, **options: Any) -> Generation:
    """An answer that is remembered, when it has been stored."""
    its: dict[str, Any] = {"options": GREEDY, "remember": True}
    answer = engine.generate(prompt, **its | options)
    engine.flush()
    return answer


def talk(engine: HCacheEngine, turns: int = 3, *, remember: bool = True) -> list[Generation]:
    """Some turns of one conversation."""
    prompt, answers = "", []
    for said in SAID[:turns]:
        prompt += f"user: {said}<|im_end|>assistant: "
        answers.append(asked(engine, prompt, remember=remember))
        prompt += f"{answers[-1].text}<|im_end|>"
    return answers


def facts(answer: Generation) -> tuple[int, int, int]:
    """Prompt, exact and fresh tokens."""
    its = answer.provenance
    return its.prompt_tokens, its.exact_tokens, its.fresh_tokens


def paths_of(store: StateStore) -> list[int]:
    """The lengths of all states of paths."""
    if not store.has_beside(PATHS):
        return []
    with store.beside(PATHS) as paths:
        return sorted(record.num_tokens for record in paths.records())


# --- conversations --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_next_turn_restores_all_that_was_said(store: StateStore, shape: Shape) -> None:
    """Only what is new is read, and the answers are transformers' own."""
    answers = talk(engine_on(store, shape))
    prompt = list[int]()
    for number, (said, answer) in enumerate(zip(SAID, answers, strict=True)):
        new = encode(TOKENIZER, f"user: {said}<|im_end|>assistant: ", is_document=False)
        before, prompt = len(prompt), prompt + new
        expected = generate(model_of(shape), prompt, 24, do_sample=False, **PRINTABLE)
        assert list(answer.token_ids) == expected
        # The last token of an answer was not read by the model when the turn ended.
        exact = max(0, before - 1 - (len(answers[number - 1].token_ids) == 24))
        assert facts(answer) == (len(prompt), exact, len(prompt) - exact)
        prompt += encode(TOKENIZER, f"{answer.text}<|im_end|>", is_document=False)


def test_k_and_v_are_those_of_full_prefill(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a conversation that was stored in three states, when it is restored."""
    engine = engine_on(store)
    answers = talk(engine)
    prompt = "".join(
        f"user: {said}<|im_end|>assistant: {answer.text}<|im_end|>"
        for said, answer in zip(SAID, answers, strict=True)
    )
    with engine.restoring(prompt) as (composition, restored), torch.no_grad():
        ids = torch.tensor([composition.token_ids.tolist()])
        model: Any = engine.adapter.model
        model(input_ids=ids, past_key_values=restored, use_cache=True)
        pairs = [restored.by_position(layer) for layer in range(SHAPE.layers)]
    assert len(composition.spans) == len(SAID)
    expected = prefill(model_of(SHAPE), composition.token_ids.tolist())
    for found, its in zip(zip(*pairs, strict=True), (expected.keys, expected.values), strict=True):
        assert largest_and_rms(torch.cat(found) - its)["largest"] < 1e-4


def test_a_conversation_goes_on_after_a_restart(tmp_path: Path) -> None:
    with StateStore.open(tmp_path) as store:
        engine = engine_on(store)
        before = talk(engine, 2)
        engine.close()
    with StateStore.open(tmp_path) as store:
        after = talk(engine_on(store))
        assert [answer.text for answer in after[:2]] == [answer.text for answer in before]
        prompt, exact, fresh = facts(after[2])
        assert prompt == exact + fresh
        assert fresh <= len(f"x<|im_end|>user: {SAID[2]}<|im_end|>assistant: ")


def test_nothing_is_kept_unless_it_is_asked_for(store: StateStore) -> None:
    talk(engine_on(store), remember=False)
    assert store.namespaces() == ["default"]


def test_paths_can_be_left_off(store: StateStore) -> None:
    talk(engine_on(store, paths_max_bytes=0))
    assert store.namespaces() == ["default"]
    with pytest.raises(ValueError, match="-1"):
        engine_on(store, paths_max_bytes=-1)


def test_another_answer_to_the_same_message_is_another_branch(store: StateStore) -> None:
    """Both are found afterwards, as far as they go."""
    engine = engine_on(store)
    prompt = f"user: {SAID[0]} Tell me all that there is.<|im_end|>assistant: "
    options = [
        GenerationOptions(max_new_tokens=24, temperature=2.0, seed=seed, extra=PRINTABLE)
        for seed in (1, 2)
    ]
    answers = [asked(engine, prompt, options=its) for its in options]
    assert answers[0].text != answers[1].text
    for answer in answers:
        more = f"{prompt}{answer.text}<|im_end|>user: {SAID[1]}<|im_end|>assistant: "
        assert facts(asked(engine, more))[1] >= len(prompt) - 30


def test_an_edited_message_is_restored_up_to_there(store: StateStore) -> None:
    """States are causal: what stands before a change is as it was."""
    engine = engine_on(store)
    head = "user: " + "so much is the same here, " * 8
    asked(engine, f"{head}but not this<|im_end|>assistant: ")
    prompt = f"{head}and this is new<|im_end|>assistant: "
    answer = asked(engine, prompt)
    ids = encode(TOKENIZER, prompt, is_document=False)
    assert list(answer.token_ids) == generate(
        model_of(SHAPE), ids, 24, do_sample=False, **PRINTABLE
    )
    assert facts(answer)[1] == len(head)


@pytest.mark.parametrize("stop", ["", "e", "ab"])
def test_what_a_stop_string_cut_off_is_not_kept(store: StateStore, stop: str) -> None:
    """A prompt goes on from the text that was given, not from the tokens that were decoded."""
    engine = engine_on(store)
    options = GenerationOptions(
        max_new_tokens=40, temperature=3.0, seed=3, stop=stop or (), extra=PRINTABLE
    )
    prompt = f"user: {SAID[0]}<|im_end|>assistant: "
    answer = asked(engine, prompt, options=options)
    more = f"{prompt}{answer.text}<|im_end|>user: more<|im_end|>assistant: "
    following = asked(engine, more)
    ids = encode(TOKENIZER, more, is_document=False)
    expected = generate(model_of(SHAPE), ids, 24, do_sample=False, **PRINTABLE)
    assert list(following.token_ids) == expected
    assert facts(following)[0] == len(ids)


def test_an_answer_of_nothing_is_not_kept(store: StateStore) -> None:
    engine = engine_on(store)
    only_end = GenerationOptions(
        max_new_tokens=5, temperature=0, extra={"suppress_tokens": [*range(257), 258, 259]}
    )
    answer = asked(engine, f"user: {SAID[0]}<|im_end|>assistant: ", options=only_end)
    assert answer.text == ""
    assert paths_of(store) == []


def test_a_token_in_front_belongs_to_the_path(store: StateStore) -> None:
    """What `add_bos` puts there has no text; without it, the path is another one."""
    tokenizer = byte_tokenizer(adds_bos=True)
    engine = HCacheEngine(model_of(SHAPE), tokenizer, store, fidelity="none")
    prompt = "Once upon a time there were eight planets, and "
    answer = asked(engine, prompt)
    more = f"{prompt}{answer.text} and so on"
    following = asked(engine, more)
    ids = [256, *encode(tokenizer, more, is_document=False)]
    assert list(following.token_ids) == generate(
        model_of(SHAPE), ids, 24, do_sample=False, **PRINTABLE
    )
    assert facts(following)[1] >= len(prompt) + len(answer.text)
    assert facts(asked(engine, more, add_bos=False))[1] == 0


@pytest.mark.parametrize("tokenization", ["segmented", "strict"])
def test_real_words_go_on(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], store: StateStore, tokenization: Any
) -> None:
    """A chat with a real model and its template, word for word as without memory."""
    model, tokenizer = smollm2
    options = GenerationOptions(max_new_tokens=12, temperature=0)
    engine = HCacheEngine(
        model, tokenizer, store, add_bos=False, fidelity="exact", tokenization=tokenization
    )
    messages = [{"role": "system", "content": "Be brief."}]
    for number, said in enumerate(SAID):
        messages.append({"role": "user", "content": said})
        prompt = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
        answer = asked(engine, prompt, options=options)
        plain = engine.generate(prompt, options=options)
        assert answer.text == plain.text
        assert not number or facts(answer)[1] > 0.5 * facts(answer)[0]
        messages.append({"role": "assistant", "content": answer.text})


def test_bfloat16_states_are_within_its_rounding(store: StateStore) -> None:
    model = model_of(SHAPE, torch.bfloat16)
    engine = HCacheEngine(model, TOKENIZER, store, add_bos=False, fidelity="none")
    answers = talk(engine, 2)
    prompt = f"user: {SAID[0]}<|im_end|>assistant: {answers[0].text}<|im_end|>"
    with engine.restoring(prompt) as (composition, restored), torch.no_grad():
        ids = torch.tensor([composition.token_ids.tolist()])
        its: Any = model
        found = its(input_ids=ids, past_key_values=restored, use_cache=True).logits[0, -1]
    expected = prefill(model, composition.token_ids.tolist()).logits
    assert composition.num_exact
    assert largest_and_rms((found - expected).float())["largest"] < 0.1


# --- what is exact --------------------------------------------------------------------------------


def test_what_follows_a_loss_is_approximate(store: StateStore) -> None:
    """It is restored as it was, but not by an engine that wants every bit."""
    engine = engine_on(store, preamble=PREAMBLE)
    engine.precompute(DOCUMENTS)
    answer = asked(engine, ASKED)
    assert answer.provenance.relocated_tokens
    more = f"{ASKED}{answer.text}\nQuestion: and which?\nAnswer:"
    following = asked(engine, more)
    assert following.provenance.relocated_tokens == 0
    assert facts(following)[1] >= len(ASKED)
    exact = engine_on(store, preamble=PREAMBLE, fidelity="exact")
    found = exact.generate(more, options=GREEDY)
    ids = encode(TOKENIZER, more, is_document=False)
    assert list(found.token_ids) == generate(model_of(SHAPE), ids, 24, do_sample=False, **PRINTABLE)
    assert facts(found)[1] < len(ASKED)


def test_what_follows_exact_states_is_exact(store: StateStore) -> None:
    engine = engine_on(store, preamble=PREAMBLE, fidelity="exact")
    engine.precompute(DOCUMENTS[:1])
    answer = asked(engine, ASKED)
    assert facts(answer)[1]
    found = asked(engine, f"{ASKED}{answer.text}\nQuestion: and which?\nAnswer:")
    assert facts(found)[1] >= len(ASKED)


def test_lossy_states_make_approximate_paths(store: StateStore) -> None:
    engine = engine_on(store, preamble=PREAMBLE, storage_dtype="int8", representation="kv")
    engine.precompute(DOCUMENTS[:1])
    asked(engine, ASKED)
    with store.beside(PATHS) as paths:
        assert [record.is_approximate for record in paths.records()] == [True]


def test_new_documents_behind_a_path_are_found(store: StateStore) -> None:
    engine = engine_on(store, preamble=PREAMBLE, fidelity=1.0)
    engine.precompute(DOCUMENTS)
    prompt = f"user: {SAID[0]}<|im_end|>assistant: "
    answer = asked(engine, prompt)
    more = f"{prompt}{answer.text}<|im_end|>user: {DOCUMENTS[1]}\n\nWhat?<|im_end|>assistant: "
    following = asked(engine, more)
    its = following.provenance
    assert its.documents_restored == 1
    assert its.repaired_tokens == len(DOCUMENTS[1])
    assert its.exact_tokens >= len(prompt)
    ids = encode(TOKENIZER, more, is_document=False)
    expected = generate(model_of(SHAPE), ids, 24, do_sample=False, **PRINTABLE)
    assert list(following.token_ids) == expected


# --- rows of documents that recur -----------------------------------------------------------------


@pytest.mark.parametrize("fidelity", ["none", "exact"])
def test_documents_that_recur_become_exact(store: StateStore, fidelity: str) -> None:
    engine = engine_on(store, preamble=PREAMBLE, fidelity=fidelity)
    engine.precompute(DOCUMENTS)
    for number in range(RECURS):
        assert paths_of(store) == []
        prompt = ASKED.replace("how many", f"{number} or how many")
        its = asked(engine, prompt, remember=False).provenance
        assert its.relocated_tokens if fidelity == "none" else its.fresh_tokens > len(DOCUMENTS[1])
    answer = asked(engine, ASKED, remember=False)
    documents = len(PREAMBLE) + sum(map(len, DOCUMENTS)) + 2
    assert facts(answer) == (len(ASKED), documents, len(ASKED) - documents)
    ids = encode(TOKENIZER, ASKED, is_document=False)
    expected = generate(model_of(SHAPE), ids, 24, do_sample=False, **PRINTABLE)
    assert list(answer.token_ids) == expected
    assert engine_on(store, fidelity="exact").plan(ASKED).exact_tokens == documents


def test_documents_that_recur_are_not_kept_where_that_is_turned_off(store: StateStore) -> None:
    engine = engine_on(store, preamble=PREAMBLE, keep_recurring=False)
    engine.precompute(DOCUMENTS)
    for _ in range(RECURS + 1):
        asked(engine, ASKED, remember=False)
    assert paths_of(store) == []


def test_nothing_is_read_for_a_store_that_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with StateStore.open(tmp_path) as store:
        engine_on(store, preamble=PREAMBLE).precompute(DOCUMENTS)
    with StateStore.open(tmp_path, read_only=True) as store:
        engine = engine_on(store, preamble=PREAMBLE)
        for _ in range(RECURS + 1):
            assert asked(engine, ASKED, remember=False).provenance.relocated_tokens
    assert not caplog.messages


def test_one_exact_document_is_no_row(store: StateStore) -> None:
    engine = engine_on(store, preamble=PREAMBLE)
    engine.precompute(DOCUMENTS)
    for _ in range(RECURS + 1):
        asked(engine, f"{PREAMBLE}{DOCUMENTS[0]}\n\nWhat?", remember=False)
    assert paths_of(store) == []


# --- the store ------------------------------------------------------------------------------------


def test_paths_are_seen_in_their_namespace_only(tmp_path: Path) -> None:
    with StateStore.open(tmp_path) as one, StateStore.open(tmp_path, namespace="other") as other:
        talk(engine_on(one), 2)
        assert one.stats().documents == 0
        assert [facts(answer)[1] for answer in talk(engine_on(other), 1)] == [0]
        one.delete_namespace("default")
        assert not one.has_beside(PATHS)
        assert other.has_beside(PATHS)
        assert facts(talk(engine_on(one), 1)[0])[1] == 0


def test_encrypted_paths_are_found_with_their_key_only(tmp_path: Path) -> None:
    key = bytes(range(32))
    with StateStore.open(tmp_path, key=key) as store:
        talk(engine_on(store), 2)
    with StateStore.open(tmp_path, key=key) as store:
        assert facts(talk(engine_on(store), 2)[1])[1]
    assert SAID[0].encode() not in b"".join(
        path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    )
    with StateStore.open(tmp_path) as store:
        assert [facts(answer)[1] for answer in talk(engine_on(store), 2)] == [0, 0]


def test_paths_take_no_more_than_they_may(store: StateStore) -> None:
    limit = 1 << 20
    engine = engine_on(store, paths_max_bytes=limit)
    for number in range(40):
        asked(engine, f"user: number {number} {'of many ' * 8}<|im_end|>assistant: ")
    with store.beside(PATHS) as paths:
        assert 0 < sum(its.num_bytes for its in paths.totals().values()) <= limit
        assert paths.counters().evictions


def test_what_is_larger_than_all_paths_may_be_is_not_kept(
    store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engine_on(store, paths_max_bytes=1 << 20)
    assert asked(engine, "user: " + "so much to say " * 150).text
    assert paths_of(store) == []
    assert "is not kept" in caplog.text


def test_a_damaged_state_is_read_afresh_and_dropped(store: StateStore) -> None:
    engine = engine_on(store)
    expected = talk(engine)
    with store.beside(PATHS) as paths:
        first = min(paths.records(), key=lambda record: record.created_s)
        with paths._writing() as txn:
            (row, *_) = paths._rows.chunk_keys(txn, first.key)
            value = bytearray(txn.get("chunks", row) or b"")
            value[-1] ^= 1
            txn.put("chunks", row, bytes(value))
        found = talk(engine)
        assert [answer.text for answer in found] == [answer.text for answer in expected]
        assert "dropped" in " ".join(found[0].provenance.warnings + found[1].provenance.warnings)
        assert paths.counters().damaged or paths._uses._counted["damaged"]
    assert facts(talk(engine)[2])[1]


def test_a_store_that_is_read_only_is_gone_along_but_not_written(tmp_path: Path) -> None:
    with StateStore.open(tmp_path) as store:
        talk(engine_on(store), 1)
    with StateStore.open(tmp_path, read_only=True) as store:
        answers = talk(engine_on(store), 3)
        assert [facts(answer)[1] > 0 for answer in answers] == [False, True, True]
        assert len(paths_of(store)) == 1


def test_another_model_goes_along_nothing(store: StateStore) -> None:
    talk(engine_on(store), 2)
    model = tiny_model(SHAPE, seed=1)
    engine = HCacheEngine(model, TOKENIZER, store, add_bos=False, fidelity="none")
    assert [facts(answer)[1] for answer in talk(engine, 1)] == [0]


def test_what_a_changed_model_said_is_not_kept(store: StateStore) -> None:
    """Its K and V are no model's, also where the weights are put back."""
    model = tiny_model(SHAPE)
    weight = model.model.layers[0].self_attn.v_proj.weight
    before = weight.detach().clone()
    engine = HCacheEngine(model, TOKENIZER, store, add_bos=False, fidelity="exact")

    def write(_text: str) -> None:
        with torch.no_grad():
            weight.mul_(2)

    answer = asked(engine, f"user: {SAID[0]}<|im_end|>assistant: ", on_text=write)
    with torch.no_grad():
        weight.copy_(before)
    assert answer.text
    assert paths_of(store) == []


def test_a_limit_holds_for_paths_that_are_there(tmp_path: Path) -> None:
    with StateStore.open(tmp_path) as store:
        talk(engine_on(store), 1)
    limit = 1 << 20
    with StateStore.open(tmp_path) as store:
        engine = engine_on(store, paths_max_bytes=limit)
        for number in range(30):
            asked(engine, f"user: number {number} {'of many ' * 8}<|im_end|>assistant: ")
        with store.beside(PATHS) as paths:
            assert sum(its.num_bytes for its in paths.totals().values()) <= limit


def test_what_is_deleted_can_be_deleted_again(tmp_path: Path) -> None:
    """What is said afterwards is found under the same name, though nothing else is there."""
    with StateStore.open(tmp_path, namespace="admin") as admin:
        with StateStore.open(tmp_path, namespace="one") as store:
            engine = engine_on(store)
            talk(engine, 1)
            assert admin.delete_namespace("one")
            talk(engine, 1)  # refused, since the namespace is gone: the next one is made anew
            talk(engine, 2)
            engine.close()
        assert "one" in admin.namespaces()
        assert admin.delete_namespace("one")
        assert admin.namespaces() == ["admin"]
        assert not admin.delete_namespace("one")


def test_a_state_that_another_one_has_replaced_is_not_read(store: StateStore) -> None:
    engine = engine_on(store)
    answers = talk(engine, 1)
    prompt = f"user: {SAID[0]}<|im_end|>assistant: {answers[0].text}<|im_end|>user: x"
    resolved = engine.bound.resolve(prompt)
    assert resolved.pieces[0].is_path
    with store.beside(PATHS) as paths:
        (record,) = paths.records()
        with paths.reading() as reader:
            values = [
                (layer, 0, bytearray(reader.value(record.key, layer, 0)))
                for layer in range(SHAPE.layers)
            ]
        paths.delete(record.key)  # an approximate one takes no exact one's place
        paths.put(replace(record, is_approximate=True), values)
    shelf = engine.bound.shelf(resolved.pieces)
    with pytest.raises(MissingStateError, match="taken its place"), shelf.reading():
        pass
    assert engine.generate(prompt, options=GREEDY).text


# --- the keeper -----------------------------------------------------------------------------------


@pytest.fixture
def busy(store: StateStore) -> Iterator[tuple[Keeper, threading.Event]]:
    """A keeper that writes nothing before it is told to."""
    engine = engine_on(store)
    allowed = threading.Event()

    class Waiting(Paths):
        def keep(self, snapshot: Snapshot, path: Any = ()) -> None:
            assert allowed.wait(PATIENCE_S)

    paths = Waiting(engine.adapter, store, engine.bound.tokens, engine.root)
    keeper = Keeper(engine.adapter, paths, engine.bound.tokens, engine.root)
    yield keeper, allowed
    allowed.set()
    keeper.close()


def snapshot_of(engine: HCacheEngine, tokens: int = 20) -> Snapshot:
    spec = engine.adapter.spec
    shape = (spec.num_layers, spec.num_kv_heads, tokens, spec.head_dim)
    ids = token_array(range(tokens))
    return Snapshot(engine.root, ids, "x" * 20, 0, torch.zeros(shape), torch.zeros(shape), False)


def test_no_more_waits_to_be_written_than_may(
    store: StateStore, busy: tuple[Keeper, threading.Event]
) -> None:
    keeper, allowed = busy
    snapshot = snapshot_of(engine_on(store))
    kept = [keeper.keep(snapshot, "prompt") for _ in range(MAX_WAITING + 2)]
    assert kept == [True] * MAX_WAITING + [False] * 2
    allowed.set()
    keeper.flush()
    assert keeper.keep(snapshot, "prompt")


def test_a_prompt_waits_for_what_it_goes_on_from(
    store: StateStore, busy: tuple[Keeper, threading.Event]
) -> None:
    """And for nothing else."""
    keeper, allowed = busy
    keeper.keep(snapshot_of(engine_on(store)), "Hello.")
    assert keeper.walk("Good morning.", add_bos=False) == []
    walked = threading.Event()

    def walk() -> None:
        keeper.walk("Hello. And more", add_bos=False)
        walked.set()

    thread = threading.Thread(target=walk)
    thread.start()
    assert not walked.is_set()
    allowed.set()
    thread.join(PATIENCE_S)
    assert walked.is_set()


def test_an_error_in_the_background_is_logged(
    store: StateStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request fails because of it."""
    engine = engine_on(store)

    def broken(*_: Any, **__: Any) -> None:
        raise StoreError("the disk is gone")

    monkeypatch.setattr(StateStore, "put_all", broken)
    with caplog.at_level(logging.WARNING, "hcache_rag"):
        assert talk(engine, 2)[1].text
    assert "the disk is gone" in caplog.text


def test_nothing_is_kept_after_the_end(store: StateStore) -> None:
    engine = engine_on(store)
    engine.close()
    assert asked(engine, f"user: {SAID[0]}<|im_end|>assistant: ").text
    assert paths_of(store) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_keeps_what_is_said_in_it(tmp_path: Path) -> None:
    with StateStore.open(tmp_path) as store:
        engine = engine_on(store)
        talk(engine, 1)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                found = talk(engine, 2)
                status = 0 if len(paths_of(store)) == 2 and facts(found[1])[1] else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_only_rows_that_can_be_found_by_their_text_are_read(store: StateStore) -> None:
    engine = engine_on(store)
    keeper = Keeper(engine.adapter, engine.paths, engine.bound.tokens, engine.root)
    ids = token_array(encode(TOKENIZER, "x" * 40, is_document=False))
    for text in ("y" * 40, "x" * 40):
        piece = ResolvedPiece(ids, "x" * 40, None)
        for _ in range(RECURS):
            keeper.count(Resolved(text, False, [piece], (), len(text)), 0)
        keeper.flush()
        keeper._counts.clear()
        assert len(paths_of(store)) == (text[0] == "x")
    keeper.close()


def test_turning_back_undoes_rope(store: StateStore) -> None:
    """K before RoPE of a snapshot, against what the model's own projections gave."""
    engine = engine_on(store)
    adapter = engine.adapter
    ids = encode(TOKENIZER, "some text of a length that is odd", is_document=False)
    reading = prefill(model_of(SHAPE), ids)
    snapshot = Snapshot(engine.root, token_array(ids), "", 0, reading.keys, reading.values, False)
    formats = [fmt.representation for fmt in engine.paths.layout.layers]
    with adapter._catching(formats) as caught, torch.no_grad():
        adapter.model(input_ids=torch.tensor([ids]))
    for layer, (keys, values) in zip(captured_layers(adapter, snapshot), caught, strict=True):
        assert layer.first is not None
        assert layer.second is not None
        torch.testing.assert_close(layer.first, keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.second, values, rtol=0, atol=0)


def test_more_than_there_is_cannot_be_copied(store: StateStore) -> None:
    engine = engine_on(store)
    with engine.restoring("some text") as (_, restored):
        assert isinstance(restored, RestoringCache)
        with pytest.raises(ValueError, match="of 0"):
            restored.copied(0, 10)
