"""What an analysis finds, as frozen data. The JSON files are these classes; ``schema`` names their version.

Numbers are rounded to what is worth reading. null stands for what does not exist, such as the stable rank of a map
that is zero. Layers count from 1, positions from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

ANALYSIS_SCHEMA = "steering-operators/analysis/1"
COMPARISON_SCHEMA = "steering-operators/comparison/1"

Scope = Literal["single", "cumulative"]
Place = Literal["last", "first"]


@dataclass(frozen=True)
class Token:
    """A token, its text, and its score: a logit, a probability or a cosine, as the field that holds it says."""

    id: int
    text: str
    score: float


@dataclass(frozen=True)
class Reconstruction:
    """Per component of h: h itself, sum J x + c with the detached map, sum J x with the ordinary Jacobian."""

    target: tuple[float, ...]
    detached: tuple[float, ...]
    ordinary: tuple[float, ...]
    detached_error: float
    ordinary_error: float


@dataclass(frozen=True)
class Direction:
    """One triplet: sigma, u through the unembedding (logits), v against the embeddings (cosines)."""

    sigma: float
    left: tuple[Token, ...]
    right: tuple[Token, ...]


@dataclass(frozen=True)
class Position:
    """One input token and its map J_i. ``share``: (h . J_i x_i) / |h|^2; with the share of c they add up to 1."""

    index: int
    token: Token
    share: float
    stable_rank: float | None
    singular_values: tuple[float, ...]
    directions: tuple[Direction, ...]


@dataclass(frozen=True)
class LayerMap:
    """A map into block ``target`` of one layer, from the input of that block (single) or from x (cumulative).

    ``along_final``: |u_1 . u_k| with u_k, k = 1 and 2, of the cumulative block map of the last layer.
    ``answer_rank``: the rank of the model's next token among the logits of u_1, 1 being the top.
    """

    scope: Scope
    target: Literal["block", "attention", "mlp"]
    place: Place
    sigma: float
    stable_rank: float | None
    answer_rank: int | None
    along_final: tuple[float, float] | None
    left: tuple[Token, ...]


@dataclass(frozen=True)
class Layer:
    """One layer. ``lens``: the logit lens of h at the last position (logits); the norms are Euclidean.

    ``along_final``: the cosine between h and that of the last layer, at the last position.
    """

    index: int
    norm_last: float
    norm_first: float
    norm_attention: float
    norm_mlp: float
    along_final: float
    lens: tuple[Token, ...]
    lens_answer_rank: int
    maps: tuple[LayerMap, ...]

    def map(self, scope: Scope, target: str, place: Place) -> LayerMap:
        """One of the maps."""
        return next(m for m in self.maps if (m.scope, m.target, m.place) == (scope, target, place))


@dataclass(frozen=True)
class Emergence:
    """The first layer from which on the top token is the model's next token; None where that never happens.

    ``stream``: logit lens of h at the last position. ``last``, ``first``: u_1 of the cumulative map of that position.
    """

    stream: int | None
    last: int | None
    first: int | None


@dataclass(frozen=True)
class Analysis:
    """Everything about one prompt. ``answer``: the model's most likely next tokens, with probabilities."""

    schema: str
    text: str
    model: str
    architecture: str
    model_fingerprint: str
    rule_set: str
    dtype: str
    num_layers: int
    hidden_size: int
    layer: int
    answer: tuple[Token, ...]
    offset_share: float
    reconstruction: Reconstruction
    positions: tuple[Position, ...]
    layers: tuple[Layer, ...]
    emergence: Emergence
    seconds: float

    @property
    def mean_stable_rank(self) -> float | None:
        """Over the positions that have one."""
        return mean([position.stable_rank for position in self.positions])


@dataclass(frozen=True)
class Phrase:
    """One phrase under one model. ``answer``: next tokens (probabilities); ``*_left``: u_1 (logits)."""

    text: str
    num_tokens: int
    first: float | None
    last: float | None
    mean: float | None
    answer: tuple[Token, ...]
    first_left: tuple[Token, ...]
    last_left: tuple[Token, ...]
    last_right: tuple[Token, ...]


@dataclass(frozen=True)
class ModelSummary:
    """One model over all phrases."""

    model: str
    architecture: str
    model_fingerprint: str
    dtype: str
    num_layers: int
    hidden_size: int
    phrases: tuple[Phrase, ...]
    seconds: float

    def values(self, which: Literal["first", "last", "mean"]) -> list[float]:
        """The stable ranks of one kind, of the phrases that have one."""
        found = (getattr(phrase, which) for phrase in self.phrases)
        return [value for value in found if value is not None]


@dataclass(frozen=True)
class Comparison:
    """Several models over the same phrases."""

    schema: str
    phrases: tuple[str, ...]
    models: tuple[ModelSummary, ...]


def to_json(result: Analysis | Comparison) -> str:
    """The result as one JSON document."""
    return TypeAdapter(type(result)).dump_json(result, indent=1).decode()


def analysis_from_json(document: str) -> Analysis:
    """An analysis read back. Raises ``pydantic.ValidationError``."""
    return TypeAdapter(Analysis).validate_json(document)


def comparison_from_json(document: str) -> Comparison:
    """A comparison read back. Raises ``pydantic.ValidationError``."""
    return TypeAdapter(Comparison).validate_json(document)


def rounded(value: float) -> float:
    """Six significant digits."""
    return float(f"{value:.6g}")


def mean(values: list[float | None]) -> float | None:
    """The mean of those that are numbers."""
    numbers = [value for value in values if value is not None]
    return rounded(sum(numbers) / len(numbers)) if numbers else None
