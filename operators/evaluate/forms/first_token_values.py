"""Only the values of the first token that later tokens read: its keys, and its own stream, stay as they were.

With attention frozen, the lens is the derivative along this path alone: so its form here is the operator that acts on
the value path.
"""

from __future__ import annotations

from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material

_FIRST = Positions.parse("first")


def _anchor(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    vector = material.contrast_anchor(concept.texts)
    return (Push(constant(vector, f"the contrast anchor of {concept.name}"), _FIRST, "values"),)


def _lens(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    vector = material.lens_vector((concept.word,), "first")
    return (Push(constant(vector, f"the lens of {concept.word}"), _FIRST, "values"),)


FORMS = (
    Form("contrast-anchor-first-values", "contrast anchor, values of the first token only", _anchor),
    Form("lens-first-values", "lens of one word, values of the first token only", _lens),
)
