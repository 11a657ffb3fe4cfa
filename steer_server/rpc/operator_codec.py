"""An entry of the store as its protobuf message. Whatever a file holds, its message stays below a megabyte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.timestamp_pb2 import Timestamp
from steering.v1 import operators_pb2 as ops

from operators.core.header import Calibration, LowRank, OperatorHeader
from steer_server.registry import OperatorEntry
from steer_server.rpc.codec import WIRE_RULES

_MAX_MORE_TEXTS = 64 << 10
"""Bytes: the header admits a thousand texts of 65536 tokens each."""


def operator(entry: OperatorEntry) -> ops.Operator:
    """One entry of the store; of an unusable one, its name, size and problem."""
    if entry.artifact is None:
        return ops.Operator(name=entry.name, problem=entry.problem, size_bytes=entry.size_bytes)
    header = entry.artifact.header
    created = Timestamp()
    created.FromDatetime(header.created)
    return ops.Operator(
        name=entry.name,
        digest=entry.artifact.digest,
        concept=header.concept,
        concept_token_ids=header.concept_ids,
        concept_weight=header.shares[0],
        num_texts=len(header.texts),
        more_texts=_within(_MAX_MORE_TEXTS, _more_texts(header)),
        members=(ops.Member(name=one.name, digest=one.digest, weight=one.weight) for one in header.members),
        model=header.model,
        model_fingerprint=header.model_fingerprint,
        model_dtype=header.model_dtype,
        profile=header.profile,
        rule_set=header.rule_set,
        layer=header.layer,
        injection_layer=header.injection_layer,
        hidden_size=header.hidden_size,
        positions=entry.artifact.positions,
        rank=header.low_rank.rank if header.low_rank else header.hidden_size,
        low_rank=_low_rank(header.low_rank) if header.low_rank else None,
        dtype=header.dtype,
        recommended_strength=header.recommended.strength,
        recommended_rule=WIRE_RULES[header.recommended.rule],
        recommended_blend=header.recommended.blend,
        calibration=_calibration(header, header.calibration) if header.calibration else None,
        reconstruction_error=header.reconstruction_error,
        created=created,
        size_bytes=entry.size_bytes,
        builder_version=header.builder_version,
    )


def _more_texts(header: OperatorHeader) -> Iterator[ops.ConceptText]:
    for text, share in zip(header.more_texts, header.shares[1:], strict=True):
        yield ops.ConceptText(text=text.text, token_ids=text.ids, weight=share)


def _within(budget: int, messages: Iterable[ops.ConceptText]) -> Iterator[ops.ConceptText]:
    """The first messages, as many as fit together into ``budget`` bytes."""
    for message in messages:
        budget -= message.ByteSize()
        if budget < 0:
            return
        yield message


def _low_rank(low_rank: LowRank) -> ops.LowRank:
    return ops.LowRank(
        min_residual=min(low_rank.residuals), max_residual=max(low_rank.residuals), weighting=low_rank.weighting
    )


def _calibration(header: OperatorHeader, calibration: Calibration) -> ops.Calibration:
    point = header.calibrated_point
    return ops.Calibration(
        recommended=None
        if point is None
        else ops.CalibrationPoint(
            kl_p95=point.kl_p95,
            hit_rate=point.hit_rate,
            perplexity_ratio=point.perplexity_ratio,
            distinct_2=point.distinct_2,
        ),
        plain_hit_rate=calibration.plain_hit_rate,
        kl_budget=calibration.kl_budget,
        max_perplexity_ratio=calibration.max_perplexity_ratio,
        prompts=calibration.prompts,
        tokens=calibration.tokens,
    )
