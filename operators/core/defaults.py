"""What a new operator recommends where nobody says, and nothing was measured.

Forms of steering were compared at the same distance from the plain model (``docs/MEASURED.md``, *Forms of steering*):
the contrast anchor alone, at all positions, gave the most useful texts. So that is what a new operator recommends. Its
strength is a round one that is about 1 nat (p95 KL) away (*What a new operator does*): concepts differ, and a
calibration finds each one's.

What speaks of the map (the profile ``golden``, a rule, a push of the first token, a blend below 1) is the published
operator's, and has its defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

from operators.core.header import Anchor, Profile, Recommended

NEW_OPERATORS = Recommended(strength=0.3, blend=1.0, anchor="contrast")
"""The contrast anchor: of operators of the profile ``residual``."""
NEW_VECTORS = Recommended(strength=NEW_OPERATORS.strength, blend=1.0)
PUBLISHED = Recommended(anchor="contrast")
"""The operator itself, by the published rule; its anchor is for a request that asks for a blend."""


_EARLIER = tuple(Recommended(anchor=anchor) for anchor in get_args(Anchor))


def is_default(recommended: Recommended) -> bool:
    """Whether this is what an operator recommends that was built without a setting, by this version or an earlier."""
    return recommended in (NEW_OPERATORS, NEW_VECTORS, *_EARLIER)


def default_recommended(profile: Profile, given: Mapping[str, object] | None = None) -> Recommended:
    """What an operator of this profile recommends where only the fields ``given`` of a setting are decided.

    A rule or a push of the first token makes a difference only where the map pushes: with blend 1 it would be given for
    nothing.
    """
    given = given or {}
    if "blend" in given:
        return NEW_OPERATORS if given["blend"] == 1.0 else PUBLISHED
    of_the_map = profile == "golden" or "rule" in given or "first_token" in given
    return PUBLISHED if of_the_map else NEW_OPERATORS
