"""Operators on the device that steers, kept between jobs."""

from __future__ import annotations

from collections import OrderedDict

import torch

from operators.core.apply import PreparedOperator, prepare
from operators.core.errors import SteeringError
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application

MAX_OPERATORS_KEPT = 4096
"""Words make many small operators, each with a cost beside its numbers."""


class PreparedOperatorCache:
    """By digest; the least recently used are dropped when there are too many, or they take more than ``budget``."""

    def __init__(self, device: torch.device, *, budget: int, max_kept: int = MAX_OPERATORS_KEPT) -> None:
        """``budget``: bytes. The operators of the running job may exceed it, and ``max_kept``, until :meth:`trim`."""
        self._device = device
        self._budget, self._max_kept = budget, max_kept
        self._operators: OrderedDict[str, PreparedOperator] = OrderedDict()
        self.num_bytes = 0
        """That they take now. Any thread may ask."""

    def __len__(self) -> int:
        return len(self._operators)

    def get(self, application: Application) -> PreparedOperator:
        """Raises :class:`SteeringNotAppliedError` for an operator whose anchor has no direction."""
        digest = application.artifact.digest
        if digest not in self._operators:
            try:
                prepared = self._operators[digest] = prepare(application.artifact, self._device)
            except SteeringError as error:
                raise SteeringNotAppliedError(f"{application.name}: {error}") from error
            self.num_bytes += prepared.nbytes
        self._operators.move_to_end(digest)
        return self._operators[digest]

    def trim(self) -> None:
        """Drops operators until the others are within the budget."""
        while self._operators and (self.num_bytes > self._budget or len(self._operators) > self._max_kept):
            _, dropped = self._operators.popitem(last=False)
            self.num_bytes -= dropped.nbytes
