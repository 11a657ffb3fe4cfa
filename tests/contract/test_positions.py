"""Each form of positions, against the loop that recomputes everything and pushes those positions alone."""

from __future__ import annotations

import pytest

from operators.core.apply import Setting
from operators.core.artifact import with_header
from operators.core.header import Recommended
from operators.core.positions import Positions
from operators.core.store import Store
from steer_server.compare import compare
from steer_server.errors import InvalidRequestError, SteeringNotAppliedError
from steer_server.generate import generate
from steer_server.registry import Registry
from steer_server.types import (
    Application,
    Arm,
    CompareRequest,
    Completion,
    GenerationRequest,
    OperatorUse,
    Prompt,
    Row,
    SamplingParams,
    SteeringPlan,
)

pytestmark = pytest.mark.model

PROMPT = "Here is a painting of the"
TOKENS = 8
SAMPLING = SamplingParams(max_tokens=TOKENS)
# (form, rule, blend, strength): the first token alone takes more to be heard.
CASES = [
    ("all", "cumulative", 0.5, 0.55),
    ("first", "cumulative", 1.0, 1.5),
    ("first", "cumulative", 0.0, 1.5),
    ("2..", "cumulative", 0.0, 0.55),
    ("prompt", "cumulative", 0.25, 0.8),
    ("generated", "cumulative", 0.0, 0.8),
    ("generated", "substitute", 0.0, 0.8),
    ("3..9", "substitute", 0.25, -0.8),
    ("prompt:2..", "cumulative", 0.0, 0.8),
    ("generated:1..4", "cumulative", 0.0, 0.9),
]


@pytest.mark.parametrize(("positions", "rule", "blend", "strength"), CASES)
async def test_every_form_gives_the_ids_of_the_loop_and_counts_exactly(
    positions, rule, blend, strength, smollm, engine, operator_of, decode, steered_row, recompute
):
    loaded, artifact = smollm(), operator_of("The Golden Gate Bridge in San", "golden", 21)
    prompt_ids = loaded.tokenizer(PROMPT)["input_ids"]
    [(ids, end)] = await decode(
        engine, PROMPT, SAMPLING, steered_row(artifact, strength, rule, blend, positions=positions)
    )
    assert [ids] == recompute(loaded.model, artifact, prompt_ids, [strength], TOKENS, rule, blend, positions)
    (receipt,) = end.receipts
    n = len(prompt_ids)
    due = [k for k in range(n + len(ids) - 1) if recompute.pushed[positions](k, n)]
    assert receipt.positions == Positions.parse(positions)
    assert receipt.prompt_tokens_steered + receipt.prompt_tokens_cached == sum(k < n for k in due)
    assert receipt.generated_tokens_steered == sum(k >= n for k in due)
    if receipt.prompt_tokens_steered + receipt.generated_tokens_steered:
        assert receipt.mean_dose == pytest.approx(abs(strength) / 2, rel=1e-4)


async def test_two_operators_of_one_layer_push_each_its_own_positions(engine, operator_of, decode, steered_row):
    bridge = operator_of("The Golden Gate Bridge in San", "golden", 21)

    def row(*uses):
        settings = [Setting(0.55, "cumulative", 0.0, Positions.parse(positions)) for positions in uses]
        return Row(SteeringPlan(tuple(Application("operator", bridge, setting, ()) for setting in settings)))

    whole, parts, prompt = await decode(engine, PROMPT, SAMPLING, row("all"), row("prompt", "generated"), row("prompt"))
    # Half of the text each: together they are one operator at every position.
    assert parts[0] == whole[0] != prompt[0]
    first, second = parts[1].receipts
    assert (first.generated_tokens_steered, second.prompt_tokens_steered) == (0, 0)
    assert second.generated_tokens_steered == whole[1].receipts[0].generated_tokens_steered
    assert first.dose_bound == second.dose_bound == 0.55


async def test_strength_zero_is_plain_at_any_positions(engine, operator_of, decode, steered_row):
    artifact = operator_of("The Golden Gate Bridge in San", "golden", 21)
    rows = [Row(), *(steered_row(artifact, 0.0, positions=positions) for positions in ("first", "generated"))]
    (plain, _), *silent = await decode(engine, PROMPT, SAMPLING, *rows)
    for ids, end in silent:
        assert ids == plain
        assert (end.receipts[0].prompt_tokens_steered, end.receipts[0].generated_tokens_steered) == (0, 0)


@pytest.fixture
def registry(engine, operator_of, tmp_path):
    """``golden``, and ``early``, which recommends the first token."""
    artifact = operator_of("The Golden Gate Bridge in San", "golden", 21)
    Store(tmp_path).save("golden", artifact)
    recommended = Recommended(strength=1.5, positions=Positions(end=1))
    Store(tmp_path).save("early", with_header(artifact, recommended=recommended))
    return Registry(Store(tmp_path), engine.model, max_bytes=1 << 30, max_dose=1.0)


async def completion(engine, registry, use, **sampling):
    request = GenerationRequest("r", Prompt(text=PROMPT), SamplingParams(**sampling), (use,))
    return [event async for event in generate(engine, registry, request)][-1]


@pytest.mark.parametrize(
    ("positions", "sampling", "says"),
    [
        ("generated", {"max_tokens": 1}, "begins at position 6; the prompt has 6 tokens, and the model is fed 6 at"),
        ("generated:4..", {"max_tokens": 5}, "begins at position 10; .* and the model is fed 10 at most"),
        ("10..12", {"max_tokens": 5}, "begins at position 10; "),
        ("prompt:6..", {"max_tokens": 5}, "begins at position 6; the prompt has 6 tokens$"),
        ("1000000..", {"max_tokens": 1 << 30}, "begins at position 1000000; "),
    ],
)
async def test_positions_that_no_text_can_have_are_refused_by_name(engine, registry, positions, sampling, says):
    use = OperatorUse("golden", positions=Positions.parse(positions))
    request = GenerationRequest("r", Prompt(text=PROMPT), SamplingParams(**sampling), (OperatorUse("golden", 0.0), use))
    with pytest.raises(InvalidRequestError, match=rf"operators\[1\]\.positions: is {positions}, which {says}"):
        await anext(generate(engine, registry, request))
    comparison = CompareRequest(
        "r", Prompt(text=PROMPT), SamplingParams(**sampling), (Arm("a", (OperatorUse("golden"),)), Arm("b", (use,)))
    )
    with pytest.raises(InvalidRequestError, match=r"arms\[1\]\.operators\[0\]\.positions") as caught:
        await anext(compare(engine, registry, comparison, max_arms=4))
    assert caught.value.field == "arms[1].operators[0].positions"


async def test_the_last_position_that_can_be_fed_is_accepted(engine, registry):
    use = OperatorUse("golden", 0.4, positions=Positions.parse("9.."))
    done = await completion(engine, registry, use, max_tokens=5, ignore_eos=True)
    assert isinstance(done, Completion)
    assert (done.usage.prompt_tokens, done.receipts[0].generated_tokens_steered) == (6, 1)


async def test_a_text_that_ends_before_its_positions_is_an_error(engine, registry):
    plain = await completion(engine, registry, OperatorUse("golden", 0.0), max_tokens=4)
    use = OperatorUse("golden", 0.4, positions=Positions.parse("generated"))
    stop = {"max_tokens": 4, "stop_token_ids": plain.token_ids[:1]}
    with pytest.raises(
        SteeringNotAppliedError,
        match=r"golden: positions generated begin at 6; the text ended \(STOP_TOKEN\) when .* fed 6 tokens",
    ):
        await completion(engine, registry, use, **stop)
    silent = OperatorUse("golden", 0.0, positions=use.positions)
    assert (await completion(engine, registry, silent, **stop)).token_ids == plain.token_ids[:1]


async def test_the_recommended_positions_are_those_of_a_request_that_names_none(engine, registry):
    found = await completion(engine, registry, OperatorUse("early"), max_tokens=4)
    (receipt,) = found.receipts
    assert (str(receipt.positions), receipt.defaulted) == (
        "first",
        ("strength", "rule", "blend", "positions", "anchor", "first_token"),
    )
    steered = receipt.prompt_tokens_steered + receipt.prompt_tokens_cached, receipt.generated_tokens_steered
    assert steered == (1, 0)
    everywhere = OperatorUse("early", 0.4, positions=Positions())
    (receipt,) = (await completion(engine, registry, everywhere, max_tokens=4, ignore_eos=True)).receipts
    assert (receipt.generated_tokens_steered, receipt.defaulted) == (3, ("rule", "blend", "anchor", "first_token"))
