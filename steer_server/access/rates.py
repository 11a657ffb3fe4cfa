"""How much a token may ask for in a minute. Measured on the monotonic clock: setting the time changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from steer_server.errors import InvalidRequestError, RateLimitedError

_MINUTE = 60.0


class Rate:
    """A bucket that holds a minute's worth, is full at first, and fills again evenly. Belongs to one event loop."""

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._left, self._at = per_minute, clock()

    def take(self, amount: float) -> float:
        """Takes so much and returns 0.0; where there is less, takes nothing and returns the seconds until there is."""
        self._fill()
        if amount <= self._left:
            self._left -= amount
            return 0.0
        return (amount - self._left) * _MINUTE / self.per_minute

    def give_back(self, amount: float) -> None:
        """Of what was taken and not used."""
        self._fill()
        self._left = min(self.per_minute, self._left + amount)

    def _fill(self) -> None:
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / _MINUTE)
        self._at = now


class Account:
    """The rates of one token, whatever calls it makes. None: no limit."""

    def __init__(
        self,
        name: str,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.limits = name, (requests_per_minute, tokens_per_minute)
        self._requests = None if requests_per_minute is None else Rate(requests_per_minute, clock=clock)
        self._tokens = None if tokens_per_minute is None else Rate(tokens_per_minute, clock=clock)

    def count_request(self) -> None:
        """Raises :class:`RateLimitedError` for one too many."""
        if self._requests is not None and (wait := self._requests.take(1)):
            problem = f"token {self.name!r} may call {self._requests.per_minute:g} times a minute"
            raise RateLimitedError(problem, wait, cause="requests per minute")

    def reserve(self, tokens: int, field: str) -> None:
        """Takes what a request asks for. ``field``: where it says how much.

        Raises:
            InvalidRequestError: it asks for more than a minute has, and so for more than there will ever be.
            RateLimitedError: there is not so much left now.
        """
        if self._tokens is None:
            return
        most = self._tokens.per_minute
        if tokens > most:
            problem = f"asks for {tokens} tokens in all texts; token {self.name!r} may ask for {most:g} a minute"
            raise InvalidRequestError(field, problem)
        if wait := self._tokens.take(tokens):
            raise RateLimitedError(
                f"{tokens} tokens are asked for, and token {self.name!r} may ask for {most:g} a minute",
                wait,
                cause="tokens per minute",
            )

    def give_back(self, tokens: int) -> None:
        """Of what was reserved and not generated."""
        if self._tokens is not None:
            self._tokens.give_back(tokens)


class Charge:
    """What one call has reserved."""

    def __init__(self, account: Account | None = None) -> None:
        """None: of nobody, who may have all."""
        self._account, self._reserved, self._used = account, 0, 0

    @property
    def tokens_per_minute(self) -> float | None:
        """None: no limit."""
        return None if self._account is None else self._account.limits[1]

    def reserve(self, tokens: int, field: str) -> None:
        """See :meth:`Account.reserve`."""
        if self._account is not None:
            self._account.reserve(tokens, field)
            self._reserved += tokens

    def count_request(self) -> None:
        """See :meth:`Account.count_request`."""
        if self._account is not None:
            self._account.count_request()

    def use(self, tokens: int) -> None:
        """Called by engines, from their threads, for what they compute: whether or not anybody is there to get it."""
        if self._account is not None:
            self._used += tokens

    def settle(self) -> None:
        """The call is over: what was reserved and not used is given back."""
        if self._account is not None:
            self._account.give_back(max(0, self._reserved - self._used))
        self._reserved = self._used = 0
