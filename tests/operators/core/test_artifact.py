import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from operators.core.artifact import from_bytes, make_artifact, read_artifact, to_bytes
from operators.core.errors import ArtifactError
from operators.core.file_format import parse_header
from operators.core.header import OperatorHeader, Recommended, injection_layer
from operators.core.positions import Positions


def _tensors(artifact):
    return [artifact.factors, artifact.anchor, artifact.substitute_base, artifact.offset]


@pytest.mark.parametrize("affine", [False, True])
def test_an_artifact_survives_the_round_trip_bit_for_bit(make_operator, affine, tmp_path):
    artifact = make_operator(affine=affine, concept='naïve 橋 \n\t"quoted" \\ 🌉')
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_bytes(artifact))
    read = read_artifact(path)
    assert read.header == artifact.header
    assert read.digest == artifact.digest
    for found, expected in zip(_tensors(read), _tensors(artifact), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)
    assert to_bytes(read) == to_bytes(artifact)


@pytest.mark.parametrize(("name", "dtype"), [("float64", torch.float64), ("bfloat16", torch.bfloat16)])
def test_every_dtype_survives_the_round_trip(make_operator, name, dtype):
    plain = make_operator()
    header = plain.header.model_copy(update={"dtype": name})
    tensors = [tensor.to(dtype) for tensor in _tensors(plain) if tensor is not None]
    read = from_bytes(to_bytes(make_artifact(header, *tensors)), source="x")
    assert read.factors.dtype == dtype
    assert torch.equal(read.factors, tensors[0])


def test_equal_artifacts_give_equal_bytes(make_operator):
    assert len({to_bytes(make_operator(affine=True)) for _ in range(20)}) == 1


def test_equal_artifacts_give_equal_bytes_in_other_processes(make_operator):
    program = (
        "import sys, hashlib\nfrom operators.core.artifact import from_bytes, to_bytes\n"
        "data = sys.stdin.buffer.read()\nprint(to_bytes(from_bytes(data, source='x')) == data)"
    )
    done = subprocess.run([sys.executable, "-c", program], input=to_bytes(make_operator()), capture_output=True)
    assert done.stdout == b"True\n"


@pytest.mark.parametrize(
    "other",
    [{"seed": 1}, {"n": 2}, {"affine": True}, {"concept": "another"}, {"recommended": Recommended(blend=0.5)}],
)
def test_other_artifacts_have_other_digests(make_operator, other):
    assert make_operator(**other).digest != make_operator().digest


def test_one_changed_number_changes_the_digest(make_operator):
    artifact = make_operator()
    anchor = artifact.anchor.clone()
    anchor[2] = torch.nextafter(anchor[2], torch.tensor(9.0))
    changed = make_artifact(artifact.header, artifact.factors, anchor, artifact.substitute_base)
    assert changed.digest != artifact.digest


@settings(max_examples=100)
@given(concept=st.text(max_size=400))
def test_no_concept_makes_a_file_that_its_reader_refuses(make_operator, concept):
    artifact = make_operator(1, 2, concept=concept)
    assert from_bytes(to_bytes(artifact), source="x").header.concept == concept


def test_no_length_of_the_header_is_mistaken_for_another_format(make_operator):
    # A file begins with that length, and some lengths begin like a zip archive or a pickle.
    for length in range(0, 500, 4):
        from_bytes(to_bytes(make_operator(1, 2, concept="x" * length)), source="x")


def test_tensors_are_stored_without_their_graph_and_in_rows(make_operator):
    artifact = make_operator()
    jacobian = artifact.factors.transpose(1, 2).requires_grad_(True)
    copied = make_artifact(artifact.header, jacobian, artifact.anchor, artifact.substitute_base)
    read = from_bytes(to_bytes(copied), source="x")
    assert torch.equal(read.factors, jacobian)
    assert not read.factors.requires_grad


def test_the_profile_decides_where_the_operator_is_added():
    assert injection_layer("golden", 21) == 20
    assert injection_layer("residual", 21) == 21


@pytest.mark.parametrize(
    "field",
    [
        {"concept_ids": ()},
        {"concept_ids": (-1,)},
        {"layer": 0},
        {"model_fingerprint": "sha256:12"},
        {"profile": "silver"},
        {"dtype": "float16"},
        {"reconstruction_error": float("nan")},
        {"created": datetime(2030, 1, 1)},
        {"unheard": "of"},
    ],
)
def test_a_header_with_a_value_out_of_range_cannot_be_made(make_operator, field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        make_operator(1, **field)


@pytest.mark.parametrize(
    "field", [{"strength": float("inf")}, {"blend": 1.5}, {"rule": "mean"}, {"positions": "last"}, {"positions": 1}]
)
def test_recommended_values_are_values_that_can_be_used(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        Recommended(**field)


@pytest.mark.parametrize("text", ["all", "first", "generated:1..4"])
def test_recommended_positions_are_written_in_their_text_form(make_operator, text):
    positions = Positions.parse(text)
    artifact = make_operator(1, recommended=Recommended(positions=positions))
    assert json.loads(artifact.header_json)["recommended"]["positions"] == text
    assert from_bytes(to_bytes(artifact), source="x").header.recommended.positions == positions


@pytest.mark.parametrize(("written", "problem"), [('"last"', "positions is 'last'; accepted"), ("4", "is 4; a text")])
def test_positions_of_another_form_are_refused_by_the_name_of_the_field(make_operator, written, problem):
    text = make_operator(1).header_json.replace('"positions":"all"', f'"positions":{written}')
    with pytest.raises(ArtifactError, match=rf"header field 'recommended\.positions': .*{problem}"):
        parse_header(text, source="x")


def test_a_header_cannot_be_changed(make_operator):
    header = make_operator().header
    assert isinstance(header, OperatorHeader)
    with pytest.raises(ValidationError, match="frozen"):
        header.layer = 3
    assert header.created.tzinfo == UTC


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda a: {"factors": a.factors[:2]}, r"'jacobian' has shape \(2, 5, 5\).*\(3, 5, 5\)"),
        (lambda a: {"factors": a.factors.double()}, r"'jacobian' is torch\.float64.*float32"),
        (lambda a: {"anchor": a.anchor[:4]}, r"'anchor' has shape \(4,\)"),
        (lambda a: {"substitute_base": a.anchor / 0}, "'substitute_base' has values that are not finite"),
        (lambda a: {"offset": a.anchor[None]}, r"'offset' has shape \(1, 5\)"),
    ],
)
def test_parts_that_do_not_fit_together_are_not_signed(make_operator, change, named):
    artifact = make_operator()
    parts = {
        "factors": artifact.factors,
        "anchor": artifact.anchor,
        "substitute_base": artifact.substitute_base,
        **change(artifact),
    }
    with pytest.raises(ArtifactError, match=named):
        make_artifact(artifact.header, **parts)
