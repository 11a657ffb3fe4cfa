"""A dose curve: what each strength does to neutral texts, and the strength that a budget of KL asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, Field, model_validator

from operators.core.errors import SettingError
from operators.core.vector_source import STRICT, Count, Fingerprint, Word

MAX_POINTS = 64
MAX_CURVE_WORDS = 64
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_NonNegative = Annotated[float, Field(ge=0.0)]


class DosePoint(BaseModel):
    """What one strength did to the texts of a curve. Filled by :mod:`operators.lens.measure`."""

    model_config = STRICT

    strength: Annotated[float, Field(gt=0.0)]
    kl_p95: _NonNegative
    """95th percentile over the tokens of the steered texts of KL(plain || steered), in nats."""
    kl_mean: _NonNegative
    hit_rate: _Share
    """Share of the texts that hold the word."""
    useful_rate: _Share
    """Share of the texts that hold the word, and four tokens in a row never twice."""


class DoseCurve(BaseModel):
    """The points of one operator at one setting, by strength. Filled by :mod:`operators.lens.measure`."""

    model_config = STRICT

    words: tuple[Word, ...] = Field(min_length=1, max_length=MAX_CURVE_WORDS)
    """The words that were steered towards, one at a time."""
    prompts: Count
    prompts_digest: Fingerprint
    """sha256 of the prompts, joined by line feeds."""
    tokens: Count
    """Per text; decoded greedily."""
    plain_hit_rate: _Share
    points: tuple[DosePoint, ...] = Field(min_length=1, max_length=MAX_POINTS)

    @model_validator(mode="after")
    def _strengths_rise(self) -> DoseCurve:
        strengths = [point.strength for point in self.points]
        if sorted(set(strengths)) != strengths:
            raise ValueError("the strengths of the points do not rise")
        return self

    @property
    def doses(self) -> tuple[tuple[float, float], ...]:
        """(strength, p95 KL) of each point: what :func:`strength_for` takes."""
        return tuple((point.strength, point.kl_p95) for point in self.points)


def strength_for(doses: Sequence[tuple[float, float]], kl: float) -> float:
    """The strength at which a curve reaches a p95 KL of ``kl`` nats, to four significant digits.

    Between two measured points, log KL is linear in log strength: for small pushes, KL grows with a power of the
    strength. Measured KL may fall from one strength to the next, by chance or where texts fall apart; the curve is then
    the largest KL of all strengths up to there, so that the answer is the weakest strength that uses the budget up.

    Args:
        doses: pairs (strength > 0, p95 KL in nats), in any order.

    Raises:
        SettingError: of the field "kl": it is no positive, finite number, or outside of the range that was measured,
            which the message names. Nothing is extrapolated.
    """
    if not (math.isfinite(kl) and kl > 0):
        raise SettingError("kl", f"is {kl:g}; a finite number of nats above 0 is accepted")
    curve: list[tuple[float, float]] = []
    for strength, reached in sorted(doses):
        if strength > 0 and reached > 0 and (not curve or reached > curve[-1][1]):
            curve.append((strength, reached))
    if not curve:
        raise SettingError("kl", f"is {kl:g}; no dose was measured, and a strength is needed in its place")
    low, high = curve[0][1], curve[-1][1]
    if not low <= kl <= high:
        raise SettingError(
            "kl",
            f"is {kl:g}; {low:.3g} to {high:.3g} nats (p95) were measured, for strengths {curve[0][0]:g} to "
            f"{curve[-1][0]:g}: a budget in this range, or a strength, is accepted",
        )
    upper = next(index for index, (_, reached) in enumerate(curve) if reached >= kl)
    (above, above_kl) = curve[upper]
    if upper == 0 or above_kl == kl:
        return above
    below, below_kl = curve[upper - 1]
    share = math.log(kl / below_kl) / math.log(above_kl / below_kl)
    return float(f"{below * (above / below) ** share:.4g}")
