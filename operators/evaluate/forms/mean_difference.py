"""Mean difference (CAA) over all tokens but the first of each text, where the anchors take the last token only.

At the last token it would be the contrast anchor itself.
"""

from __future__ import annotations

from operators.core.neutral_texts import neutral_texts
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
    vector = material.mean_token_state(concept.texts) - material.mean_token_state(neutral_texts())
    return (Push(constant(vector, f"the mean difference of {concept.name}")),)


FORMS = (Form("mean-difference", "mean over the tokens minus the neutral texts', all positions", _make),)
