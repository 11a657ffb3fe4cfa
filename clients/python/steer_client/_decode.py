"""Protobuf to results.

Raises ProtocolError for an answer that lacks what the contract promises, or that speaks of something this
client does not know: guessing would turn a newer server's answer into a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from steering.v1 import generation_pb2 as pb
from steering.v1 import operators_pb2 as operators

from steer_client import _results as results
from steer_client import _store as store
from steer_client._errors import ProtocolError
from steer_client._requests import Rule

_FINISH_REASONS: dict[int, results.FinishReason] = {
    pb.FinishReason.Value(f"FINISH_REASON_{reason.name}"): reason for reason in results.FinishReason
}
_RULES: dict[int, Rule] = {pb.RULE_CUMULATIVE: "cumulative", pb.RULE_SUBSTITUTE: "substitute"}


def generation(message: pb.GenerateResponse) -> results.Generation:
    """A finished text."""
    reason = _FINISH_REASONS.get(message.finish_reason)
    if reason is None:
        raise _unknown("finish reason", message.finish_reason)
    _require(message, "usage", "timings")
    return results.Generation(
        request_id=message.request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        finish_reason=reason,
        stop_string=message.stop_string or None,
        usage=results.Usage(message.usage.prompt_tokens, message.usage.completion_tokens),
        timings=_timings(message.timings),
        receipts=tuple(_receipt(receipt) for receipt in message.receipts),
        logprobs=_logprobs(message.logprobs),
        seed=message.seed,
    )


def delta(message: pb.Delta) -> results.TextDelta:
    """The next piece of a text."""
    return results.TextDelta(message.text, tuple(message.token_ids), _logprobs(message.logprobs))


def arm_result(message: pb.Comparison, steered: results.Generation) -> results.ArmResult:
    """One comparison; `steered` is the text that its arm finished with."""
    kl = None
    if message.HasField("kl_mean"):
        kl = results.KL(message.kl_mean, _optional(message, "kl_p95"), tuple(message.kl_per_token))
    elif message.kl_per_token:
        raise _missing(message, "kl_mean")
    return results.ArmResult(
        generation=steered,
        first_divergence=message.first_divergence if message.HasField("first_divergence") else None,
        kl=kl,
        normal_perplexity=_optional(message, "normal_perplexity"),
        steered_perplexity=_optional(message, "steered_perplexity"),
    )


def operator_info(message: operators.Operator) -> store.OperatorInfo:
    """An artifact; one that cannot be used may lack anything but its name."""
    problem = message.problem or None
    rule = _RULES.get(message.recommended_rule)
    if rule is None and (problem is None or message.recommended_rule != pb.RULE_UNSPECIFIED):
        raise _unknown(f"recommended rule of {message.name!r}", message.recommended_rule)
    return store.OperatorInfo(
        name=message.name,
        problem=problem,
        digest=message.digest,
        concept=message.concept,
        concept_token_ids=tuple(message.concept_token_ids),
        concept_weight=message.concept_weight,
        num_texts=message.num_texts,
        more_texts=tuple(
            store.ConceptText(each.text, tuple(each.token_ids), each.weight) for each in message.more_texts
        ),
        members=tuple(store.Member(each.name, each.digest, each.weight) for each in message.members),
        model=message.model,
        model_fingerprint=message.model_fingerprint,
        model_dtype=message.model_dtype,
        profile=message.profile,
        rule_set=message.rule_set,
        layer=message.layer,
        injection_layer=message.injection_layer,
        hidden_size=message.hidden_size,
        positions=message.positions,
        rank=message.rank,
        low_rank=_low_rank(message.low_rank) if message.HasField("low_rank") else None,
        dtype=message.dtype,
        recommended_strength=message.recommended_strength,
        recommended_rule=rule,
        recommended_blend=message.recommended_blend,
        calibration=_calibration(message.calibration) if message.HasField("calibration") else None,
        reconstruction_error=message.reconstruction_error,
        created=message.created.ToDatetime(UTC) if message.HasField("created") else None,
        size_bytes=message.size_bytes,
        builder_version=message.builder_version,
    )


def _low_rank(message: operators.LowRank) -> store.LowRank:
    return store.LowRank(message.min_residual, message.max_residual, message.weighting)


def _calibration(message: operators.Calibration) -> store.Calibration:
    point = message.recommended
    return store.Calibration(
        recommended=store.CalibrationPoint(point.kl_p95, point.hit_rate, point.perplexity_ratio, point.distinct_2)
        if message.HasField("recommended")
        else None,
        plain_hit_rate=message.plain_hit_rate,
        kl_budget=message.kl_budget,
        max_perplexity_ratio=message.max_perplexity_ratio,
        prompts=message.prompts,
        tokens=message.tokens,
    )


def operator_list(message: operators.ListOperatorsResponse) -> tuple[store.OperatorInfo, ...]:
    """The store, in the server's order."""
    return tuple(operator_info(each) for each in message.operators)


def one_operator(message: operators.GetOperatorResponse) -> store.OperatorInfo:
    """The answer to a question about one name."""
    _require(message, "operator")
    return operator_info(message.operator)


def reload_report(message: operators.ReloadOperatorsResponse) -> store.ReloadReport:
    """What a reload changed."""
    return store.ReloadReport(
        tuple(message.added), tuple(message.changed), tuple(message.removed), tuple(message.unusable)
    )


def tokenization(message: pb.TokenizeResponse) -> results.Tokenization:
    """Token ids and their texts, one for one."""
    if len(message.token_ids) != len(message.tokens):
        raise ProtocolError(f"the server tokenized to {len(message.token_ids)} ids but {len(message.tokens)} texts")
    return results.Tokenization(tuple(message.token_ids), tuple(message.tokens))


def model_info(message: pb.GetModelInfoResponse) -> results.ModelInfo:
    """The model, its limits and its engine."""
    return results.ModelInfo(
        model=message.model,
        architecture=message.architecture,
        model_fingerprint=message.model_fingerprint,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        num_layers=message.num_layers,
        hidden_size=message.hidden_size,
        vocab_size=message.vocab_size,
        context_length=message.context_length,
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
        engine=message.engine,
        dtype=message.dtype,
        device=message.device,
        server_version=message.server_version,
        max_queue=message.max_queue,
        max_arms=message.max_arms,
        max_dose=message.max_dose,
    )


def healthy(message: health_pb2.HealthCheckResponse) -> bool:
    """Whether the server takes requests."""
    return bool(message.status == health_pb2.HealthCheckResponse.SERVING)


def _timings(message: pb.Timings) -> results.Timings:
    _require(message, "queued", "total")
    first = _seconds(message.time_to_first_token) if message.HasField("time_to_first_token") else None
    return results.Timings(queued=_seconds(message.queued), time_to_first_token=first, total=_seconds(message.total))


def _receipt(message: pb.Receipt) -> results.Receipt:
    rule = _RULES.get(message.rule)
    if rule is None:
        raise _unknown(f"rule in the receipt of {message.operator!r}", message.rule)
    return results.Receipt(
        operator=message.operator,
        digest=message.digest,
        layer=message.layer,
        rule=rule,
        strength=message.strength,
        blend=message.blend,
        prompt_tokens_steered=message.prompt_tokens_steered,
        generated_tokens_steered=message.generated_tokens_steered,
        prompt_tokens_cached=message.prompt_tokens_cached,
        mean_dose=message.mean_dose,
        max_dose=message.max_dose,
        dose_bound=message.dose_bound,
        defaulted=tuple(message.defaulted),
        calibrated=message.calibrated,
    )


def _logprobs(messages: Iterable[pb.TokenLogprob]) -> tuple[results.TokenLogprob, ...]:
    return tuple(
        results.TokenLogprob(
            token_id=each.token_id,
            token=each.token,
            logprob=each.logprob,
            top=tuple(results.TopLogprob(top.token_id, top.token, top.logprob) for top in each.top),
        )
        for each in messages
    )


def _seconds(message: Duration) -> float:
    return message.seconds + message.nanos / 1e9


def _optional(message: Message, field: str) -> float | None:
    return float(getattr(message, field)) if message.HasField(field) else None


def _require(message: Message, *fields: str) -> None:
    for field in fields:
        if not message.HasField(field):
            raise _missing(message, field)


def _missing(message: Message, field: str) -> ProtocolError:
    return ProtocolError(f"the server's {message.DESCRIPTOR.name} lacks `{field}`")


def _unknown(what: str, number: int) -> ProtocolError:
    if number == 0:
        return ProtocolError(f"the server gave no {what}")
    return ProtocolError(f"the server gave a {what} that this client does not know ({number}): update the client")
