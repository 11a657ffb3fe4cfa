"""What the operator of a server lets a request ask for: tokens, and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steer_server.caller import CALLER
from steer_server.errors import InvalidRequestError
from steer_server.types import Row, SamplingParams


@dataclass(frozen=True)
class Caps:
    """None: no cap. Filled from the configuration."""

    max_tokens: int | None = None
    max_total_tokens: int | None = None
    max_time: float | None = None
    """Seconds."""
    max_texts: int | None = None
    """Of one prompt."""

    def apply(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters of a request, with the time limit that it did not set.

        Raises :class:`InvalidRequestError` for a longer one than is accepted.
        """
        if self.max_time is None:
            return sampling
        if sampling.time_limit is None:
            return replace(sampling, time_limit=self.max_time)
        if sampling.time_limit > self.max_time:
            raise InvalidRequestError(
                "sampling.time_limit", f"is {sampling.time_limit:g} s; this server accepts {self.max_time:g} s"
            )
        return sampling

    def check_samples(self, n: int) -> None:
        """Raises :class:`InvalidRequestError` for more samples of one text than are accepted."""
        if self.max_texts is not None and n > self.max_texts:
            raise InvalidRequestError("n", f"is {n}; at most {self.max_texts} are accepted")

    def fit(self, rows: Sequence[Row], *, num_prompts: int = 1) -> tuple[Row, ...]:
        """The rows; those that may have fewer tokens than they ask for share what the caps leave them.

        ``num_prompts``: each of which has these rows.
        """
        fitting = sum(row.sampling.fit_max_tokens for row in rows)
        fixed = sum(row.sampling.max_tokens for row in rows if not row.sampling.fit_max_tokens)
        in_all = (self.max_total_tokens, CALLER.get().grant.charge.tokens_per_minute)
        shares = [(int(most) // num_prompts - fixed) // max(1, fitting) for most in in_all if most is not None]
        most = min((*shares, *(() if self.max_tokens is None else (self.max_tokens,))), default=None)
        return tuple(rows) if most is None else tuple(row.of_at_most(most) for row in rows)

    def reserve_tokens(self, rows: Sequence[Row], *, num_prompts: int = 1) -> None:
        """Reserves the tokens that rows ask for, of those that the caller's token may ask for in a minute.

        ``num_prompts``: each of which has these rows.

        Raises:
            InvalidRequestError: they ask for more than is ever accepted.
            RateLimitedError: or for more than is left just now.
        """
        for row in rows:
            tokens = row.sampling.max_tokens
            if self.max_tokens is not None and tokens > self.max_tokens:
                raise InvalidRequestError(
                    f"{row.sampling_field}.max_tokens", f"is {tokens} tokens; this server accepts {self.max_tokens}"
                )
        total = num_prompts * sum(row.sampling.max_tokens for row in rows)
        if self.max_total_tokens is not None and total > self.max_total_tokens:
            counts = "/".join(str(count) for count in sorted({row.sampling.max_tokens for row in rows}))
            raise InvalidRequestError(
                "sampling.max_tokens",
                f"is {counts} tokens, in {num_prompts * len(rows)} texts {total}; this server accepts "
                f"{self.max_total_tokens} in all texts of a request",
            )
        CALLER.get().grant.charge.reserve(total, "sampling.max_tokens")


NO_CAPS = Caps()
