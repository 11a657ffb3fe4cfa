"""Texts that are given: read in parts of bounded size, interrupted between them, and proved as generated ones are."""

from dataclasses import replace

import pytest

from operators.core.apply import Setting
from operators.core.positions import Positions
from steer_server.engine.hf import decode as decode_module
from steer_server.engine.hf.decode import Decoder
from steer_server.engine.hf.memory import DecodeMemory, scored_positions
from steer_server.errors import InvalidRequestError
from steer_server.generate import CompletionBuilder
from steer_server.types import (
    Application,
    Completion,
    DecodeJob,
    FinishReason,
    Report,
    Row,
    RowFinished,
    SamplingParams,
    SteeringPlan,
    TokenEvent,
)

TEXT = (7, 5, 9, 9, 6, 8, 11, 5, 7, 10, 6)


@pytest.fixture
def read(llama, artifact, plan_of, make_decoder):
    """``read(**changes)``: the decoder of a plain and a steered row of TEXT."""

    def make(plan=None, **changes):
        rows = [Row(None, score=True), Row(plan or plan_of((artifact, 0.6)), score=True)]
        decoder = make_decoder(llama, rows, max_tokens=len(TEXT))
        job = replace(decoder.job, forced_ids=TEXT)
        known = {"loaded": decoder.loaded, "operators": decoder.operators, "eos_ids": frozenset(TEXT[3:4])}
        return Decoder(**{"job": job, "check_interruption": lambda: None, **known, **changes})

    return make


def _scores(events):
    events = list(events)
    return [
        [(event.token_id, event.score) for event in events if isinstance(event, TokenEvent) and event.row == row]
        for row in (0, 1)
    ]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_text_is_read_in_parts_of_bounded_logits_and_scored_as_one(llama, read, monkeypatch, size):
    whole = _scores(read().run())
    monkeypatch.setattr(decode_module, "scored_positions", lambda rows, vocabulary: size)
    shapes = []
    handle = llama.model.register_forward_hook(lambda module, args, output: shapes.append(output.logits.shape[:2]))
    try:
        decoder = read()
        found = _scores(decoder.run())
    finally:
        handle.remove()
    # The prompt, then the text without its last token; the end of a sequence amid it ends nothing.
    first, *parts = shapes
    assert (first, max(part[1] for part in parts)) == ((2, 1), min(size, len(TEXT) - 1))
    assert sum(part[1] for part in parts) == len(TEXT) - 1
    assert decoder.num_prompt_tokens_read == len(decoder.job.prompt_ids) + len(TEXT) - 1
    for row in (0, 1):
        assert [token for token, _ in found[row]] == list(TEXT)
        for (_, one), (_, other) in zip(found[row], whole[row], strict=True):
            assert one.kl == pytest.approx(other.kl, abs=1e-5)
            assert (one.logprob, one.plain_logprob) == pytest.approx((other.logprob, other.plain_logprob), abs=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_text_that_is_interrupted_has_receipts_of_what_was_read(read, plan_of, artifact, monkeypatch, parts):
    monkeypatch.setattr(decode_module, "scored_positions", lambda rows, vocabulary: 3)
    asked = iter([None] * parts)
    plan = plan_of((artifact, 0.6))
    decoder = read(plan, check_interruption=lambda: next(asked, FinishReason.TIME_LIMIT))
    events = list(decoder.run())
    ends = [event for event in events if isinstance(event, RowFinished)]
    assert [end.reason for end in ends] == [FinishReason.TIME_LIMIT] * 2
    count = 3 * parts - 2
    assert [len(row) for row in _scores(events)] == [count] * 2
    (receipt,) = ends[1].receipts
    assert (receipt.prompt_tokens_steered, receipt.generated_tokens_steered) == (len(decoder.job.prompt_ids), count - 1)


def test_a_text_that_is_read_passes_the_check_of_receipts(read, plan_of, artifact):
    plan = plan_of((artifact, 0.6))
    decoder = read(plan, prove_every_position=True)
    builder = CompletionBuilder("r", len(decoder.job.prompt_ids), decoder.job.rows[1].sampling, plan)
    found = [each for event in decoder.run() if event.row == 1 for each in builder.add(event)]
    assert isinstance(found[-1], Completion)
    (receipt,) = found[-1].receipts
    assert receipt.positions_checked == len(decoder.job.prompt_ids) + len(TEXT) - 1
    assert (found[-1].token_ids, found[-1].finish_reason) == (TEXT, FinishReason.MAX_TOKENS)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("positions", ["all", "generated:2..5", "prompt", "first"])
def test_the_doses_of_the_text_are_told_position_by_position(read, artifact, monkeypatch, size, positions):
    monkeypatch.setattr(decode_module, "scored_positions", lambda rows, vocabulary: size)
    where = Positions.parse(positions)
    plan = SteeringPlan((Application("a", artifact, Setting(0.6, "cumulative", 0.0, where), ()),))
    decoder = read(plan)
    rows = tuple(replace(row, report=Report(doses=True)) for row in decoder.job.rows)
    plain, steered = (
        event for event in read(plan, job=replace(decoder.job, rows=rows)).run() if isinstance(event, RowFinished)
    )
    n, fed = len(decoder.job.prompt_ids), len(TEXT) - 1
    pushed = range(n + fed)[where.among(0, n + fed, prompt_tokens=n)]
    expected = [0.3 * (place in pushed) for place in range(n, n + fed)]
    assert steered.doses == pytest.approx(expected, rel=1e-4)
    assert plain.doses == ()
    # Not asked for, not told.
    assert [event.doses for event in decoder.run() if isinstance(event, RowFinished)] == [(), ()]


def test_memory_counts_the_rows_once_and_the_logits_of_a_part(plan_of, artifact):
    rows = (Row(None, score=True), Row(plan_of((artifact, 0.6)), score=True))
    vocabulary = 1 << 18
    assert scored_positions(2, vocabulary) == 32
    assert scored_positions(1000, vocabulary) == 1
    memory = DecodeMemory(budget=1 << 40, per_token=10, per_row=16 * vocabulary, context_length=4096)
    job = DecodeJob.of((1,) * 10, SamplingParams(max_tokens=100), rows, forced_ids=(5,) * 100)
    assert memory.needed(job) == 2 * (110 * 10 + 32 * 16 * vocabulary)
    with pytest.raises(InvalidRequestError, match=r"2 rows .* of up to 110 tokens take"):
        replace(memory, budget=1 << 20).needed(job)
