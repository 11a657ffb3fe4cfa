"""The header and the file of a lens: what does not fit together is refused, whoever wrote it."""

import json

import pytest
from pydantic import ValidationError

from operators.core.artifact import from_bytes, to_bytes
from operators.core.dose_curve import DoseCurve, DosePoint
from operators.core.errors import ArtifactError
from operators.core.header import Member, OperatorHeader, Recommended
from operators.core.positions import ALL_POSITIONS, Positions

POINT = DosePoint(strength=0.1, kl_p95=0.5, kl_mean=0.1, hit_rate=0.5, useful_rate=0.4)
CURVE = DoseCurve(
    words=("tea",), prompts=1, prompts_digest=f"sha256:{'1' * 64}", tokens=1, plain_hit_rate=0, points=(POINT,)
)
FIRST = Positions(end=1)


@pytest.fixture
def lens(tiny, make_random_lens):
    return make_random_lens(tiny("llama", dtype="float32"))


@pytest.fixture
def make_header(lens):
    def make(*, source=None, **fields):
        """The header of the lens with other fields; ``source``: other ones of its ``lens``."""
        described = lens.header.model_dump() | fields
        described["lens"] = {**lens.header.lens.model_dump(), **(source or {})}
        return OperatorHeader.model_validate(described)

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept_ids": (1,)}, "a lens has no 'concept_ids'"),
        ({"reconstruction_error": 0.0}, "a lens has no 'reconstruction_error'"),
        ({"profile": "golden"}, "a lens is added to the input"),
        ({"rule_set": ""}, "a lens has a 'rule_set'"),
        ({"words": ("tea",)}, "neither 'members', 'words'"),
        ({"members": (Member(name="a", digest=f"sha256:{'1' * 64}", weight=1.0),)}, "neither 'members'"),
        ({"recommended": Recommended(strength=0.0, blend=0.5, positions=FIRST)}, "recommended blend is 1"),
        (
            {"recommended": Recommended(strength=0.0, blend=1.0, positions=ALL_POSITIONS)},
            "pushes first; it recommends all",
        ),
        ({"recommended": Recommended(strength=0.1, blend=1.0, positions=FIRST)}, "where it has a 'default_kl'"),
        ({"source": {"default_kl": 0.5}}, "without the curve"),
        ({"source": {"default_kl": 0.5, "curve": CURVE.model_dump()}}, "strength above 0"),
        ({"source": {"default_kl": 0.0, "curve": CURVE.model_dump()}}, "greater than 0"),
        ({"source": {"positions": "last"}}, "'first', 'others' or 'all'"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(make_header, changes, message):
    with pytest.raises(ValidationError, match=message):
        make_header(**changes)


def test_a_lens_with_a_curve_may_recommend_a_strength(make_header):
    recommended = Recommended(strength=0.1, blend=1.0, positions=FIRST)
    header = make_header(recommended=recommended, source={"default_kl": 0.5, "curve": CURVE.model_dump()})
    assert (header.rank, header.texts, header.positions, header.lens.curve) == (0, (), 0, CURVE)


def test_a_lens_is_no_vector_as_well(make_header, make_rank_0):
    with pytest.raises(ValidationError, match="a vector has no"):
        make_header(vector=make_rank_0().header.vector, rule_set="")


def test_every_damaged_byte_is_found(lens):
    data = to_bytes(lens)
    for place in range(8, len(data), max(1, len(data) // 300)):
        damaged = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        with pytest.raises(ArtifactError):
            from_bytes(damaged, source="lens")
    for length in (0, 7, 100, len(data) - 1):
        with pytest.raises(ArtifactError):
            from_bytes(data[:length], source="lens")


def test_what_is_no_lens_is_written_as_before(make_operator, make_rank_0):
    # Versions without lenses refuse fields that they do not know.
    for artifact in (make_operator(), make_rank_0()):
        assert "lens" not in json.loads(artifact.header_json)
