"""From events of the contract to what OpenAI's API answers: choices, log-probabilities, usage; whole or in pieces."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from steering.v1 import comparison_pb2, text_pb2

from steer_server.errors import ShuttingDownError
from steer_server.http.messages import to_json
from steer_server.http.openai.requests import Asked

_LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON has no number for; as vLLM does."""
_UNREADABLE = "\ufffd"
_STOPPED = {text_pb2.FINISH_REASON_EOS, text_pb2.FINISH_REASON_STOP_STRING, text_pb2.FINISH_REASON_STOP_TOKEN}

_Events = AsyncGenerator[comparison_pb2.CompareEvent, None]


@dataclass
class _Usage:
    """Tokens of all texts; a prompt counts once."""

    prompt: int = 0
    completion: int = 0

    def add(self, index: int, texts_of_a_prompt: int, usage: text_pb2.Usage) -> None:
        if index % texts_of_a_prompt == 0:
            self.prompt += usage.prompt_tokens
        self.completion += usage.completion_tokens

    def body(self) -> dict[str, int]:
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


@dataclass
class Answers:
    """The answers to one request."""

    asked: Asked
    fingerprint: str
    """Of the model."""
    _usage: _Usage = field(default_factory=_Usage)
    _offsets: dict[int, int] = field(default_factory=dict)
    """Characters of each text so far, as its tokens have them."""
    _last_ids: dict[int, int] = field(default_factory=dict)
    """The last token of each text."""

    @property
    def _texts(self) -> int:
        """Of each prompt."""
        return self.asked.message.n or 1

    async def whole(self, events: _Events) -> dict[str, Any]:
        """One answer with all texts. Raises :class:`ShuttingDownError` where the server cut one short."""
        asked, choices = self.asked, {}
        prompts: dict[int, Sequence[int]] = {}
        async with aclosing(events):
            async for event in events:
                if event.HasField("started"):
                    prompts[self._index(event)] = event.started.prompt_token_ids
                elif event.HasField("delta"):
                    self._note(event)
                elif event.HasField("finished"):
                    choices[self._index(event)] = self._choice(event, prompts)
        body = self._head("chat.completion" if asked.is_chat else "text_completion")
        if asked.has_token_ids and asked.is_chat:
            body["prompt_token_ids"] = list(prompts[0])
        return body | {"choices": [choices[index] for index in sorted(choices)], "usage": self._usage.body()}

    async def pieces(self, events: _Events) -> AsyncGenerator[dict[str, Any], None]:
        """One answer in pieces, as texts grow. Raises as :meth:`whole` does."""
        head = self._head("chat.completion.chunk" if self.asked.is_chat else "text_completion")
        if self.asked.has_usage:
            head["usage"] = None
        async with aclosing(events):
            async for event in events:
                for piece in self._pieces(event):
                    yield head | piece
        if self.asked.has_usage:
            yield head | {"choices": [], "usage": self._usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        asked = self.asked
        return {
            "id": f"{'chatcmpl' if asked.is_chat else 'cmpl'}-{asked.request_id}",
            "object": kind,
            "created": asked.created,
            "model": asked.model,
            "system_fingerprint": self.fingerprint,
        }

    def _index(self, event: comparison_pb2.CompareEvent) -> int:
        """Of a text: the texts of the first prompt come first."""
        return int(event.prompt_id or 0) * self._texts + event.sample

    def _note(self, event: comparison_pb2.CompareEvent) -> None:
        if event.delta.token_ids:
            self._last_ids[self._index(event)] = event.delta.token_ids[-1]

    def _choice(self, event: comparison_pb2.CompareEvent, prompts: dict[int, Sequence[int]]) -> dict[str, Any]:
        text, index = event.finished, self._index(event)
        choice: dict[str, Any] = {"index": index}
        if self.asked.is_chat:
            choice["message"] = {"role": "assistant", "content": text.text, "refusal": None}
        else:
            choice["text"] = text.text
        choice["logprobs"] = self._logprobs(index, text.logprobs)
        if self.asked.has_token_ids:
            choice["token_ids"] = list(text.token_ids)
            if not self.asked.is_chat:
                choice["prompt_token_ids"] = list(prompts[index])
        return choice | self._end(index, text)

    def _end(self, index: int, text: text_pb2.GenerateResponse) -> dict[str, Any]:
        """Why a text ended, and what steered it."""
        reason = text_pb2.FinishReason.Name(text.finish_reason).removeprefix("FINISH_REASON_")
        if text.finish_reason == text_pb2.FINISH_REASON_CANCELLED:
            raise ShuttingDownError
        self._usage.add(index, self._texts, text.usage)
        stop: str | int | None = text.stop_string or None
        if text.finish_reason == text_pb2.FINISH_REASON_STOP_TOKEN:
            stop = self._last_ids[index]
        steering = {"receipts": [to_json(receipt) for receipt in text.receipts], "finish_reason": reason}
        return {
            "finish_reason": "stop" if text.finish_reason in _STOPPED else "length",
            "stop_reason": stop,
            "steering": steering | {"seed": text.seed},
        }

    def _pieces(self, event: comparison_pb2.CompareEvent) -> Iterator[dict[str, Any]]:
        index, asked = self._index(event), self.asked
        if event.HasField("started"):
            if not asked.is_chat and not asked.has_token_ids:
                return
            more = {"prompt_token_ids": list(event.started.prompt_token_ids)} if asked.has_token_ids else {}
            if asked.is_chat:
                yield more | {"choices": [self._piece(index, "", {"role": "assistant"})]}
            else:
                yield {"choices": [self._piece(index, "") | more]}
        elif event.HasField("delta"):
            delta = event.delta
            self._note(event)
            if delta.text or asked.has_logprobs or asked.has_token_ids:
                piece = self._piece(index, delta.text) | {"logprobs": self._logprobs(index, delta.logprobs)}
                if asked.has_token_ids:
                    piece["token_ids"] = list(delta.token_ids)
                yield {"choices": [piece]}
        elif event.HasField("finished"):
            yield {"choices": [self._piece(index, "") | self._end(index, event.finished)]}

    def _piece(self, index: int, text: str, more: dict[str, str] | None = None) -> dict[str, Any]:
        ends: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": None}
        if not self.asked.is_chat:
            return ends | {"text": text}
        delta = {"content": text} if text or more else {}
        return ends | {"delta": (more or {}) | delta}

    def _logprobs(self, index: int, found: Iterable[text_pb2.TokenLogprob]) -> dict[str, Any] | None:
        if not self.asked.has_logprobs:
            return None
        if self.asked.is_chat:
            return {"content": [_chat_logprob(each) for each in found], "refusal": None}
        offset, offsets, tokens = self._offsets.get(index, 0), [], list(found)
        for each in tokens:
            offsets.append(offset)
            offset += len(each.token)
        self._offsets[index] = offset
        return {
            "tokens": [each.token for each in tokens],
            "token_logprobs": [_finite(each.logprob) for each in tokens],
            "top_logprobs": [_by_token(each) for each in tokens],
            "text_offset": offsets,
        }


def _by_token(found: text_pb2.TokenLogprob) -> dict[str, float]:
    """The alternatives, and the token itself. Of two tokens with one text, the likelier."""
    pairs = [*((each.token, each.logprob) for each in found.top), (found.token, found.logprob)]
    return {token: _finite(logprob) for token, logprob in sorted(pairs, key=lambda pair: pair[1])}


def _chat_logprob(found: text_pb2.TokenLogprob) -> dict[str, Any]:
    top = [_one_logprob(each.token, each.logprob) for each in found.top]
    return _one_logprob(found.token, found.logprob) | {"top_logprobs": top}


def _one_logprob(token: str, logprob: float) -> dict[str, Any]:
    # Of a part of a character the bytes are not known.
    known = None if _UNREADABLE in token else list(token.encode())
    return {"token": token, "logprob": _finite(logprob), "bytes": known}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
