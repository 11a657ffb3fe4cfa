"""What a server says of its operators, from the header to the SDK's dataclasses."""

from dataclasses import asdict, replace
from datetime import UTC

import pytest
from steer_client import SamplingParams
from steer_client import _decode as decode
from steering.v1 import operators_pb2 as ops
from steering.v1 import steering_pb2 as sp

from operators.core.dose_curve import DoseCurve, DosePoint
from operators.core.header import ConceptText, Member, Recommended
from operators.core.positions import Positions
from steer_server.registry import OperatorEntry
from steer_server.rpc.operator_codec import operator

_DIGEST = f"sha256:{'7' * 64}"


@pytest.fixture
def full(low_artifact, remake, calibration_of):
    """A mixture of three texts, of rank 5, calibrated: everything that a header can say."""
    return remake(
        low_artifact,
        attention="eager",
        weights=(0.5, 0.75, -0.25),
        members=(Member(name="first", digest=_DIGEST, weight=1.0), Member(name="second", digest=_DIGEST, weight=-0.5)),
        calibration=calibration_of(low_artifact.header),
    )


def _told(artifact):
    """The operator as the SDK gives it, over the wire."""
    message = ops.Operator.FromString(operator(OperatorEntry("g", "", 1234, artifact)).SerializeToString())
    return decode.operator_info(message)


def test_an_exact_operator_of_one_text_is_described_by_its_header(artifact):
    message = operator(OperatorEntry("g", "", 1234, artifact))
    header = artifact.header
    assert (message.name, message.problem, message.digest) == ("g", "", artifact.digest)
    assert (message.concept, list(message.concept_token_ids)) == (header.concept, list(header.concept_ids))
    assert (message.layer, message.injection_layer, message.hidden_size) == (2, 2, header.hidden_size)
    assert (message.positions, message.size_bytes) == (len(header.concept_ids), 1234)
    assert (message.recommended_strength, message.recommended_blend) == (0.6, 0.25)
    assert message.recommended_rule == sp.RULE_SUBSTITUTE
    assert message.created.ToDatetime(UTC) == header.created
    assert message.reconstruction_error == header.reconstruction_error
    assert (message.rank, message.HasField("low_rank")) == (header.hidden_size, False)
    assert (message.num_texts, message.concept_weight, list(message.more_texts)) == (1, 1.0, [])
    assert (message.model_dtype, message.dtype) == ("float32", "float32")
    assert not message.HasField("calibration")
    assert message.attention == header.attention == "sdpa"
    info = _told(artifact)
    assert (info.exact, info.calibrated, info.rank) == (True, False, header.hidden_size)


def test_no_field_of_the_contract_is_forgotten(full):
    message = operator(OperatorEntry("g", "", 1234, full))
    assert {field.name for field, _ in message.ListFields()} == {
        field.name
        for field in ops.Operator.DESCRIPTOR.fields
        if field.name not in ("problem", "recommended_blend", "lens")
    }
    assert full.header.recommended.blend == 0.0
    for part in (message.low_rank, message.calibration, message.calibration.recommended, message.members[0]):
        assert {field.name for field, _ in part.ListFields()} == {field.name for field in part.DESCRIPTOR.fields}


def test_a_calibrated_mixture_of_low_rank_arrives_whole(full):
    info, header = _told(full), full.header
    assert info.attention == "eager"
    assert (info.rank, info.exact, info.calibrated) == (5, False, True)
    residuals = header.low_rank.residuals
    assert asdict(info.low_rank) == {
        "min_residual": min(residuals),
        "max_residual": max(residuals),
        "weighting": "embedding",
    }
    assert (info.num_texts, info.concept_weight) == (3, 0.5)
    assert [(more.text, more.token_ids, more.weight) for more in info.more_texts] == [
        (more.text, more.ids, weight) for more, weight in zip(header.more_texts, (0.75, -0.25), strict=True)
    ]
    assert [asdict(member) for member in info.members] == [member.model_dump() for member in header.members]
    assert asdict(info.calibration) == {
        "recommended": {"kl_p95": 0.75, "hit_rate": 0.5, "perplexity_ratio": 1.5, "distinct_2": 0.875},
        "plain_hit_rate": 0.0625,
        "kl_budget": 1.0,
        "max_perplexity_ratio": 2.0,
        "prompts": 20,
        "tokens": 28,
        "sampling": asdict(SamplingParams(temperature=0.5, top_p=0.75, repetition_penalty=1.2, seed=3)),
        "held_out": header.calibration.held_out.model_dump(exclude={"prompts_digest"}),
    }


def test_a_calibrated_operator_has_the_curve_of_its_setting(full):
    info, header = _told(full), full.header
    at = (header.layer, header.recommended.rule, header.recommended.blend)
    measured = [point for point in header.calibration.points if (point.layer, point.rule, point.blend) == at]
    assert 0 < len(measured) < len(header.calibration.points)
    assert [(point.strength, point.kl_p95, point.hit_rate) for point in info.curve] == sorted(
        (point.strength, point.kl_p95, point.hit_rate) for point in measured
    )
    assert {(point.kl_mean, point.useful_rate) for point in info.curve} == {(None, None)}
    assert info.lens is None


def test_a_lens_is_described_with_its_curve_and_positions(llama, make_random_lens):
    doses = (DosePoint(strength=0.1, kl_p95=0.5, kl_mean=0.125, hit_rate=0.75, useful_rate=0.625),)
    curve = DoseCurve(words=("chess",), prompts=2, prompts_digest=_DIGEST, tokens=8, plain_hit_rate=0.0, points=doses)
    source = {"curve": curve, "default_kl": 0.5, "positions": "others"}
    recommended = Recommended(strength=0.1, blend=1.0, positions=Positions(start=1))
    lens = make_random_lens(llama, lens=source, recommended=recommended)
    info = _told(lens)
    assert asdict(info.lens) == {"read_from": "others", "texts": 2}
    assert [asdict(point) for point in info.curve] == [point.model_dump() for point in doses]
    assert str(info.recommended_positions) == "1.."
    assert (info.usable, info.vector, info.exact, info.rank, info.calibrated) == (True, False, False, 0, False)
    assert _told(make_random_lens(llama)).curve == ()


def test_a_mean_of_texts_has_equal_shares(low_artifact):
    info = _told(low_artifact)
    assert [info.concept_weight, *(more.weight for more in info.more_texts)] == pytest.approx([1 / 3] * 3)


def test_a_setting_that_no_calibration_measured_is_not_called_calibrated(low_artifact, remake, calibration_of):
    chosen = calibration_of(low_artifact.header, at_recommended=False)
    info = _told(remake(low_artifact, calibration=chosen))
    assert (info.calibration.recommended, info.calibrated) == (None, False)
    assert info.calibration.kl_budget == 1.0


def test_the_largest_header_that_is_read_makes_no_large_message(full):
    widest = "𐌀" * (1 << 16)
    ids = ((1 << 31) - 1,) * (1 << 16)
    header = full.header.model_copy(
        update={
            "concept": widest,
            "concept_ids": ids,
            "more_texts": (ConceptText.model_construct(text=widest, ids=ids),) * 1024,
            "weights": (0.5,) * 1025,
            "members": (Member(name="𐌀" * 1024, digest=_DIGEST, weight=1.0),) * 64,
            "low_rank": full.header.low_rank.model_copy(update={"residuals": (0.5,) * (1 << 16)}),
            "calibration": full.header.calibration.model_copy(
                update={"words": ("𐌀" * 1024,) * 256, "points": full.header.calibration.points * 1365}
            ),
            **dict.fromkeys(("model", "architecture", "rule_set", "builder_version"), "𐌀" * 1024),
        }
    )
    message = operator(OperatorEntry("g", "", 1234, replace(full, header=header)))
    assert message.ByteSize() < 1 << 20
    assert (message.num_texts, len(message.more_texts)) == (1025, 0)


def test_texts_are_sent_in_order_while_they_fit(full):
    texts = tuple(ConceptText(text=f"{number:05d}" * 200, ids=(number,)) for number in range(100))
    header = full.header.model_copy(update={"more_texts": texts, "weights": (0.5,) * 101})
    message = operator(OperatorEntry("g", "", 1234, replace(full, header=header)))
    sent = len(message.more_texts)
    assert [each.text for each in message.more_texts] == [each.text for each in texts[:sent]]
    assert 60_000 < sum(each.ByteSize() for each in message.more_texts) <= 65536
    assert (message.num_texts, sent < 100) == (101, True)


def test_an_unusable_operator_has_its_problem_and_nothing_that_was_not_read():
    message = operator(OperatorEntry("g", "it is damaged", 7, None))
    assert {descriptor.name for descriptor, _ in message.ListFields()} == {"name", "problem", "size_bytes"}
    info = decode.operator_info(message)
    assert (info.usable, info.exact, info.calibrated, info.low_rank, info.calibration) == (
        False,
        False,
        False,
        None,
        None,
    )
