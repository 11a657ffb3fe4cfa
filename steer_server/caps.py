"""What the operator of a server lets a request ask for: tokens, and time."""

from __future__ import annotations

from dataclasses import dataclass, replace

from steer_server.errors import InvalidRequestError
from steer_server.types import SamplingParams


@dataclass(frozen=True)
class Caps:
    """None: no cap. Filled from the configuration."""

    max_tokens: int | None = None
    max_total_tokens: int | None = None
    max_time: float | None = None
    """Seconds."""

    def apply(self, sampling: SamplingParams, *, num_texts: int) -> SamplingParams:
        """The parameters of a request of so many texts, with the time limit that it did not set.

        Raises :class:`InvalidRequestError` for one that asks for more than is accepted.
        """
        self.check_tokens(sampling.max_tokens, "sampling.max_tokens", num_texts=num_texts)
        limit = self.limit_time(sampling.time_limit, "sampling.time_limit")
        return sampling if limit == sampling.time_limit else replace(sampling, time_limit=limit)

    def check_tokens(self, tokens: int, field: str, *, num_texts: int) -> None:
        """Raises :class:`InvalidRequestError`, at ``field``, for so many texts of up to ``tokens`` tokens each."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise InvalidRequestError(field, f"is {tokens}{_unit(field)}; this server accepts {self.max_tokens}")
        if self.max_total_tokens is not None and num_texts * tokens > self.max_total_tokens:
            raise InvalidRequestError(
                field,
                f"is {tokens}{_unit(field)}, in {num_texts} texts {num_texts * tokens}; this server accepts "
                f"{self.max_total_tokens} in all texts of a request",
            )

    def limit_time(self, seconds: float | None, field: str) -> float | None:
        """A time limit, that of the server where there is none. Raises :class:`InvalidRequestError` at ``field``."""
        if self.max_time is None or seconds is None:
            return self.max_time if seconds is None else seconds
        if seconds > self.max_time:
            raise InvalidRequestError(field, f"is {seconds:g} s; this server accepts {self.max_time:g} s")
        return seconds


def _unit(field: str) -> str:
    return "" if field.endswith("max_tokens") else " tokens"


NO_CAPS = Caps()
