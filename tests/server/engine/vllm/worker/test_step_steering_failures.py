"""What makes the text of a request in a batch one that must not be shown."""

from dataclasses import replace

import pytest
import torch

from operators.core.apply import prepare
from steer_server.engine.vllm.worker.request_state import LayerDoses
from steer_server.engine.vllm.worker.step_steering import LoadedOperator
from steer_server.engine.vllm.worker_protocol import OperatorSetting

CUMULATIVE = OperatorSetting("exact", "cumulative", 0.5, 0.0)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def set_doses(value):
    def change(pushes):
        for push in pushes.values():
            push.moved = None if value is None else replace(push.moved, dose=torch.full_like(push.moved.dose, value))

    return change


def test_an_operator_that_was_never_loaded_is_a_failure(batch):
    batch.begin(
        "a", OperatorSetting("exact", "cumulative", 0.5, 0.0), OperatorSetting("unknown", "cumulative", 0.5, 0.0)
    )
    batch.step(("a", 0, 2))
    assert batch.failure("a") == "operator unknown is not loaded"


@pytest.mark.parametrize(
    "setting",
    [CUMULATIVE, OperatorSetting("exact", "substitute", 0.5, 0.0), OperatorSetting("exact", "cumulative", 0.5, 1.0)],
    ids=str,
)
def test_an_operator_that_is_unloaded_under_a_request_is_its_failure(batch, setting):
    batch.begin("a", setting)
    batch.begin("b", OperatorSetting("affine", "cumulative", 0.5, 0.0), seed=1)
    batch.step(("a", 0, 2), ("b", 0, 2))
    batch.steering.unload("exact")
    batch.steering.unload("exact")
    assert set(batch.steering.loaded) == {"affine", "higher", "low"}
    pushed = batch.step(("a", 2, 2), ("b", 2, 2))
    assert not pushed["a", 2].any()
    close(pushed["b", 2], batch.expected("b", 2)[2:4])
    assert batch.failure("a") == "operator exact was unloaded"
    assert batch.failure("b") == ""


def test_a_request_whose_only_operator_is_gone_is_a_failure_even_when_nothing_else_is_steered(batch):
    batch.begin("a", CUMULATIVE)
    batch.steering.unload("exact")
    assert batch.step(("a", 0, 2)) == {}
    assert batch.failure("a") == "operator exact was unloaded"


@pytest.mark.parametrize("blend", [0.0, 0.5])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_direction_that_does_not_exist_is_a_failure_of_its_request_alone(batch, value, blend):
    x = batch.embeddings()
    x[:3] = 0.0 if value == 0.0 else batch.embeddings(3)
    x[2] = value
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.5, blend), x=x)
    batch.begin("b", OperatorSetting("exact", "cumulative", 0.5, 0.3), seed=1)
    pushed = batch.step(("b", 0, 2), ("a", 0, 3))
    place = 0 if value == 0.0 else 2
    assert batch.failure("a") == f"the steering direction at position {place} is zero or not finite"
    assert not pushed["a", 2][2].any()
    close(pushed["b", 2], batch.expected("b", 2)[:2])
    assert batch.failure("b") == ""


@pytest.mark.parametrize("lost", ["exact", "affine", "both"])
def test_a_direction_that_one_of_two_operators_lacks_is_told_by_its_position(make_batch, lost):
    batch = make_batch()
    # J x = 0 for every operator without an offset.
    x = batch.embeddings()
    if lost != "affine":
        x[0] = 0.0
    if lost != "exact":
        x[3] = float("inf")
    batch.begin(
        "a", OperatorSetting("exact", "cumulative", 0.5, 0.0), OperatorSetting("affine", "cumulative", 0.3, 0.0), x=x
    )
    batch.begin("b", OperatorSetting("exact", "cumulative", 0.5, 0.0), seed=1)
    batch.step(("b", 0, 2), ("a", 0, 5))
    place = 3 if lost == "affine" else 0
    assert batch.failure("a") == f"the steering direction at position {place} is zero or not finite"
    assert batch.failure("b") == ""


def test_the_anchor_is_a_direction_whatever_the_embeddings_are(batch):
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.5, 1.0), x=torch.zeros_like(batch.embeddings()))
    close(batch.step(("a", 0, 3))["a", 2], batch.expected("a", 2)[:3])
    assert batch.failure("a") == ""


def test_a_hook_that_never_ran_is_a_failure(batch):
    batch.begin("a", CUMULATIVE)
    batch.begin("b", OperatorSetting("low", "cumulative", 0.5, 0.0))
    batch.step(("a", 0, 2), ("b", 0, 2), change=lambda pushes: setattr(pushes[2], "moved", None))
    assert batch.failure("a") == "layer 2 was not reached: the model did not call its hook"
    assert batch.failure("b") == ""


@pytest.mark.parametrize("dose", [0.0, -0.1, float("nan"), float("inf")])
def test_a_hidden_state_that_did_not_move_by_a_positive_amount_is_a_failure(batch, dose):
    batch.begin("a", CUMULATIVE)
    batch.step(("a", 0, 2), change=set_doses(dose))
    assert f"layer 2: the hidden state moved as by strength {2 * dose:g}" in batch.failure("a")


@pytest.mark.parametrize("factor", [0.01, 0.5, 0.999, 1.001, 2.0])
@pytest.mark.parametrize("setting", [CUMULATIVE, OperatorSetting("exact", "cumulative", -1.5, 0.5)], ids=str)
def test_a_dose_that_is_not_half_the_strength_is_a_failure(batch, setting, factor):
    batch.begin("a", setting)
    batch.step(("a", 0, 3), change=set_doses(abs(setting.strength) / 2 * factor))
    expected = f"{abs(setting.strength):g}"
    assert f"moved as by strength {abs(setting.strength) * factor:g}; {expected} was to be" in batch.failure("a")


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_dose_that_is_not_that_of_the_sum_of_the_pushes_is_a_failure(batch, factor):
    settings = CUMULATIVE, OperatorSetting("affine", "cumulative", -0.2, 0.0)
    for request, scale in (("a", 1.0), ("b", factor)):
        batch.begin(request, *settings, OperatorSetting("low", "cumulative", 9.0, 0.0))

        def change(pushes, scale=scale):
            pushes[2].moved = replace(pushes[2].moved, dose=scale * pushes[2].moved.dose)

        batch.step((request, 0, 2), change=change)
    assert batch.failure("a") == ""
    assert "layer 2: the hidden state moved as by strength" in batch.failure("b")


def test_a_push_beyond_what_the_strengths_can_give_is_a_failure_though_it_was_applied(batch):
    batch.begin("a", CUMULATIVE)
    batch.step(("a", 0, 2), change=lambda pushes: setattr(pushes[2], "moved", twice(pushes[2].moved)))
    assert "a push of strength 1 was worked out; 0.5 was to be applied" in batch.failure("a")


def twice(moved):
    return replace(moved, dose=2 * moved.dose, due=2 * moved.due)


def test_a_layer_that_was_pushed_twice_in_one_step_is_a_failure(batch):
    batch.begin("a", CUMULATIVE)
    batch.step(("a", 0, 2), change=lambda pushes: setattr(pushes[2], "times", 2))
    assert batch.failure("a") == "layer 2 was pushed 2 times in one step"


@pytest.mark.parametrize("count", range(1, 13))
def test_strengths_that_cancel_are_a_failure_however_they_are_rounded(batch, make_operator, count):
    # Worked out in places of their own, equal directions may differ in their last bits.
    batch.steering.load("same", LoadedOperator(prepare(make_operator(seed=1), torch.device("cpu")), 2))
    for request, other in (("a", "exact"), ("b", "same")):
        batch.begin(request, CUMULATIVE, OperatorSetting(other, "cumulative", -0.5, 0.0))
        batch.begin(f"beside {request}", OperatorSetting(other, "cumulative", 0.5, 0.0), seed=1)
    batch.step(*((request, 0, count) for request in batch.texts))
    assert "strengths may cancel" in batch.failure("a")
    assert "strengths may cancel" in batch.failure("b")
    assert batch.failure("beside a") == batch.failure("beside b") == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weakest_strength_that_a_dtype_resolves_is_no_rounding(make_batch, dtype):
    batch = make_batch(dtype)
    batch.begin("a", OperatorSetting("exact", "cumulative", torch.finfo(dtype).eps, 0.0))
    batch.step(("a", 0, 12))
    assert batch.failure("a") == ""


def test_a_dose_is_looked_at_when_its_position_is_computed_once_more(batch):
    batch.begin("a", CUMULATIVE)
    batch.step(("a", 0, 4))
    batch.step(("a", 0, 4), change=set_doses(0.9))
    assert "moved as by strength 1.8" in batch.failure("a")
    assert batch.steering.measurement("a").layers == (LayerDoses(2, 0, pytest.approx([0.25] * 4, abs=1e-5)),)


def test_the_first_failure_is_the_one_that_is_told(batch):
    batch.begin("a", CUMULATIVE)
    batch.step(("a", 0, 2), change=set_doses(None))
    batch.step(("a", 2, 2), change=set_doses(0.9))
    batch.steering.unload("exact")
    batch.step(("a", 4, 1))
    assert "was not reached" in batch.failure("a")


# Tokens that no step brought.


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("setting", [CUMULATIVE, OperatorSetting("exact", "substitute", 0.5, 0.0)], ids=str)
def test_a_chunk_of_a_prompt_that_was_not_seen_is_a_failure_and_no_cached_prefix(batch, setting, first):
    batch.begin("a", setting)
    batch.begin("b", setting, seed=1)
    batch.step(("b", 0, 4), *([("a", 0, first)] if first else []))
    batch.step(("a", 6, 2), ("b", 4, 2), announced=False)
    batch.step(("a", 8, 1), ("b", 6, 1))
    assert batch.failure("a") == f"positions {first} to 5 were not steered: no step announced them"
    assert batch.steering.measurement("a").cached == 0
    assert batch.failure("b") == ""


@pytest.mark.parametrize("at", [0, 2, 4, 6])
def test_a_request_that_was_announced_at_a_position_must_go_on_from_there(batch, at):
    batch.begin("a", CUMULATIVE)
    batch.step(("a", 0, 4))
    # Also where its own earlier steps had come as far: what they left is gone.
    batch.steering.start_at("a", at)
    batch.step(("a", 7, 2), announced=False)
    assert batch.failure("a") == f"positions {at} to 6 were not steered: no step announced them"


def test_a_request_that_was_announced_twice_before_it_ran_begins_where_it_was_announced_last(batch):
    batch.begin("a", CUMULATIVE)
    batch.steering.start_at("a", 8)
    batch.steering.start_at("a", 2)
    batch.step(("a", 2, 8), announced=False)
    measurement = batch.steering.measurement("a")
    assert (measurement.cached, measurement.failure) == (8, "")


def test_a_step_that_ran_without_a_request_fails_it_and_whoever_found_what_that_step_left(batch):
    for request in ("a", "after", "beside"):
        batch.begin(request, CUMULATIVE, salt="s" if request != "beside" else "another salt")
    batch.step(("beside", 0, 4))
    batch.steering.fail_unprepared("a")
    batch.step(("after", 4, 2), ("beside", 4, 2))
    # It finds its own blocks, which would pass for another's.
    batch.step(("a", 4, 2))
    assert batch.failure("a") == "a step ran without its pushes"
    assert batch.failure("after") == INHERITED
    assert batch.failure("beside") == ""


def test_a_request_that_nobody_follows_may_be_announced_and_missed(batch):
    batch.steering.start_at("plain", 4)
    batch.steering.fail_unprepared("plain")
    assert len(batch.steering) == 0


def test_a_layer_that_was_left_out_of_a_step_is_a_failure(batch):
    batch.begin("a", CUMULATIVE, OperatorSetting("low", "cumulative", 0.5, 0.0))
    batch.step(("a", 0, 4))
    batch.step(("a", 4, 2), change=lambda pushes: pushes.pop(3))
    assert batch.failure("a") == ""
    batch.step(("a", 6, 1))
    assert batch.failure("a") == "layer 3: positions 4 to 5 were not steered: no step announced them"


# What a request that failed left in the cache of keys and values.

INHERITED = "its prompt's beginning was left by a request that failed"


def _fails(batch, request="bad", salt="s"):
    batch.begin(request, CUMULATIVE, salt=salt)
    batch.step((request, 0, 4), change=set_doses(None))


@pytest.mark.parametrize("taken", [True, False], ids=["its measurement taken", "still running"])
def test_a_request_that_begins_on_what_a_failed_one_left_fails_too(batch, taken):
    _fails(batch)
    if taken:
        batch.steering.measurement("bad")
        batch.steering.remove_request("bad")
    for request, salt, first in (("after", "s", 4), ("whole", "s", 0), ("other", "another salt", 4)):
        batch.begin(request, CUMULATIVE, salt=salt)
        batch.step((request, first, 2))
    assert batch.failure("after") == INHERITED
    # These two share none of its keys and values.
    assert batch.failure("whole") == batch.failure("other") == ""


def test_a_request_that_begins_on_what_an_unknown_operator_left_fails_too(batch):
    batch.begin("bad", OperatorSetting("late", "cumulative", 0.5, 0.0), salt="s")
    batch.step(("bad", 0, 4))
    batch.steering.load("late", batch.loaded["exact"])
    batch.begin("after", OperatorSetting("late", "cumulative", 0.5, 0.0), salt="s")
    batch.step(("after", 4, 2))
    assert batch.failure("after") == INHERITED


def test_a_request_that_was_under_way_before_is_not_to_blame_for_a_later_failure(batch):
    for request in ("first", "bad"):
        batch.begin(request, CUMULATIVE, salt="s")
        batch.step((request, 2, 2))
    batch.step(("bad", 4, 2), change=set_doses(None))
    batch.step(("first", 4, 2))
    assert batch.failure("bad") != ""
    assert batch.failure("first") == ""


def test_what_a_request_leaves_may_be_found_in_the_very_same_step(batch):
    batch.begin("bad", CUMULATIVE, salt="s")
    batch.begin("beside", OperatorSetting("low", "cumulative", 0.5, 0.0), salt="s")
    batch.step(("bad", 0, 4), ("beside", 4, 1), change=lambda pushes: setattr(pushes[2], "moved", None))
    assert batch.failure("beside") == INHERITED


def test_a_failure_that_is_noticed_late_reaches_those_who_began_in_between(batch):
    # Measurements are read from the device some steps after they were made.
    for request in ("before", "bad", "after"):
        batch.begin(request, CUMULATIVE, salt="s")
    batch.step(("before", 2, 2))
    _, failing = batch.prepare(("bad", 0, 4))
    batch.step(("after", 4, 2))
    batch.step(("before", 4, 2))
    batch.steering.record(failing)
    _fails(batch, "bad later")
    assert "was not reached" in batch.failure("bad")
    assert batch.failure("after") == INHERITED
    assert batch.failure("before") == ""


def test_a_request_that_comes_back_finds_what_a_failed_one_left(batch):
    batch.begin("a", CUMULATIVE, salt="s")
    batch.step(("a", 0, 6))
    _fails(batch)
    batch.step(("a", 4, 2))
    assert batch.failure("a") == INHERITED


def test_a_request_that_comes_back_to_where_it_stood_may_stand_on_what_a_failed_one_left(batch):
    for request in ("a", "never away"):
        batch.begin(request, CUMULATIVE, salt="s")
        batch.step((request, 0, 4))
    _fails(batch)
    # Its own blocks were given away meanwhile.
    batch.steering.start_at("a", 4)
    batch.step(("a", 4, 2), ("never away", 4, 2))
    assert batch.failure("a") == INHERITED
    assert batch.failure("never away") == ""


def test_what_a_missed_chunk_left_is_tainted_from_the_missed_step_on(batch):
    batch.begin("a", CUMULATIVE, salt="s")
    batch.begin("after", CUMULATIVE, salt="s")
    # A step in which nothing was prepared brought positions 0 to 3 of the one, and the other finds them.
    batch.steering.start_at("after", 4)
    batch.step(("after", 4, 2), ("a", 4, 2), announced=False)
    assert "were not steered" in batch.failure("a")
    assert batch.failure("after") == INHERITED
