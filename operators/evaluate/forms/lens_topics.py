"""The lens of topic words that nobody typed: the tokens that an operator of the concept's texts reads most.

The read-out is w = J_{n-1}ᵀ y_c/|y_c| against every embedding; its twelve best tokens that are words take part.
"""

from __future__ import annotations

from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    vector = material.lens_vector(material.read_words(concept.texts, 12), "first")
    return (Push(constant(vector, f"the lens of what {concept.name} reads"), Positions.parse("first")),)


FORMS = (Form("lens-topics-first", "lens of 12 words read off the texts, first token", _make),)
