"""The other rule: a_k = b + J_{n-1} x_k, the token in the concept's last place, with no running sum."""

from __future__ import annotations

from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import OperatorDirections, Push
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    return (Push(OperatorDirections(material.operator(concept.texts), "substitute")),)


FORMS = (Form("substitute", "operator by the rule substitute, mean of the texts, all positions", _make),)
