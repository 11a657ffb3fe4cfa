"""How many tokens a text may have where the request leaves that to the server: as many as an engine accepts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from steer_server.errors import InvalidRequestError
from steer_server.types import DecodeJob


def fitted(job: DecodeJob, check: Callable[[DecodeJob], object]) -> DecodeJob:
    """The job with as many tokens as ``check`` accepts, in the rows that may have fewer than they ask for.

    ``check`` must accept every smaller number where it accepts one. Raises what it raises for the least.
    """
    lengths = [(row.sampling.max_tokens, row.sampling.min_tokens) for row in job.rows if row.sampling.fit_max_tokens]
    if not lengths or _accepts(check, job):
        return job
    refused = max(most for most, _ in lengths)
    accepted = max(1, *(least for _, least in lengths))
    check(_of_at_most(job, accepted))
    while refused - accepted > 1:
        middle = (accepted + refused) // 2
        if _accepts(check, _of_at_most(job, middle)):
            accepted = middle
        else:
            refused = middle
    return _of_at_most(job, accepted)


def _of_at_most(job: DecodeJob, tokens: int) -> DecodeJob:
    return replace(job, rows=tuple(row.of_at_most(tokens) for row in job.rows))


def _accepts(check: Callable[[DecodeJob], object], job: DecodeJob) -> bool:
    try:
        check(job)
    except InvalidRequestError:
        return False
    return True
