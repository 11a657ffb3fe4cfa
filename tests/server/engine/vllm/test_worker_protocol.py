"""What travels from the server to the workers with a request."""

import json

import pytest

from steer_server.engine.vllm.worker_protocol import OperatorSetting, SteeringArgs, operator_settings


def test_what_travels_to_the_workers_is_every_operator_of_a_strength_other_than_zero(artifact, other_artifact, plan_of):
    plan = plan_of((artifact, 0.5), (other_artifact, 0.0), (artifact, -0.25), rule="substitute", blend=0.125)
    assert operator_settings(plan) == (
        OperatorSetting(artifact.digest, "substitute", 0.5, 0.125),
        OperatorSetting(artifact.digest, "substitute", -0.25, 0.125),
    )


@pytest.mark.parametrize("keep_from", [None, 0, 7])
@pytest.mark.parametrize(
    "settings", [(), (OperatorSetting("a", "cumulative", 0.5, 0.0), OperatorSetting("b", "substitute", -0.25, 1.0))]
)
def test_a_worker_reads_what_the_client_wrote(settings, keep_from):
    args = SteeringArgs("key", "salt", settings, keep_from)
    # Plain lists and scalars, as which they reach the engine core.
    received = json.loads(json.dumps(args.to_extra_args()))
    assert SteeringArgs.from_extra_args(received) == args


@pytest.mark.parametrize("extra_args", [None, {}, {"another": 1}])
def test_a_request_of_somebody_else_carries_no_steering(extra_args):
    assert SteeringArgs.from_extra_args(extra_args) is None
