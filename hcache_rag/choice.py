"""What a state keeps of each layer, chosen when it is stored. Pure: no torch, no disk, no clock.

Every way to get one token of one layer costs computing and bytes: recompute (c_R, 0), hidden
(c_H, b_H), K and V (c_K, b_K). With reading and computing overlapped the time of a mix is
max(computing, reading), so the best mix lies where the ray "both take as long" meets the
lower-left convex hull of these points, and mixes at most two neighbours on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hcache_rag.layout import STORAGE_DTYPES, LayerFormat, Representation, StateLayout
from hcache_rag.plan import Seconds, makespan, piece_tokens_for, pieces_of_layers
from hcache_rag.profile import HardwareProfile, ModelCosts, ReadRate
from hcache_rag.spec import ModelSpec

HIDDEN, KV, NONE = Representation.HIDDEN, Representation.KV, Representation.NONE


@dataclass(frozen=True, slots=True)
class Objective:
    """What a layout is chosen for.

    Args:
        goal: "time": least time to restore; "bytes": fewest bytes with which no layer has to be
            recomputed.
        max_bytes_per_token: least time within so many bytes; first layers may then keep nothing.
    """

    goal: str = "time"
    max_bytes_per_token: float | None = None

    def __post_init__(self) -> None:
        if self.goal not in ("time", "bytes"):
            raise ValueError(f"goal is 'time' or 'bytes', not {self.goal!r}")
        if self.max_bytes_per_token is not None and not 0 < self.max_bytes_per_token < float("inf"):
            raise ValueError(
                f"max_bytes_per_token must be positive, not {self.max_bytes_per_token}"
            )


DEFAULT_HIDDEN_DTYPE, DEFAULT_KV_DTYPE = "int8-smooth", "int8"
"""Chosen by `benchmarks/bench_storage.py`: of the forms that move the next-token distribution by at
most a quarter of what computing in bfloat16 moves it (KL), those of fewest bytes."""

LEAST_TIME, LEAST_BYTES = Objective("time"), Objective("bytes")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a layout is judged on: restored and fresh tokens, documents of equal length."""

    restored_tokens: int = 2048
    documents: int = 4
    fresh_tokens: int = 32

    def __post_init__(self) -> None:
        if self.restored_tokens < 1 or self.documents < 1 or self.fresh_tokens < 0:
            raise ValueError(f"no prompt has these numbers: {self}")

    @property
    def document_tokens(self) -> int:
        """Tokens of one document."""
        return max(1, self.restored_tokens // self.documents)


@dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A layout, and in words why it was chosen."""

    layout: StateLayout
    reason: str
    makespan_s: float = 0.0


def layout_asked_for(
    spec: ModelSpec,
    representation: str | Sequence[str] | StateLayout,
    storage_dtype: str | None,
    profile: HardwareProfile | None = None,
    objective: Objective = LEAST_TIME,
    *,
    is_known: bool = True,
) -> LayoutChoice:
    """What states of a model keep, as `HCacheEngine` is asked.

    Args:
        representation, storage_dtype: see `HCacheEngine`.
        is_known: whether K and V can be made of its hidden states.

    Raises:
        ValueError: a layout for another model, or one that needs what is not known.
    """
    if isinstance(representation, StateLayout):
        if len(representation.layers) != spec.num_layers:
            raise ValueError(
                f"a layout of {len(representation.layers)} layers for a model of {spec.num_layers}"
            )
        choice = LayoutChoice(representation, "given by the caller")
    elif representation != "auto" or not is_known:
        asked = representation if representation != "auto" else "kv"
        choice = fixed_layout(spec, asked, storage_dtype)
    else:
        hidden, kv = storage_dtypes(spec, storage_dtype)
        return choose_layout(spec, profile, objective, hidden_dtype=hidden, kv_dtype=kv)
    if HIDDEN in {fmt.representation for fmt, _ in choice.layout.runs} and not is_known:
        raise ValueError(
            f"nothing is known about models of family {spec.family!r}, so that no K and V can be "
            "made of their hidden states: keep K and V"
        )
    return choice


def fixed_layout(
    spec: ModelSpec, representation: str | Sequence[str], dtype: str | None = None
) -> LayoutChoice:
    """The layout that somebody asks for.

    Args:
        representation: "hidden" or "kv" for every layer, or one of these or "none" per layer.
        dtype: what it is stored in, by default as `storage_dtypes` says.

    Raises:
        ValueError: an unknown representation or dtype, or not one per layer.
    """
    hidden, kv = storage_dtypes(spec, dtype)
    if representation == "kv":
        kv = dtype or kv  # where nothing else is kept, what cannot be is refused
    dtypes = {"hidden": hidden, "kv": kv, "none": ""}
    if isinstance(representation, str):
        fmt = _format(representation, dtypes, ("auto", "hidden", "kv"))
        layout = StateLayout.of(spec, [fmt] * spec.num_layers)
        return LayoutChoice(layout, f"{representation!r} was asked for")
    if len(representation) != spec.num_layers:
        raise ValueError(
            f"{len(representation)} representations were given for {spec.num_layers} layers"
        )
    formats = [_format(name, dtypes, ("hidden", "kv", "none")) for name in representation]
    return LayoutChoice(StateLayout.of(spec, formats), "chosen per layer by the caller")


def _format(name: str, dtypes: Mapping[str, str], known: Sequence[str]) -> LayerFormat:
    if name not in known or name == "auto":
        raise ValueError(f"unknown representation {name!r}; known: {', '.join(known)}")
    return LayerFormat(Representation(name), dtypes[name])


def choose_layout(
    spec: ModelSpec,
    profile: HardwareProfile | None = None,
    objective: Objective = LEAST_TIME,
    *,
    hidden_dtype: str | None = None,
    kv_dtype: str | None = None,
    prompt: Prompt | None = None,
    rate: ReadRate | None = None,
) -> LayoutChoice:
    """Choose what a state of `spec` keeps of each layer.

    Args:
        profile: the machine that will restore; without one, the form of fewest bytes is chosen.
        objective: for least time every layer keeps something, since the machine may read faster
            tomorrow; what to recompute is decided when restoring.
        hidden_dtype, kv_dtype: what the two forms are stored in, see `storage_dtypes`.
        prompt: what the time is judged on.
        rate: of reading, by default the profile's from the device.

    Raises:
        ValueError: `max_bytes_per_token` is less than any layout with one stored layer takes.
    """
    default_hidden, default_kv = storage_dtypes(spec)
    hidden = LayerFormat(HIDDEN, hidden_dtype or default_hidden)
    kv = LayerFormat(KV, kv_dtype or default_kv)
    if profile is None or objective.goal == "bytes":
        return _fewest_bytes(spec, hidden, kv, objective.max_bytes_per_token)
    mixes = _Mixes(
        spec,
        profile.costs_of(spec),
        rate or profile.cold,
        (hidden, kv),
        prompt or Prompt(),
    )
    return mixes.best(objective, profile.name)


def _fewest_bytes(
    spec: ModelSpec, hidden: LayerFormat, kv: LayerFormat, max_bytes_per_token: float | None
) -> LayoutChoice:
    tokens = StateLayout.of(spec, (hidden, kv)).chunk_tokens
    by_bytes = {fmt: fmt.num_bytes(spec, tokens) / tokens for fmt in (hidden, kv)}
    chosen = hidden if by_bytes[hidden] < by_bytes[kv] else kv
    reason = (
        f"{chosen.representation}: of a token and layer, hidden states take "
        f"{by_bytes[hidden]:,.0f} bytes, K and V {by_bytes[kv]:,.0f}"
    )
    stored = spec.num_layers
    if max_bytes_per_token is not None:
        stored = min(stored, int(max_bytes_per_token / by_bytes[chosen]))
    if not stored:
        raise ValueError(
            f"no layer can be stored in {max_bytes_per_token:,.0f} bytes a token; one takes "
            f"{by_bytes[chosen]:,.0f}"
        )
    formats = [LayerFormat(NONE)] * (spec.num_layers - stored) + [chosen] * stored
    return LayoutChoice(StateLayout.of(spec, formats), reason)


class _Mixes:
    """All layouts of first layers without a state, then two runs of two formats, in arrays."""

    def __init__(
        self,
        spec: ModelSpec,
        costs: ModelCosts,
        rate: ReadRate,
        formats: tuple[LayerFormat, LayerFormat],
        prompt: Prompt,
    ) -> None:
        self.spec, self.costs, self.rate = spec, costs, rate
        self.formats, self.prompt = formats, prompt
        self.chunk_tokens = StateLayout.of(spec, formats).chunk_tokens
        self._own_chunk_tokens = [StateLayout.of(spec, [fmt]).chunk_tokens for fmt in formats]

    def best(self, objective: Objective, machine: str) -> LayoutChoice:
        """The mix with the least makespan; of equally fast ones, the one of fewest bytes."""
        codes = self._codes(objective.max_bytes_per_token)
        bytes_per_token = self._bytes()[codes].sum(1)
        times = self.makespans(codes)
        near = np.flatnonzero(times <= times.min() * 1.001)
        chosen = int(near[np.argmin(bytes_per_token[near])])
        layout = StateLayout.of(self.spec, [self._format(code) for code in codes[chosen]])
        reason = f"least time on {machine}: {hull_in_words(self.spec, self.costs, self.formats)}"
        return LayoutChoice(layout, reason, float(times[chosen]))

    def _format(self, code: int) -> LayerFormat:
        return LayerFormat(NONE) if code == 2 else self.formats[code]

    def _codes(
        self, max_bytes_per_token: float | None
    ) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """Layouts (C, L): 0 and 1 the two formats, 2 nothing. Both orders of the two formats.

        As many layers as the bytes allow keep something: what is stored need not be read.
        """
        num_layers, (first_bytes, second_bytes, _) = self.spec.num_layers, self._bytes()
        rows = []
        for first in range(num_layers + 1):
            second = num_layers - first
            if max_bytes_per_token is not None:
                room = int((max_bytes_per_token - first * first_bytes) // second_bytes)
                second = min(second, room)
            if second < 0 or not first + second:
                continue
            nothing = [2] * (num_layers - first - second)
            rows.append([*nothing, *[0] * first, *[1] * second])
            rows.append([*nothing, *[1] * second, *[0] * first])
        if not rows:
            raise ValueError(
                f"no layer can be stored in {max_bytes_per_token:,.0f} bytes a token; "
                f"one takes at least {min(first_bytes, second_bytes):,.0f}"
            )
        return np.unique(np.array(rows), axis=0)

    def _bytes(self) -> Seconds:
        """Bytes of one token of a layer in full chunks, by code."""
        tokens = self.chunk_tokens
        return np.array([*(fmt.num_bytes(self.spec, tokens) / tokens for fmt in self.formats), 0.0])

    def makespans(self, codes: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Seconds:
        """The least makespan (C,) of each layout (C, L), with any number of layers recomputed."""
        times = self._makespans(codes, self.chunk_tokens)
        for code, chunk_tokens in enumerate(self._own_chunk_tokens):
            is_pure = ((codes == code) | (codes == 2)).all(1)
            if chunk_tokens != self.chunk_tokens and is_pure.any():
                times[is_pure] = self._makespans(codes[is_pure], chunk_tokens)
        return times

    def _makespans(
        self, codes: np.ndarray[tuple[int, int], np.dtype[np.int64]], chunk_tokens: int
    ) -> Seconds:
        prompt, num_layers = self.prompt, self.spec.num_layers
        tokens = prompt.document_tokens * prompt.documents
        pieces = pieces_of_layers(num_layers, tokens, piece_tokens_for(tokens), chunk_tokens)
        read_s, move_s, call_s = [], [], []
        whole, rest = divmod(prompt.document_tokens, chunk_tokens)
        chunks = [chunk_tokens] * whole + [rest] * bool(rest)
        for fmt in self.formats:
            num_bytes = sum(fmt.value_bytes(self.spec, n) for n in chunks) * prompt.documents
            cost = self.costs.restore(fmt)
            read_s.append(float(self.rate(num_bytes, len(chunks) * prompt.documents)))
            move_s.append(tokens * cost.per_token_s)
            call_s.append(cost.fixed_s)
        reading = np.array([*read_s, 0.0])[codes]
        restoring = np.array([*move_s, 0.0])[codes] + np.array([*call_s, 0.0])[codes] * pieces
        layer_s = prompt.documents * float(self.costs.layer(prompt.document_tokens))
        forward_s = self.costs.suffix(prompt.fresh_tokens, tokens)
        least = (codes == 2).sum(1)
        best = np.full(len(codes), np.inf)
        for layers in range(num_layers + 1):
            is_left = np.arange(num_layers) >= layers
            upfront = layer_s * np.maximum(layers, least)
            times = makespan(reading * is_left, restoring * is_left, forward_s, upfront, pieces)
            best = np.minimum(best, times)
        return best


def hull_in_words(
    spec: ModelSpec, costs: ModelCosts, formats: tuple[LayerFormat, LayerFormat]
) -> str:
    """Whether hidden states can be part of a best mix, and why, in a sentence.

    They can where their point lies below the line from K and V to recomputing:
    `b_H / b_K + (c_H - c_K) / (c_R - c_K) < 1`, whatever the machine's read rate is.
    """
    hidden, kv = formats
    tokens = 512
    byte_share = hidden.num_bytes(spec, tokens) / kv.num_bytes(spec, tokens)
    c_hidden, c_kv = (costs.restore(fmt)(tokens) for fmt in formats)
    c_recompute = costs.layer(tokens)
    work_share = float((c_hidden - c_kv) / max(c_recompute - c_kv, 1e-12))
    numbers = (
        f"a hidden row takes {byte_share:.2f} of the bytes of K and V, and projecting it "
        f"{work_share:.2f} of the work of recomputing it"
    )
    if byte_share + work_share < 1:
        return (
            f"hidden states are part of the best mix at some read rates: {numbers}, together "
            "less than 1"
        )
    return (
        f"hidden states are never part of the best mix for this model, because {numbers}: "
        "together not less than 1"
    )


def storage_dtypes(spec: ModelSpec, dtype: str | None = None) -> tuple[str, str]:
    """What hidden states, and K and V, are stored in if `dtype` is asked for; None is the default.

    Raises:
        ValueError: neither form can be stored so.
    """
    if dtype is None:
        return DEFAULT_HIDDEN_DTYPE, DEFAULT_KV_DTYPE
    if dtype not in STORAGE_DTYPES[HIDDEN]:
        raise ValueError(
            f"states cannot be stored as {dtype!r}; known: {', '.join(STORAGE_DTYPES[HIDDEN])}"
        )
    return dtype, dtype if dtype in STORAGE_DTYPES[KV] else "int8"
