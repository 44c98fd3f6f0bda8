"""What a state belongs to: one model, bit for bit, as it computes now, and one tokenizer.

Any other weight, number of the configuration, adapter, dtype or tokenizer is another model: its
states are missed, and the answer is transformers' own. Another preamble is another path of the same
model: its states are relocated, never exact.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Part, document, encode_parts, greedy, joined, prefill
from tiny import SHAPES, VOCABULARY, Shape, byte_tokenizer, tiny_model
from tokenizers import Tokenizer, normalizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hcache_rag import GenerationOptions, HCacheEngine, PromptTooLongError, StateStore
from hcache_rag.errors import UnsupportedModelError
from hcache_rag.identity import tokenizer_fingerprint
from hcache_rag.models import ModelAdapter
from hcache_rag.provenance import Generation

SHAPE = {shape.label: shape for shape in SHAPES}
LLAMA, MISTRAL, QWEN2 = (SHAPE[s] for s in ("llama-gqa-bias", "mistral-gqa", "qwen2-gqa-bias"))
PREAMBLE = "Answer from the passages below.\n\n"
A = "Herons stand in the shallow water at dawn and wait for the fish to come."
B = "A comet of ice and dust comes back to the Sun about every 76 years."
ONE = [Part(PREAMBLE), document(A), Part("\n\nQuestion: who waits?\nAnswer:")]
TWO = [*ONE[:2], Part("\n\n"), document(B), *ONE[2:]]
PRINTABLE = {"suppress_tokens": list(range(94, VOCABULARY))}
NEW_TOKENS = 16
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # peft asks for it
        "ignore:Already found a .peft_config. attribute:UserWarning",
    ),
]


@cache
def model_of(shape: Shape) -> PreTrainedModel:
    """A model that tests share and leave as it is."""
    return tiny_model(shape)


def fingerprint(model: PreTrainedModel) -> str:
    return ModelAdapter(model).fingerprint


def rebuilt(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """A model of the same weights and another configuration."""
    config = copy.deepcopy(model.config)
    for name, value in changes.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    auto: Any = AutoModelForCausalLM
    other = auto.from_config(config, attn_implementation="sdpa").eval()
    other.load_state_dict(model.state_dict())
    result: PreTrainedModel = other
    return result


@dataclass(frozen=True)
class Reader:
    """A model as an engine is given it, and what transformers alone makes of it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase = field(default_factory=byte_tokenizer)

    def engine(self, store: StateStore, **more: Any) -> HCacheEngine:
        """By default an engine that restores whatever it takes for its own."""
        kept = str(self.model.dtype).removeprefix("torch.")
        keep: dict[str, Any] = {"preamble": PREAMBLE, "fidelity": "none", "storage_dtype": kept}
        return HCacheEngine(self.model, self.tokenizer, store, **{**keep, **more})

    def own(self, parts: Sequence[Part]) -> tuple[int, ...]:
        """Transformers' own greedy answer."""
        call: Any = self.tokenizer
        ids = list(call("")["input_ids"]) + encode_parts(self.tokenizer, parts)
        return tuple(greedy(self.model, ids, NEW_TOKENS, **PRINTABLE))

    def logits(self, parts: Sequence[Part]) -> Tensor:
        """Transformers' own, after a prompt."""
        return prefill(self.model, encode_parts(self.tokenizer, parts)).logits


def ask(engine: HCacheEngine, parts: Sequence[Part]) -> Generation:
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, temperature=0.0, extra=PRINTABLE)
    return engine.generate(joined(parts), options=options)


def assert_hit(reader: Reader, store: StateStore) -> None:
    """What is stored is this model's own."""
    answer = ask(reader.engine(store), ONE)
    assert answer.provenance.exact_tokens >= len(PREAMBLE + A)
    assert answer.provenance.documents_missed == 0
    if reader.model.dtype == torch.float32:
        assert answer.token_ids == reader.own(ONE)


def assert_missed(reader: Reader, store: StateStore) -> None:
    """What is stored is not this model's, and the answer is its own."""
    answer = ask(reader.engine(store), TWO)
    provenance = answer.provenance
    assert (provenance.restored_tokens, provenance.repaired_tokens) == (0, 0)
    assert (provenance.documents_missed, provenance.missed_tokens) == (2, len(A + B))
    assert provenance.bytes_read == 0
    assert any("made by another model or tokenizer" in w for w in provenance.warnings)
    assert answer.token_ids == reader.own(TWO)


def assert_apart(first: Reader, second: Reader) -> None:
    """The second uses nothing that the first has stored; both keep theirs in one store."""
    store = StateStore.in_memory()
    first.engine(store).precompute([A, B])
    assert_hit(first, store)
    assert_missed(second, store)
    report = second.engine(store).precompute([A, B])
    assert (report.stored, report.reused) == (2, 0)
    assert_hit(second, store)
    assert_hit(first, store)


# --- weights ------------------------------------------------------------------------------------


TENSORS = [
    pytest.param(shape, name, id=f"{shape.label}:{name}")
    for shape in (LLAMA, SHAPE["llama-gqa-tied"], MISTRAL, QWEN2)
    for name, _ in model_of(shape).named_parameters()
]


@pytest.mark.parametrize(("shape", "name"), TENSORS)
def test_one_bit_of_any_tensor_is_another_model(shape: Shape, name: str) -> None:
    """The lowest bit of its last element; put back, it is the same model again."""
    model = model_of(shape)
    before = fingerprint(model)
    bits = model.get_parameter(name).data.view(torch.int32).view(-1)
    bits[-1] ^= 1
    try:
        assert fingerprint(model) != before
    finally:
        bits[-1] ^= 1
    assert fingerprint(model) == before


def test_every_place_of_a_tensor_counts() -> None:
    """The lowest and the highest bit of its first, a middle and its last element."""
    model = tiny_model(SHAPE["qwen2-mha-odd"], dtype=torch.bfloat16)
    before = fingerprint(model)
    found = {before}
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.bias"):
        bits = model.get_parameter(name).data.view(torch.int16).view(-1)
        for place in (0, len(bits) // 2, -1):
            for bit in (1, -(2**15)):
                bits[place] ^= bit
                found.add(fingerprint(model))
                bits[place] ^= bit
    assert len(found) == 13
    assert fingerprint(model) == before


def test_two_tensors_that_change_places_are_another_model() -> None:
    model = tiny_model(LLAMA)
    before = fingerprint(model)
    first, second = (model.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
    first.data, second.data = second.data, first.data
    assert fingerprint(model) != before


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_model_is_the_same(shape: Shape, tmp_path: Path) -> None:
    """Made twice; whatever it is called, however it attends; loaded twice from one folder."""
    model = model_of(shape)
    other = tiny_model(shape, attention="eager")
    other.config._name_or_path, other.config.use_cache = "elsewhere", False
    assert fingerprint(other) == ModelAdapter(model, "a name").fingerprint == fingerprint(model)
    model.save_pretrained(tmp_path)
    auto: Any = AutoModelForCausalLM
    loaded = [auto.from_pretrained(tmp_path) for _ in range(2)]
    assert fingerprint(loaded[0]) == fingerprint(loaded[1])


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"])
def test_the_states_of_other_weights_are_missed(name: str) -> None:
    """Of a bit: even where no answer shows it, and no state does."""
    other = tiny_model(LLAMA)
    other.get_parameter(name).data.view(torch.int32).view(-1)[7] ^= 1
    assert_apart(Reader(model_of(LLAMA)), Reader(other))


# --- the configuration --------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """Of a configuration, with the weights as they were.

    Args:
        is_seen: transformers' own logits of a short prompt differ.
    """

    label: str
    shape: Shape
    changes: dict[str, Any]
    is_seen: bool = True


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
WIDER = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 2048, "max_window_layers": 0}
CHANGES = [
    *(
        Change(f"{shape.family}-{label}", shape, changes)
        for shape in (LLAMA, MISTRAL, QWEN2)
        for label, changes in (
            ("theta", {"rope_parameters": {**ROPE, "rope_theta": 500.0}}),
            ("linear", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}}),
            ("yarn", {"rope_parameters": {**ROPE, **YARN}}),
            ("norm-eps", {"rms_norm_eps": 0.1}),
            ("activation", {"hidden_act": "gelu"}),
            ("heads", WIDER),
        )
    ),
    Change("llama-window", LLAMA, {"max_position_embeddings": 2048}, is_seen=False),
    Change("mistral-sliding", MISTRAL, {"sliding_window": 2048}, is_seen=False),
    Change("qwen2-sliding", QWEN2, WINDOW, is_seen=False),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_states_of_another_configuration_are_missed(change: Change) -> None:
    """Whether or not it can be seen in this prompt."""
    first = Reader(model_of(change.shape))
    second = Reader(rebuilt(first.model, **change.changes))
    is_seen = not torch.equal(first.logits(TWO), second.logits(TWO))
    assert is_seen == change.is_seen
    assert fingerprint(first.model) != fingerprint(second.model)
    assert_apart(first, second)


def test_the_same_configuration_rebuilt_is_the_same_model() -> None:
    """So that what the test above sees is what was changed."""
    for shape in (LLAMA, MISTRAL, QWEN2):
        assert fingerprint(rebuilt(model_of(shape))) == fingerprint(model_of(shape))


@pytest.mark.parametrize("window", [64, 100])
def test_a_prompt_beyond_the_sliding_window_uses_no_states_of_without(
    window: int, store: StateStore
) -> None:
    """What sliding layers compute is something else."""
    first = Reader(model_of(MISTRAL))
    first.engine(store).precompute([A, B])
    engine = Reader(rebuilt(first.model, sliding_window=window)).engine(store)
    assert engine.plan(joined(TWO)).restored_tokens == 0


# --- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [LLAMA, QWEN2])
def test_the_states_of_another_dtype_are_missed(shape: Shape) -> None:
    """The same numbers, computed with in bfloat16 and in float32."""
    other: Any = tiny_model(shape, dtype=torch.bfloat16)
    assert_apart(Reader(tiny_model(shape, dtype=torch.bfloat16)), Reader(other.float()))


# --- tokenizers ---------------------------------------------------------------------------------


def retokenized(change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerBase:
    """The byte tokenizer with its description changed."""
    tokenizer: Any = byte_tokenizer()
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    change(description)
    backend = Tokenizer.from_str(json.dumps(description))
    other: PreTrainedTokenizerBase = type(tokenizer)(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
    return other


def swapped(description: dict[str, Any]) -> None:
    """Two letters have each other's ids."""
    vocabulary = description["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]


def with_a_token_more(description: dict[str, Any]) -> None:
    """Which stands in no text here."""
    last = description["added_tokens"][-1]
    description["added_tokens"].append({**last, "id": 259, "content": "<never>"})


def in_lower_case(description: dict[str, Any]) -> None:
    tokenizer: Any = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    description["normalizer"] = json.loads(tokenizer.backend_tokenizer.to_str())["normalizer"]


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "swapped": lambda: retokenized(swapped),
    "one-more": lambda: retokenized(with_a_token_more),
    "lower-case": lambda: retokenized(in_lower_case),
    "bos": lambda: byte_tokenizer(adds_bos=True),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_states_of_another_tokenizer_are_missed(kind: str) -> None:
    """Also where the ids of these very texts are the same."""
    first, second = Reader(model_of(LLAMA)), Reader(model_of(LLAMA), TOKENIZERS[kind]())
    assert tokenizer_fingerprint(first.tokenizer) != tokenizer_fingerprint(second.tokenizer)
    assert_apart(first, second)


def test_the_same_tokenizer_is_the_same() -> None:
    """Rebuilt from its description, used, or given a chat template."""
    before = tokenizer_fingerprint(byte_tokenizer())
    assert tokenizer_fingerprint(retokenized(lambda _: None)) == before
    tokenizer: Any = byte_tokenizer()
    tokenizer(A)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(tokenizer) == before


@pytest.mark.parametrize("call", [{"padding": True}, {"truncation": True, "max_length": 512}])
def test_a_tokenizer_is_the_same_however_it_was_called_last(call: dict[str, Any]) -> None:
    """Neither padding nor truncation decides the ids of a document."""
    tokenizer: Any = byte_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer([A, A + B], **call)
    assert tokenizer_fingerprint(tokenizer) == before


# --- preambles ----------------------------------------------------------------------------------

OTHER = "Answer from the passages above.\n\n"


def under_another_preamble(parts: Sequence[Part]) -> list[Part]:
    return [Part(OTHER), *parts[1:]]


def test_another_preamble_is_another_path(store: StateStore) -> None:
    """States are stored anew after it, beside those after the first."""
    reader = Reader(model_of(LLAMA))
    reader.engine(store).precompute([A, B])
    report = reader.engine(store, preamble=OTHER).precompute([A, B])
    assert (report.stored, report.reused) == (2, 0)
    assert len({record.key for record in store.records() if record.text == A}) == 2
    for preamble, parts in ((PREAMBLE, ONE), (OTHER, under_another_preamble(ONE))):
        answer = ask(reader.engine(store, preamble=preamble), parts)
        assert answer.provenance.exact_tokens == len(preamble + A)
        assert answer.token_ids == reader.own(parts)


def test_states_after_another_preamble_are_never_exact(store: StateStore) -> None:
    """Relocated as a rule; not restored where only the exact is; all read again, the own answer."""
    reader, parts = Reader(model_of(LLAMA)), under_another_preamble(TWO)
    reader.engine(store).precompute([A, B])
    for fidelity, relocated, repaired in (
        ("none", len(A + B), 0),
        ("exact", 0, 0),
        (1.0, 0, len(A + B)),
    ):
        answer = ask(reader.engine(store, preamble=OTHER, fidelity=fidelity), parts)
        provenance = answer.provenance
        assert provenance.exact_tokens == 0
        assert (provenance.relocated_tokens, provenance.repaired_tokens) == (relocated, repaired)
        if not relocated:
            assert answer.token_ids == reader.own(parts)


def test_a_first_token_is_part_of_the_path(store: StateStore) -> None:
    """What was stored behind <bos> is not exact without it."""
    reader = Reader(model_of(LLAMA), byte_tokenizer(adds_bos=True))
    reader.engine(store).precompute([A])
    with_bos = ask(reader.engine(store), ONE)
    assert with_bos.provenance.exact_tokens == 1 + len(PREAMBLE + A)
    without = reader.engine(store, add_bos=False)
    assert ask(without, ONE).provenance.exact_tokens == 0
    assert without.precompute([A]).stored == 1
    assert ask(without, ONE).provenance.exact_tokens == len(PREAMBLE + A)


# --- adapters -----------------------------------------------------------------------------------

BESIDE = ("q_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
INSIDE = ("k_proj", "v_proj")
"""What is adapted: beside the projections to K and V, or inside them."""


@pytest.fixture
def peft() -> Any:
    """The library of adapters."""
    return pytest.importorskip("peft", reason="without peft there are no LoRA adapters to load")


def lora(peft: Any, modules: Sequence[str], seed: int = 1, alpha: float = 32) -> Any:
    """A LoRA whose matrices are not zero, and are random by `seed` when it is loaded next."""
    torch.manual_seed(seed)
    return peft.LoraConfig(
        r=4, lora_alpha=alpha, target_modules=[*modules], init_lora_weights=False
    )


def adapted(peft: Any, modules: Sequence[str] = BESIDE, **more: Any) -> PreTrainedModel:
    """A model with an adapter, by transformers' own door to peft."""
    model: Any = tiny_model(LLAMA)
    model.add_adapter(lora(peft, modules, **more), adapter_name="first")
    result: PreTrainedModel = model.eval()
    return result


def wrapped(peft: Any, modules: Sequence[str] = BESIDE, **more: Any) -> Any:
    """A `PeftModel`."""
    return peft.get_peft_model(tiny_model(LLAMA), lora(peft, modules, **more)).eval()


@pytest.mark.parametrize("modules", [BESIDE, MLP, ("lm_head",)], ids=" ".join)
def test_the_states_of_a_model_without_the_adapter_are_missed(
    modules: Sequence[str], peft: Any
) -> None:
    """And those with it without it, though the weights below are the same."""
    base, other = Reader(model_of(LLAMA)), Reader(adapted(peft, modules))
    assert not torch.equal(base.logits(ONE), other.logits(ONE))
    assert_apart(base, other)
    assert_apart(other, base)


def test_the_states_of_other_adapters_are_missed(peft: Any) -> None:
    """Of the same shape, other numbers."""
    assert_apart(Reader(adapted(peft, seed=1)), Reader(adapted(peft, seed=2)))


def test_a_merged_adapter_is_another_model(peft: Any) -> None:
    """Also one on K and V, which are plain projections then."""
    base, model = Reader(model_of(LLAMA)), wrapped(peft, (*BESIDE, *INSIDE))
    assert_apart(base, Reader(model.merge_and_unload()))


def test_the_states_from_before_an_adapter_are_found_when_it_is_unloaded(
    peft: Any, store: StateStore
) -> None:
    """They were never used meanwhile."""
    model: Any = tiny_model(LLAMA)
    base = Reader(model)
    base.engine(store).precompute([A, B])
    with_adapter = peft.get_peft_model(model, lora(peft, BESIDE)).eval()
    assert_missed(Reader(with_adapter.get_base_model()), store)
    assert_hit(Reader(with_adapter.unload()), store)
    assert_hit(base, store)


def test_an_adapter_on_k_and_v_is_refused(peft: Any, store: StateStore) -> None:
    """They are no plain projections of the layer's input then."""
    for model in (adapted(peft, INSIDE), wrapped(peft, INSIDE).get_base_model()):
        with pytest.raises(UnsupportedModelError, match="not with a plain"):
            HCacheEngine(model, byte_tokenizer(), store)


def off(model: PreTrainedModel) -> PreTrainedModel:
    """With its adapters switched off."""
    model.disable_adapters()
    return model


def of_two(peft: Any, *active: str) -> PreTrainedModel:
    """A model with two adapters, of which some are in use."""
    model: Any = adapted(peft)
    model.add_adapter(lora(peft, BESIDE, seed=2), adapter_name="second")
    model.set_adapter([*active])
    result: PreTrainedModel = model.eval()
    return result


TENSORS_ALIKE: dict[str, Callable[[Any], tuple[PreTrainedModel, PreTrainedModel]]] = {
    "scaled": lambda peft: (adapted(peft, alpha=8), adapted(peft, alpha=64)),
    "switched-off": lambda peft: (adapted(peft), off(adapted(peft))),
    "another-of-two": lambda peft: (of_two(peft, "first"), of_two(peft, "second")),
    "both-of-two": lambda peft: (of_two(peft, "first"), of_two(peft, "first", "second")),
}


@pytest.mark.parametrize("kind", TENSORS_ALIKE)
def test_the_states_of_an_adapter_in_other_use_are_missed(kind: str, peft: Any) -> None:
    """Though every tensor is the same."""
    first, second = map(Reader, TENSORS_ALIKE[kind](peft))
    assert not torch.equal(first.logits(ONE), second.logits(ONE))
    assert_apart(first, second)
    assert_apart(second, first)


@pytest.mark.parametrize("way", ["disable_adapters", "delete_adapter"])
def test_the_states_from_before_an_adapter_are_found_when_it_is_not_in_use(
    way: str, peft: Any, store: StateStore
) -> None:
    """The model computes what it computed before."""
    model: Any = tiny_model(LLAMA)
    Reader(model).engine(store).precompute([A, B])
    model.add_adapter(lora(peft, BESIDE), adapter_name="first")
    model.eval()
    assert_missed(Reader(model), store)
    getattr(model, way)(*(["first"] if way == "delete_adapter" else []))
    assert_hit(Reader(model), store)


@pytest.mark.parametrize("modules", [BESIDE, MLP], ids=" ".join)
def test_a_peft_model_is_the_model_inside(modules: Sequence[str], peft: Any) -> None:
    """Its states are those of the model that it has changed."""
    model, store = wrapped(peft, modules), StateStore.in_memory()
    assert_apart(Reader(model_of(LLAMA)), Reader(model))
    Reader(model).engine(store).precompute([A, B])
    assert_hit(Reader(model.get_base_model()), store)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_model_with_virtual_tokens_is_refused(kind: str, peft: Any, store: StateStore) -> None:
    """What is in front of every prompt there is no text, and in no state."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(tiny_model(LLAMA), config).eval()
    with pytest.raises(UnsupportedModelError):
        HCacheEngine(model, byte_tokenizer(), store)


def add(model: Any, peft: Any) -> None:
    model.add_adapter(lora(peft, BESIDE, seed=2), adapter_name="second")
    model.set_adapter("second")


CHANGES_OF_A_MODEL: dict[str, Callable[[Any, Any], object]] = {
    "adapter-added": add,
    "adapter-switched-off": lambda model, _peft: model.disable_adapters(),
    "weights-changed": lambda model, _peft: model.model.layers[0].mlp.up_proj.weight.mul_(-1),
}


@pytest.mark.parametrize("kind", CHANGES_OF_A_MODEL)
def test_a_model_that_changes_under_a_running_engine(
    kind: str, peft: Any, store: StateStore
) -> None:
    """Its states from before are missed at once; what is stored now is not taken for them."""
    model = adapted(peft)
    engine = Reader(model).engine(store)
    engine.precompute([A, B])
    with torch.no_grad():
        CHANGES_OF_A_MODEL[kind](model, peft)
    answer = ask(engine, ONE)
    assert answer.token_ids == Reader(model).own(ONE)
    assert answer.provenance.restored_tokens == 0
    assert engine.precompute([A, B]).stored == 2


def test_factors_that_change_with_the_length_end_the_window(store: StateStore) -> None:
    """longrope rotates all positions otherwise, once a sequence passes the first window."""
    model = tiny_model(LLAMA)
    half = model.config.head_dim // 2
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * half,
        "long_factor": [4.0] * half,
        "original_max_position_embeddings": 128,
    }
    engine = HCacheEngine(model, byte_tokenizer(), store)
    assert engine.adapter.spec.window_tokens == 128
    with pytest.raises(PromptTooLongError, match="128 tokens"):
        engine.generate("x" * 130)
