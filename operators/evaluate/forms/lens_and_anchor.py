"""Lens and contrast anchor together, as unit vectors with equal weight, at the first token."""

from __future__ import annotations

from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    lens = constant(material.lens_vector((concept.word,), "first"), f"the lens of {concept.word}").unit
    anchor = constant(material.contrast_anchor(concept.texts), f"the contrast anchor of {concept.name}").unit
    return (Push(constant(lens + anchor, f"lens and anchor of {concept.name}"), Positions.parse("first")),)


FORMS = (Form("lens-and-anchor-first", "lens of one word plus contrast anchor, first token", _make),)
