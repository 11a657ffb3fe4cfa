"""Strengths that come to nothing are refused before anything is queued, and only those."""

from dataclasses import replace

import pytest
import torch

from operators.core.apply import Setting
from operators.core.artifact import OperatorArtifact
from operators.core.positions import Positions
from steer_server.errors import InvalidRequestError
from steer_server.net_pushes import check_net_pushes
from steer_server.types import Application, SteeringPlan

PROMPT, MOST = 6, 10


def plan(*uses):
    """Of (artifact, strength, positions, other parts of the setting)."""
    applications = []
    for artifact, strength, positions, *rest in uses:
        how = {"rule": "cumulative", "blend": 0.0, **(rest[0] if rest else {})}
        setting = Setting(strength, positions=Positions.parse(positions), **how)
        applications.append(Application(f"op{len(applications)}", artifact, setting, ()))
    return SteeringPlan(tuple(applications))


def check(made, dtype="float32", **changed):
    limits = {"prompt_tokens": PROMPT, "max_tokens": MOST, "context_length": 64, **changed}
    check_net_pushes(made, "operators", **limits, dtype=dtype)


def refused(made, dtype="float32", **changed):
    with pytest.raises(InvalidRequestError) as caught:
        check(made, dtype, **changed)
    return caught.value


@pytest.mark.parametrize(("dtype", "lost", "kept"), [("float32", 1e-7, 1.2e-7), ("bfloat16", 7e-3, 8e-3)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_strength_below_the_resolution_is_refused_by_name(artifact, dtype, lost, kept, sign):
    error = refused(plan((artifact, 0.5, "all"), (artifact, sign * lost, "first")), dtype)
    assert error.field == "operators[1].strength"
    assert f"is {sign * lost:g} (op1), which is lost in rounding: hidden states in {dtype}" in str(error)
    check(plan((artifact, 0.5, "all"), (artifact, sign * kept, "first")), dtype)
    check(plan((artifact, 0.5, "all"), (artifact, 0.0, "first")), dtype)


@pytest.mark.parametrize(
    "uses",
    [
        [(0.5, "all"), (-0.5, "all")],
        [(0.5, "all"), (0.25, "all"), (-0.75, "all")],
        [(0.5, "all"), (-0.5, "first")],
        [(0.5, "..5"), (-0.5, "3..")],
        [(0.5, "prompt"), (-0.5, "2..3")],
        [(0.5, "generated"), (-0.5, "8..9")],
        [(0.5, "all"), (-0.5 - 1e-8, "all")],
        [(0.5, "all", {"blend": 1.0}), (-0.5, "all", {"blend": 1.0, "rule": "substitute"})],
        [(0.5, "all", {"anchor": "contrast"}), (-0.5, "all")],
        [(0.5, "all", {"first_token": "anchor"}), (-0.5, "first", {"blend": 1.0})],
    ],
)
def test_strengths_of_one_direction_that_cancel_somewhere_are_refused(artifact, uses):
    made = plan(*((artifact, *use) for use in uses))
    error = refused(made)
    assert error.field == f"operators[{len(uses) - 1}].strength"
    assert "cancels what the others push at position" in str(error)


@pytest.mark.parametrize(
    "uses",
    [
        [(0.5, "all"), (-0.4, "all")],
        [(0.5, "..3"), (-0.5, "3..")],
        [(0.5, "prompt"), (-0.5, "generated")],
        [(0.5, "all"), (-0.5, "all", {"rule": "substitute"})],
        [(0.5, "all"), (-0.5, "all", {"blend": 0.5})],
        [(0.5, "all", {"blend": 0.5, "anchor": "contrast"}), (-0.5, "all", {"blend": 0.5})],
        [(0.5, "20.."), (-0.5, "30.."), (0.1, "all")],
        [(0.0, "all"), (0.0, "all")],
        [(0.5, "all")],
    ],
)
def test_what_does_not_cancel_is_accepted(artifact, uses):
    check(plan(*((artifact, *use) for use in uses)))


def test_other_directions_beside_those_that_cancel_are_enough(artifact, other_artifact):
    check(plan((artifact, 0.5, "all"), (artifact, -0.5, "all"), (other_artifact, 0.1, "all")))
    # Of the other, nothing reaches the first token.
    refused(plan((artifact, 0.5, "all"), (artifact, -0.5, "all"), (other_artifact, 0.1, "1..")))
    check(plan((artifact, 0.5, "all"), (other_artifact, -0.5, "all")))


def test_positions_that_no_text_of_the_request_has_do_not_count(artifact):
    made = plan((artifact, 0.5, "all"), (artifact, -0.5, "generated:3.."))
    check(made, max_tokens=4)
    refused(made, max_tokens=5)
    check(made, max_tokens=5, context_length=PROMPT + 4)


def test_vectors_that_point_the_same_way_are_one_direction_whatever_their_length(artifact, remake):
    longer: OperatorArtifact = replace(artifact, anchor=artifact.anchor * 3, digest="sha256:" + "1" * 64)
    against = replace(artifact, anchor=-artifact.anchor, digest="sha256:" + "2" * 64)
    whole = {"blend": 1.0}
    refused(plan((artifact, 0.5, "all", whole), (longer, -0.5, "all", whole)))
    refused(plan((artifact, 0.5, "all", whole), (against, 0.5, "all", whole)))
    check(plan((artifact, 0.5, "all", whole), (longer, 0.5, "all", whole)))
    torch.testing.assert_close(longer.anchor, -3 * against.anchor)
