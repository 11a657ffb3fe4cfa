"""Whatever can be signed can be read, as the same operator."""

import dataclasses
import io
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from operators.core import artifact as artifacts
from operators.core import file_format
from operators.core.artifact import from_bytes, make_artifact, to_bytes, with_header
from operators.core.errors import ArtifactError
from operators.core.file_format import parse_file_header
from operators.core.header import (
    Calibration,
    CalibrationPoint,
    ConceptText,
    LowRank,
    Member,
    NeutralTexts,
    OperatorHeader,
    Recommended,
)
from operators.core.positions import Positions
from operators.core.store import Store
from operators.core.vector_source import ContrastVector, TextFile, VectorMixture

# Values that a header's fields accept, and others that they do not.
_TEXT = (
    st.one_of(st.text(max_size=20), st.sampled_from(["", "x" * 1024, "x" * 1025, "\udc80", "\0", '"\\'])) | st.none()
)
_NUMBER = st.one_of(
    st.floats(-2.0, 2.0), st.sampled_from([7.0, -0.0, 5e-324, float("nan"), float("inf"), 1 << 40, True, "1", None])
)
_FINGERPRINT = st.sampled_from([f"sha256:{'a' * 64}", f"weights-sha256:{'0' * 64}", "sha256:0", f"md5:{'0' * 64}"])
_IDS = st.lists(st.integers(-1, 1 << 31), max_size=4).map(tuple) | st.just([0, 1, 2])
_RECOMMENDED = st.builds(
    lambda **fields: Recommended().model_copy(update=fields),
    strength=_NUMBER,
    blend=_NUMBER,
    rule=st.sampled_from(["cumulative", "substitute", "other"]),
    positions=st.sampled_from([Positions(), Positions(end=1), Positions(start=3), "first", "sometimes"]),
    anchor=st.sampled_from(["contrast", "concept"]),
    first_token=st.sampled_from(["operator", "anchor"]),
)
_POINT = CalibrationPoint(
    layer=2, rule="cumulative", blend=0.0, strength=0.5, texts=2, kl_p95=0.1, hit_rate=1.0, perplexity_ratio=1.0,
    distinct_2=0.5,
)  # fmt: skip
_CALIBRATION = Calibration(
    words=("a",), kl_budget=1.0, max_perplexity_ratio=2.0, min_distinct_ratio=0.5, prompts=2, tokens=3,
    plain_hit_rate=0.0, plain_perplexity=2.0, plain_distinct_2=0.5, points=(_POINT,), chosen=0,
)  # fmt: skip
_ZONES = [UTC, timezone(timedelta(hours=-3, minutes=30))]
_FIELDS = {
    "concept": _TEXT | st.sampled_from(["x" * (1 << 16), "x" * ((1 << 16) + 1)]),
    "concept_ids": _IDS,
    "concept_tokens": st.none() | st.lists(_TEXT, max_size=4).map(tuple),
    "more_texts": st.sampled_from([(), (ConceptText(text="b", ids=(1,)),)]),
    "weights": st.lists(_NUMBER, max_size=2).map(tuple),
    "members": st.lists(st.builds(Member, name=st.just("a"), digest=st.just(f"sha256:{'b' * 64}"), weight=st.just(1.0)))
    .map(tuple)
    .filter(lambda members: len(members) < 4),
    "words": st.one_of(
        st.lists(_TEXT, max_size=3).map(tuple), st.sampled_from([("a",) * 256, ("a",) * 257, ["a"] * 300])
    ),
    "model": _TEXT,
    "architecture": _TEXT,
    "rule_set": _TEXT,
    "model_fingerprint": _FINGERPRINT,
    "tokenizer_fingerprint": _FINGERPRINT,
    "profile": st.sampled_from(["golden", "residual", "silver"]),
    "layer": st.integers(-1, 6),
    "injection_layer": st.integers(-1, 6),
    "num_layers": st.integers(0, 6),
    "hidden_size": st.integers(4, 6),
    "dtype": st.sampled_from(["float32", "float64", "int8"]),
    "model_dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
    "attention": st.none() | _TEXT,
    "tolerance": _NUMBER,
    "reconstruction_error": _NUMBER,
    "recommended": _RECOMMENDED,
    "calibration": st.sampled_from(
        [None, _CALIBRATION, *(_CALIBRATION.model_copy(update=update) for update in ({"chosen": 4}, {"words": ()}))]
    ),
    "neutral": st.sampled_from([None, NeutralTexts(digest=f"sha256:{'4' * 64}", ids=((1, 2), (3,)))]),
    "low_rank": st.sampled_from(
        [None, LowRank(rank=2, residuals=(0.1,), weighting="white", oversample=0, power_iterations=0, seed=0)]
    ),
    "vector": st.sampled_from(
        [
            None,
            VectorMixture(norm=1.0),
            ContrastVector(norm=1.0, **dict.fromkeys(("positive", "negative"), TextFile(
                name="a", digest=f"sha256:{'5' * 64}", texts=1))),
        ]
    ),
    "created": st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.sampled_from(_ZONES))
    | st.just(datetime(2030, 1, 1)),
    "builder_version": _TEXT,
    "no_such_field": st.integers(),
}  # fmt: skip


@pytest.fixture(scope="module")
def operators(make_operator, make_rank_0, make_random_lens, tiny):
    """One of every kind."""
    return (make_operator(neutral=True), make_operator(affine=True), make_rank_0(), make_random_lens(tiny("llama")))


def _check_reads_back(artifact):
    data = to_bytes(artifact)
    read = from_bytes(data, source="x")
    assert (read.header, read.header_json, read.digest) == (artifact.header, artifact.header_json, artifact.digest)
    assert parse_file_header(io.BytesIO(data), len(data), source="x").header == artifact.header
    assert to_bytes(read) == data


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(kind=st.integers(0, 3), data=st.data())
def test_what_can_be_signed_reads_back_equal(operators, kind, data):
    names = data.draw(st.lists(st.sampled_from(sorted(_FIELDS)), min_size=1, max_size=2, unique=True))
    changes = {name: data.draw(_FIELDS[name], label=name) for name in names}
    for sign in (
        lambda artifact: with_header(artifact, **changes),
        # A header that nobody has checked since.
        lambda artifact: artifacts._signed(artifact.header.model_copy(update=changes), artifacts.tensors_of(artifact)),
    ):
        try:
            signed = sign(operators[kind])
        except ArtifactError:
            continue
        _check_reads_back(signed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"words": ["w"] * 300}, "'words'.*256"),
        ({"words": ("w" * 2000,)}, "'words.0'"),
        ({"recommended": Recommended().model_copy(update={"blend": 7.0})}, "'recommended.blend'"),
        ({"recommended": {"blend": 7.0}}, "'recommended.blend'"),
        ({"recommended": Recommended().model_copy(update={"strength": float("nan")})}, "'recommended.strength'"),
        ({"calibration": _CALIBRATION.model_copy(update={"chosen": 1})}, "chosen is 1"),
        ({"concept": "\udc80"}, "'concept'"),
        ({"no_such_field": 1}, "'no_such_field'"),
        ({"layer": 0}, "'layer'"),
    ],
)
def test_a_header_that_its_reader_would_refuse_is_not_signed(make_operator, changes, words):
    with pytest.raises(ArtifactError, match=words):
        with_header(make_operator(), **changes)


@pytest.mark.parametrize("changes", [{"words": ["w"] * 300}, {"words": ["w"]}, {"concept_ids": [0, 1, 2]}])
def test_a_header_that_was_changed_after_it_was_made_is_not_signed(make_operator, changes):
    good = make_operator()
    header = good.header.model_copy(update=changes)
    with pytest.raises(ArtifactError, match=r"header"):
        make_artifact(header, good.factors, good.anchor, good.substitute_base)


def test_a_list_is_written_as_the_tuple_that_is_read(make_operator):
    signed = with_header(make_operator(), words=["a", "b"])
    assert signed.header.words == ("a", "b")
    _check_reads_back(signed)


def test_a_header_longer_than_is_read_is_not_signed(make_operator, monkeypatch):
    good = make_operator()
    monkeypatch.setattr(file_format, "MAX_JSON_BYTES", (1 << 16) + 1000)
    with pytest.raises(ArtifactError, match="the header takes"):
        with_header(good, concept='"' * 500)


def test_more_numbers_than_are_read_are_not_signed(make_operator, monkeypatch):
    good = make_operator()
    monkeypatch.setattr(artifacts, "MAX_BYTES", artifacts.MAX_JSON_BYTES + good.nbytes - 1)
    with pytest.raises(ArtifactError, match=f"its numbers take {good.nbytes} bytes"):
        with_header(good, concept="b")


def test_every_field_is_tried():
    assert set(OperatorHeader.model_fields) - set(_FIELDS) == {"embedding", "lens"}


@pytest.mark.parametrize(
    "change",
    [
        lambda artifact: {"anchor": artifact.anchor + 1},
        lambda artifact: {"anchor": artifact.anchor * float("nan")},
        lambda artifact: {"factors": artifact.factors[:1]},
        lambda artifact: {"digest": f"sha256:{'0' * 64}"},
        lambda artifact: {"header_json": artifact.header_json.replace("a concept", "another")},
        lambda artifact: {"header": artifact.header.model_copy(update={"recommended": Recommended(strength=0.1)})},
        lambda artifact: {"header_json": artifact.header_json.replace("true", "1").replace(":2,", ":-2,")},
    ],
)
def test_what_was_changed_after_it_was_signed_is_not_saved(make_operator, tmp_path, change):
    signed = make_operator()
    with pytest.raises(ArtifactError, match=r"^a: "):
        Store(tmp_path).save("a", dataclasses.replace(signed, **change(signed)))
    assert list(tmp_path.iterdir()) == []
    Store(tmp_path).save("a", signed)
    assert Store(tmp_path).load("a").digest == signed.digest
