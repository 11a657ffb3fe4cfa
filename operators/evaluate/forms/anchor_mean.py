"""The mean anchor: the mean hidden state of the concept's texts, as it is."""

from __future__ import annotations

from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    return (Push(constant(material.mean_state(concept.texts), f"the mean anchor of {concept.name}")),)


FORMS = (Form("mean-anchor", "mean hidden state of the texts, all positions", _make),)
