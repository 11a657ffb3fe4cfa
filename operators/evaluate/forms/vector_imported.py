"""Vectors from files (``--vector CONCEPT=FILE``), at every position: only for the concepts that have one."""

from __future__ import annotations

from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import IMPORTED, Form
from operators.evaluate.material import Material


def _make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    found = material.imported(concept.name)
    return () if found is None else (Push(constant(found[0], f"the imported vector of {concept.name}")),)


FORMS = (Form(IMPORTED, "imported vector, all positions", _make),)
