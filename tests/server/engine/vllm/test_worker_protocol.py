"""What travels from the server to the workers with a request."""

import json

import pytest

from operators.core.apply import Setting
from operators.core.positions import Positions
from steer_server.engine.vllm.worker_protocol import OperatorSetting, SteeringArgs, operator_settings
from steer_server.types import Application, SteeringPlan


def test_what_travels_to_the_workers_is_every_operator_of_a_strength_other_than_zero(artifact, other_artifact, plan_of):
    plan = plan_of((artifact, 0.5), (other_artifact, 0.0), (artifact, -0.25), rule="substitute", blend=0.125)
    assert operator_settings(plan, 7) == (
        OperatorSetting(artifact.digest, "substitute", 0.5, 0.125),
        OperatorSetting(artifact.digest, "substitute", -0.25, 0.125),
    )


@pytest.mark.parametrize(
    ("positions", "interval"),
    [("all", (0, None)), ("first", (0, 1)), ("2..", (2, None)), ("prompt", (0, 7)), ("generated:1..3", (8, 10))],
)
def test_positions_travel_as_those_of_the_text_with_its_prompt(artifact, positions, interval):
    setting = Setting(0.5, "cumulative", 0.0, Positions.parse(positions))
    plan = SteeringPlan((Application("operator", artifact, setting, ()),))
    assert operator_settings(plan, 7) == (OperatorSetting(artifact.digest, "cumulative", 0.5, 0.0, *interval),)


@pytest.mark.parametrize("keep_from", [None, 0, 7])
@pytest.mark.parametrize(
    "settings",
    [(), (OperatorSetting("a", "cumulative", 0.5, 0.0), OperatorSetting("b", "substitute", -0.25, 1.0, 2, 9))],
)
def test_a_worker_reads_what_the_client_wrote(settings, keep_from):
    args = SteeringArgs("key", "salt", settings, keep_from)
    # Plain lists and scalars, as which they reach the engine core.
    received = json.loads(json.dumps(args.to_extra_args()))
    assert SteeringArgs.from_extra_args(received) == args


@pytest.mark.parametrize("extra_args", [None, {}, {"another": 1}])
def test_a_request_of_somebody_else_carries_no_steering(extra_args):
    assert SteeringArgs.from_extra_args(extra_args) is None
