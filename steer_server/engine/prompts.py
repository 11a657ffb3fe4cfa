"""Encoding prompts (text, ids or a conversation) to token ids, in threads beside the event loop and with bounds.

Texts of a page or two have threads of their own, so that none of them waits for a book; and callers take turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from operators.model.text_ids import following_ids, text_ids
from steer_server.engine.chat_template import ChatTemplate
from steer_server.errors import InvalidRequestError, PromptTooLongError, ShuttingDownError, errors_of
from steer_server.fair_threads import FairRoom, FairThreads
from steer_server.types import ModelInfo, Prompt, SamplingParams

_SHORT_THREADS, _LONG_THREADS = 2, 1
_SHORT = 16 << 10
"""Characters: some 50 ms for a tokenizer."""
_SHORT_IDS = 4 << 10
"""Tokens to decode one by one: some 50 ms too."""
_TRIED_PER_TOKEN = 8
"""Characters of a text, for each token of the context, that are read first: most texts have half as many."""
_MARGIN = 64
"""Tokens by which the beginning of a text may have more when it is read alone: those at the cut."""
_MAX_BYTES = 16 << 20
"""Of a prompt, whatever the context: some four million tokens."""

_T = TypeVar("_T")


def max_prompt_bytes(tokenizer: Any, context_length: int) -> int:
    """Most bytes of a text that could fit into a context: if every token were the longest of the vocabulary."""
    longest = max(len(token.encode()) for token in tokenizer.get_vocab())
    return min(context_length * longest, _MAX_BYTES)


class PromptReader:
    """The tokenizer and the chat template of one model."""

    def __init__(self, tokenizer: Any, model: ModelInfo, *, max_waiting: int) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._max_bytes = max_prompt_bytes(tokenizer, model.context_length)
        self._short = FairThreads(_SHORT_THREADS, "encode-short")
        self._long = FairThreads(_LONG_THREADS, "encode-long")
        self._template = ChatTemplate(tokenizer, max_characters=self._max_bytes) if model.has_chat_template else None
        self._room = FairRoom(max_waiting, "prompts wait to be read")
        self._closed = False

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode`."""
        return self._checked(await self._in_turn(partial(self._ids, prompt)))

    async def encode_text(self, text: str, *, follows: bool) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode_text`."""
        with errors_of("prompt", at="text"):
            ids = await self._in_turn(partial(self._tokenise, text, special_tokens=not follows, follows=follows))
        if not ids:
            raise InvalidRequestError("text", "has no tokens; at least one is needed")
        check_ids("text", ids, self._model.vocab_size)
        return ids

    async def texts(self, ids: Sequence[int]) -> tuple[str, ...]:
        """See :meth:`steer_server.engine.base.Engine.token_texts`."""
        threads = self._short if len(ids) <= _SHORT_IDS else self._long
        return await self._in_turn(partial(threads.run, partial(self._decode_each, ids)))

    async def _in_turn(self, work: Callable[[], Awaitable[_T]]) -> _T:
        if self._closed:
            raise ShuttingDownError
        with self._room.place():
            try:
                return await work()
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._closed and not (task and task.cancelling()):
                    # The caller did not give up: closing cancelled the waiting prompts.
                    raise ShuttingDownError from None
                raise

    def _decode_each(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(str(self._tokenizer.decode([token])) for token in ids)

    def close(self) -> None:
        """Refuses waiting and new prompts with :class:`ShuttingDownError`."""
        self._closed = True
        self._short.close()
        self._long.close()
        if self._template is not None:
            self._template.close()

    async def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.text is not None:
            return await self._tokenise(prompt.text, special_tokens=True)
        if self._template is None or prompt.chat is None:
            raise InvalidRequestError("prompt.chat", f"{self._model.model} has no chat template; send text")
        self._check_bytes(sum(len(turn.content.encode()) for turn in prompt.chat.messages))
        return await self._tokenise(await self._template.render(prompt.chat), special_tokens=False)

    async def _tokenise(self, text: str, *, special_tokens: bool, follows: bool = False) -> tuple[int, ...]:
        threads = self._short if len(text) <= _SHORT else self._long
        return await threads.run(partial(self._encode, text, special_tokens=special_tokens, follows=follows))

    def _encode(self, text: str, *, special_tokens: bool, follows: bool) -> tuple[int, ...]:
        self._check_bytes(len(text.encode()))
        # A text that fits is read once or twice in all; of one that does not, not much more than would fit.
        tried = _TRIED_PER_TOKEN * self._model.context_length
        while tried < len(text):
            found = len(self._read(text[:tried], special_tokens=special_tokens)) - _MARGIN
            if found >= self._model.context_length:
                raise PromptTooLongError(found, self._model.context_length, more=True)
            tried *= 4
        return following_ids(self._tokenizer, text) if follows else self._read(text, special_tokens=special_tokens)

    def _read(self, text: str, *, special_tokens: bool) -> tuple[int, ...]:
        if special_tokens:
            return text_ids(self._tokenizer, text)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_bytes(self, size: int) -> None:
        if size > self._max_bytes:
            raise PromptTooLongError(size, self._model.context_length, unit="bytes")

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if not ids:
            raise InvalidRequestError("prompt", "has no tokens; at least one is needed")
        if len(ids) >= self._model.context_length:
            raise PromptTooLongError(len(ids), self._model.context_length)
        # Ids of a text are checked too: a tokenizer may have more tokens than the model has embeddings.
        check_ids("prompt.token_ids", ids, self._model.vocab_size)
        return ids


def check_ids(field: str, ids: tuple[int, ...], vocab_size: int, part: str = "") -> None:
    """Raises :class:`InvalidRequestError` for the first id outside of the vocabulary; ``field[index]part`` names it."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{field}[{index}]{part}", f"is {token}; 0 to {vocab_size - 1} are accepted")


def check_sampled_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """:func:`check_ids` of all that a request's sampling has."""
    check_ids("sampling.stop_token_ids", sampling.stop_token_ids, vocab_size)
    biased = tuple(bias.token_id for bias in sampling.logit_bias)
    check_ids("sampling.logit_bias", biased, vocab_size, part=".token_id")
