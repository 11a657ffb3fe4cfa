"""A band of eight random directions, the same for every concept: what a push of that size does by itself."""

from __future__ import annotations

import torch

from operators.core.positions import Positions
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push, constant
from operators.evaluate.form import Form
from operators.evaluate.material import Material

_BAND = 8


def _at(name: str, about: str, where: str, *, quick: bool = False) -> Form:
    def make(material: Material, _concept: EvalConcept) -> tuple[Push, ...]:
        # On the CPU: the same directions on every device.
        vectors = torch.randn(_BAND, material.hidden_size, generator=torch.Generator().manual_seed(0))
        positions = Positions.parse(where)
        return tuple(Push(constant(vector.to(material.device), "a random direction"), positions) for vector in vectors)

    return Form(name, about, make, shared=True, quick=quick)


FORMS = (
    _at("random-all", "eight random directions, all positions", "all"),
    _at("random-first", "eight random directions, first token", "first", quick=True),
    _at("random-others", "eight random directions, all but first", "1.."),
)
