"""What a server says of the operators in its store."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from steer_client._positions import ALL_POSITIONS, Positions
from steer_client._requests import Anchor, FirstToken, Rule, SamplingParams


@dataclass(frozen=True, slots=True)
class NeutralTexts:
    """The texts whose mean hidden state an operator has: sha256 of them all, one per line, and how many there are."""

    digest: str
    texts: int


@dataclass(frozen=True, slots=True)
class ConceptText:
    """One of the texts that an operator was built from."""

    text: str
    token_ids: tuple[int, ...]
    #: Share of this text's map in the operator's.
    weight: float


@dataclass(frozen=True, slots=True)
class Member:
    """One operator of a mixture, as it was when the mixture was made."""

    name: str
    digest: str
    #: Of its direction among the members' directions.
    weight: float


@dataclass(frozen=True, slots=True)
class LowRank:
    """What J_i ≈ U B_i leaves out: |J_i − U B_i|/|J_i|, the least and the most over the positions."""

    min_residual: float
    max_residual: float
    #: Covariance of the test vectors: "embedding" or "white".
    weighting: str


@dataclass(frozen=True, slots=True)
class CalibrationPoint:
    """One setting, measured over the prompts of a calibration."""

    #: 95th percentile over the tokens of KL(plain ‖ steered), in nats.
    kl_p95: float
    #: Share of the texts that hold one of the concept's words.
    hit_rate: float
    #: Perplexity of the steered texts under the plain model, over that of the plain texts.
    perplexity_ratio: float
    #: Distinct pairs of neighbouring tokens over all pairs.
    distinct_2: float


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A setting on prompts that the search for it never saw."""

    prompts: int
    hit_rate: float
    #: Share of the texts that hold one of the concept's words and repeat no four tokens; its 95 % interval.
    useful_rate: float
    useful_low: float
    useful_high: float
    kl_p95: float
    kl_mean: float
    perplexity_ratio: float
    distinct_2: float
    plain_useful_rate: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a recommended setting was read off."""

    #: The recommended setting; None where it is none of those that were measured.
    recommended: CalibrationPoint | None
    plain_hit_rate: float
    #: Bounds that the search kept to.
    kl_budget: float
    max_perplexity_ratio: float
    #: Prompts, and tokens decoded from each.
    prompts: int
    tokens: int
    #: How its texts were drawn, for a request that is to have the same; None where an earlier version did it.
    sampling: SamplingParams | None = None
    #: The recommended setting; None where it was chosen by hand, or by an earlier version.
    held_out: HeldOut | None = None


@dataclass(frozen=True, slots=True)
class DosePoint:
    """One point of a dose curve: a strength, and what it came to over the prompts that it was measured on."""

    strength: float
    #: 95th percentile and mean over the tokens of KL(plain ‖ steered), in nats. The mean is None where not measured.
    kl_p95: float
    kl_mean: float | None
    #: Share of the texts that hold the word, or one of the concept's.
    hit_rate: float
    #: Share of the texts that hold it and repeat no four tokens; None where not measured.
    useful_rate: float | None


@dataclass(frozen=True, slots=True)
class Lens:
    """What a lens was read from: positions "first", "others" or "all" of so many texts."""

    read_from: str
    texts: int


@dataclass(frozen=True, slots=True)
class OperatorInfo:
    """An artifact in the server's store.

    `problem` says why an operator cannot be used; what could not be read is then None, 0 or empty.
    """

    name: str
    problem: str | None
    digest: str
    #: The first text that it was built from; the others are in `more_texts`. Of a vector, what its maker said of it.
    concept: str
    concept_token_ids: tuple[int, ...]
    #: Share of the first text's map in the operator's.
    concept_weight: float
    #: How many texts there are. The server sends `more_texts` only up to a budget of 64 KiB.
    num_texts: int
    more_texts: tuple[ConceptText, ...]
    #: Of a mixture, the operators that it was made of.
    members: tuple[Member, ...]
    #: The model that it was built for.
    model: str
    model_fingerprint: str
    #: Of the model that it was built on: "float32", "float64" or "bfloat16".
    model_dtype: str
    #: What computed its attention then: "sdpa" or "eager". Empty where an earlier version built it.
    attention: str
    #: "golden" or "residual".
    profile: str
    rule_set: str
    #: Layer of the Jacobian's target.
    layer: int
    #: The layer whose input is pushed.
    injection_layer: int
    hidden_size: int
    #: Number of Jacobian blocks: the tokens of the longest text; 0 for a vector.
    positions: int
    #: r of J_i = U B_i; the hidden size for an exact operator, 0 for a vector.
    rank: int
    #: None for an exact operator.
    low_rank: LowRank | None
    #: Of the operator's numbers.
    dtype: str
    recommended_strength: float
    recommended_rule: Rule | None
    recommended_blend: float
    #: None where it was not calibrated.
    calibration: Calibration | None
    #: Relative error of Σ J x + c against the hidden state, measured when it was built; of several texts, the worst.
    #: 0 for a vector, which reconstructs nothing.
    reconstruction_error: float
    #: In UTC.
    created: datetime | None
    size_bytes: int
    builder_version: str
    #: Where it is recommended to push.
    recommended_positions: Positions = ALL_POSITIONS
    recommended_anchor: Anchor = field(default="concept", metadata={"when_unset": lambda: "concept"})
    recommended_first_token: FirstToken = field(default="operator", metadata={"when_unset": lambda: "operator"})
    #: What the contrast anchor is against; None where there is none.
    neutral: NeutralTexts | None = None
    #: Set for a lens, which `Word` and `Words` are given to.
    lens: Lens | None = None
    #: What a KL budget is looked up in, by increasing strength; empty where nothing was measured.
    curve: tuple[DosePoint, ...] = ()

    @property
    def usable(self) -> bool:
        """Whether a request may name it."""
        return self.problem is None

    @property
    def vector(self) -> bool:
        """Whether it is one vector, of rank 0, that pushes every token the same way: its blend is always 1."""
        return self.usable and self.rank == 0 and self.lens is None

    @property
    def exact(self) -> bool:
        """Whether its blocks are the whole Jacobian."""
        return self.usable and self.low_rank is None and self.rank > 0

    @property
    def calibrated(self) -> bool:
        """Whether a calibration measured the recommended setting."""
        return self.calibration is not None and self.calibration.recommended is not None


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """Names of the operators that a reload touched, and of those that cannot be used after it."""

    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unusable: tuple[str, ...]
