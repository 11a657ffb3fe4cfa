"""What an operator says about itself: everything but its numbers.

One JSON document inside the artifact's file, read strictly: an unknown field, a value out of bounds or a number that
is not finite is an error, never a default.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from operators.core.errors import SettingError
from operators.core.positions import ALL_POSITIONS, Positions

Profile = Literal["golden", "residual"]
Rule = Literal["cumulative", "substitute"]
DTypeName = Literal["float32", "float64", "bfloat16"]

_Fingerprint = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
MAX_CONCEPT = 1 << 16
"""Characters, and tokens, of a text: a bound for everything that a listing of operators sends over a wire."""
MAX_MEMBERS = 64
MAX_TEXTS = 256
MAX_WORDS = 256
MAX_WORD = 1024
"""Characters."""
_Word = Annotated[str, Field(max_length=MAX_WORD)]

_Text = Annotated[str, Field(max_length=MAX_CONCEPT)]
_Ids = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(min_length=1, max_length=MAX_CONCEPT)]
_Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
_NonNegative = Annotated[float, Field(ge=0.0)]
_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


class Recommended(BaseModel):
    """Values that a request gets when it names none."""

    model_config = _STRICT

    strength: float = 0.5
    rule: Rule = "cumulative"
    blend: _Fraction = 0.0
    positions: Annotated[Positions, PlainValidator(_read_positions), PlainSerializer(str)] = ALL_POSITIONS
    """In its text form, such as ``"first"``, where the header is written down."""


class ConceptText(BaseModel):
    """One text and its token ids. Filled by :mod:`operators.builder.build`."""

    model_config = _STRICT

    text: _Text
    ids: _Ids


class Member(BaseModel):
    """One operator of a mixture, as it was when the mixture was made. Filled by :mod:`operators.builder.combine`."""

    model_config = _STRICT

    name: _Word
    digest: _Fingerprint
    weight: float


class LowRank(BaseModel):
    """How J_i ~ U B_i was computed, and its residuals. Filled by :mod:`operators.builder.build`."""

    model_config = _STRICT

    rank: _Count
    residuals: tuple[_NonNegative, ...] = Field(min_length=1, max_length=MAX_CONCEPT)
    """|J_i - U B_i|_F / |J_i|_F per position, as random probes estimate it."""
    weighting: Literal["embedding", "white"]
    """The covariance of the test vectors: that of the embedding table, or the identity."""
    oversample: Annotated[int, Field(ge=0)]
    power_iterations: Annotated[int, Field(ge=0)]
    seed: int


class CalibrationPoint(BaseModel):
    """What a calibration measured at one setting, at all positions. Filled by :mod:`operators.tune.calibrate`."""

    model_config = _STRICT

    layer: _Count
    rule: Rule
    blend: _Fraction
    strength: float
    texts: _Count
    """Number of steered texts: one for each of the first prompts."""
    kl_p95: _NonNegative
    """95th percentile over the tokens of the steered texts of KL(plain || steered), in nats."""
    hit_rate: _Fraction
    """Share of the texts that hold one of the concept's words."""
    perplexity_ratio: _NonNegative
    """Perplexity of the steered texts under the plain model, over that of the plain texts."""
    distinct_2: _Fraction
    """Distinct pairs of neighbouring tokens of a text, over all of its pairs."""


class Calibration(BaseModel):
    """The points that a calibration measured, and the one that it chose. Filled by :mod:`operators.tune.calibrate`."""

    model_config = _STRICT

    words: tuple[_Word, ...] = Field(min_length=1, max_length=MAX_WORDS)
    kl_budget: _NonNegative
    max_perplexity_ratio: _NonNegative
    min_distinct_ratio: _Fraction
    """Bound of the texts' distinct-2, over that of the plain texts."""
    prompts: _Count
    tokens: _Count
    plain_hit_rate: _Fraction
    plain_perplexity: _NonNegative
    plain_distinct_2: _Fraction
    points: tuple[CalibrationPoint, ...] = Field(max_length=4096)
    chosen: Annotated[int, Field(ge=0)] | None
    """Index of the point that became the recommendation; None where none beat the plain model within the bounds."""

    @model_validator(mode="after")
    def _chosen_is_a_point(self) -> Calibration:
        if self.chosen is not None and self.chosen >= len(self.points):
            raise ValueError(f"chosen is {self.chosen}; there are {len(self.points)} points")
        return self


class OperatorHeader(BaseModel):
    """Everything about an operator but its numbers. Filled by :mod:`operators.builder.build`."""

    model_config = _STRICT

    concept: _Text
    concept_ids: _Ids
    more_texts: tuple[ConceptText, ...] = Field(default=(), max_length=MAX_TEXTS - 1)
    """Further texts of the same concept: the operator is the mean of theirs."""
    weights: tuple[float, ...] = Field(default=(), max_length=MAX_TEXTS)
    """Of each text's map in the operator's; none means the mean."""
    members: tuple[Member, ...] = Field(default=(), max_length=MAX_MEMBERS)
    """The operators of a mixture; their texts are this one's."""
    model: _Word
    architecture: _Word
    model_fingerprint: _Fingerprint
    tokenizer_fingerprint: _Fingerprint
    profile: Profile
    rule_set: _Word
    layer: _Count
    injection_layer: Annotated[int, Field(ge=0)]
    num_layers: _Count
    hidden_size: _Count
    dtype: DTypeName
    """Of the tensors."""
    model_dtype: DTypeName
    """Of the model whose map this is: its rounding bounds the reconstruction error."""
    embedding: Literal["block-input"] = "block-input"
    """x_i is what the first block receives: after any scaling of the embedding table."""
    low_rank: LowRank | None = None
    """None for an exact operator."""
    tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The residual that was given in place of a rank; the operator is exact where no lower rank keeps to it."""
    words: tuple[_Word, ...] = Field(default=(), max_length=MAX_WORDS)
    """Words that show the concept in a text, for a calibration."""
    recommended: Recommended
    calibration: Calibration | None = None
    reconstruction_error: _NonNegative
    """|sum J_i x_i + c - y| / |y|; of several texts, the worst of each text's own map (not of the mean)."""
    builder_version: _Word
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
        chosen = (point.layer, point.rule, point.blend, point.strength, ALL_POSITIONS)
        return point if chosen == (self.layer, at.rule, at.blend, at.strength, at.positions) else None

    @property
    def positions(self) -> int:
        """n, the number of blocks: the tokens of the longest text."""
        return max(len(self.concept_ids), *(len(more.ids) for more in self.more_texts), 0)

    @property
    def texts(self) -> tuple[ConceptText, ...]:
        """All texts of the concept."""
        return (ConceptText(text=self.concept, ids=self.concept_ids), *self.more_texts)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weight of each text's map in the operator's, in the order of ``texts``."""
        count = 1 + len(self.more_texts)
        return self.weights or (1.0 / count,) * count

    @model_validator(mode="after")
    def _every_text_has_a_weight(self) -> Self:
        if len(self.shares) != 1 + len(self.more_texts):
            raise ValueError(f"{len(self.weights)} weights for {1 + len(self.more_texts)} texts")
        return self
