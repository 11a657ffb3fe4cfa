"""Protobuf messages to the server's nouns and back, by the names of their fields. No decisions are made here."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from google.protobuf.message import Message
from steering.convert import FieldError, Reader, oneof_writer, reader, writer
from steering.v1 import comparison_pb2, score_pb2, text_pb2
from steering.v1 import generation_pb2 as pb

from steer_server.errors import InvalidRequestError
from steer_server.types import (
    ArmSampling,
    Compared,
    CompareEvent,
    CompareRequest,
    Completion,
    Delta,
    GenerateEvent,
    GenerationRequest,
    ModelInfo,
    Prompt,
    RequestLimits,
    ScoreRequest,
    Started,
    TextScore,
    Tokenization,
    TokenizeRequest,
)

_T = TypeVar("_T")
_S = TypeVar("_S", bound=ArmSampling)
_GENERATE_EVENTS = {Started: "started", Delta: "delta", Completion: "finished"}

_read_generation_request = reader(pb.GenerateRequest, GenerationRequest)
_read_compare_request = reader(comparison_pb2.CompareRequest, CompareRequest)
_read_score_request = reader(score_pb2.ScoreRequest, ScoreRequest)
_read_tokenize_request = reader(pb.TokenizeRequest, TokenizeRequest)
# A text that is streamed has no others inside it.
_write_generate_event = oneof_writer(pb.GenerateEvent, _GENERATE_EVENTS, without=("more",))
_write_compare_event = oneof_writer(
    comparison_pb2.CompareEvent, _GENERATE_EVENTS | {Compared: "compared"}, without=("more",)
)
_write_completion = writer(text_pb2.GenerateResponse, Completion)
_write_text_score = writer(score_pb2.ScoreResponse, TextScore)
_write_tokenization = writer(pb.TokenizeResponse, Tokenization)
_write_limits = writer(pb.RequestLimits, RequestLimits)
_write_model_info = writer(pb.GetModelInfoResponse, ModelInfo)


def generation_request(message: pb.GenerateRequest) -> GenerationRequest:
    """Raises :class:`InvalidRequestError` naming the field at fault, as do all decoders here."""
    asked = _decode(_read_generation_request, message)
    return replace(asked, sampling=_that_fits(asked.sampling, message.sampling))


def compare_request(message: comparison_pb2.CompareRequest) -> CompareRequest:
    """See :func:`generation_request`."""
    asked = _decode(_read_compare_request, message)
    arms = tuple(
        arm if arm.sampling is None else replace(arm, sampling=_that_fits(arm.sampling, given.sampling))
        for arm, given in zip(asked.arms, message.arms, strict=True)
    )
    return replace(asked, sampling=_that_fits(asked.sampling, message.sampling), arms=arms)


def score_request(message: score_pb2.ScoreRequest) -> ScoreRequest:
    """See :func:`generation_request`."""
    return _decode(_read_score_request, message)


def prompt(message: text_pb2.Prompt) -> Prompt:
    """See :func:`generation_request`."""
    return _decode(_read_tokenize_request, pb.TokenizeRequest(prompt=message)).prompt


def generate_event(event: GenerateEvent, *, repeats: bool = True) -> pb.GenerateEvent:
    """One event of a stream, whose last one ``repeats`` what the others had."""
    return _write_generate_event(event if repeats else _without_repeats(event), sample=event.sample)


def compare_event(event: CompareEvent, *, repeats: bool = True) -> comparison_pb2.CompareEvent:
    """One event of a comparison; see :func:`generate_event`."""
    if isinstance(event, Compared):
        return _write_compare_event(event, prompt_id=event.prompt_id)
    inner = event.event if repeats else _without_repeats(event.event)
    return _write_compare_event(inner, arm=event.arm, sample=inner.sample, prompt_id=event.prompt_id)


def _without_repeats(event: GenerateEvent) -> GenerateEvent:
    return replace(event, text="", token_ids=(), logprobs=()) if isinstance(event, Completion) else event


def completion(result: Completion, *others: Completion) -> text_pb2.GenerateResponse:
    """A finished continuation, and the samples behind it."""
    return _write_completion(result, more=[_write_completion(each, more=()) for each in others])


def text_score(result: TextScore) -> score_pb2.ScoreResponse:
    """A text under every arm."""
    return _write_text_score(result)


def tokenization(result: Tokenization) -> pb.TokenizeResponse:
    """A prompt's token ids and their texts."""
    return _write_tokenization(result)


def model_info(
    model: ModelInfo,
    *,
    version: str,
    max_queue: int,
    max_arms: int,
    max_dose: float,
    operator_admin: bool,
    limits: RequestLimits,
) -> pb.GetModelInfoResponse:
    """The model being served and the server's limits."""
    return _write_model_info(
        model,
        server_version=version,
        max_queue=max_queue,
        max_arms=max_arms,
        max_dose=max_dose,
        operator_admin=operator_admin,
        limits=_write_limits(limits),
    )


def _that_fits(sampling: _S, message: text_pb2.SamplingParams) -> _S:
    """A text whose length the request leaves to the server is never one that the server has no room for."""
    if message.HasField("max_tokens") or message.HasField("fit_max_tokens"):
        return sampling
    return replace(sampling, fit_max_tokens=True)


def _decode(read: Reader[_T], message: Message) -> _T:
    try:
        return read(message)
    except FieldError as error:
        raise InvalidRequestError(error.path, error.problem) from None
