"""A steady batch, one token of each request a step: what it costs, what it pushes, and what ends it."""

import random
from dataclasses import replace

import pytest
import torch

from operators.core.apply import PreparedOperator
from steer_server.engine.vllm.worker.layer_hooks import push_rows
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.step_movements import StepMovements
from steer_server.engine.vllm.worker.step_plan import StepPlan
from steer_server.engine.vllm.worker.step_steering import LoadedOperator, StepSteering
from steer_server.engine.vllm.worker_protocol import OperatorSetting
from tests.operations import CountOperations

WIDTH, LAYERS, ROWS = 16, 4, 64
SETTING = OperatorSetting("exact", "cumulative", 0.6, 0.0)


@pytest.fixture
def plans(monkeypatch):
    """One entry per step that was laid out anew."""
    made, lay_out = [], StepPlan.__init__

    def counted(self, *args):
        made.append(args)
        lay_out(self, *args)

    monkeypatch.setattr(StepPlan, "__init__", counted)
    return made


def steering_of(operators):
    steering = StepSteering()
    for index in range(operators):
        basis, anchor = torch.linalg.qr(torch.randn(WIDTH, 4)).Q, torch.randn(WIDTH)
        prepared = PreparedOperator(torch.randn(3, 4, WIDTH), basis, None, anchor, anchor / anchor.norm())
        steering.load(str(index), LoadedOperator(prepared, index % LAYERS))
    for row in range(ROWS):
        setting = OperatorSetting(str(row % operators), "cumulative", 0.1 * (1 + row % 4), 0.0)
        steering.add_request(str(row), (setting,), "")
    return steering


def operations(steering, position):
    """Of one step of every request: of preparing it, pushing, measuring and recording."""
    spans = [TokenSpan(str(row), row, position, 1) for row in range(ROWS)]
    x, hidden, movements = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH), StepMovements()
    with CountOperations() as counted:
        pushes = steering.prepare(spans, lambda _: x, lambda *_: x)
    prepared = counted.count
    with counted:
        for push in pushes.values():
            push_rows(push, hidden, hidden, movements)
        movements.measure()
        steering.record(pushes)
    return prepared, counted.count


@pytest.mark.parametrize("operators", [1, 16, ROWS])
def test_a_step_of_a_steady_batch_takes_two_products_per_operator_and_little_else(operators):
    steering = steering_of(operators)
    operations(steering, 0)
    for position in (1, 2, 3):
        prepared, in_all = operations(steering, position)
        assert prepared <= 2 * operators + 24
        assert in_all <= prepared + 24 + 14 * min(operators, LAYERS)
    assert {steering.measurement(str(row)).failure for row in range(ROWS)} == {""}


def test_a_step_that_is_laid_out_anew_takes_few_operations_per_operator():
    steering = steering_of(ROWS)
    operations(steering, 0)
    steering.start_at("5", 1)
    prepared, _ = operations(steering, 1)
    # The views of what it writes: of its terms, and of its sums.
    assert prepared <= 4 * ROWS + 50


def step(batch, *parts):
    """A step in which every row must get exactly what a text alone gets there."""
    pushed = batch.step(*parts)
    for request, first, count in parts:
        for layer in (2, 3):
            expected = batch.expected(request, layer)[first : first + count]
            found = pushed.get((request, layer), torch.zeros_like(expected))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return pushed


def a_setting(chance, loaded):
    start = chance.choice([0, 0, 0, 5, 13])
    return OperatorSetting(
        chance.choice(sorted(loaded)),
        chance.choice(["cumulative", "cumulative", "substitute"]),
        # No two that cancel.
        chance.choice([0.7, 0.31, 0.2]),
        chance.choice([0.0, 0.0, 0.3, 1.0]),
        start,
        chance.choice([None, None, start + 7]),
        first_token=chance.choice(["operator", "anchor"]),
    )


@pytest.mark.parametrize("seed", range(8))
def test_requests_that_come_go_and_come_back_between_steady_steps_are_pushed_as_if_alone(batch, plans, seed):
    chance, length = random.Random(seed), 40
    at, waiting = {}, [f"r{number}" for number in range(9)]
    steps = 0
    while waiting or at:
        while waiting and (not at or chance.random() < 0.15):
            request = waiting.pop()
            settings = [a_setting(chance, batch.loaded) for _ in range(chance.randint(1, 3))]
            batch.begin(request, *settings, x=batch.embeddings(length, chance.randrange(1 << 20)))
            at[request] = 0
        # A few bring several tokens where they begin; one may be left out, or come back at an earlier token.
        parts = [(request, first, 1 if first else chance.randint(1, 4)) for request, first in at.items()]
        if len(parts) > 1 and chance.random() < 0.1:
            parts.pop(chance.randrange(len(parts)))
        step(batch, *parts)
        steps += 1
        for request, first, count in parts:
            at[request] = first + count
        if chance.random() < 0.05:
            at[chance.choice(sorted(at))] = 3
        for request in [request for request, first in at.items() if first >= length - 4]:
            assert batch.failure(request) == ""
            batch.steering.remove_request(request)
            del at[request]
    # Most steps needed no plan of their own.
    assert 0 < len(plans) < 0.7 * steps


def test_a_steady_batch_ends_where_an_operator_begins_or_ends(batch, plans):
    batch.begin("a", replace(SETTING, start=4, end=7), replace(SETTING, digest="low", start=2))
    for at in range(12):
        step(batch, ("a", at, 1))
    # Summed; the other begins; this one begins; it ends.
    assert len(plans) == 4
    assert [(one.layer, one.first, len(one.doses)) for one in batch.steering.measurement("a").layers] == [
        (2, 4, 3),
        (3, 2, 10),
    ]


def test_an_operator_that_is_unloaded_ends_it_and_fails_its_request_alone(batch):
    batch.begin("a", SETTING)
    batch.begin("b", replace(SETTING, digest="affine"), seed=1)
    for at in (0, 1):
        step(batch, ("a", at, 1), ("b", at, 1))
    batch.steering.unload("exact")
    for at in (2, 3, 4):
        pushed = batch.step(("a", at, 1), ("b", at, 1))
        assert not pushed["a", 2].any()
        torch.testing.assert_close(pushed["b", 2], batch.expected("b", 2)[at : at + 1], rtol=1e-4, atol=1e-5)
    assert batch.failure("a") == "operator exact was unloaded"
    assert batch.failure("b") == ""


def test_an_operator_that_is_loaded_again_is_the_one_that_pushes(batch):
    # Of the current token alone, so that nothing is left of the one before.
    batch.begin("a", replace(SETTING, rule="substitute"))
    for at in (0, 1):
        step(batch, ("a", at, 1))
    batch.loaded = {**batch.loaded, "exact": batch.loaded["affine"]}
    batch.steering.load("exact", batch.loaded["affine"])
    step(batch, ("a", 2, 1))


@pytest.mark.parametrize(
    "parts",
    [
        [("a", 2, 1)],
        [("b", 2, 1), ("a", 2, 1)],
        [("a", 2, 2), ("b", 2, 1)],
        [("a", 2, 1), ("b", 2, 1), ("c", 0, 1)],
    ],
    ids=["one left", "other rows", "two tokens", "one more"],
)
def test_another_step_than_the_next_one_is_laid_out_anew(batch, plans, parts):
    for seed, request in enumerate("abc"):
        batch.begin(request, SETTING, seed=seed)
    for at in (0, 1):
        step(batch, ("a", at, 1), ("b", at, 1))
    assert len(plans) == 1
    step(batch, *parts)
    assert len(plans) == 2
    assert {batch.failure(request) for request in "abc"} == {""}


def test_a_token_that_was_never_announced_is_no_next_one(batch):
    batch.begin("a", SETTING)
    for at in (0, 1):
        step(batch, ("a", at, 1))
    batch.step(("a", 4, 1), announced=False)
    assert batch.failure("a") == "positions 2 to 3 were not steered: no step announced them"


def test_a_layer_that_was_not_reached_in_a_steady_step_is_a_failure(batch):
    batch.begin("a", SETTING)
    for at in (0, 1):
        step(batch, ("a", at, 1))
    batch.step(("a", 2, 1), change=lambda pushes: setattr(pushes[2], "moved", None))
    assert batch.failure("a") == "layer 2 was not reached: the model did not call its hook"


@pytest.mark.parametrize("column", ["dose", "due", "rounding"])
@pytest.mark.parametrize("value", [0.0, 0.29, 0.3001, 9.0, float("nan"), float("inf")])
def test_what_was_measured_in_a_steady_step_is_judged_as_in_any_other(make_batch, column, value):
    def failures(*steps):
        batch = make_batch()
        batch.begin("a", SETTING)
        batch.begin("b", replace(SETTING, digest="affine"), seed=1)
        for at in steps:
            batch.step(("a", at, 1), ("b", at, 1))
        last = len(steps)

        def change(pushes):
            getattr(pushes[2].moved, column)[pushes[2].spans.index(("a", 1, last, 1))] = value

        batch.step(("a", last, 1), ("b", last, 1), change=change)
        return batch.failure("a").replace(f"position {last}", "position"), batch.failure("b")

    steady, alone = failures(0, 1), failures()
    assert steady == alone
    assert bool(steady[0]) == (column != "rounding" or value != value)
    assert steady[1] == ""
