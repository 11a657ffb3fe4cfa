"""Salts of the prefix cache: requests of the very same steering share keys and values, and no others do."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from steer_server.engine.vllm.step_steering import Use

_MOST = 4096
"""Steerings whose renewals are remembered."""


class Salts:
    """A salt per steering, made of its operators and scalars, until it is renewed."""

    def __init__(self, *, most: int = _MOST) -> None:
        """``most``: how many renewed steerings are told apart; one more renews them all."""
        self._most = most
        self._renewed: dict[str, int] = {}
        self._era = 0

    def of(self, uses: Sequence[Use]) -> str:
        """The salt of a steering, whatever the order of its operators."""
        steering = _name(uses)
        # Of a fixed length, whatever the number of operators: the scheduler hashes it with every block.
        return _digest(json.dumps([self._era, self._renewed.get(steering, 0), steering]))

    def renew(self, uses: Sequence[Use]) -> None:
        """From now on nobody finds the keys and values of this steering so far: one of its requests failed."""
        steering = _name(uses)
        if steering not in self._renewed and len(self._renewed) >= self._most:
            # To forget one alone would bring its first salt back.
            self._era += 1
            self._renewed.clear()
        self._renewed[steering] = self._renewed.get(steering, 0) + 1


def _name(uses: Sequence[Use]) -> str:
    return _digest(json.dumps(sorted(dataclasses.astuple(use) for use in uses)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
