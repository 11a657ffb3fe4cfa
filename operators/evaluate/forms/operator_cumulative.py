"""The published rule: a_k = c + sum_{j<=k} J_{j mod n} x_j, of one text and of the mean of the texts' maps.

At position 0 its direction is J_0 x_0, which is of the prompt and not of the concept: hence a form with the contrast
anchor there.
"""

from __future__ import annotations

from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import OperatorDirections, Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _one_text(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    return (Push(OperatorDirections(material.operator(concept.texts[:1]))),)


def _mean(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    return (Push(OperatorDirections(material.operator(concept.texts))),)


def _anchor_first(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    anchor = constant(material.contrast_anchor(concept.texts), f"the contrast anchor of {concept.name}").unit
    return (Push(OperatorDirections(material.operator(concept.texts), first=anchor)),)


FORMS = (
    Form("cumulative-one-text", "published operator of one text, all positions", _one_text),
    Form("cumulative", "published operator, mean of the texts, all positions", _mean, quick=True),
    Form("cumulative-anchor-first", "the same with the contrast anchor at the first token", _anchor_first),
)
