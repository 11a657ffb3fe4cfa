"""Refuses a text within which the model's rotary factors would change: its keys would be of two kinds."""

from __future__ import annotations

from typing import Any

from operators.model.rope import rope_change_within
from steer_server.errors import InvalidRequestError
from steer_server.types import DecodeJob


def check_rope(job: DecodeJob, config: Any, context_length: int) -> None:
    """Raises :class:`InvalidRequestError` where the longest text that the job may become crosses such a length.

    Args:
        config: the model's text configuration.
    """
    for field, sampling in job.samplings.items():
        _check_length(len(job.prompt_ids), sampling.max_tokens, f"{field}.max_tokens", config, context_length)


def _check_length(prompt: int, max_tokens: int, field: str, config: Any, context_length: int) -> None:
    # The last token of a text is never fed back.
    longest = min(prompt + max_tokens, context_length) - 1
    change = rope_change_within(config, prompt, longest)
    if change is None:
        return
    room = change.length + 1 - prompt
    accepted = [f"1 to {room}"] if room > 0 else []
    if not change.again:
        accepted.append(f"a prompt of more than {change.length} tokens")
    elif room <= 0:
        accepted.append(f"a prompt of at most {change.length} tokens")
    raise InvalidRequestError(
        field,
        f"is {max_tokens} tokens after a prompt of {prompt} tokens; the model's rotary factors "
        f"({change.rope_type}) change beyond {change.length} tokens, and no text has two sets of them: "
        f"{', or '.join(accepted)}, is accepted",
    )
