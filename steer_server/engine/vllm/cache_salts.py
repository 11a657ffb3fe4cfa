"""Salts of the prefix cache: requests with exactly the same steering share keys and values, all others do not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from steer_server.engine.vllm.worker_protocol import OperatorSetting

_MAX_RENEWED = 4096


class CacheSalts:
    """One salt per steering, derived from its operators and scalars; renewing it yields a salt never used before."""

    def __init__(self, *, max_renewed: int = _MAX_RENEWED) -> None:
        """``max_renewed``: bound on the steerings whose renewals are counted one by one; beyond it all are renewed."""
        self._max_renewed = max_renewed
        self._renewals: dict[str, int] = {}
        """Number of renewals, by the digest of a steering."""
        self._generation = 0

    def of(self, settings: Sequence[OperatorSetting]) -> str:
        """The salt of a steering; the order of its operators does not matter."""
        steering = _steering_digest(settings)
        # A digest, so that its length does not grow with the operators: the scheduler hashes it with every block.
        return _digest(json.dumps([self._generation, self._renewals.get(steering, 0), steering]))

    def renew(self, settings: Sequence[OperatorSetting]) -> None:
        """Makes what is cached under this steering unreachable, because one of its requests failed."""
        steering = _steering_digest(settings)
        if steering not in self._renewals and len(self._renewals) >= self._max_renewed:
            # Dropping one count alone would bring back the first salt of that steering, and what is cached under it.
            self._generation += 1
            self._renewals.clear()
        self._renewals[steering] = self._renewals.get(steering, 0) + 1


def _steering_digest(settings: Sequence[OperatorSetting]) -> str:
    # Sorted as texts: an end may be None, which has no order among numbers.
    return _digest(json.dumps(sorted(json.dumps(dataclasses.astuple(setting)) for setting in settings)))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
