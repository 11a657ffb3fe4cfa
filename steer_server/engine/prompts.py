"""Encoding prompts (text, ids or a conversation) to token ids, in a thread beside the event loop and with a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from operators.model.text_ids import text_ids
from steer_server.errors import InvalidRequestError, PromptTooLongError, QueueFullError, ShuttingDownError
from steer_server.types import ModelInfo, Prompt


class PromptReader:
    """One tokenizer in a thread of its own: a long prompt takes seconds, and must not hold up the event loop."""

    def __init__(self, tokenizer: Any, model: ModelInfo, *, max_waiting: int) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._encoding = 0
        self._max_encoding = max_waiting
        self._closed = False
        self._longest_token = max(len(token.encode()) for token in tokenizer.get_vocab())

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """See :meth:`steer_server.engine.base.Engine.encode`."""
        if self._closed:
            raise ShuttingDownError
        if self._encoding >= self._max_encoding:
            raise QueueFullError(f"{self._max_encoding} prompts wait to be read, the most admitted", retry_after=1.0)
        self._encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, self._encode, prompt)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                # The caller did not give up: closing cancelled the waiting prompts.
                raise ShuttingDownError from None
            raise
        finally:
            self._encoding -= 1

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        ids = self._ids(prompt)
        if not ids:
            raise InvalidRequestError("prompt", "has no tokens; at least one is needed")
        if len(ids) >= self._model.context_length:
            raise PromptTooLongError(len(ids), self._model.context_length)
        # Ids of a text are checked too: a tokenizer may have more tokens than the model has embeddings.
        check_ids("prompt.token_ids", ids, self._model.vocab_size)
        return ids

    def _tokenise(self, text: str, *, special_tokens: bool) -> tuple[int, ...]:
        fewest = len(text.encode()) // self._longest_token
        if fewest > self._model.context_length:
            # A lower bound that is too high already: tokenising megabytes would take long.
            raise PromptTooLongError(fewest, self._model.context_length)
        if special_tokens:
            return text_ids(self._tokenizer, text)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def texts(self, ids: Iterable[int]) -> tuple[str, ...]:
        """Each token decoded on its own."""
        return tuple(str(self._tokenizer.decode([token])) for token in ids)

    def close(self) -> None:
        """Refuses waiting and new prompts with :class:`ShuttingDownError`."""
        self._closed = True
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        if prompt.text is not None:
            return self._tokenise(prompt.text, special_tokens=True)
        if not self._model.has_chat_template:
            raise InvalidRequestError("prompt.chat", f"{self._model.model} has no chat template; send text")
        messages = [{"role": turn.role, "content": turn.content} for turn in prompt.chat or ()]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # A template is a program of the model's author, and may raise any exception.
            raise InvalidRequestError("prompt.chat", f"the chat template refuses it: {error}") from error
        return self._tokenise(text, special_tokens=False)


def check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises :class:`InvalidRequestError` for the first id outside of the vocabulary; ``field`` names it."""
    for index, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{field}[{index}]", f"is {token}; 0 to {vocab_size - 1} are accepted")
