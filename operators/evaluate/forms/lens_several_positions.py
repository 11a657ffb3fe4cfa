"""The lens taken from the first four positions of neutral texts together, and applied there."""

from __future__ import annotations

from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    vector = material.lens_vector((concept.word,), "..4")
    return (Push(constant(vector, f"the lens of {concept.word}"), Positions.parse("..4")),)


FORMS = (Form("lens-first-four", "lens of one word, first four tokens", _make),)
