"""What an operator says about itself: everything but its numbers.

One JSON document inside the artifact's file, read strictly: an unknown field, a value out of bounds or a number that
is not finite is an error, never a default.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, Field, PlainSerializer, PlainValidator, field_validator, model_validator

from operators.core.errors import SettingError
from operators.core.lens_source import PUSHED, LensSource
from operators.core.measured import HeldOut, Sampling
from operators.core.model_fingerprint import ModelFingerprint
from operators.core.positions import ALL_POSITIONS, Positions
from operators.core.vector_source import STRICT, Count, Fingerprint, VectorSource, Word

Profile = Literal["golden", "residual"]
Rule = Literal["cumulative", "substitute"]
Anchor = Literal["contrast", "concept"]
FirstToken = Literal["operator", "anchor"]
DTypeName = Literal["float32", "float64", "bfloat16"]
AttentionName = Literal["sdpa", "eager"]

MAX_CONCEPT = 1 << 16
"""Characters, and tokens, of a text: a bound for everything that a listing of operators sends over a wire."""
MAX_MEMBERS = 64
MAX_TEXTS = 256
MAX_WORDS = 256
MAX_NEUTRAL_TEXTS = 256

_Text = Annotated[str, Field(max_length=MAX_CONCEPT)]
_Ids = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(max_length=MAX_CONCEPT)]
_OneOrMoreIds = Annotated[_Ids, Field(min_length=1)]
_Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
_NonNegative = Annotated[float, Field(ge=0.0)]


def injection_layer(profile: Profile, layer: int) -> int:
    """The decoder layer (from 0) whose input an operator of this profile and target layer is added to.

    ``golden`` follows the published code, which adds to the input of block s-1 with a map that ends behind it.
    """
    return layer - 1 if profile == "golden" else layer


def _read_positions(value: object) -> Positions:
    if not isinstance(value, str | Positions):
        raise ValueError(f"is {value!r}; a text such as 'all' is accepted")
    try:
        return Positions.parse(str(value))
    except SettingError as error:
        raise ValueError(str(error)) from error


_Positions = Annotated[Positions, PlainValidator(_read_positions), PlainSerializer(str)]
SETTING_FIELDS = ("strength", "rule", "blend", "positions", "anchor", "first_token")
"""What makes a setting: of :class:`Recommended`, of a :class:`CalibrationPoint` and of a request."""


class Recommended(BaseModel):
    """Values that a request gets when it names none."""

    model_config = STRICT

    strength: float = 0.5
    rule: Rule = "cumulative"
    blend: _Fraction = 0.0
    positions: _Positions = ALL_POSITIONS
    """In its text form, such as ``"first"``, where the header is written down."""
    anchor: Anchor = "concept"
    """What earlier versions, which knew no other, mean; what is built now recommends its contrast anchor."""
    first_token: FirstToken = "operator"


class ConceptText(BaseModel):
    """One text and its token ids. Filled by :mod:`operators.builder.build`."""

    model_config = STRICT

    text: _Text
    ids: _OneOrMoreIds


class Member(BaseModel):
    """One operator of a mixture, as it was when the mixture was made. Filled by :mod:`operators.builder.combine`."""

    model_config = STRICT

    name: Word
    digest: Fingerprint
    weight: float


class NeutralTexts(BaseModel):
    """The texts whose mean hidden state is the tensor ``neutral``. Filled by :mod:`operators.builder.neutral`."""

    model_config = STRICT

    digest: Fingerprint
    """sha256 of the texts, one per line."""
    ids: tuple[_OneOrMoreIds, ...] = Field(min_length=1, max_length=MAX_NEUTRAL_TEXTS)
    """The tokens of each text, so that the mean can be computed anew, here and at other layers."""

    @field_validator("ids")
    @classmethod
    def _fit_a_header(cls, ids: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        if (total := sum(map(len, ids))) > MAX_CONCEPT:
            raise ValueError(f"the texts have {total} tokens; at most {MAX_CONCEPT} are accepted")
        return ids


class LowRank(BaseModel):
    """How J_i ~ U B_i was computed, and its residuals. Filled by :mod:`operators.builder.build`."""

    model_config = STRICT

    rank: Count
    residuals: tuple[_NonNegative, ...] = Field(min_length=1, max_length=MAX_CONCEPT)
    """|J_i - U B_i|_F / |J_i|_F per position, as random probes estimate it."""
    weighting: Literal["embedding", "white"]
    """The covariance of the test vectors: that of the embedding table, or the identity."""
    oversample: Annotated[int, Field(ge=0)]
    power_iterations: Annotated[int, Field(ge=0)]
    seed: int


class CalibrationPoint(BaseModel):
    """What a calibration measured at one setting. Filled by :mod:`operators.tune.calibrate`."""

    model_config = STRICT

    layer: Count
    rule: Rule
    blend: _Fraction
    strength: float
    positions: _Positions = ALL_POSITIONS
    anchor: Anchor = "concept"
    first_token: FirstToken = "operator"
    texts: Count
    """Number of steered texts: one for each of the first prompts."""
    kl_p95: _NonNegative
    """95th percentile over the tokens of the steered texts of KL(plain || steered), in nats."""
    hit_rate: _Fraction
    """Share of the texts that hold one of the concept's words."""
    useful_rate: _Fraction | None = None
    """Share of the texts that hold one, and repeat no four tokens. None, as below, of an earlier version."""
    kl_mean: _NonNegative | None = None
    tokens: Count | None = None
    """Per text: fewer than the calibration's in its first rounds."""
    perplexity_ratio: _NonNegative
    """Perplexity of the steered texts under the plain model, over that of the plain texts."""
    distinct_2: _Fraction
    """Distinct pairs of neighbouring tokens of a text, over all of its pairs."""


class Calibration(BaseModel):
    """The points that a calibration measured, and the one that it chose. Filled by :mod:`operators.tune.calibrate`."""

    model_config = STRICT

    words: tuple[Word, ...] = Field(min_length=1, max_length=MAX_WORDS)
    kl_budget: _NonNegative
    max_perplexity_ratio: _NonNegative
    min_distinct_ratio: _Fraction
    """Bound of the texts' distinct-2, over that of the plain texts."""
    prompts: Count
    tokens: Count
    plain_hit_rate: _Fraction
    plain_perplexity: _NonNegative
    plain_distinct_2: _Fraction
    points: tuple[CalibrationPoint, ...] = Field(max_length=4096)
    sampling: Sampling | None = None
    """How the texts were drawn; None for an earlier version's, which are greedy."""
    held_out: HeldOut | None = None
    """The chosen setting on prompts that the search never saw; None where there is none, or of an earlier version."""
    chosen: Annotated[int, Field(ge=0)] | None
    """Index of the point that became the recommendation; None where none beat the plain model within the bounds."""

    @model_validator(mode="after")
    def _chosen_is_a_point(self) -> Calibration:
        if self.chosen is not None and self.chosen >= len(self.points):
            raise ValueError(f"chosen is {self.chosen}; there are {len(self.points)} points")
        return self


class OperatorHeader(BaseModel):
    """Everything about an operator but its numbers. Filled by :mod:`operators.builder.build`, and of a vector by
    :mod:`operators.vectors.vector_operator`, and of a lens by :mod:`operators.lens.build`.

    A vector is an operator of rank 0: it has no texts, blocks or reconstruction, and its anchor is the vector.
    A lens has none of these either, and no anchor: it pushes along words, which each request names, and
    :mod:`operators.model.words` makes a vector of them.
    """

    model_config = STRICT

    concept: _Text
    """The first text; of a vector, what its maker said about it."""
    concept_ids: _Ids
    """Empty for a vector."""
    concept_tokens: Annotated[tuple[_Text, ...], Field(max_length=MAX_CONCEPT)] | None = None
    """What each of these ids is as text, for people; None for a vector or a lens, and of an earlier version."""
    vector: VectorSource | None = None
    """Where a vector comes from; None for every other operator."""
    lens: LensSource | None = None
    """How a lens was made; None for everything that is none."""
    more_texts: tuple[ConceptText, ...] = Field(default=(), max_length=MAX_TEXTS - 1)
    """Further texts of the same concept: the operator is the mean of theirs."""
    weights: tuple[float, ...] = Field(default=(), max_length=MAX_TEXTS)
    """Of each text's map in the operator's; none means the mean."""
    members: tuple[Member, ...] = Field(default=(), max_length=MAX_MEMBERS)
    """The operators of a mixture; their texts are this one's."""
    model: Word
    architecture: Word
    model_fingerprint: ModelFingerprint
    tokenizer_fingerprint: Fingerprint
    profile: Profile
    rule_set: Word
    """What was frozen in the Jacobian; empty for a vector."""
    layer: Count
    injection_layer: Annotated[int, Field(ge=0)]
    num_layers: Count
    hidden_size: Count
    dtype: DTypeName
    """Of the tensors."""
    model_dtype: DTypeName
    """Of the model whose map this is: its rounding bounds the reconstruction error."""
    attention: Word | None = None
    """What computed the model's attention, by transformers' name; None of an earlier version."""
    embedding: Literal["block-input"] = "block-input"
    """x_i is what the first block receives: after any scaling of the embedding table."""
    low_rank: LowRank | None = None
    """None for an exact operator."""
    neutral: NeutralTexts | None = None
    """None for a vector, and for what an earlier version built: there is then no contrast anchor."""
    tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The residual that was given in place of a rank; the operator is exact where no lower rank keeps to it."""
    words: tuple[Word, ...] = Field(default=(), max_length=MAX_WORDS)
    """Words that show the concept in a text, for a calibration."""
    recommended: Recommended
    calibration: Calibration | None = None
    reconstruction_error: _NonNegative | None = None
    """|sum J_i x_i + c - y| / |y|; of several texts, the worst of each text's own map (not of the mean). None for a
    vector."""
    builder_version: Word
    created: AwareDatetime

    @field_validator("created")
    @classmethod
    def _created_is_in_range(cls, created: datetime) -> datetime:
        if not 1970 < created.year < 9999:
            raise ValueError(f"{created} is no time at which an operator was built")
        return created

    @property
    def calibrated_point(self) -> CalibrationPoint | None:
        """What the calibration chose, where that is still what is recommended.

        None for every other setting, measured or not: one that was tried and rejected is not a calibrated one.
        """
        if self.calibration is None or self.calibration.chosen is None:
            return None
        point, at = self.calibration.points[self.calibration.chosen], self.recommended
        chosen = (point.layer, *(getattr(point, name) for name in SETTING_FIELDS))
        return point if chosen == (self.layer, *(getattr(at, name) for name in SETTING_FIELDS)) else None

    @property
    def positions(self) -> int:
        """n, the number of blocks: the tokens of the longest text; 0 for a vector or a lens."""
        return max(len(self.concept_ids), *(len(more.ids) for more in self.more_texts), 0)

    @property
    def rank(self) -> int:
        """r of J_i = U B_i: the hidden size for an exact operator, 0 for a vector or a lens."""
        if self.vector is not None or self.lens is not None:
            return 0
        return self.hidden_size if self.low_rank is None else self.low_rank.rank

    @property
    def texts(self) -> tuple[ConceptText, ...]:
        """All texts of the concept; none for a vector or a lens."""
        if self.vector is not None or self.lens is not None:
            return ()
        return (ConceptText(text=self.concept, ids=self.concept_ids), *self.more_texts)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each text's map in the operator's, in the order of ``texts``."""
        count = len(self.texts)
        return self.weights or tuple(1.0 / count for _ in range(count))

    @model_validator(mode="after")
    def _every_token_has_its_text(self) -> Self:
        if self.concept_tokens is not None and len(self.concept_tokens) != len(self.concept_ids):
            raise ValueError(f"{len(self.concept_tokens)} concept_tokens for {len(self.concept_ids)} concept_ids")
        return self

    @model_validator(mode="after")
    def _is_a_vector_or_a_map(self) -> Self:
        of_maps = {
            "concept_ids": self.concept_ids,
            "more_texts": self.more_texts,
            "weights": self.weights,
            "low_rank": self.low_rank,
            "tolerance": self.tolerance,
            "neutral": self.neutral,
            "reconstruction_error": self.reconstruction_error,
        }
        if self.vector is None and self.lens is None:
            absent = next(
                (name for name in ("concept_ids", "reconstruction_error") if of_maps[name] in ((), None)), None
            )
            if absent is not None:
                raise ValueError(f"an operator that is no vector needs {absent!r}")
            return self
        kind = "lens" if self.vector is None else "vector"
        present = next((name for name, value in of_maps.items() if value not in ((), None)), None)
        if self.vector is not None:
            present = "rule_set" if self.rule_set else "lens" if self.lens is not None else present
        if present is not None:
            raise ValueError(f"a {kind} has no {present!r}")
        if self.profile != "residual":
            raise ValueError(
                f"a {kind} is added to the input of its layer, so its profile is 'residual', not {self.profile!r}"
            )
        if self.recommended.blend != 1.0:
            raise ValueError(f"a {kind} is all anchor: its recommended blend is 1, not {self.recommended.blend}")
        if self.vector is None:
            return self
        if (self.vector.method == "mixture") != bool(self.members):
            raise ValueError(f"a vector by {self.vector.method!r} has {len(self.members)} members; a mixture has some")
        return self

    @model_validator(mode="after")
    def _is_a_whole_lens(self) -> Self:
        if self.lens is None:
            return self
        if not self.rule_set or self.members or self.words or self.calibration is not None:
            raise ValueError("a lens has a 'rule_set', and neither 'members', 'words' nor a 'calibration'")
        if self.recommended.positions != PUSHED[self.lens.positions]:
            raise ValueError(
                f"a lens of the positions {self.lens.positions!r} pushes {PUSHED[self.lens.positions]}; it recommends "
                f"{self.recommended.positions}"
            )
        if self.lens.default_kl is not None and self.lens.curve is None:
            raise ValueError("a lens recommends a strength without the curve that it is taken from")
        if (self.lens.default_kl is None) != (self.recommended.strength == 0.0):
            raise ValueError("a lens recommends a strength above 0 where it has a 'default_kl', and else 0")
        return self

    @model_validator(mode="after")
    def _has_the_anchor_it_recommends(self) -> Self:
        if self.recommended.anchor == "contrast" and self.neutral is None:
            raise ValueError("the contrast anchor is recommended, which takes neutral texts; there are none")
        return self

    @model_validator(mode="after")
    def _every_text_has_a_weight(self) -> Self:
        if len(self.shares) != len(self.texts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.texts)} texts")
        return self
