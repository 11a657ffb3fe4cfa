"""The strength that a budget of KL asks of an operator or a lens, from what was measured of it."""

from __future__ import annotations

from operators.core.dose_curve import strength_for
from operators.core.errors import SettingError
from operators.core.header import Anchor, CalibrationPoint, FirstToken, OperatorHeader, Rule
from operators.core.positions import Positions

DEFAULT_KL = 0.5
"""Nats of p95 KL(plain || steered) that a lens steers with where a request gives neither strength nor budget."""


def strength_within(
    header: OperatorHeader,
    kl: float,
    *,
    rule: Rule,
    blend: float,
    positions: Positions,
    anchor: Anchor,
    first_token: FirstToken,
) -> float:
    """The strength at which the texts of a dose curve had a p95 KL of ``kl`` nats.

    The curve of a lens is its own; that of an operator are the points of its calibration at its layer and this setting,
    of the most and the longest texts.

    Raises:
        SettingError: of the field "kl": nothing was measured at this setting, or the budget is no positive number
            within the range that was.
    """
    doses = measured_doses(header, rule=rule, blend=blend, positions=positions, anchor=anchor, first_token=first_token)
    if not doses and header.lens is not None and header.lens.curve is not None:
        measured = header.recommended.positions
        raise SettingError("kl", f"is {kl:g}; doses were measured at positions {measured}, not {positions}")
    if not doses:
        raise SettingError("kl", f"is {kl:g}; no dose was measured at this setting, so that a strength is needed")
    return strength_for(doses, kl)


def measured_doses(
    header: OperatorHeader, *, rule: Rule, blend: float, positions: Positions, anchor: Anchor, first_token: FirstToken
) -> tuple[tuple[float, float], ...]:
    """(strength, p95 KL) of what was measured at a setting: of a lens its curve, which is at its own positions."""
    if header.lens is not None:
        curve = header.lens.curve
        return curve.doses if curve is not None and positions == header.recommended.positions else ()
    at = measured_points(header, rule=rule, blend=blend, positions=positions, anchor=anchor, first_token=first_token)
    return tuple((point.strength, point.kl_p95) for point in at)


def measured_points(
    header: OperatorHeader, *, rule: Rule, blend: float, positions: Positions, anchor: Anchor, first_token: FirstToken
) -> tuple[CalibrationPoint, ...]:
    """What a calibration measured at an operator's layer and this setting, of the most and the longest texts."""
    wanted = (positions, *_direction_of(rule, blend, anchor, first_token))
    points = () if header.calibration is None else header.calibration.points
    at = [
        point
        for point in points
        if point.layer == header.layer
        and (point.positions, *_direction_of(point.rule, point.blend, point.anchor, point.first_token)) == wanted
    ]
    # Rounds on all prompts of a small set differ in their tokens alone.
    most = max(((point.texts, point.tokens or 0) for point in at), default=None)
    return tuple(point for point in at if (point.texts, point.tokens or 0) == most)


def _direction_of(rule: Rule, blend: float, anchor: Anchor, first_token: FirstToken) -> tuple[object, ...]:
    """What distinguishes directions: at blend 1 every rule is the anchor, and at 0 no anchor has a share."""
    if blend == 1.0:
        return (anchor,)
    return (rule, blend, first_token, anchor if blend > 0.0 or first_token == "anchor" else None)
