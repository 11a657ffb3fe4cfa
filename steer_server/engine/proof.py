"""Holding what was added to hidden states against the reference, at some positions of every text.

Of each operator the first and the last token of the prompt that it pushes are looked at, one between them, the first
generated one, and one in each of the stretches behind it that are four times as long as the one before: about a dozen
in a long text. Which one of a stretch is drawn, anew for every prompt and again the same for the same one.

What is compared is what rounding to the model's dtype leaves of the push, so that a small one can be told from noise.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from steer_server.engine.reference import EmbedIds, ReferencePushes, is_pushed
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application, SteeringPlan

_GROWTH = 4
_FINE_APART = 1e-5
"""1 - cosine that arithmetic in float32, in another order, may come to. Measured: 1e-10, on SmolLM2."""
_COARSE_APART = 5e-4
"""The same in dtypes coarser than float32, where a last bit may fall otherwise and a scaled embedding be rounded."""


@dataclass(frozen=True, eq=False)
class Sample:
    """One hidden state at one layer before and after its push. Filled by an engine's witness."""

    position: int
    token: int
    """The id of the token whose state it is."""
    norm: float
    """|h|: of the whole state, where ``before`` is one of two parts of it."""
    before: torch.Tensor
    """(d,) in the model's dtype."""
    after: torch.Tensor
    """(d,) in the model's dtype."""


class Proof:
    """What the samples of one text prove."""

    def __init__(
        self,
        plan: SteeringPlan,
        embed: EmbedIds,
        *,
        prompt_ids: Sequence[int],
        max_tokens: int,
        every_position: bool = False,
    ) -> None:
        """``every_position``: look at all of them, in place of some."""
        prompt_tokens = self._prompt_tokens = len(prompt_ids)
        self._reference = ReferencePushes(plan, embed, prompt_tokens=prompt_tokens)
        self._cosines: dict[tuple[int, int], float] = {}
        """By layer and position."""
        chosen: dict[int, set[int]] = defaultdict(set)
        text_end, draw = prompt_tokens + max_tokens, random.Random(repr(tuple(prompt_ids)))  # noqa: S311 - no secret
        for use in plan.applications:
            if use.setting.strength != 0.0:
                first, end = use.setting.positions.interval(prompt_tokens)
                pushed = range(first, text_end if end is None else min(end, text_end))
                chosen[use.layer].update(pushed if every_position else choose_positions(pushed, prompt_tokens, draw))
        self.positions: Mapping[int, tuple[int, ...]] = {
            layer: tuple(sorted(positions)) for layer, positions in chosen.items()
        }
        """By layer, those to be looked at, where the text comes as far."""

    def due(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Layer and position of the samples among the positions ``first`` to ``end`` - 1."""
        for layer, positions in self.positions.items():
            for place in range(bisect_left(positions, first), bisect_left(positions, end)):
                yield layer, positions[place]

    def check(self, layer: int, samples: Iterable[Sample], ids: Sequence[int]) -> None:
        """Holds samples of a layer against the reference.

        Args:
            ids: of the text, at least up to the last sample's position.

        Raises:
            SteeringNotAppliedError: what was added is not what the plan adds; says where.
        """
        for sample in sorted(samples, key=lambda one: one.position):
            if ids[sample.position] != sample.token:
                raise SteeringNotAppliedError(
                    f"layer {layer}: token {sample.token} was looked at for position {sample.position} of the text, "
                    f"which is {ids[sample.position]}"
                )
            push = self._reference.at(layer, sample.position, ids)
            if push is None:
                if not torch.equal(sample.before, sample.after):
                    raise SteeringNotAppliedError(f"layer {layer}: position {sample.position} is not to be steered")
                continue
            key = layer, sample.position
            cosine = _cosine(f"layer {layer}, position {sample.position}", sample, push)
            self._cosines[key] = min(cosine, self._cosines.get(key, 1.0))

    def require(self, first: int, end: int) -> None:
        """Raises :class:`SteeringNotAppliedError` for a due sample among the positions ``first`` to ``end`` - 1 that
        was never checked.
        """
        for layer, position in self.due(first, end):
            if (layer, position) not in self._cosines:
                raise SteeringNotAppliedError(
                    f"layer {layer}: nothing was seen of what was done to position {position}"
                )

    def of(self, use: Application) -> tuple[int, float | None]:
        """How many positions of an operator were checked, and the worst cosine there; None where there is none."""
        cosines = [
            cosine
            for (layer, position), cosine in self._cosines.items()
            if layer == use.layer
            and use.setting.strength != 0.0
            and is_pushed(use.setting.positions, position, self._prompt_tokens)
        ]
        return len(cosines), min(cosines, default=None)


def choose_positions(pushed: range, prompt_tokens: int, draw: random.Random) -> Iterator[int]:
    """The positions to be looked at among those that an operator pushes; some may come twice."""
    prompt = pushed[: max(0, prompt_tokens - pushed.start)]
    if prompt:
        yield from (prompt[0], prompt[-1], draw.choice(prompt))
    generated = pushed[len(prompt) :]
    if generated:
        yield generated[0]
    start = 1
    while start < len(generated):
        yield draw.choice(generated[start : start * _GROWTH])
        start *= _GROWTH


def _cosine(where: str, sample: Sample, push: torch.Tensor) -> float:
    """cos(what was added, what is due), both after rounding to the model's dtype.

    Raises :class:`SteeringNotAppliedError` where they differ in direction or length by more than arithmetic explains.
    """
    before, after = sample.before.float(), sample.after.float()
    expected = ((before + sample.norm * push.float()).to(sample.after.dtype).float() - before).double()
    moved = (after - before).double()
    lengths = float(moved.norm()), float(expected.norm())
    product = lengths[0] * lengths[1]
    cosine = min(1.0, float(moved @ expected) / product) if product > 0.0 else 0.0
    coarse = torch.finfo(sample.after.dtype).eps > torch.finfo(torch.float32).eps
    apart = _COARSE_APART if coarse else _FINE_APART
    # Negated, so that NaN is wrong as well.
    if not cosine >= 1.0 - apart:
        raise SteeringNotAppliedError(
            f"{where}: what was added has cosine {cosine:.4g} with the operators' direction; at least "
            f"{1.0 - apart:g} is rounding"
        )
    slack = (2.0 * apart) ** 0.5
    if not abs(lengths[0] - lengths[1]) <= slack * lengths[1]:
        raise SteeringNotAppliedError(
            f"{where}: what was added is {lengths[0] / lengths[1]:.4g} times what the strengths give"
        )
    return cosine
