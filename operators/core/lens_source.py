"""What a lens says about itself: a matrix that turns any word into a push, so that no texts of a concept are needed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from operators.core.dose_curve import DoseCurve, DosePoint
from operators.core.positions import Positions
from operators.core.vector_source import STRICT, Count, Fingerprint

LensPositions = Literal["first", "others", "all"]
MAX_FINDINGS = 1024
_NonNegative = Annotated[float, Field(ge=0.0)]

PUSHED: dict[LensPositions, Positions] = {
    "first": Positions(end=1),
    "others": Positions(start=1),
    "all": Positions(),
}
"""The positions that a lens pushes: those that it was taken from."""


class LensFinding(BaseModel):
    """One trial of the search for positions, layer and strength. Filled by :mod:`operators.lens.search`."""

    model_config = STRICT

    positions: LensPositions
    layer: Count
    texts: Count
    """Steered texts: each word on each of the first prompts."""
    point: DosePoint


class LensSource(BaseModel):
    """How a lens was made, and what its search found. Filled by :mod:`operators.lens.build`.

    With out_t the output of the final norm at position t and h_s the input of the lens's block at position s, detached,

        first    J = mean over texts of  sum_{t>=1} d out_t / d h_0
        others   J = mean over texts of  sum_{s>=1} sum_{t>=s} d out_t / d h_s
        all      their sum
    """

    model_config = STRICT

    positions: LensPositions
    texts: Count
    texts_digest: Fingerprint
    """sha256 of the neutral texts, joined by line feeds."""
    vocabulary: Count
    """Rows of the unembedding W_U, of which the tensor ``vocabulary_mean`` is the mean."""
    tied: bool
    """Whether W_U is the embedding table."""
    certificate: Literal["exact"] = "exact"
    """All rows of J were computed; the only rounding is that of float32."""
    reconstruction_error: _NonNegative | None = None
    """|sum_s G_s h_s + c - sum_t out_t| / |sum_t out_t| of the neutral text where it is largest, with G_s the text's
    own matrices at the lowest layer that was computed along: the maps are those of the model."""
    curve: DoseCurve | None = None
    """Of this lens at its recommended positions; None where no dose was measured."""
    default_kl: Annotated[float, Field(gt=0.0)] | None = None
    """The p95 KL, in nats, that the recommended strength has on the curve. None where no strength is recommended:
    nothing was measured, or nothing steered; a request must then give its strength."""
    findings: tuple[LensFinding, ...] = Field(default=(), max_length=MAX_FINDINGS)
