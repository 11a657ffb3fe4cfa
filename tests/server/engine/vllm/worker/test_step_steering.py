"""Steering a continuous batch, held against one sequence at a time (``operators.core.apply.Direction``)."""

import random
from dataclasses import replace

import pytest
import torch

from steer_server.engine.vllm.worker_protocol import OperatorSetting

CUMULATIVE = OperatorSetting("exact", "cumulative", 0.5, 0.0)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_every_request_of_a_mixed_batch_is_pushed_as_if_it_were_alone(batch, seed):
    chance = random.Random(seed)
    lengths = {f"r{number}": chance.randint(1, 20) for number in range(7)}
    for request, length in lengths.items():
        settings = [
            OperatorSetting(
                chance.choice(sorted(batch.loaded)),
                chance.choice(["cumulative", "substitute"]),
                chance.choice([0.7, -0.4, 0.2]),
                chance.choice([0.0, 0.0, 0.3, 1.0]),
            )
            for _ in range(chance.randint(1, 4))
        ]
        batch.begin(request, *settings, x=batch.embeddings(length, chance.randrange(1 << 20)))
    at = dict.fromkeys(lengths, 0)
    while left := [request for request in lengths if at[request] < lengths[request]]:
        parts = [
            (request, at[request], chance.randint(1, min(6, lengths[request] - at[request])))
            for request in chance.sample(left, chance.randint(1, len(left)))
        ]
        pushed = batch.step(*parts)
        for (request, layer), push in pushed.items():
            close(push, batch.expected(request, layer)[at[request] : at[request] + len(push)])
        for request, _, count in parts:
            layers = {batch.loaded[setting.digest].layer for setting in batch.settings[request]}
            assert layers <= {layer for other, layer in pushed if other == request}
            at[request] += count
    for request, length in lengths.items():
        measurement = batch.steering.measurement(request)
        assert (measurement.cached, measurement.failure) == (0, "")
        assert {len(measured.doses) for measured in measurement.layers} == {length}


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 7], [7, 1, 1, 3], [2, 9, 1]], ids=str)
def test_any_chunking_of_a_prompt_gives_the_same(batch, rule, blend, cuts):
    batch.begin("a", OperatorSetting("exact", rule, 0.6, blend))
    expected, first = batch.expected("a", 2), 0
    for count in cuts:
        close(batch.step(("a", first, count))["a", 2], expected[first : first + count])
        first += count
    assert batch.embedded_prefixes == []
    (measured,) = batch.steering.measurement("a").layers
    assert measured.doses == pytest.approx([0.3] * 12, abs=1e-5)


@pytest.mark.parametrize("rule", ["cumulative", "substitute"])
@pytest.mark.parametrize("first", [0, 3, 6, 9])
def test_a_request_that_comes_back_at_another_position_goes_on_from_its_token_ids(batch, rule, first):
    batch.begin("a", OperatorSetting("exact", rule, 0.6, 0.2), OperatorSetting("low", rule, 0.4, 0.0))
    batch.step(("a", 0, 7))
    for at, count in ((first, 2), (first + 2, 1)):
        pushed = batch.step(("a", at, count))
        for layer in (2, 3):
            close(pushed["a", layer], batch.expected("a", layer)[at : at + count])
    # A rule that sums up nothing needs nothing of what came before.
    assert batch.embedded_prefixes == ([("a", 0, first)] if rule == "cumulative" and first else [])


def test_a_request_that_begins_after_a_cached_prefix_sums_it_up_and_says_so(batch):
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.6, 0.0))
    close(batch.step(("a", 8, 3))["a", 2], batch.expected("a", 2)[8:11])
    measurement = batch.steering.measurement("a")
    assert (measurement.cached, len(measurement.layers[0].doses), measurement.failure) == (8, 3, "")


@pytest.mark.parametrize("rules", [("cumulative", "substitute"), ("substitute", "cumulative")])
def test_two_operators_at_one_layer_add_up(batch, rules):
    settings = [OperatorSetting("exact", rules[0], 0.7, 0.0), OperatorSetting("affine", rules[1], -0.4, 0.3)]
    batch.begin("both", *settings)
    batch.begin("one", settings[0], seed=1)
    batch.begin("other", settings[1], seed=2)
    pushed = batch.step(("one", 0, 4), ("both", 0, 12), ("other", 0, 5))
    for request, count in (("one", 4), ("both", 12), ("other", 5)):
        close(pushed[request, 2], batch.expected(request, 2)[:count])
    (measured,) = batch.steering.measurement("both").layers
    assert measured.doses == pytest.approx(batch.expected("both", 2).norm(dim=-1).tolist(), abs=1e-5)


def test_an_operator_that_one_request_uses_twice_is_pushed_twice_in_that_request_alone(batch):
    twice = OperatorSetting("exact", "cumulative", 0.5, 0.0), OperatorSetting("exact", "cumulative", 0.3, 0.6)
    batch.begin("twice", *twice)
    # As many tokens as the first one brings a second time: the sizes of the two groups of rows are the same.
    batch.begin("another", OperatorSetting("affine", "cumulative", 0.5, 0.0), seed=1)
    pushed = batch.step(("another", 0, 4), ("twice", 0, 4))
    close(pushed["twice", 2], batch.expected("twice", 2)[:4])
    close(pushed["another", 2], batch.expected("another", 2)[:4])


def test_the_bits_of_a_row_do_not_depend_on_its_neighbours_blend(make_batch):
    found = []
    for blend in (0.0, 0.5):
        batch = make_batch()
        batch.begin("a", OperatorSetting("exact", "cumulative", 0.6, 0.0))
        batch.begin("b", OperatorSetting("exact", "cumulative", -0.2, blend), seed=1)
        found.append(batch.step(("a", 0, 6), ("b", 0, 6))["a", 2])
    assert torch.equal(*found)


def test_hidden_states_of_half_precision_are_steered_from_embeddings_in_full(make_batch):
    batch = make_batch()
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.6, 0.0), x=batch.embeddings().bfloat16())
    batch.step(("a", 0, 4))
    close(batch.step(("a", 6, 2))["a", 2], batch.expected("a", 2)[6:8])


def test_nothing_is_read_from_the_device_while_a_step_is_prepared(batch):
    # Tensors of the device "meta" have no values: to read one is an error. On an accelerator it waits for the model.
    meta = torch.device("meta")
    for digest, loaded in batch.loaded.items():
        batch.steering.load(digest, replace(loaded, operator=loaded.operator.to(meta)))
    mixed = (
        OperatorSetting("exact", "cumulative", 0.5, 0.3),
        OperatorSetting("exact", "substitute", 0.2, 0.0),
        OperatorSetting("low", "cumulative", 1.0, 1.0),
    )
    batch.begin("a", *mixed, x=batch.embeddings().to(meta))
    batch.begin("b", OperatorSetting("affine", "cumulative", 0.5, 0.0), x=batch.embeddings().to(meta))
    for parts in ((("a", 0, 4), ("b", 2, 3)), (("a", 4, 1), ("b", 5, 1))):
        _, pushes = batch.prepare(*parts)
        assert {layer: push.push.shape for layer, push in pushes.items()} == {
            2: (sum(count for *_, count in parts), 5),
            3: (parts[0][2], 5),
        }


# Measurements.


def test_a_position_that_is_computed_once_more_is_counted_once(batch):
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.6, 0.0), OperatorSetting("low", "cumulative", 0.2, 0.0))
    doses = []

    def change(pushes):
        for push in pushes.values():
            push.moved = replace(push.moved, dose=torch.full_like(push.moved.dose, 0.01 * (1 + len(doses))))
        doses.append(None)

    for first, count in ((0, 5), (2, 4), (0, 7), (7, 1)):
        batch.step(("a", first, count), change=change)
    lower, higher = batch.steering.measurement("a").layers
    assert (lower.layer, higher.layer) == (2, 3)
    # Each as it was measured first.
    assert lower.doses == higher.doses == pytest.approx([0.01] * 5 + [0.02] + [0.03] + [0.04])


def test_a_prefix_that_is_found_half_way_through_the_prompt_is_cached_as_well(batch):
    # Preempted after 3 of its tokens; by then another request with the same steering had computed more.
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.6, 0.0), OperatorSetting("low", "cumulative", 0.2, 0.0))
    for first, count in ((0, 5), (8, 2), (10, 2)):
        batch.step(("a", first, count))
    measurement = batch.steering.measurement("a")
    assert (measurement.cached, measurement.failure) == (8, "")
    assert [len(measured.doses) for measured in measurement.layers] == [4, 4]


def test_each_layer_of_a_request_has_its_own_measurement(batch):
    batch.begin("a", OperatorSetting("exact", "cumulative", 0.6, 0.0), OperatorSetting("low", "substitute", -0.2, 0.0))
    batch.begin("b", OperatorSetting("higher", "cumulative", 1.0, 0.5), seed=1)
    batch.step(("a", 0, 2), ("b", 0, 3))
    lower, higher = batch.steering.measurement("a").layers
    assert (lower.layer, higher.layer) == (2, 3)
    assert lower.doses == pytest.approx([0.3] * 2, abs=1e-5)
    assert higher.doses == pytest.approx([0.1] * 2, abs=1e-5)
    assert [(each.layer, len(each.doses)) for each in batch.steering.measurement("b").layers] == [(3, 3)]


def test_a_request_that_never_ran_has_an_empty_measurement(batch):
    batch.begin("a", CUMULATIVE)
    measurement = batch.steering.measurement("a")
    assert (measurement.cached, measurement.layers, measurement.failure) == (0, (), "")


def test_following_a_request_again_leaves_it_as_it_is(batch):
    batch.begin("a", CUMULATIVE)
    batch.step(("a", 0, 4))
    batch.begin("a", CUMULATIVE)
    close(batch.step(("a", 4, 2))["a", 2], batch.expected("a", 2)[4:6])
    assert len(batch.steering.measurement("a").layers[0].doses) == 6


def test_a_forgotten_request_leaves_nothing_and_may_still_have_been_in_a_step(batch):
    batch.begin("a", CUMULATIVE)
    batch.begin("b", CUMULATIVE, seed=1)
    assert len(batch.steering) == 2
    batch.step(("a", 0, 3), ("b", 0, 2), change=lambda _: batch.steering.remove_request("a"))
    assert "a" not in batch.steering
    assert "b" in batch.steering
    assert len(batch.steering) == 1
    with pytest.raises(KeyError):
        batch.steering.measurement("a")
    assert batch.steering.measurement("b").layers[0].doses == pytest.approx([0.25] * 2, abs=1e-5)
    batch.steering.remove_request("a")
