"""The contrast anchor y_c: the mean hidden state of the concept's texts minus that of neutral ones."""

from __future__ import annotations

from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import CONTRAST, Form
from operators.evaluate.material import Material


def _at(where: str) -> Form:
    def make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
        vector = material.contrast_anchor(concept.texts)
        return (Push(constant(vector, f"the contrast anchor of {concept.name}"), Positions.parse(where)),)

    name, said = {
        "all": ("", "all positions"),
        "first": ("-first", "first token"),
        "1..": ("-others", "all but first"),
    }[where]
    return Form(f"{CONTRAST}{name}", f"contrast anchor, {said}", make, quick=where != "1..")


FORMS = tuple(map(_at, ("all", "first", "1..")))
