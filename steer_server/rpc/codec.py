"""Protobuf messages to the server's nouns and back. No decisions are made here."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal, get_args

from google.protobuf.duration_pb2 import Duration
from steering.v1 import generation_pb2 as pb

from operators.core.header import Rule
from steer_server.errors import InvalidRequestError
from steer_server.types import (
    Arm,
    ArmEvent,
    ChatMessage,
    Compared,
    CompareEvent,
    CompareRequest,
    Comparison,
    Completion,
    Delta,
    FinishReason,
    GenerateEvent,
    GenerationRequest,
    ModelInfo,
    OperatorUse,
    Prompt,
    Receipt,
    SamplingParams,
    Started,
    TokenLogprob,
)

_RULES: dict[pb.Rule.ValueType, Rule] = {pb.RULE_CUMULATIVE: "cumulative", pb.RULE_SUBSTITUTE: "substitute"}
WIRE_RULES: dict[Rule, pb.Rule.ValueType] = {rule: number for number, rule in _RULES.items()}
_REASONS = {reason: pb.FinishReason.Value(f"FINISH_REASON_{reason.value}") for reason in FinishReason}
_MAX_REQUEST_ID = 128
_SamplingScalar = Literal[
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "ignore_eos", "logprobs"
]
_SCALARS: tuple[_SamplingScalar, ...] = get_args(_SamplingScalar)


def generation_request(message: pb.GenerateRequest) -> GenerationRequest:
    """Raises :class:`InvalidRequestError` naming the field at fault, as do all decoders here."""
    return GenerationRequest(
        request_id=_request_id(message.request_id),
        prompt=prompt(message.prompt),
        sampling=_sampling(message.sampling),
        operators=_uses(message.operators, "operators"),
    )


def compare_request(message: pb.CompareRequest) -> CompareRequest:
    """See :func:`generation_request`."""
    return CompareRequest(
        request_id=_request_id(message.request_id),
        prompt=prompt(message.prompt),
        sampling=_sampling(message.sampling),
        arms=tuple(
            Arm(arm.name, _uses(arm.operators, f"arms[{index}].operators")) for index, arm in enumerate(message.arms)
        ),
        score=message.score if message.HasField("score") else True,
    )


def prompt(message: pb.Prompt) -> Prompt:
    """See :func:`generation_request`."""
    kind = message.WhichOneof("input")
    if kind == "text":
        return Prompt(text=message.text)
    if kind == "token_ids":
        return Prompt(token_ids=tuple(message.token_ids.ids))
    if kind == "chat":
        return Prompt(chat=tuple(ChatMessage(turn.role, turn.content) for turn in message.chat.messages))
    return Prompt()


def _request_id(given: str) -> str:
    if len(given) > _MAX_REQUEST_ID:
        raise InvalidRequestError("request_id", f"has {len(given)} characters; at most {_MAX_REQUEST_ID} are accepted")
    return given or secrets.token_hex(8)


def _sampling(message: pb.SamplingParams) -> SamplingParams:
    given: dict[str, Any] = {name: getattr(message, name) for name in _SCALARS if message.HasField(name)}
    return SamplingParams(
        **given,
        # Drawn here, so that the response can report what was used.
        seed=message.seed if message.HasField("seed") else secrets.randbits(63),
        stop_strings=tuple(message.stop_strings),
        stop_token_ids=tuple(message.stop_token_ids),
        time_limit=_seconds(message.time_limit) if message.HasField("time_limit") else None,
    )


def _uses(messages: Iterable[pb.OperatorUse], field: str) -> tuple[OperatorUse, ...]:
    return tuple(_use(message, f"{field}[{index}]") for index, message in enumerate(messages))


def _use(message: pb.OperatorUse, field: str) -> OperatorUse:
    if message.rule != pb.RULE_UNSPECIFIED and message.rule not in _RULES:
        accepted = ", ".join(pb.Rule.Name(number) for number in _RULES)
        raise InvalidRequestError(f"{field}.rule", f"is {message.rule}; accepted: {accepted}")
    return OperatorUse(
        name=message.name,
        strength=message.strength if message.HasField("strength") else None,
        rule=_RULES.get(message.rule),
        blend=message.blend if message.HasField("blend") else None,
    )


def generate_event(event: GenerateEvent) -> pb.GenerateEvent:
    """One event of a stream."""
    if isinstance(event, Started):
        return pb.GenerateEvent(started=_started(event))
    if isinstance(event, Delta):
        return pb.GenerateEvent(delta=_delta(event))
    return pb.GenerateEvent(finished=completion(event))


def compare_event(event: CompareEvent) -> pb.CompareEvent:
    """One event of a comparison."""
    if isinstance(event, Compared):
        return pb.CompareEvent(compared=pb.CompareFinished(comparisons=map(_comparison, event.comparisons)))
    return _arm_event(event)


def _arm_event(event: ArmEvent) -> pb.CompareEvent:
    if isinstance(event.event, Started):
        return pb.CompareEvent(arm=event.arm, started=_started(event.event))
    if isinstance(event.event, Delta):
        return pb.CompareEvent(arm=event.arm, delta=_delta(event.event))
    return pb.CompareEvent(arm=event.arm, finished=completion(event.event))


def completion(result: Completion) -> pb.GenerateResponse:
    """A finished continuation."""
    return pb.GenerateResponse(
        request_id=result.request_id,
        text=result.text,
        token_ids=result.token_ids,
        finish_reason=_REASONS[result.reason],
        stop_string=result.stop_string,
        usage=pb.Usage(prompt_tokens=result.prompt_tokens, completion_tokens=len(result.token_ids)),
        timings=pb.Timings(
            queued=_duration(result.timings.queued),
            time_to_first_token=_duration(result.timings.time_to_first_token) if result.token_ids else None,
            total=_duration(result.timings.total),
        ),
        receipts=map(_receipt, result.receipts),
        logprobs=map(_logprob, result.logprobs),
        seed=result.seed,
    )


def model_info(
    model: ModelInfo, *, version: str, max_queue: int, max_arms: int, max_dose: float
) -> pb.GetModelInfoResponse:
    """The model being served and the server's limits."""
    return pb.GetModelInfoResponse(
        model=model.model,
        architecture=model.architecture,
        model_fingerprint=model.fingerprint,
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        vocab_size=model.vocab_size,
        context_length=model.context_length,
        eos_token_ids=model.eos_token_ids,
        has_chat_template=model.has_chat_template,
        engine=model.engine,
        dtype=model.dtype,
        device=model.device,
        server_version=version,
        max_queue=max_queue,
        max_arms=max_arms,
        max_dose=max_dose,
    )


def _started(event: Started) -> pb.Started:
    return pb.Started(request_id=event.request_id, prompt_token_ids=event.prompt_token_ids)


def _delta(event: Delta) -> pb.Delta:
    return pb.Delta(text=event.text, token_ids=event.token_ids, logprobs=map(_logprob, event.logprobs))


def _logprob(item: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=item.token_id,
        token=item.token,
        logprob=item.logprob,
        top=(pb.TopLogprob(token_id=top.token_id, token=top.token, logprob=top.logprob) for top in item.top),
    )


def _receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(
        operator=receipt.operator,
        digest=receipt.digest,
        layer=receipt.layer,
        rule=WIRE_RULES[receipt.rule],
        strength=receipt.strength,
        blend=receipt.blend,
        prompt_tokens_steered=receipt.prompt_tokens_steered,
        generated_tokens_steered=receipt.generated_tokens_steered,
        prompt_tokens_cached=receipt.prompt_tokens_cached,
        mean_dose=receipt.mean_dose,
        max_dose=receipt.max_dose,
        dose_bound=receipt.dose_bound,
        defaulted=receipt.defaulted,
        calibrated=receipt.calibrated,
    )


def _comparison(result: Comparison) -> pb.Comparison:
    return pb.Comparison(
        arm=result.arm,
        first_divergence=result.first_divergence,
        kl_per_token=result.kl_per_token,
        kl_mean=result.kl_mean,
        kl_p95=result.kl_p95,
        normal_perplexity=result.normal_perplexity,
        steered_perplexity=result.steered_perplexity,
    )


def _duration(seconds: float) -> Duration:
    message = Duration()
    message.FromTimedelta(timedelta(seconds=seconds))
    return message


def _seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9
