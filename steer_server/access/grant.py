"""What one call may do."""

from __future__ import annotations

from dataclasses import dataclass, field

from steer_server.access.rates import Charge
from steer_server.access.scopes import SCOPES


@dataclass(frozen=True)
class Grant:
    """Filled by :class:`steer_server.access.control.AccessControl`; as it is here where no tokens are asked for."""

    token: str = ""
    """The name of the token, never the token itself."""
    scopes: frozenset[str] = frozenset(SCOPES)
    operators: frozenset[str] | None = None
    """The names of those that may be used, the lens of words among them. None: all."""
    queue_share: float | None = None
    """Of the places of the queue. None: no other share than everybody's."""
    charge: Charge = field(default_factory=Charge)

    def may_use(self, operator: str) -> bool:
        """Whether it may use, and see, the operator of that name, if there is one."""
        return self.operators is None or operator in self.operators


EVERYTHING = Grant()
