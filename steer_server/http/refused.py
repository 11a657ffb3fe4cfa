"""What is refused because of HTTP itself, before it is a call of the contract."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that no handler sees. ``status`` and ``code`` are what the client gets."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        """``param``: the part of the request that is at fault."""
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers
