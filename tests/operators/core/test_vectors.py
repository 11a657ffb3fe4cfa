"""Operators of rank 0: their file, their header, and what they push."""

import json

import pytest
import torch
from pydantic import ValidationError

from operators.core.apply import Direction, Setting, prepare, prepared_bytes
from operators.core.artifact import from_bytes, make_vector, tensors_of, to_bytes, with_header
from operators.core.errors import ArtifactError, SettingError
from operators.core.file_format import read_file_header
from operators.core.header import ConceptText, LowRank, Member, OperatorHeader, Recommended
from operators.core.store import Store
from operators.core.vector_source import ContrastVector, TextFile, VectorMixture

CPU = torch.device("cpu")
MEMBERS = (Member(name="a", digest=f"sha256:{'5' * 64}", weight=2.0),)
SIDE = TextFile(name="texts.txt", digest=f"sha256:{'4' * 64}", texts=3)


@pytest.mark.parametrize(
    "source",
    [None, ContrastVector(norm=2.0, positive=SIDE, negative=SIDE), VectorMixture(norm=1.5)],
    ids=["import", "contrast", "mixture"],
)
def test_a_vector_comes_back_from_its_file_with_every_bit(make_rank_0, source):
    members = MEMBERS if isinstance(source, VectorMixture) else ()
    made = make_rank_0(7, **({} if source is None else {"vector": source, "members": members}))
    read = from_bytes(to_bytes(made), source="a")
    assert torch.equal(read.anchor, made.anchor)
    assert (read.header, read.digest) == (made.header, made.digest)
    assert sorted(tensors_of(read)) == ["anchor"]
    assert (read.positions, read.header.rank, read.header.texts, read.header.shares) == (0, 0, (), ())
    assert read.nbytes == 7 * 4


def test_its_header_is_read_without_its_numbers(make_rank_0, tmp_path):
    made = make_rank_0()
    path = Store(tmp_path).save("happy", made)
    found = read_file_header(path)
    assert (found.header, found.digest, found.affine) == (made.header, made.digest, False)


def test_what_is_no_vector_is_written_as_before(make_operator):
    # Versions without vectors refuse fields that they do not know.
    assert "vector" not in json.loads(make_operator().header_json)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concept_ids", (1,)),
        ("more_texts", (ConceptText(text="x", ids=(1,)),)),
        ("weights", (1.0,)),
        ("rule_set", "up-live/1"),
        ("low_rank", LowRank(rank=1, residuals=(0.1,), weighting="white", oversample=1, power_iterations=1, seed=0)),
        ("tolerance", 0.1),
        ("reconstruction_error", 0.0),
    ],
)
def test_a_vector_with_a_field_of_a_map_is_refused(make_rank_0, field, value):
    with pytest.raises(ValidationError, match=f"a vector has no '{field}'"):
        make_rank_0(**{field: value})


def test_a_map_without_its_fields_is_refused(make_operator):
    fields = make_operator().header.model_dump()
    for field, value in (("concept_ids", ()), ("reconstruction_error", None)):
        with pytest.raises(ValidationError, match=f"needs '{field}'"):
            OperatorHeader(**{**fields, field: value})


def test_a_vector_is_residual_and_all_anchor(make_rank_0):
    with pytest.raises(ValidationError, match="'residual', not 'golden'"):
        make_rank_0(profile="golden", injection_layer=1)
    with pytest.raises(ValidationError, match=r"blend is 1, not 0\.5"):
        make_rank_0(recommended=Recommended(blend=0.5))
    # A value that was never checked is named like any other.
    with pytest.raises(ValidationError, match="blend is 1, not None"):
        make_rank_0(recommended=Recommended().model_copy(update={"blend": None}))


def test_mixtures_and_no_other_vectors_have_members(make_rank_0):
    with pytest.raises(ValidationError, match="'import' has 1 members"):
        make_rank_0(members=MEMBERS)
    with pytest.raises(ValidationError, match="'mixture' has 0 members"):
        make_rank_0(vector=VectorMixture(norm=1.5))


def test_tensors_of_a_map_in_a_vectors_file_are_refused(make_rank_0, make_operator):
    vector, operator = make_rank_0(), make_operator()
    with pytest.raises(ArtifactError, match="unknown"):
        make_vector(operator.header, vector.anchor)
    with pytest.raises(ArtifactError, match="shape"):
        make_vector(vector.header, vector.anchor[:4])
    with pytest.raises(ArtifactError, match="not finite"):
        make_vector(vector.header, vector.anchor / 0)


def test_a_changed_header_keeps_the_numbers(make_rank_0):
    made = make_rank_0()
    changed = with_header(made, words=("happy",))
    assert torch.equal(changed.anchor, made.anchor)
    assert (changed.header.words, changed.digest != made.digest) == (("happy",), True)


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
def test_every_token_is_pushed_along_the_unit_vector(make_rank_0, rule):
    made = make_rank_0(6)
    operator = prepare(made, CPU)
    direction = Direction(operator, Setting(-0.7, rule, 1.0))
    expected = made.anchor / made.anchor.norm()
    for count in (1, 3, 0):
        pushes = direction.advance(torch.randn(count, 6))
        assert pushes.shape == (count, 6)
        torch.testing.assert_close(pushes, expected.expand(count, 6))
    assert operator.is_vector
    assert operator.nbytes == prepared_bytes(made) == 6 * 4


@pytest.mark.parametrize("blend", [0.0, 0.5, 0.999])
def test_any_other_blend_is_an_error_and_never_another_push(make_rank_0, blend):
    with pytest.raises(SettingError, match=r"blend is .*; the operator is a vector \(rank 0\), and only 1"):
        Direction(prepare(make_rank_0(), CPU), Setting(0.5, "cumulative", blend))
