"""Measurements of the workers: requested together, and turned into receipts only where they prove the plan."""

import asyncio
from dataclasses import replace

import pytest

from operators.core.apply import Setting
from operators.core.positions import Positions
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.measurements import MeasurementCollector, measured_receipts, merge_measurements
from steer_server.engine.vllm.worker_protocol import OperatorSetting
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import Application, SteeringPlan


class Workers:
    """Answer when they are let; note what was asked together."""

    def __init__(self):
        self.calls, self.error, self.answer = [], None, None
        self.gate = asyncio.Event()
        self.gate.set()

    async def take(self, keys):
        self.calls.append(keys)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [{"of": key} for key in keys] if self.answer is None else self.answer


@pytest.fixture
async def workers():
    return Workers()


@pytest.fixture
def salts():
    return CacheSalts()


@pytest.fixture
def collector(workers, salts):
    return MeasurementCollector(workers.take, salts)


async def test_each_request_gets_its_own_measurement(workers, collector):
    workers.answer = [{"of": "a"}, None]
    assert await asyncio.gather(collector.take("a"), collector.take("b")) == [{"of": "a"}, None]


async def test_what_is_wanted_at_the_same_time_is_asked_for_together(workers, collector):
    workers.gate.clear()
    first = asyncio.ensure_future(collector.take("a"))
    await asyncio.sleep(0.01)
    others = [asyncio.ensure_future(collector.take(key)) for key in "bcd"]
    await asyncio.sleep(0.01)
    assert workers.calls == [["a"]]
    workers.gate.set()
    assert await asyncio.gather(first, *others) == [{"of": key} for key in "abcd"]
    assert workers.calls == [["a"], ["b", "c", "d"]]
    assert await collector.take("e") == {"of": "e"}
    assert workers.calls[2:] == [["e"]]


@pytest.mark.parametrize("problem", ["a failed call", "an answer too few"])
async def test_an_error_reaches_everyone_who_waits_and_no_one_after(workers, collector, problem):
    if problem == "a failed call":
        workers.error = RuntimeError("the engine died")
    else:
        workers.answer = []
    found = await asyncio.wait_for(asyncio.gather(*map(collector.take, "abc"), return_exceptions=True), 5)
    assert [type(error) for error in found] == [RuntimeError if workers.error else ValueError] * 3
    workers.error = workers.answer = None
    assert await collector.take("d") == {"of": "d"}


async def test_one_who_gives_up_leaves_the_others_their_measurements(workers, collector):
    workers.gate.clear()
    given_up, other = (asyncio.ensure_future(collector.take(key)) for key in "ab")
    await asyncio.sleep(0.01)
    given_up.cancel()
    workers.gate.set()
    assert await asyncio.wait_for(other, 5) == {"of": "b"}
    with pytest.raises(asyncio.CancelledError):
        await given_up
    workers.error = RuntimeError("the engine died")
    workers.gate.clear()
    given_up, other = (asyncio.ensure_future(collector.take(key)) for key in "ab")
    await asyncio.sleep(0.01)
    given_up.cancel()
    workers.gate.set()
    with pytest.raises(RuntimeError, match="the engine died"):
        await asyncio.wait_for(other, 5)


SETTINGS, OTHER = ((OperatorSetting(digest, "cumulative", 0.4, 0.0),) for digest in ("gate", "dress"))
GOOD, BAD = ({"cached": 0, "layers": {}, "failure": failure} for failure in ("", "layer 2 was not reached"))


@pytest.mark.parametrize("waiting", [True, False], ids=["read", "abandoned"])
@pytest.mark.parametrize(
    ("measurement", "begun", "renewed"),
    [
        (GOOD, True, False),
        (GOOD, False, False),
        (BAD, True, True),
        (BAD, False, True),
        (None, True, True),
        # Aborted in the queue, it left nothing.
        (None, False, False),
    ],
)
async def test_a_row_that_failed_takes_its_shared_prefixes_along_whether_or_not_somebody_reads_it(
    workers, collector, salts, measurement, begun, renewed, waiting
):
    workers.answer = [measurement]
    before = salts.of(SETTINGS), salts.of(OTHER)
    collecting = collector.collect("a", SETTINGS, begun=begun)
    if waiting:
        assert await collecting == measurement
    else:
        reader = asyncio.ensure_future(asyncio.shield(collecting))
        await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait({collecting}, timeout=5)
    assert workers.calls == [["a"]]
    assert (salts.of(SETTINGS) != before[0], salts.of(OTHER) != before[1]) == (renewed, False)


async def test_a_row_without_steering_renews_nothing(workers, collector, salts):
    before = salts.of(())
    workers.answer = [None]
    await collector.collect("a", (), begun=True)
    assert salts.of(()) == before


async def test_a_call_that_fails_while_nobody_waits_renews_the_salt_and_leaves_the_collector_usable(
    workers, collector, salts
):
    before, workers.error = salts.of(SETTINGS), RuntimeError("no answer")
    await asyncio.wait({collector.collect("a", SETTINGS, begun=True)}, timeout=5)
    workers.error = None
    assert await collector.take("b") == {"of": "b"}
    # What the workers would have told is lost.
    assert salts.of(SETTINGS) != before


# Receipts: a prompt of 4 tokens, 6 fed in all, at layer 2.


@pytest.fixture
def plan(artifact, other_artifact, plan_of):
    return plan_of((artifact, 0.6), (other_artifact, 0.0), (artifact, 0.2))


def _measurement(*doses, cached=0, first=None, failure=""):
    measured = {"first": cached if first is None else first, "doses": list(doses)}
    return {"cached": cached, "layers": {"2": measured}, "failure": failure}


def _at_layers(doses, count):
    return {layer: {"first": 0, "doses": [dose] * count} for layer, dose in doses.items()}


def _receipts(plan, measurement, prompt_tokens=4, fed=6):
    return measured_receipts(plan, measurement, prompt_tokens=prompt_tokens, fed=fed)


def test_a_receipt_tells_what_was_measured(plan):
    first, idle, second = _receipts(plan, _measurement(0.5, 0.25, 0.25, 0.25, 0.125, 0.125))
    for receipt in (first, second):
        assert (receipt.layer, receipt.dose_bound) == (2, pytest.approx(0.4))
        assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (4, 2)
        assert receipt.prompt_tokens_cached == 0
        assert (receipt.mean_dose, receipt.max_dose) == (0.25, 0.5)
    assert [receipt.strength for receipt in (first, idle, second)] == [0.6, 0.0, 0.2]
    assert (idle.prompt_tokens_steered, idle.generated_tokens_steered, idle.max_dose) == (0, 0, 0.0)


def test_what_the_engine_computed_ahead_of_a_text_that_had_ended_does_not_count(plan):
    receipt, *_ = _receipts(plan, _measurement(0.25, 0.25, 0.25, 0.25, 0.125, 0.125, 0.5, 0.5))
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (4, 2)
    assert receipt.max_dose == 0.25


def test_cached_prompt_tokens_are_counted_apart_and_measured_by_nobody(plan):
    first, idle, _ = _receipts(plan, _measurement(0.25, 0.5, 0.125, 0.375, cached=3))
    assert (first.prompt_tokens_steered, first.prompt_tokens_cached, first.generated_tokens_steered) == (1, 3, 2)
    assert (first.mean_dose, first.max_dose) == (pytest.approx(0.875 / 3), 0.5)
    # An operator without strength took no part in them.
    assert idle.prompt_tokens_cached == 0


def test_layers_are_measured_apart(artifact, remake, plan_of):
    plan = plan_of((artifact, 0.6), (remake(artifact, layer=3, injection_layer=3), 1.0))
    measurement = {"cached": 0, "layers": _at_layers({"3": 0.5, "2": 0.25}, 2), "failure": ""}
    lower, higher = _receipts(plan, measurement, prompt_tokens=2, fed=2)
    assert (lower.mean_dose, higher.mean_dose) == (0.25, 0.5)
    measurement["layers"].pop("3")
    with pytest.raises(SteeringNotAppliedError, match="layer 3: 0 of 2 prompt tokens were steered"):
        _receipts(plan, measurement, prompt_tokens=2, fed=2)


@pytest.mark.parametrize(
    ("measurement", "why"),
    [
        (None, "no worker knows of this request"),
        (_measurement(*[0.25] * 6, failure="layer 2 was not reached"), "^layer 2 was not reached$"),
        (_measurement(*[0.25] * 5), "layer 2: 1 of 2 generated tokens were steered"),
        (_measurement(*[0.25] * 2, cached=3), "layer 2: 1 of 2 generated tokens were steered"),
        (_measurement(*[0.25] * 5, first=1), "layer 2: 3 of 4 prompt tokens were steered"),
        (_measurement(0.25, 0.25, 0.0, 0.25, 0.25, 0.25), "layer 2: 3 of 4 prompt tokens were steered"),
        (_measurement(), "layer 2: 0 of 4 prompt tokens were steered"),
        (
            {"cached": 0, "layers": _at_layers({"1": 0.25}, 6), "failure": ""},
            "layer 2: 0 of 4 prompt tokens were steered",
        ),
        (_measurement(*[0.25] * 2, cached=4), "4 tokens count as cached; of a prompt of 4 the last is always computed"),
        (_measurement(*[0.25] * 2, cached=9), "9 tokens count as cached"),
    ],
    ids=[
        "unknown",
        "failed",
        "one short",
        "one short after the cache",
        "one short at the beginning",
        "a gap",
        "none",
        "another layer",
        "no prompt",
        "beyond",
    ],
)
def test_a_measurement_that_does_not_prove_the_plan_gives_no_receipt(plan, measurement, why):
    with pytest.raises(SteeringNotAppliedError, match=why):
        _receipts(plan, measurement)


# At positions of their own.

WHERE = {
    "all": ((4, 2), (1, 2)),
    "first": ((1, 0), (0, 0)),
    "1..": ((3, 2), (1, 2)),
    "prompt": ((4, 0), (1, 0)),
    "generated": ((0, 2), (0, 2)),
    "prompt:2..": ((2, 0), (1, 0)),
    "3..5": ((1, 1), (1, 1)),
    "generated:1..5": ((0, 1), (0, 1)),
}
"""Positions; prompt and generated tokens that they hold of a prompt of 4, 6 fed; and those that a cache of 3 leaves."""


@pytest.mark.parametrize("positions", WHERE)
@pytest.mark.parametrize("cached", [0, 3])
def test_a_receipt_counts_the_positions_of_its_operator_and_needs_every_one_of_them(
    artifact, make_plan, positions, cached
):
    # Another operator of the layer pushes everywhere; each position has a dose of its own.
    plan = make_plan((artifact, 0.6, positions), (artifact, 0.2, "all"))
    whole = [2.0**-position for position in range(6)]
    ours, others = _receipts(plan, _measurement(*whole[cached:], cached=cached))
    where = Positions.parse(positions)
    due = [position for position in range(cached, 6) if where.count(position, position + 1, prompt_tokens=4)]
    assert (ours.prompt_tokens_steered, ours.generated_tokens_steered) == WHERE[positions][cached > 0]
    assert ours.prompt_tokens_steered + ours.prompt_tokens_cached == WHERE[positions][0][0]
    assert ours.mean_dose == pytest.approx(sum(whole[position] for position in due) / max(1, len(due)))
    assert ours.max_dose == max((whole[position] for position in due), default=0.0)
    assert (others.prompt_tokens_steered, others.prompt_tokens_cached) == (4 - cached, cached)
    alone = make_plan((artifact, 0.6, positions))
    for missing in due:
        doses = [whole[position] if position in due and position != missing else 0.0 for position in range(cached, 6)]
        with pytest.raises(SteeringNotAppliedError, match=r"layer 2: \d of \d \w+ tokens were steered"):
            _receipts(alone, _measurement(*doses, cached=cached))
    # What nobody asked for need not be there.
    needed = whole[min(due, default=6) : max(due, default=6) + 1]
    assert _receipts(alone, _measurement(*needed, cached=cached, first=min(due, default=6))) == (
        replace(ours, dose_bound=pytest.approx(0.3)),
    )


@pytest.fixture
def make_plan():
    """``make_plan((artifact, strength, positions), ...)``."""

    def make(*uses):
        return SteeringPlan(
            tuple(
                Application(
                    f"operator-{place}", artifact, Setting(strength, "cumulative", 0.0, Positions.parse(positions)), ()
                )
                for place, (artifact, strength, positions) in enumerate(uses)
            )
        )

    return make


def _measured(failure="", cached=0, doses=3, last=0.2, layer="2", first=0):
    measured = {"first": first, "doses": [0.2] * (doses - 1) + [last]}
    return {"cached": cached, "failure": failure, "layers": {layer: measured}, "seen": {}}


def test_workers_that_say_the_same_are_believed():
    assert merge_measurements([[_measured(), None], [_measured(), None]]) == [_measured(), None]
    # Rounded otherwise.
    assert merge_measurements([[_measured()], [_measured(last=0.2 * (1 + 5e-4))]]) == [_measured()]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (_measured(failure="layer 2 was not reached"), "layer 2 was not reached"),
        (_measured(doses=2), "the workers do not agree"),
        (_measured(cached=32), "the workers do not agree"),
        (_measured(layer="3"), "the workers do not agree"),
        (_measured(first=1), "the workers do not agree"),
        (_measured(last=0.2 * (1 + 2e-3)), "the workers do not agree"),
        (_measured(last=0.0), "the workers do not agree"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_a_worker_that_says_otherwise_fails_the_request(other, said, order):
    [measurement] = merge_measurements([[_measured()], [_measured()], [other]][::order])
    assert said in measurement["failure"]


def test_a_request_that_one_worker_does_not_know_is_known_to_none():
    assert merge_measurements([[_measured()], [None]]) == [None]
