"""Stop strings that are special tokens: these leave no text to be found, so that they are recognised by their ids."""

from __future__ import annotations

from typing import Any

from steer_server.errors import InvalidRequestError
from steer_server.types import SamplingParams


def special_stops(sampling: SamplingParams, tokenizer: Any) -> dict[int, str]:
    """Token id -> stop string, of those that are exactly one special token of the tokenizer.

    Raises, unless the text is to have special tokens:
        InvalidRequestError: one has a special token beside other text, and would be met in no text.
    """
    stops = sampling.stop_strings
    # A tokenizer may have thousands of added tokens, and this is asked on the event loop, for every row.
    special = _special_tokens(tokenizer) if stops else {}
    for index, stop in enumerate(stops):
        within = next((token for token in special if token in stop and stop not in special), None)
        if within is not None and sampling.skip_special_tokens:
            raise InvalidRequestError(
                f"sampling.stop_strings[{index}]",
                f"has the special token {within!r} beside other text, and special tokens are not part of the text; "
                f"{within!r} alone, or text without it, is accepted",
            )
    return {special[stop]: stop for stop in stops if stop in special}


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """The tokens that decoding leaves out of a text, with their ids."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: int(number) for number, token in added.items() if token.special and token.content}
