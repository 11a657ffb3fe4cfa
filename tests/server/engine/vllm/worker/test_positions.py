"""Operators that push some positions only, in a continuous batch: held against one sequence at a time, masked."""

import random

import pytest
import torch

from operators.core.positions import Positions
from steer_server.engine.vllm.worker.push_plan import PushPlan
from steer_server.engine.vllm.worker_protocol import OperatorSetting

PROMPT, TEXT = 8, 14
RULES = ("all", "first", "1..", "prompt", "generated", "3..6", "prompt:2..", "generated:2..", "6..11", "generated:0..1")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def setting(positions, digest="exact", rule="cumulative", strength=0.6, blend=0.0):
    return OperatorSetting(digest, rule, strength, blend, *Positions.parse(positions).interval(PROMPT))


def due(batch, request, layer, first, end):
    """The positions among first, ..., end - 1 that some operator of a request pushes at a layer."""
    here = [one for one in batch.settings[request] if batch.loaded[one.digest].layer == layer]
    return [
        position
        for position in range(first, end)
        if any(one.start <= position and (one.end is None or position < one.end) for one in here)
    ]


def step(batch, *parts):
    """A step in which every row must get exactly what a text alone gets there."""
    pushed = batch.step(*parts)
    for request, first, count in parts:
        for layer in (2, 3):
            expected = batch.expected(request, layer)[first : first + count]
            found = pushed.get((request, layer), torch.zeros_like(expected))
            close(found, expected)
            assert found.any(-1).tolist() == [
                bool(due(batch, request, layer, at, at + 1)) for at in range(first, first + count)
            ]
    return pushed


def recorded(batch, request):
    """The positions that have a dose, by layer."""
    measurement = batch.steering.measurement(request)
    assert measurement.failure == ""
    return {
        one.layer: [one.first + place for place, dose in enumerate(one.doses) if dose > 0.0]
        for one in measurement.layers
    }


@pytest.mark.parametrize("positions", RULES)
@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cuts", [[8] + [1] * 6, [1] * 14, [3, 5, 1, 1, 4], [14]], ids=str)
def test_any_chunking_pushes_the_positions_asked_for_and_no_other(batch, positions, rule, blend, cuts):
    batch.begin("a", setting(positions, rule=rule, blend=blend), x=batch.embeddings(TEXT))
    first = 0
    for count in cuts:
        step(batch, ("a", first, count))
        first += count
    assert batch.embedded_prefixes == []
    assert recorded(batch, "a") == {2: due(batch, "a", 2, 0, TEXT)}


@pytest.mark.parametrize("seed", range(12))
def test_a_mixed_batch_with_preemptions_and_cached_prefixes_pushes_every_position_asked_for(batch, seed):
    chance = random.Random(seed)
    requests = [f"r{number}" for number in range(6)]
    for request in requests:
        chosen = [
            setting(
                chance.choice(RULES),
                chance.choice(sorted(batch.loaded)),
                chance.choice(["cumulative", "substitute"]),
                chance.choice([0.7, -0.4, 0.2]),
                chance.choice([0.0, 0.0, 0.3, 1.0]),
            )
            for _ in range(chance.randint(1, 4))
        ]
        batch.begin(request, *chosen, x=batch.embeddings(TEXT, chance.randrange(1 << 20)))
    cached = {request: chance.choice([0, 0, 3, 7]) for request in requests}
    at = dict(cached)
    while left := [request for request in requests if at[request] < TEXT]:
        chosen = chance.sample(left, chance.randint(1, len(left)))
        parts = [(request, at[request], chance.randint(1, min(5, TEXT - at[request]))) for request in chosen]
        step(batch, *parts)
        for request, first, count in parts:
            at[request] = first + count
            if chance.random() < 0.15:
                # Preempted: all of it is computed again, or what follows a prefix that is still cached.
                at[request] = chance.choice([0, cached[request], chance.randrange(first + count)])
    for request in requests:
        measurement = batch.steering.measurement(request)
        assert measurement.cached == cached[request]
        layers = {batch.loaded[one.digest].layer for one in batch.settings[request]}
        expected = {layer: due(batch, request, layer, cached[request], TEXT) for layer in layers}
        assert recorded(batch, request) == {layer: positions for layer, positions in expected.items() if positions}


@pytest.mark.parametrize("one", RULES)
@pytest.mark.parametrize("other", ["3..6", "generated", "prompt:5..", "first"])
def test_two_operators_at_one_layer_meet_only_where_both_push(batch, one, other):
    batch.begin("both", setting(one), setting(other, "affine", strength=-0.4), x=batch.embeddings(TEXT))
    batch.begin("beside", setting(other, "affine"), x=batch.embeddings(TEXT, seed=1))
    for first, count in ((0, 5), (5, 3), (8, 1), (9, 5)):
        step(batch, ("both", first, count), ("beside", first, count))
    doses = batch.expected("both", 2).norm(dim=-1)
    [measured] = batch.steering.measurement("both").layers
    assert measured.doses == pytest.approx(
        doses[measured.first : measured.first + len(measured.doses)].tolist(), abs=1e-5
    )
    assert recorded(batch, "both") == {2: due(batch, "both", 2, 0, TEXT)}


def test_what_an_operator_may_do_at_a_position_is_what_pushes_there(batch):
    def moved(at, value):
        def change(pushes):
            # As if that had been worked out, and applied.
            pushes[2].moved.dose[at] = pushes[2].moved.due[at] = value

        return change

    for request, at, value, failure in (
        ("shared", 0, 0.5, ""),
        ("against each other", 0, 0.1, ""),
        ("above", 0, 0.501, "strength 1.002 was worked out; between 0.2 and 1 is what"),
        ("below", 0, 0.099, "strength 0.198 was worked out; between 0.2 and 1 is what"),
        ("single", 3, 0.3, ""),
        ("too much for one", 3, 0.301, "strength 0.602 was worked out; 0.6 was to be applied"),
        ("too little for one", 3, 0.299, "strength 0.598 was worked out; 0.6 was to be applied"),
    ):
        batch.begin(request, setting("all"), setting("0..2", "affine", strength=0.4), x=batch.embeddings(TEXT))
        batch.step((request, 0, 5), change=moved(at, value))
        assert failure in batch.failure(request), request
        assert bool(failure) == bool(batch.failure(request)), request


# Nothing is done where nothing is asked for.


@pytest.fixture
def computed(monkeypatch):
    """How many tokens each call that works out pushes was given."""
    calls, compute = [], PushPlan.compute

    def counted(self, x):
        calls.append(len(x))
        return compute(self, x)

    monkeypatch.setattr(PushPlan, "compute", counted)
    return calls


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
def test_after_the_first_token_nothing_is_computed_embedded_pushed_or_recorded(batch, computed, rule):
    batch.begin("a", setting("first", rule=rule), setting("first", "low", rule=rule), x=batch.embeddings(TEXT))
    batch.begin("b", setting("first", "affine", rule=rule), x=batch.embeddings(TEXT, seed=1))
    _, pushes = batch.prepare(("a", 0, PROMPT), ("b", 0, 3))
    assert {layer: len(push.push) for layer, push in pushes.items()} == {2: 2, 3: 1}
    # Of the prompts, too, the first token alone.
    assert computed == [2]
    for at in range(PROMPT, TEXT):
        _, pushes = batch.prepare(("a", at, 1), ("b", at - PROMPT + 3, 1))
        assert pushes == {}
    assert computed == [2]
    assert [span.num_tokens for span in batch.embedded] == [1, 1]
    assert batch.embedded_prefixes == []


def test_a_neighbour_that_is_pushed_everywhere_costs_its_own_tokens_only(batch, computed):
    batch.begin("a", setting("first"), x=batch.embeddings(TEXT))
    batch.begin("b", setting("all"), x=batch.embeddings(TEXT, seed=1))
    step(batch, ("a", 0, PROMPT), ("b", 0, 3))
    step(batch, ("a", PROMPT, 1), ("b", 3, 1))
    assert computed == [1 + 3, 1]


@pytest.mark.parametrize(("rule", "blend"), [("substitute", 0.0), ("cumulative", 1.0)])
def test_before_its_positions_an_operator_without_a_sum_computes_nothing(batch, computed, rule, blend):
    batch.begin("a", setting("generated", rule=rule, blend=blend), x=batch.embeddings(TEXT))
    step(batch, ("a", 0, PROMPT))
    assert computed == []
    step(batch, ("a", PROMPT, 1))
    assert computed == [1]


@pytest.mark.parametrize("unusable", [0.0, float("inf")])
def test_a_direction_that_does_not_exist_at_a_position_that_is_not_pushed_is_no_failure(batch, unusable):
    x = batch.embeddings(TEXT)
    x[1] = 0.0
    x[12] = unusable
    # The direction of "substitute" is of one token alone; an operator without offset has none at a token of zeros.
    substitute = setting("6..11", rule="substitute")
    batch.begin("a", substitute, setting("2..11", "low"), x=x)
    for first, count in ((0, 8), (8, 5), (13, 1)):
        batch.step(("a", first, count))
    assert batch.failure("a") == ""
    assert recorded(batch, "a") == {2: list(range(6, 11)), 3: list(range(2, 11))}


# Preempted, or begun after a cached prefix.


@pytest.mark.parametrize("cached", [1, 5])
def test_a_first_token_that_came_from_the_cache_is_pushed_by_nobody_and_no_failure(batch, computed, cached):
    batch.begin("a", setting("first"), x=batch.embeddings(TEXT))
    for first, count in ((cached, PROMPT - cached), (PROMPT, 1)):
        assert batch.step(("a", first, count)) == {}
    measurement = batch.steering.measurement("a")
    assert (measurement.cached, measurement.layers, measurement.failure) == (cached, (), "")
    assert (computed, batch.embedded, batch.embedded_prefixes) == ([], [], [])


def test_a_preempted_request_is_pushed_at_its_first_token_again_and_counts_it_once(batch, computed):
    batch.begin("a", setting("first"), x=batch.embeddings(TEXT))
    for first, count in ((0, PROMPT), (PROMPT, 1), (0, 4), (4, 5), (9, 1)):
        step(batch, ("a", first, count))
    assert computed == [1, 1]
    assert recorded(batch, "a") == {2: [0]}


def test_a_request_that_comes_back_among_its_positions_goes_on_from_its_token_ids(batch):
    batch.begin("a", setting("6..11"), x=batch.embeddings(TEXT))
    for first, count in ((0, 13), (9, 1), (10, 2), (12, 2)):
        step(batch, ("a", first, count))
    assert batch.embedded_prefixes == [("a", 0, 9)]
    assert recorded(batch, "a") == {2: list(range(6, 11))}


# Steps that were missed.


def test_positions_that_no_step_announced_are_a_failure_even_where_they_are_not_pushed(batch):
    batch.begin("a", setting("generated"), x=batch.embeddings(TEXT))
    batch.step(("a", 0, 3))
    batch.step(("a", 6, 4), announced=False)
    assert batch.failure("a") == "positions 3 to 5 were not steered: no step announced them"


def test_a_layer_that_was_left_out_of_a_step_is_a_failure_where_it_was_to_be_pushed(batch):
    for request, positions, missed in (("a", "all", "2 to 4"), ("b", "first", ""), ("c", "4..", "4 to 4")):
        batch.begin(request, setting(positions), setting("9..", "affine"), x=batch.embeddings(TEXT))
        batch.step((request, 0, 2))
        # What a step pushed at this layer is lost, and nothing was measured.
        batch.step((request, 2, 3), change=lambda pushes: pushes.pop(2, None))
        batch.step((request, 5, 5))
        said = f"layer 2: positions {missed} were not steered: no step announced them" if missed else ""
        assert batch.failure(request) == said


def test_an_operator_that_is_unloaded_after_its_positions_is_no_failure_and_before_them_is_one(batch):
    batch.begin("after", setting("first"), x=batch.embeddings(TEXT))
    batch.begin("before", setting("generated"), x=batch.embeddings(TEXT, seed=1))
    batch.step(("after", 0, 4), ("before", 0, 4))
    batch.steering.unload("exact")
    batch.step(("after", 4, 6), ("before", 4, 6))
    assert batch.failure("after") == ""
    assert batch.failure("before") == "operator exact was unloaded"
