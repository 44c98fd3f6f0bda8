"""`HardwareProfile`: how fast a machine reads, projects and computes. Facts and JSON, no torch.

It does not know who measured it: `measure` on this machine, or a data sheet (`presets`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from hcache_rag.errors import ProfileError
from hcache_rag.layout import STORAGE_DTYPES, LayerFormat, Representation
from hcache_rag.spec import ModelSpec

PROFILE_VERSION = 1
PROFILE_NAME = "profile.json"
"""The file's name beside the states that it was measured on."""


def _check(what: object, names: Sequence[str], *, positive: bool) -> None:
    """Refuse what no machine has: text, nothing, infinity, negative seconds."""
    for name in names:
        value = getattr(what, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value) and (value > 0 if positive else value >= 0)):
            bound = "positive" if positive else "not negative"
            raise ValueError(f"{type(what).__name__}.{name} must be {bound}, not {value!r}")


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Seconds as a function of tokens: `fixed + per_token * n + per_square * n^2`."""

    fixed_s: float = 0.0
    per_token_s: float = 0.0
    per_square_s: float = 0.0

    def __post_init__(self) -> None:
        _check(self, ("fixed_s", "per_token_s", "per_square_s"), positive=False)

    def __call__(self, tokens: Any) -> Any:
        """Seconds for a number of tokens, or for an array of numbers; 0 tokens take no time."""
        polynomial = self.fixed_s + tokens * (self.per_token_s + tokens * self.per_square_s)
        return polynomial * (tokens > 0)

    @classmethod
    def fit(cls, samples: Sequence[tuple[float, float]], degree: int = 2) -> TokenCost:
        """The non-negative polynomial with the least relative error on (tokens, seconds).

        Raises:
            ValueError: no samples.
        """
        if not samples:
            raise ValueError("a cost needs at least one sample")
        tokens, seconds = np.array(samples, dtype=float).T
        basis = np.stack([tokens**power for power in range(degree + 1)]) / seconds
        return cls(*_non_negative_fit(basis, np.ones_like(seconds)))

    def times(self, factor: float) -> TokenCost:
        """The same cost on a machine that takes `factor` times as long."""
        return TokenCost(
            self.fixed_s * factor, self.per_token_s * factor, self.per_square_s * factor
        )


def _non_negative_fit(basis: Any, target: Any) -> list[float]:
    """Least squares with coefficients of at least zero: the best of all sets of columns."""
    best, best_error = [0.0] * len(basis), np.inf
    for count in range(1, len(basis) + 1):
        for columns in combinations(range(len(basis)), count):
            found = np.linalg.lstsq(basis[list(columns)].T, target, rcond=None)[0]
            error = float(np.sum((found @ basis[list(columns)] - target) ** 2))
            if (found >= 0).all() and error < best_error - 1e-12:
                best, best_error = [0.0] * len(basis), error
                for column, value in zip(columns, found, strict=True):
                    best[column] = float(value)
    return best


@dataclass(frozen=True, slots=True)
class SuffixCost:
    """Seconds of one layer over n fresh tokens that attend to c tokens.

    `fixed + per_token * n + per_context * c + per_pair * n * c`.
    """

    fixed_s: float = 0.0
    per_token_s: float = 0.0
    per_context_s: float = 0.0
    per_pair_s: float = 0.0

    def __post_init__(self) -> None:
        names = ("fixed_s", "per_token_s", "per_context_s", "per_pair_s")
        _check(self, names, positive=False)

    def __call__(self, tokens: float, context: float) -> float:
        """Seconds of one layer; 0 tokens take no time."""
        if not tokens:
            return 0.0
        with_context = context * (self.per_context_s + tokens * self.per_pair_s)
        return self.fixed_s + tokens * self.per_token_s + with_context

    @classmethod
    def fit(cls, samples: Sequence[tuple[float, float, float]]) -> SuffixCost:
        """The non-negative form with the least relative error on (tokens, context, seconds)."""
        tokens, context, seconds = np.array(samples, dtype=float).T
        basis = np.stack([np.ones_like(tokens), tokens, context, tokens * context]) / seconds
        return cls(*_non_negative_fit(basis, np.ones_like(seconds)))


@dataclass(frozen=True, slots=True)
class ReadRate:
    """Seconds of a read: `per_request_s + bytes / bytes_per_s`."""

    bytes_per_s: float
    per_request_s: float = 0.0

    def __post_init__(self) -> None:
        _check(self, ("bytes_per_s",), positive=True)
        _check(self, ("per_request_s",), positive=False)

    def __call__(self, num_bytes: Any, requests: Any = 1) -> Any:
        """Seconds for bytes read in a number of requests; both may be arrays."""
        return num_bytes / self.bytes_per_s + requests * self.per_request_s

    @classmethod
    def fit(cls, samples: Sequence[tuple[float, float]]) -> ReadRate:
        """From (bytes of a request, its seconds)."""
        cost = TokenCost.fit(samples, degree=1)
        if not cost.per_token_s:
            sizes, seconds = np.array(samples, dtype=float).T
            return cls(float(sizes.sum() / seconds.sum()))
        return cls(1 / cost.per_token_s, cost.fixed_s)


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """What one layer of one model costs on one machine.

    Args:
        project: by storage dtype of hidden rows: rows of a piece to K and V in their slots,
            conversion, GEMM, RoPE and scatter together.
        scatter: by storage dtype of K and V: the same for stored K and V, which need no GEMM.
        layer: a document of n tokens read from scratch.
        suffix: fresh tokens behind a restored context.
    """

    project: Mapping[str, TokenCost]
    scatter: Mapping[str, TokenCost]
    layer: TokenCost
    suffix: SuffixCost

    def read_s(self, tokens: int, num_layers: int) -> float:
        """Seconds that a model of so many layers takes to read a document from scratch."""
        return float(self.layer(tokens) * num_layers)

    def restore(self, fmt: LayerFormat) -> TokenCost:
        """The compute of restoring a layer that is kept as `fmt`."""
        if fmt.representation is Representation.NONE:
            return TokenCost()
        known = self.project if fmt.representation is Representation.HIDDEN else self.scatter
        cost = known.get(fmt.dtype)
        return cost if cost is not None else max(known.values(), key=lambda c: c.per_token_s)


@dataclass(frozen=True, slots=True)
class Rates:
    """A processor in four numbers, from which the costs of any model follow.

    Args:
        projection_flops_per_s: of the GEMM from layer inputs to K and V, the time of moving these
            into the cache included.
        layer_flops_per_s: of a layer's matrix products when tokens are read.
        attention_flops_per_s: of attention, counted causally.
        memory_bytes_per_s: of what only moves: RoPE, scatter, the weights for a few fresh tokens.
    """

    projection_flops_per_s: float
    layer_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float

    def __post_init__(self) -> None:
        names = ("projection_flops_per_s", "layer_flops_per_s")
        _check(self, (*names, "attention_flops_per_s", "memory_bytes_per_s"), positive=True)

    def costs(self, spec: ModelSpec) -> ModelCosts:
        """What a layer of `spec` costs, by the formulas of HCache (EuroSys 2025).

        hidden: `4 d d_kv / F`, and never less than K and V take to move. A layer: `(4 d d_a +
        4 d d_kv + 2 m d d_ff) / F` a token and `2 d_a n^2 / F_a` for attention, which is counted
        causally: half of all pairs.
        """
        element = spec.dtype_bytes
        width = spec.kv_width + spec.value_width
        moved = 2 * width * element / self.memory_bytes_per_s
        project = TokenCost(0.0, max(spec.projection_flops / self.projection_flops_per_s, moved))
        layer = spec.layer_flops / self.layer_flops_per_s
        pair = spec.attention_flops / self.attention_flops_per_s
        weights_s = spec.layer_flops / 2 * element / self.memory_bytes_per_s
        context_s = width * element / self.memory_bytes_per_s
        return ModelCosts(
            project=dict.fromkeys(STORAGE_DTYPES[Representation.HIDDEN], project),
            scatter=dict.fromkeys(STORAGE_DTYPES[Representation.KV], TokenCost(0.0, moved)),
            layer=TokenCost(0.0, layer, pair / 2),
            suffix=SuffixCost(weights_s, layer, context_s, pair),
        )


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """A machine, as a planner needs it.

    Args:
        name: what a person calls it.
        source: who says so: a measurement with its date, or a data sheet.
        cold, warm: reading from the store, from the device and from the page cache.
        rates: the processor, for any model.
        model: the model that `costs` were measured with.
        costs: its costs as they were measured; other models' follow from `rates`.
        samples: the measurements that the fits stand on, by what was measured; for people.
    """

    name: str
    source: str
    cold: ReadRate
    warm: ReadRate
    rates: Rates
    model: ModelSpec | None = None
    costs: ModelCosts | None = None
    samples: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    def costs_of(self, spec: ModelSpec) -> ModelCosts:
        """What a layer of `spec` costs here: as measured, if it was measured with such a model."""
        if self.costs is None or self.model is None:
            return self.rates.costs(spec)
        same = replace(self.model, name=spec.name, window_tokens=spec.window_tokens) == spec
        return self.costs if same else self.rates.costs(spec)

    def to_json(self) -> str:
        """The profile as a JSON text."""
        return json.dumps({"version": PROFILE_VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> HardwareProfile:
        """The inverse of `to_json`.

        Raises:
            ProfileError: not a profile of this version.
        """
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.pop("version", None) != PROFILE_VERSION:
                raise ProfileError(f"not a hardware profile of version {PROFILE_VERSION}")
            data["cold"], data["warm"] = ReadRate(**data["cold"]), ReadRate(**data["warm"])
            data["rates"] = Rates(**data["rates"])
            if data["model"] is not None:
                data["model"] = ModelSpec(**data["model"])
            if data["costs"] is not None:
                data["costs"] = _costs_from(data["costs"])
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ProfileError(f"not a hardware profile: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile; a reader sees the old file or the whole new one.

        Raises:
            ProfileError: the file cannot be written.
        """
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            unfinished.write_text(self.to_json() + "\n")
            os.replace(unfinished, target)
        except OSError as error:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise ProfileError(f"cannot write {target}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HardwareProfile:
        """Read a profile.

        Raises:
            ProfileError: no such file, or no profile of this version.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"cannot read {path}: {error}") from error
        try:
            return cls.from_json(text)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from error


def _costs_from(data: Mapping[str, Any]) -> ModelCosts:
    return ModelCosts(
        project={dtype: TokenCost(**cost) for dtype, cost in data["project"].items()},
        scatter={dtype: TokenCost(**cost) for dtype, cost in data["scatter"].items()},
        layer=TokenCost(**data["layer"]),
        suffix=SuffixCost(**data["suffix"]),
    )
