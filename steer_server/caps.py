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
        tokens = sampling.max_tokens
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise InvalidRequestError("sampling.max_tokens", f"is {tokens}; this server accepts {self.max_tokens}")
        if self.max_total_tokens is not None and num_texts * tokens > self.max_total_tokens:
            raise InvalidRequestError(
                "sampling.max_tokens",
                f"is {tokens}, in {num_texts} texts {num_texts * tokens}; this server accepts {self.max_total_tokens} "
                "in all texts of a request",
            )
        if self.max_time is None:
            return sampling
        if sampling.time_limit is None:
            return replace(sampling, time_limit=self.max_time)
        if sampling.time_limit > self.max_time:
            raise InvalidRequestError(
                "sampling.time_limit", f"is {sampling.time_limit:g} s; this server accepts {self.max_time:g} s"
            )
        return sampling


NO_CAPS = Caps()
