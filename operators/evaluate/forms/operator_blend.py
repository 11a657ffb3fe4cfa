"""Half way between operator and anchor: d_k ~ (a_k/|a_k| + y/|y|)/2, with the anchor of its own or the contrast one."""

from __future__ import annotations

from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import OperatorDirections, Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _mean(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    return (Push(OperatorDirections(material.operator(concept.texts), blend=0.5)),)


def _contrast(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    anchor = constant(material.contrast_anchor(concept.texts), f"the contrast anchor of {concept.name}").unit
    return (Push(OperatorDirections(material.operator(concept.texts), blend=0.5, anchor=anchor)),)


FORMS = (
    Form("blend", "cumulative and mean anchor, β 0.5, all positions", _mean),
    Form("blend-contrast", "cumulative and contrast anchor, β 0.5, all positions", _contrast),
)
