"""The strength that a budget of KL asks of an operator or a lens, from what was measured of it."""

from __future__ import annotations

from operators.core.dose_curve import strength_for
from operators.core.errors import SettingError
from operators.core.header import OperatorHeader, Rule
from operators.core.positions import ALL_POSITIONS, Positions

DEFAULT_KL = 0.5
"""Nats of p95 KL(plain || steered) that a lens steers with where a request gives neither strength nor budget."""


def strength_within(header: OperatorHeader, kl: float, *, rule: Rule, blend: float, positions: Positions) -> float:
    """The strength at which the texts of a dose curve had a p95 KL of ``kl`` nats.

    The curve of a lens is its own; that of an operator are the points of its calibration at its layer, rule and blend,
    of as many texts as any of them has.

    Raises:
        SettingError: of the field "kl": nothing was measured at this setting, or the budget is no positive number
            within the range that was.
    """
    if header.lens is not None:
        measured = header.recommended.positions
        doses = () if header.lens.curve is None else header.lens.curve.doses
    else:
        measured = ALL_POSITIONS
        points = () if header.calibration is None else header.calibration.points
        # A vector, and any operator at blend 1, pushes the same way by every rule.
        at = [
            point
            for point in points
            if (point.layer, point.blend) == (header.layer, blend) and (point.rule == rule or blend == 1.0)
        ]
        most = max((point.texts for point in at), default=0)
        doses = tuple((point.strength, point.kl_p95) for point in at if point.texts == most)
    if not doses:
        raise SettingError("kl", f"is {kl:g}; no dose was measured at this setting, so that a strength is needed")
    if positions != measured:
        raise SettingError("kl", f"is {kl:g}; doses were measured at positions {measured}, not {positions}")
    return strength_for(doses, kl)
