"""The lens: J̄ᵀ(W_U[w] - mean W_U) of one word, and of the concept's word list (the mean of their unit vectors).

J̄ is taken from, and the push goes to, the same positions: the first token, or all others, or all.
"""

from __future__ import annotations

from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material


def _lens(name: str, about: str, where: str, *, listed: bool = False, quick: bool = False) -> Form:
    def make(material: Material, concept: EvalConcept) -> tuple[Push, ...]:
        words = concept.words if listed else (concept.word,)
        vector = material.lens_vector(words, where)
        return (Push(constant(vector, f"the lens of {', '.join(words)}"), Positions.parse(where)),)

    return Form(name, about, make, quick=quick)


FORMS = (
    _lens("lens-first", "lens of one word, first token", "first", quick=True),
    _lens("lens-list-first", "lens of the word list, first token", "first", listed=True),
    _lens("lens-others", "lens of one word, all but first", "1.."),
    _lens("lens-list-others", "lens of the word list, all but first", "1..", listed=True),
    _lens("lens-all", "lens of one word, all positions", "all"),
)
