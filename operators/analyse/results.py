"""What an analysis finds, as frozen data. The JSON files are these classes; ``schema`` names their version.

Numbers are rounded to what is worth reading. None (null) stands for what does not exist, such as the stable rank of a
map that is zero. Layers count from 1, positions from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

ANALYSIS_SCHEMA = "steering-operators/analysis/1"
SUMMARIES_SCHEMA = "steering-operators/comparison/1"

Target = Literal["block", "attention", "mlp"]
"""What a layer's map goes into: the block's output, or what its attention or its MLP adds to the stream."""
TARGETS: tuple[Target, ...] = ("block", "attention", "mlp")
Scope = Literal["single", "cumulative"]
"""Where a layer's map begins: at the input of the layer itself, or at the embeddings."""
SourcePosition = Literal["last", "first"]
"""The position whose vector is mapped. The result is always that of the last position."""

StableRankKind = Literal["first", "last", "mean"]
"""Of a phrase's maps: that of the first or of the last position, or the mean over all."""
STABLE_RANK_KINDS: tuple[StableRankKind, ...] = ("first", "last", "mean")


@dataclass(frozen=True)
class ScoredToken:
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
    """|sum J x + c - h| / |h|."""
    ordinary_error: float


@dataclass(frozen=True)
class SingularDirection:
    """One triplet: sigma, u through the unembedding (logits), v against the embeddings (cosines)."""

    sigma: float
    left: tuple[ScoredToken, ...]
    right: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class PositionAnalysis:
    """One input token and its map J_i. ``share``: (h . J_i x_i) / |h|^2; with the share of c they add up to 1.

    ``term_norm``: |J_i x_i|; ``term_cosine``: that between J_i x_i and h.
    """

    index: int
    token: ScoredToken
    share: float
    term_norm: float
    term_cosine: float
    stable_rank: float | None
    singular_values: tuple[float, ...]
    directions: tuple[SingularDirection, ...]


@dataclass(frozen=True)
class LayerMap:
    """One map into one layer, described by its leading triplets. ``place`` is the source position.

    ``along_final``: |u_1 . u_k| with u_k, k = 1 and 2, of the cumulative block map of the last layer.
    ``answer_rank``: the rank of the model's next token among the logits of u_1, 1 being the top.
    """

    scope: Scope
    target: Target
    place: SourcePosition
    sigma: float
    stable_rank: float | None
    answer_rank: int | None
    along_final: tuple[float, float] | None
    left: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer. ``lens``: the logit lens of h at the last position (logits); the norms are Euclidean.

    ``along_final``: the cosine between h and that of the last layer, at the last position.
    """

    index: int
    norm_last: float
    norm_first: float
    norm_attention: float
    norm_mlp: float
    along_final: float
    lens: tuple[ScoredToken, ...]
    lens_answer_rank: int
    maps: tuple[LayerMap, ...]

    def map(self, scope: Scope, target: Target, place: SourcePosition) -> LayerMap:
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
    """Everything about one prompt. Filled by :mod:`operators.analyse.analysis`.

    ``answer``: the model's most likely next tokens, with probabilities. ``layer``: that of the output embedding h.
    ``offset_share``: (h . c) / |h|^2. ``reads``, ``reads_against``: the tokens whose embeddings x have the largest and
    the least J_{n-1} x along h (scores w . x with w = J_{n-1}^T h/|h|).
    """

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
    answer: tuple[ScoredToken, ...]
    offset_share: float
    reads: tuple[ScoredToken, ...]
    reads_against: tuple[ScoredToken, ...]
    reconstruction: Reconstruction
    positions: tuple[PositionAnalysis, ...]
    layers: tuple[LayerAnalysis, ...]
    emergence: Emergence
    seconds: float

    @property
    def mean_stable_rank(self) -> float | None:
        """The mean over the positions that have a stable rank."""
        return mean([position.stable_rank for position in self.positions])


@dataclass(frozen=True)
class PhraseSummary:
    """One phrase under one model.

    ``first``, ``last``, ``mean``: stable ranks (:data:`StableRankKind`). ``answer``: next tokens (probabilities).
    ``*_left``: u_1 through the unembedding (logits). ``last_right``: v_1 against the embeddings (cosines).
    """

    text: str
    num_tokens: int
    first: float | None
    last: float | None
    mean: float | None
    answer: tuple[ScoredToken, ...]
    first_left: tuple[ScoredToken, ...]
    last_left: tuple[ScoredToken, ...]
    last_right: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class ModelSummary:
    """One model over all phrases. Filled by :mod:`operators.analyse.model_summary`."""

    model: str
    architecture: str
    model_fingerprint: str
    dtype: str
    num_layers: int
    hidden_size: int
    phrases: tuple[PhraseSummary, ...]
    seconds: float

    def stable_ranks(self, kind: StableRankKind) -> list[float]:
        """The stable ranks of one kind, of the phrases that have one."""
        values = (getattr(phrase, kind) for phrase in self.phrases)
        return [value for value in values if value is not None]


@dataclass(frozen=True)
class ModelSummaries:
    """Several models over the same phrases: what ``analyse --compare`` finds."""

    schema: str
    phrases: tuple[str, ...]
    models: tuple[ModelSummary, ...]


def to_json(result: Analysis | ModelSummaries) -> str:
    """The result as one JSON document."""
    return TypeAdapter(type(result)).dump_json(result, indent=1).decode()


def analysis_from_json(document: str) -> Analysis:
    """Reads what :func:`to_json` wrote. Raises ``pydantic.ValidationError``."""
    return TypeAdapter(Analysis).validate_json(document)


def summaries_from_json(document: str) -> ModelSummaries:
    """Reads what :func:`to_json` wrote. Raises ``pydantic.ValidationError``."""
    return TypeAdapter(ModelSummaries).validate_json(document)


def rounded(value: float) -> float:
    """The value to six significant digits."""
    return float(f"{value:.6g}")


def mean(values: list[float | None]) -> float | None:
    """The mean of the values that are not None, rounded; None where there are none."""
    numbers = [value for value in values if value is not None]
    return rounded(sum(numbers) / len(numbers)) if numbers else None
