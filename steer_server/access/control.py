"""Who calls, and whether they may: asked of every call before its request is read."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from steer_server.access.audit import AuditLog
from steer_server.access.grant import EVERYTHING, Grant
from steer_server.access.rates import Account, Charge
from steer_server.access.scopes import ADMIN, OPEN, RPC_SCOPES
from steer_server.access.token_file import TOKEN, TokenEntry, TokenTable
from steer_server.access.watched import Watched
from steer_server.errors import ACCESS_ERRORS, PermissionDeniedError, UnauthenticatedError

_BEARER = re.compile(rf"(?i:bearer) +({TOKEN.pattern})")
_MAX_NAMES = 100
"""Tokens whose calls are counted by name; those of the others together."""
OTHERS = "other"


class AccessControl:
    """Belongs to one event loop."""

    def __init__(
        self,
        tokens: Watched[TokenTable] | None = None,
        *,
        has_admin_listener: bool = False,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``tokens``: without them everybody may do everything. ``has_admin_listener``: calls of the scope admin are
        served by a listener of their own.
        """
        self._tokens, self._has_admin_listener, self._clock, self._now = tokens, has_admin_listener, clock, now
        self._latest = now()
        self._accounts: dict[str, Account] = {}
        self._audit = AuditLog(clock=clock)
        self.refusals: Counter[str] = Counter()
        """By their cause."""
        self.calls: Counter[str] = Counter()
        """By the name of the token."""

    @contextmanager
    def admitted(
        self, method: str, authorization: Sequence[str | bytes], peer: str, *, by_admin_listener: bool = False
    ) -> Iterator[Grant]:
        """Surrounds a call with what it may do.

        Args:
            method: "/service/method" of the contract, whatever the call came by.
            authorization: the values of all headers of that name.
            peer: as the audit log names it.
            by_admin_listener: whether it came by that one.

        Raises:
            UnauthenticatedError, PermissionDeniedError, RateLimitedError: the call is refused.
        """
        grant, outcome = EVERYTHING, "OK"
        is_refused = False
        try:
            if RPC_SCOPES.get(method) != OPEN:
                grant = self._grant(authorization)
                self._count(grant)
            # Behind the token: what is served where is nothing that a caller without one learns.
            self._check_listener(method, by_admin_listener=by_admin_listener)
            if RPC_SCOPES.get(method) != OPEN:
                self._check_scope(method, grant)
                grant.charge.count_request()
            yield grant
        except ACCESS_ERRORS as error:
            is_refused = True
            self.refusals[error.cause] += 1
            self._audit.refused(method, token=grant.token, peer=peer, cause=error.cause)
            raise
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            if RPC_SCOPES.get(method) == ADMIN and not is_refused:
                self._audit.called(method, token=grant.token, peer=peer, outcome=outcome)

    @contextmanager
    def recognised(self, method: str, authorization: Sequence[str | bytes], peer: str) -> Iterator[Grant]:
        """Surrounds what is no call of the contract: that it is none is told to those who have a token only.

        ``method``: what the audit log calls it. Raises :class:`UnauthenticatedError`.
        """
        try:
            grant = self._grant(authorization)
        except UnauthenticatedError as error:
            self.refusals[error.cause] += 1
            self._audit.refused(method, token="", peer=peer, cause=error.cause)
            raise
        self._count(grant)
        yield grant

    def _check_listener(self, method: str, *, by_admin_listener: bool) -> None:
        scope = RPC_SCOPES.get(method)
        # Health and reflection are of a listener, not of the model.
        if not self._has_admin_listener or not method.startswith("/steering."):
            return
        if (scope == ADMIN) != by_admin_listener:
            where = f"by the {'admin' if scope == ADMIN else 'main'} listener"
            raise PermissionDeniedError(f"{method[1:]} is served {where}, and not by this one", cause="listener")

    def _grant(self, authorization: Sequence[str | bytes]) -> Grant:
        if self._tokens is None:
            return EVERYTHING
        name, entry = self._entry(authorization, self._tokens.value)
        return Grant(
            name,
            frozenset(entry.scopes),
            None if entry.operators is None else frozenset(entry.operators),
            entry.queue_share,
            Charge(self._account(name, entry)),
        )

    def _entry(self, authorization: Sequence[str | bytes], table: TokenTable) -> tuple[str, TokenEntry]:
        if not authorization:
            raise UnauthenticatedError("a token is needed: the header authorization, Bearer TOKEN", cause="no token")
        if len(authorization) > 1:
            problem = f"the header authorization is there {len(authorization)} times; one is accepted"
            raise UnauthenticatedError(problem, cause="several tokens")
        value = authorization[0]
        found = _BEARER.fullmatch(value.decode("latin-1") if isinstance(value, bytes) else value)
        name = None if found is None else table.name_of(found[1])
        if name is None:
            # The same for all that is no token of ours, so that nothing can be learnt from it.
            raise UnauthenticatedError("the token is not accepted", cause="unknown token")
        entry = table.entries[name]
        self.look_at_clock()
        if entry.expires is not None and entry.expires <= self._latest:
            raise UnauthenticatedError(f"the token expired at {entry.expires.isoformat()}", cause="expired token")
        return name, entry

    def look_at_clock(self) -> None:
        """Called again and again: a clock that is set back brings no token back that expired, called or not."""
        self._latest = max(self._latest, self._now())

    def _check_scope(self, method: str, grant: Grant) -> None:
        scope = RPC_SCOPES.get(method)
        if scope is None:
            raise PermissionDeniedError(f"{method[1:]} is in no scope, and refused to everybody", cause="scope")
        if scope not in grant.scopes:
            has = ", ".join(sorted(grant.scopes))
            raise PermissionDeniedError(
                f"{method[1:]} needs the scope {scope}; token {grant.token!r} has {has}", cause="scope"
            )

    def _account(self, name: str, entry: TokenEntry) -> Account:
        limits = (entry.requests_per_minute, entry.tokens_per_minute)
        account = self._accounts.get(name)
        # A token that was renewed under its name has what is left of the minute, and no new one.
        if account is None or account.limits != limits:
            account = self._accounts[name] = Account(name, *limits, clock=self._clock)
            for gone in self._accounts.keys() - (self._tokens.value.entries.keys() if self._tokens else set()):
                del self._accounts[gone]
        return account

    def _count(self, grant: Grant) -> None:
        name = grant.token
        if name:
            self.calls[name if name in self.calls or len(self.calls) < _MAX_NAMES else OTHERS] += 1
