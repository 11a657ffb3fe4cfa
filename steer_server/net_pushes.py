"""What the operators of a plan push together, as far as it follows from their strengths: nothing, where they cancel.

Such a request cannot be steered as it asks, whatever its text, so it is refused before it is queued. What depends on
the text is measured while it is decoded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch

from steer_server.errors import InvalidRequestError
from steer_server.types import Application, SteeringPlan


def check_net_pushes(
    plan: SteeringPlan | None, field: str, *, prompt_tokens: int, max_tokens: int, context_length: int, dtype: str
) -> None:
    """Raises :class:`InvalidRequestError` for strengths that hidden states of the model cannot resolve.

    Each one by itself, and what is left of those that push against each other at one position of a layer.

    Args:
        field: of the request's operators.
        max_tokens: most that are generated.
        context_length: tokens of prompt and text together that the model takes.
        dtype: of the hidden states.
    """
    pushing = [(index, use) for index, use in enumerate(plan.applications if plan else ()) if use.setting.strength]
    # The smallest relative change of a number.
    resolution = torch.finfo(getattr(torch, dtype)).eps
    resolved = f"hidden states in {dtype} resolve strengths of {resolution:.2g} and more"
    for index, use in pushing:
        if abs(use.setting.strength) < resolution:
            raise InvalidRequestError(
                f"{field}[{index}].strength",
                f"is {use.setting.strength:g} ({use.name}), which is lost in rounding: {resolved}; 0 is plain",
            )
    num_fed = min(prompt_tokens + max_tokens, context_length) - 1
    for layer in sorted({use.layer for _, use in pushing}):
        there = [(index, use) for index, use in pushing if use.layer == layer]
        for position in _changes([use for _, use in there], num_fed, prompt_tokens) if len(there) > 1 else ():
            active = [
                each
                for each in there
                if each[1].setting.positions.count(position, position + 1, prompt_tokens=prompt_tokens)
            ]
            if len(active) > 1 and _net_strength([use for _, use in active], position) < resolution:
                names = ", ".join(f"{use.name} {use.setting.strength:g}" for _, use in active)
                raise InvalidRequestError(
                    f"{field}[{active[-1][0]}].strength",
                    f"cancels what the others push at position {position} of layer {layer} ({names}): {resolved}",
                )


def _changes(uses: Sequence[Application], num_fed: int, prompt_tokens: int) -> Iterator[int]:
    """Positions from each of which on the same operators push, up to the next; the first token is one by itself."""
    places = {0, 1}
    for use in uses:
        begin, end = use.setting.positions.interval(prompt_tokens)
        places |= {begin} if end is None else {begin, end}
    return (place for place in sorted(places) if place < num_fed)


def _net_strength(uses: Sequence[Application], position: int) -> float:
    """|sum of lambda d/|d|| as far as directions d are known to agree; those of different operators count in full."""
    anchors: torch.Tensor | None = None
    others: defaultdict[Hashable, float] = defaultdict(float)
    for use in uses:
        setting = use.setting
        if setting.blend_at(position) == 1.0:
            push = setting.strength * _unit_anchor(use)
            anchors = push if anchors is None else anchors + push
        else:
            # At a blend of 0 the anchor does not matter.
            direction = (use.artifact.digest, setting.rule, setting.blend, setting.anchor if setting.blend else "")
            others[direction] += setting.strength
    net = sum(abs(strength) for strength in others.values())
    return net if anchors is None else net + float(anchors.norm())


def _unit_anchor(use: Application) -> torch.Tensor:
    """z/|z| (d,) in float64: what is pushed along where only the anchor is."""
    artifact = use.artifact
    anchor = artifact.anchor.double()
    if use.setting.anchor == "contrast" and artifact.neutral is not None:
        anchor = anchor - artifact.neutral.double()
    unit: torch.Tensor = anchor / anchor.norm()
    return unit
