"""What a new operator recommends where nobody says, and nothing was measured.

Forms of steering were compared at the same distance from the plain model (``docs/MEASURED.md``, *Forms of steering*):
the contrast anchor alone, at all positions, gave the most useful texts. So that is what a new operator recommends. Its
strength is a round one that is about 1 nat (p95 KL) away (*What a new operator does*), on two models: concepts and
models differ, and a calibration finds each one's.

What speaks of the map (the profile ``golden``, a rule, a push of the first token, a blend below 1) is the published
operator's, and has its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from operators.core.header import Anchor, Profile, Recommended

NEW_OPERATORS = Recommended(strength=0.3, blend=1.0, anchor="contrast")
"""The contrast anchor: of operators of the profile ``residual``. The strength is that of SmolLM2."""
_STRENGTHS = {"Gemma3ForCausalLM": 0.1}
"""By architecture, where it was measured to be another."""
PUBLISHED = Recommended(anchor="contrast")
"""The operator itself, by the published rule; its anchor is for a request that asks for a blend."""


_EARLIER = tuple(Recommended(anchor=anchor) for anchor in get_args(Anchor))


def new_operators(architecture: str) -> Recommended:
    """:data:`NEW_OPERATORS` at the strength for models of this architecture, the name of transformers' class."""
    return NEW_OPERATORS.model_copy(update={"strength": _STRENGTHS.get(architecture, NEW_OPERATORS.strength)})


def new_vectors(architecture: str) -> Recommended:
    """What a vector recommends: it is its own anchor."""
    return Recommended(strength=new_operators(architecture).strength, blend=1.0)


def is_default(recommended: Recommended) -> bool:
    """Whether this is what an operator recommends that was built without a setting, by this version or an earlier."""
    ours = (make(architecture) for architecture in ("", *_STRENGTHS) for make in (new_operators, new_vectors))
    return recommended in (*ours, *_EARLIER)


def default_recommended(profile: Profile, architecture: str, given: Mapping[str, object] | None = None) -> Recommended:
    """What an operator of this profile recommends where only the fields ``given`` of a setting are decided.

    A rule or a push of the first token makes a difference only where the map pushes: with blend 1 it would be given for
    nothing.
    """
    given = given or {}
    if "blend" in given:
        return new_operators(architecture) if given["blend"] == 1.0 else PUBLISHED
    of_the_map = profile == "golden" or "rule" in given or "first_token" in given
    return PUBLISHED if of_the_map else new_operators(architecture)
