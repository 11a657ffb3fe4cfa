"""The forms of one operator that a calibration tries: which of its directions, and where they push."""

from __future__ import annotations

from dataclasses import dataclass

from operators.core.apply import Setting
from operators.core.header import Anchor, CalibrationPoint, FirstToken, OperatorHeader, Recommended, Rule
from operators.core.positions import ALL_POSITIONS, Positions

FIRST = Positions(end=1)
OTHERS = Positions(start=1)


@dataclass(frozen=True)
class Form:
    """A setting without its strength."""

    rule: Rule = "cumulative"
    blend: float = 0.0
    positions: Positions = ALL_POSITIONS
    anchor: Anchor = "contrast"
    first_token: FirstToken = "operator"

    @classmethod
    def of(cls, at: CalibrationPoint | Recommended) -> Form:
        """The form of what was measured, or is recommended."""
        return cls(at.rule, at.blend, at.positions, at.anchor, at.first_token)

    def setting(self, strength: float) -> Setting:
        """This form at a strength."""
        return Setting(strength, self.rule, self.blend, self.positions, self.anchor, self.first_token)

    @property
    def is_anchor(self) -> bool:
        """Whether the anchor alone pushes, so that no map is needed."""
        return self.blend == 1.0

    def __str__(self) -> str:
        """For people: ``contrast anchor, first``."""
        if self.is_anchor:
            name = f"{self.anchor} anchor"
        else:
            name = self.rule if not self.blend else f"{self.rule}, blend {self.blend:g} with the {self.anchor} anchor"
        at_first = f", {self.anchor} anchor at the first token" if self.first_token == "anchor" else ""
        return f"{name}{at_first}" + ("" if self.positions == ALL_POSITIONS else f", positions {self.positions}")


ANCHOR_FORMS = (
    Form(blend=1.0),
    Form(blend=1.0, positions=FIRST),
    Form(blend=1.0, positions=OTHERS),
    Form(blend=1.0, anchor="concept"),
    Form(blend=1.0, anchor="concept", positions=FIRST),
)
MAP_FORMS = (
    Form(),
    Form(first_token="anchor"),
    Form(rule="substitute"),
    Form(blend=0.5),
    Form(blend=0.5, first_token="anchor"),
    Form(positions=OTHERS),
    Form(rule="substitute", positions=OTHERS),
)
"""At the first token alone the published direction is of the prompt, so that its map is not tried there."""
ALL_FORMS = (*ANCHOR_FORMS, *MAP_FORMS)


def forms_for(header: OperatorHeader, forms: tuple[Form, ...]) -> tuple[Form, ...]:
    """Those that an operator has: a vector is an anchor alone, and without a neutral mean there is no contrast."""
    if header.vector is not None:
        forms = tuple(dict.fromkeys(Form(blend=1.0, anchor="concept", positions=form.positions) for form in forms))
    elif header.neutral is None:
        # A direct operator does not depend on the anchor: it stays, under the only one that there is.
        forms = tuple(
            dict.fromkeys(Form(form.rule, form.blend, form.positions, "concept", form.first_token) for form in forms)
        )
    return forms
