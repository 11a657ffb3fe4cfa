"""The token ids of a text at the beginning of a sequence or amid one, without what a tokenizer puts behind it."""

from __future__ import annotations

from typing import Any

_PROBE, _BREAK = "a", "\n"


def text_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text that goes on, or whose last token is looked at: BOS and the like stay in front of it.

    What a tokenizer puts behind every text (EOS) is left out: the model would be asked how to go on after an end.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    behind = _num_behind(tokenizer)
    return tuple(int(token) for token in (ids[:-behind] if behind else ids))


def following_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text that goes on where another one ends, without special tokens.

    Some tokenizers put a space before the first word of whatever they are given. So the text is read behind a line
    break, which is taken off again where it is tokens of its own.
    """
    before, both, alone = (
        tuple(tokenizer(each, add_special_tokens=False, verbose=False)["input_ids"])
        for each in (_BREAK, _BREAK + text, text)
    )
    return both[len(before) :] if both[: len(before)] == before else alone


def _num_behind(tokenizer: Any) -> int:
    """How many tokens the tokenizer puts behind a text, whatever its tokens."""
    added = tokenizer(_PROBE, return_special_tokens_mask=True)["special_tokens_mask"]
    return added[::-1].index(0) if 0 in added else 0
