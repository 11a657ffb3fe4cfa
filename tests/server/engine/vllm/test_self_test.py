"""The start-up self-test, against an engine that does one thing wrong at a time."""

import asyncio
from types import SimpleNamespace

import pytest

from steer_server.engine.random_operators import random_operators
from steer_server.engine.vllm.self_test import (
    STRENGTH,
    TOKENS,
    SelfTestOutput,
    check_same_model,
    check_steering,
)
from steer_server.errors import StartupError, SteeringNotAppliedError

LAYERS = 3
PROMPT = 5
FED = PROMPT + TOKENS - 1
PLAIN = SelfTestOutput((7, 8), {7: -0.5, 9: -1.5})
STEERED = SelfTestOutput((9, 8), {9: -0.25, 7: -2.5})


FIRST_TOKEN = "self-test-first-token"


def doses(counts, first=0):
    """Of so many positions by layer."""
    return {str(layer): {"first": first, "doses": [STRENGTH / 2] * count} for layer, count in counts.items()}


class Engine:
    """Two workers that steer as they should. Tests replace what is to go wrong."""

    def __init__(self):
        self.layers = [LAYERS, LAYERS]
        self.input_errors = [0.0, 0.0]
        self.outputs = {}
        self.measurements = {
            f"self-test-{layer}": {"cached": 0, "failure": "", "layers": doses({layer: FED}), "seen": {}}
            for layer in range(LAYERS)
        }
        self.measurements[FIRST_TOKEN] = {"cached": 0, "failure": "", "layers": doses({0: 1}), "seen": {}}
        self.error = None
        self.proven, self.wrong = [], ()
        self.loaded, self.asked = {}, []
        self.checks_inputs, self.at_once = False, 0
        self.together = asyncio.Barrier(LAYERS + 2)

    async def call(self, method, *args):
        return await getattr(self, method)(*args)

    async def steering_layers(self):
        return self.layers

    async def load(self, operator):
        self.loaded[operator.digest] = int(operator.digest.removeprefix("operator-"))

    async def steering_check_inputs(self, on):
        self.checks_inputs, before = on, self.checks_inputs
        return self.input_errors if before else [0.0, 0.0]

    async def steering_take(self, keys):
        return [[self.measurements.get(key) for key in keys]] * 2

    async def steering_unload(self, digests):
        for digest in digests:
            self.loaded.pop(digest, None)
        return [None, None]

    async def run(self, setting, key):
        assert self.checks_inputs
        self.asked.append((key, setting and self.loaded[setting.digest]))
        assert setting is None or (setting.start, setting.end) == (0, 1 if key == FIRST_TOKEN else None)
        if self.error is not None and setting is not None:
            raise self.error
        if key != "self-test-alone":
            # One batch: none of them ends before all have begun.
            async with asyncio.timeout(5):
                await self.together.wait()
        return self.outputs.get(key, STEERED if setting else PLAIN)

    async def check(self):
        operators = [SimpleNamespace(digest=f"operator-{layer}") for layer in range(LAYERS)]
        return await check_steering(self.run, self.call, operators, self.load, self.prove, prompt_tokens=PROMPT)

    def prove(self, key, measurement, output):
        assert measurement is self.measurements[key] or measurement == self.measurements[key]
        self.proven.append(key)
        if key in self.wrong:
            raise SteeringNotAppliedError("what was added has cosine -1")


@pytest.fixture
async def engine():
    return Engine()


async def test_an_engine_that_steers_every_layer_passes_and_keeps_nothing_of_the_test(engine):
    assert await engine.check() == PLAIN
    beside = {("self-test-beside", None), (FIRST_TOKEN, 0), *((f"self-test-{layer}", layer) for layer in range(LAYERS))}
    assert engine.asked[0] == ("self-test-alone", None)
    assert set(engine.asked[1:]) == beside
    assert (engine.loaded, engine.checks_inputs) == ({}, False)


@pytest.mark.parametrize("key", ["self-test-0", "self-test-2", FIRST_TOKEN])
async def test_an_engine_that_pushes_in_another_direction_is_refused(engine, key):
    engine.wrong = (key,)
    await _fails(engine, "failed: what was added has cosine -1")


async def test_every_steered_request_is_proven(engine):
    await engine.check()
    assert engine.proven == [*(f"self-test-{layer}" for layer in range(LAYERS)), FIRST_TOKEN]


def test_there_is_a_random_operator_for_every_layer(model_info):
    made = random_operators(model_info)
    assert [one.header.injection_layer for one in made] == list(range(model_info.num_layers))
    assert len({one.digest for one in made}) == model_info.num_layers


async def test_rounding_between_two_batches_is_no_change(engine):
    engine.outputs["self-test-beside"] = SelfTestOutput(PLAIN.ids, {7: -0.52, 9: -1.48})
    await engine.check()


async def _fails(engine, why):
    with pytest.raises(StartupError, match=f"^self-test: .*{why}"):
        await engine.check()
    assert engine.loaded == {}


@pytest.mark.parametrize("layers", [[LAYERS - 1] * 2, [LAYERS, LAYERS - 1], [0, 0]])
async def test_an_engine_with_another_number_of_layers_is_refused_before_anything_runs(engine, layers):
    engine.layers = layers
    await _fails(engine, rf"has {min(layers)} decoder layers, the model {LAYERS}")
    assert engine.asked == []


async def test_a_first_layer_that_gets_no_embeddings_is_refused(engine):
    engine.input_errors = [0.0, 0.125]
    await _fails(engine, "the first layer's input differs from the token embeddings by 0.12 of their size")


@pytest.mark.parametrize(
    "beside",
    [
        SelfTestOutput((9, 8), PLAIN.logprobs),
        SelfTestOutput(PLAIN.ids, {7: -0.6, 9: -1.5}),
        SelfTestOutput(PLAIN.ids, {1: -0.5}),
    ],
    ids=["another token", "another probability", "nothing in common"],
)
async def test_a_plain_request_that_its_neighbours_change_is_refused(engine, beside):
    engine.outputs["self-test-beside"] = beside
    await _fails(engine, "a plain request is changed by the steered requests beside it")


@pytest.mark.parametrize("layer", range(LAYERS))
async def test_a_layer_whose_request_reads_as_the_plain_one_is_refused(engine, layer):
    engine.outputs[f"self-test-{layer}"] = PLAIN
    await _fails(engine, f"steered at layer {layer} failed: its text is that of the plain one")


async def test_a_request_that_no_worker_knows_is_refused(engine):
    del engine.measurements["self-test-1"]
    await _fails(engine, "steered at layer 1 failed: no worker knows of it")


async def test_a_request_that_a_worker_failed_is_refused_in_its_words(engine):
    engine.measurements["self-test-2"]["failure"] = "layer 2 was not reached"
    await _fails(engine, "steered at layer 2 failed: layer 2 was not reached")


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"1": FED - 1}, rf"\{{'1': {FED - 1}\}}; {FED} at layer 1 were due"),
        ({}, rf"\{{\}}; {FED} at layer 1 were due"),
        ({"0": FED}, rf"\{{'0': {FED}\}}; {FED} at layer 1 were due"),
        ({"1": FED, "2": FED}, rf"\{{'1': {FED}, '2': {FED}\}}; {FED} at layer 1 were due"),
    ],
    ids=["too short", "empty", "another layer", "one layer more"],
)
async def test_a_measurement_of_other_tokens_than_those_due_is_refused(engine, measured, said):
    engine.measurements["self-test-1"]["layers"] = doses(measured)
    await _fails(engine, f"steered at layer 1 failed: tokens pushed by layer: {said}")


async def test_what_the_engine_computed_beyond_the_last_token_is_no_failure(engine):
    engine.measurements["self-test-1"]["layers"] = doses({1: FED + 2})
    await engine.check()


async def test_doses_of_later_positions_are_not_those_that_were_due(engine):
    engine.measurements["self-test-1"]["layers"] = doses({1: FED}, first=1)
    await _fails(engine, "steered at layer 1 failed: tokens pushed by layer")


@pytest.mark.parametrize("measured", [{0: 2}, {}, {0: 1, 1: 1}, {1: 1}], ids=str)
async def test_an_engine_that_pushes_another_token_than_the_first_is_refused(engine, measured):
    engine.measurements[FIRST_TOKEN]["layers"] = doses(measured)
    await _fails(engine, "steered at its first token only failed: tokens pushed by layer: .* 1 at layer 0 were due")


async def test_operators_of_the_test_go_when_a_request_breaks(engine):
    engine.error = RuntimeError("the engine died")
    with pytest.raises(RuntimeError, match="the engine died"):
        await engine.check()
    assert engine.loaded == {}


EXPECTED = [-9.0, -0.5, -2.0, -1.0]
"""Log-probabilities of a text's four tokens in transformers."""


@pytest.mark.parametrize("found", [EXPECTED, [-9.0, -0.5, -2.0, -1.25], [-9.125, -0.375, -2.0, -1.0]])
def test_weights_whose_log_probabilities_differ_by_rounding_pass(found):
    check_same_model(found, EXPECTED, tolerance=0.1)


@pytest.mark.parametrize(
    ("found", "apart"),
    [([-9.0, -0.5, -2.0, -1.5], "0.125"), ([-1.0, -0.5, -2.0, -9.0], "4"), ([float("nan"), *EXPECTED[1:]], "nan")],
)
def test_weights_of_another_model_are_refused_with_the_figures(found, apart):
    with pytest.raises(
        StartupError, match=rf"^self-test: vLLM serves another model .* {apart} nats .* at most 0\.1 is"
    ):
        check_same_model(found, EXPECTED, tolerance=0.1)
