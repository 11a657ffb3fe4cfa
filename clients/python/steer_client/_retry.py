"""When a call that failed is tried again: where the server has done nothing for it, and within the caller's timeout."""

from __future__ import annotations

import random
import time

from steer_client._errors import ServerBusyError, ServerUnavailableError, SteerError

#: Of a server that does not answer; a server that is busy says itself when to try again, as often as it takes.
_MAX_UNAVAILABLE = 2
_FIRST_PAUSE = 0.2
#: Seconds: whatever a busy server says, it is not asked more often, and not waited for longer.
_LEAST_PAUSE, _MOST_PAUSE = 0.05, 3600.0


class Retries:
    """Decides, for one call, whether it is tried again, and when. Nothing waits here."""

    def __init__(self, timeout: float | None, *, enabled: bool) -> None:
        """`timeout`: seconds for all attempts together."""
        self._end = None if timeout is None else time.monotonic() + timeout
        self._enabled = enabled
        self._unavailable = 0

    @property
    def timeout(self) -> float | None:
        """Seconds that are left for the next attempt."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def pause_after(self, error: SteerError) -> float | None:
        """Seconds to wait before the next attempt; None where there is none, and the error is the caller's."""
        pause = self._pause(error) if self._enabled else None
        left = self.timeout
        return None if pause is None or (left is not None and pause >= left) else pause

    def _pause(self, error: SteerError) -> float | None:
        if isinstance(error, ServerBusyError):
            hint = error.retry_after
            return None if hint is None or hint > _MOST_PAUSE else max(hint, _LEAST_PAUSE)
        if isinstance(error, ServerUnavailableError) and error.is_unsent and self._unavailable < _MAX_UNAVAILABLE:
            self._unavailable += 1
            return _FIRST_PAUSE * self._unavailable * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
        return None
