"""No steering: the concept's first text in front of the prompt, which is what a push is to be worth."""

from __future__ import annotations

from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push
from operators.evaluate.form import PREFIX, Form
from operators.evaluate.material import Material


def _make(_material: Material, _concept: EvalConcept) -> tuple[Push, ...]:
    return ()


FORMS = (Form(PREFIX, "the concept's first text written in front of the prompt, no steering", _make, quick=True),)
