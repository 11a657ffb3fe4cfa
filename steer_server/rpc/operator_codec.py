"""An entry of the store as its protobuf message. Whatever a file holds, its message stays below a megabyte."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from steering.convert import enum_numbers, writer
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp
from steering.v1 import text_pb2

from operators.core.apply import Setting
from operators.core.dose_curve import DosePoint
from operators.core.header import Calibration, CalibrationPoint, LowRank, NeutralTexts, OperatorHeader
from operators.core.measured import HeldOut, Sampling
from operators.core.positions import Positions
from steer_server.applications import measured_at
from steer_server.registry import OperatorEntry, StoreChanges

_MAX_MORE_TEXTS = 64 << 10
"""Bytes: the header admits a thousand texts of 65536 tokens each."""
_RULES = enum_numbers(sp.Rule.DESCRIPTOR)
_ANCHORS = enum_numbers(sp.Anchor.DESCRIPTOR)
_FIRST_TOKENS = enum_numbers(sp.FirstToken.DESCRIPTOR)

_write_operator = writer(ops.Operator, OperatorHeader)
_write_calibration = writer(ops.Calibration, Calibration)
_write_point = writer(ops.CalibrationPoint, CalibrationPoint)
_write_held_out = writer(ops.HeldOut, HeldOut)
_write_dose = writer(ops.DosePoint, DosePoint)
_write_positions = writer(sp.Positions, Positions)
_write_store_changes = writer(ops.ReloadOperatorsResponse, StoreChanges)


def operator(entry: OperatorEntry) -> ops.Operator:
    """One entry of the store; of an unusable one, its name, size and problem."""
    if entry.artifact is None:
        return ops.Operator(name=entry.name, problem=entry.problem, size_bytes=entry.size_bytes)
    header = entry.artifact.header
    # Every other field is the header's of the same name.
    return _write_operator(
        header,
        name=entry.name,
        problem=entry.problem,
        size_bytes=entry.size_bytes,
        digest=entry.artifact.digest,
        positions=entry.artifact.positions,
        concept_token_ids=header.concept_ids,
        concept_weight=header.shares[0] if header.shares else None,
        num_texts=len(header.texts),
        more_texts=_within(_MAX_MORE_TEXTS, _more_texts(header)),
        rank=header.rank,
        low_rank=_low_rank(header.low_rank) if header.low_rank else None,
        recommended_strength=header.recommended.strength,
        recommended_rule=_RULES[header.recommended.rule],
        recommended_blend=header.recommended.blend,
        recommended_positions=_write_positions(header.recommended.positions),
        recommended_anchor=_ANCHORS[header.recommended.anchor],
        recommended_first_token=_FIRST_TOKENS[header.recommended.first_token],
        neutral=_neutral(header.neutral) if header.neutral else None,
        calibration=_calibration(header, header.calibration) if header.calibration else None,
        lens=None if header.lens is None else ops.Lens(read_from=header.lens.positions, texts=header.lens.texts),
        curve=_curve(header),
    )


def store_changes(changes: StoreChanges) -> ops.ReloadOperatorsResponse:
    """What a reload changed."""
    return _write_store_changes(changes)


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


def _neutral(neutral: NeutralTexts) -> ops.NeutralTexts:
    return ops.NeutralTexts(digest=neutral.digest, texts=len(neutral.ids))


def _curve(header: OperatorHeader) -> Iterator[ops.DosePoint]:
    """What was measured at the recommended rule, blend and positions, by strength."""
    if header.lens is not None:
        curve = header.lens.curve
        for dose in () if curve is None else curve.points:
            yield _write_dose(dose)
        return
    at = header.recommended
    for point in sorted(measured_at(header, Setting.of(at)), key=lambda each: each.strength):
        yield ops.DosePoint(strength=point.strength, kl_p95=point.kl_p95, hit_rate=point.hit_rate)


def _calibration(header: OperatorHeader, calibration: Calibration) -> ops.Calibration:
    point = header.calibrated_point
    return _write_calibration(
        calibration,
        recommended=None if point is None else _write_point(point),
        sampling=None if calibration.sampling is None else _sampling(calibration.sampling),
        held_out=None if point is None or calibration.held_out is None else _write_held_out(calibration.held_out),
    )


def _sampling(sampling: Sampling) -> text_pb2.SamplingParams:
    given = sampling.model_dump(exclude=set() if sampling.temperature else {"top_p", "seed"})
    return text_pb2.SamplingParams(**given)
