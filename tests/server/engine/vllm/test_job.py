"""A job on vLLM, with an engine in its place that answers what a test tells it to."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from operators.core.apply import Setting, prepared_bytes
from steer_server.engine.reference import EmbeddingRows, ReferencePushes
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.job import VLLMJob
from steer_server.engine.vllm.measurements import MeasurementCollector
from steer_server.engine.vllm.operator_cache import OperatorCache
from steer_server.engine.vllm.row_decoder import DecodeContext
from steer_server.errors import EngineFailedError, QueueFullError, ShuttingDownError, SteeringNotAppliedError
from steer_server.types import (
    Application,
    DecodeJob,
    FinishReason,
    Row,
    RowFinished,
    SamplingParams,
    SteeringPlan,
    TokenEvent,
)

PROMPT = (5, 6, 7)
IDS = (10, 11, 12, 13)
EOS = 13


class Engine:
    """Decodes IDS, ends a reading at once, and gives a good account of both; gates make what they name wait."""

    def __init__(self, model):
        self.model = model
        self.salts = CacheSalts()
        self.collector = MeasurementCollector(self.take_measurements, self.salts)
        self.operator_cache = self
        self.loaded, self.streams, self.closed, self.taken, self.over = [], [], [], [], []
        self.gates = {}
        self.failed = {}
        self.count = None
        self.looks_at, self.sign = {}, 1.0

    async def _wait(self, what):
        if what in self.gates:
            await self.gates[what].wait()

    async def load(self, artifacts):
        artifacts = list(artifacts)
        await self._wait("load")
        self.loaded += artifacts

    async def generate(self, ids, params, settings, key, *, keep_from=None, private_cache=False, looks_at=()):
        self.looks_at[key] = looks_at
        self.streams.append((key, tuple(ids), tuple(settings), keep_from, private_cache))
        try:
            tokens = (0,) if private_cache else IDS
            for place, token in enumerate(tokens):
                await self._wait("read" if private_cache else place)
                found = {token: SimpleNamespace(logprob=-0.5)} if params.get("logprobs") is not None else None
                choice = SimpleNamespace(token_ids=[token], logprobs=[found] if found else None, finish_reason=None)
                yield SimpleNamespace(outputs=[choice], metrics=None, finished=False)
        finally:
            self.closed.append(key)

    async def score(self, steered, plain, ids):
        await self._wait("score")
        return {"kl": [0.25] * len(ids), "logprobs": [-1.0] * len(ids)}

    async def take_measurements(self, keys):
        await self._wait("take")
        self.taken += keys
        return [self._measurement(key) for key in keys]

    def _measurement(self, key):
        [settings] = [settings for name, _, settings, _, _ in self.streams if name == key]
        if not settings:
            return None
        count = len(PROMPT) + len(IDS) - 1 if self.count is None else self.count
        return {
            "cached": 0,
            "failure": self.failed.get("all", ""),
            "layers": {"2": {"first": 0, "doses": [0.2] * count}},
            "seen": self._seen(self.looks_at[key]),
        }

    def _seen(self, looks_at):
        """States of 0s but for one 3, pushed as they should be: by 0.2 of their norm, towards the plan's direction."""
        reference = ReferencePushes(self.plan, self.embed, prompt_tokens=len(PROMPT))
        ids = (*PROMPT, *IDS)
        seen = {}
        for layer, positions in looks_at.items():
            seen[str(layer)] = []
            for position in positions:
                if position < len(ids):
                    before = torch.zeros(40)
                    before[0] = 3.0
                    push = reference.at(layer, position, ids).float()
                    after = before + self.sign * 3.0 * push
                    states = (state.numpy().tobytes() for state in (before, after))
                    seen[str(layer)].append((position, ids[position], 3.0, *states))
        return seen

    def translate_error(self, error):
        return EngineFailedError(str(error))

    def end_job(self, job, seconds):
        self.over.append(job)


@pytest.fixture
async def engine(with_name):
    return Engine(with_name(eos_token_ids=(EOS,)))


@pytest.fixture
def steered(artifact, engine, llama):
    engine.plan = SteeringPlan((Application("gate", artifact, Setting(0.4, "cumulative", 0.0), ()),))
    engine.embed = EmbeddingRows(llama.model)
    return Row(engine.plan)


@pytest.fixture
def start(engine, llama):
    def run(*rows, operators=(), **sampling):
        job = DecodeJob.of(PROMPT, SamplingParams(**sampling), rows)
        context = DecodeContext(
            client=engine,
            operator_cache=engine.operator_cache,
            measurements=engine.collector,
            salts=engine.salts,
            model=engine.model,
            tokenizer=llama.tokenizer,
            dtype=torch.float32,
            embed=EmbeddingRows(llama.model),
            translate_error=engine.translate_error,
        )
        return VLLMJob(context, job, operators, engine.end_job)

    return run


@pytest.fixture
def scored(steered):
    return Row(steered.plan, score=True)


async def _events(job):
    async with asyncio.timeout(5):
        return [event async for event in job]


async def _ends(job):
    events = await _events(job)
    tokens = [event.token_id for event in events if isinstance(event, TokenEvent)]
    return tokens, [event for event in events if isinstance(event, RowFinished)]


async def _settled(engine):
    """Every row that was begun has been closed, and its measurement taken."""
    async with asyncio.timeout(5):
        while not engine.over:
            await asyncio.sleep(0)
        await asyncio.gather(*engine.collector._collecting)
    begun = [key for key, *_ in engine.streams]
    assert sorted(engine.closed) == sorted(begun)
    assert sorted(engine.taken) == sorted(
        key for key, _, settings, keep, _ in engine.streams if settings or keep is not None
    )


async def test_a_steered_text_ends_with_its_receipts_and_its_scores(engine, start, scored):
    tokens, [end] = await _ends(start(scored))
    assert (tokens, end.reason) == (list(IDS), FinishReason.EOS)
    assert [(score.kl, score.plain_logprob) for score in end.scores] == [(0.25, -1.0)] * len(IDS)
    assert end.receipts[0].prompt_tokens_steered == len(PROMPT)
    assert end.receipts[0].generated_tokens_steered == len(IDS) - 1
    (_, prompt, settings, keep, alone), (_, read, plain, also, by_itself) = engine.streams
    assert (prompt, len(settings), keep, alone) == (PROMPT, 1, len(PROMPT) - 1, False)
    assert (read, plain, also, by_itself) == ((*PROMPT, *IDS[:-1]), (), len(PROMPT) - 1, True)
    await _settled(engine)


# Ends.


async def _over(engine, *jobs):
    """When all of them are over, and whatever a callback still has to say has been said."""
    async with asyncio.timeout(5):
        await asyncio.gather(*(job.wait() for job in jobs))
    await asyncio.sleep(0.01)


@pytest.mark.parametrize("end", ["cancel", "stop", "by themselves"])
async def test_a_job_whose_rows_end_together_is_over_once(engine, start, end):
    gate = engine.gates[2] = asyncio.Event()
    job = start(Row(), Row(), Row())
    async with asyncio.timeout(5):
        while job.running < 3:
            await asyncio.sleep(0)
    if end == "by themselves":
        gate.set()
    else:
        getattr(job, end)()
    await _over(engine, job)
    assert engine.over == [job]
    assert (job.running, job.waiting) == (0, 0)


async def test_a_job_of_many_rows_that_ends_leaves_the_operators_to_another_one(engine, start, steered, monkeypatch):
    artifact = steered.plan.applications[0].artifact
    there = []

    async def load(one):
        there.append(one.digest)

    async def unload(digests):
        for digest in digests:
            there.remove(digest)

    operator_cache = OperatorCache(load, unload, budget=prepared_bytes(artifact))

    def end_job(job, seconds):
        engine.over.append(job)
        operator_cache.release(job.operators)

    monkeypatch.setattr(engine, "operator_cache", operator_cache)
    monkeypatch.setattr(engine, "end_job", end_job)
    engine.gates[2] = asyncio.Event()
    jobs = []
    for rows in (3, 1):
        operator_cache.reserve([artifact], retry_after=1.0)
        jobs.append(start(*[steered] * rows, operators=[artifact]))
    async with asyncio.timeout(5):
        while sum(job.running for job in jobs) < 4:
            await asyncio.sleep(0)
    jobs[0].cancel()
    await _over(engine, jobs[0])
    other = replace(artifact, digest="another")
    with pytest.raises(QueueFullError):
        operator_cache.reserve([other], retry_after=1.0)
    jobs[1].cancel()
    await _over(engine, jobs[1])
    assert engine.over == jobs
    operator_cache.reserve([other], retry_after=1.0)


# Time limits.


async def test_a_time_limit_that_runs_out_while_operators_are_loaded_ends_the_row_without_tokens(
    engine, start, steered
):
    engine.gates["load"] = asyncio.Event()
    tokens, ends = await _ends(start(steered, Row(), time_limit=0.1))
    late, plain = sorted(ends, key=lambda end: end.row)
    assert (late.reason, late.text, late.scores) == (FinishReason.TIME_LIMIT, "", ())
    assert (late.receipts[0].prompt_tokens_steered, late.receipts[0].max_dose) == (0, 0.0)
    # The row beside it has nothing to wait for.
    assert (plain.reason, tokens) == (FinishReason.EOS, list(IDS))
    assert len(engine.streams) == 1
    await _settled(engine)


async def test_time_spent_loading_is_not_given_back(engine, start, steered):
    engine.gates |= {"load": asyncio.Event(), 2: asyncio.Event()}
    asyncio.get_running_loop().call_later(0.15, engine.gates["load"].set)
    began = asyncio.get_running_loop().time()
    engine.count = len(PROMPT) + 1
    tokens, [end] = await _ends(start(steered, time_limit=0.3))
    assert asyncio.get_running_loop().time() - began < 0.42
    assert (tokens, end.reason) == (list(IDS[:2]), FinishReason.TIME_LIMIT)
    await _settled(engine)


@pytest.mark.parametrize("where", ["read", "score"])
async def test_a_time_limit_that_runs_out_while_a_text_is_scored_leaves_it_as_it_ended_and_unscored(
    engine, start, scored, where
):
    engine.gates[where] = asyncio.Event()
    tokens, [end] = await _ends(start(scored, time_limit=0.1))
    assert (tokens, end.reason, end.scores) == (list(IDS), FinishReason.EOS, ())
    assert end.receipts[0].generated_tokens_steered == len(IDS) - 1
    await _settled(engine)


async def test_a_text_that_the_time_limit_cut_is_not_scored_beyond_it(engine, start, scored):
    engine.gates[3] = asyncio.Event()
    engine.count = len(PROMPT) + 2
    tokens, [end] = await _ends(start(scored, time_limit=0.1))
    assert (tokens, end.reason, end.scores) == (list(IDS[:3]), FinishReason.TIME_LIMIT, ())
    assert end.receipts[0].generated_tokens_steered == 2
    assert len(engine.streams) == 1
    await _settled(engine)


# Failures, and who learns of them.


@pytest.mark.parametrize(
    ("failure", "count", "said"),
    [("layer 2 was not reached", None, "layer 2 was not reached"), ("", 3, "layer 2: 0 of 3 generated tokens were")],
)
async def test_a_row_that_was_not_steered_is_an_error_and_its_prefixes_are_forsaken(
    engine, start, steered, failure, count, said
):
    engine.failed["all"], engine.count = failure, count
    job = start(steered)
    with pytest.raises(SteeringNotAppliedError, match=said):
        await _events(job)
    settings = engine.streams[0][2]
    assert engine.salts.of(settings) != CacheSalts().of(settings)
    await _settled(engine)


@pytest.mark.parametrize("when", [2, "take"], ids=["while it decodes", "while its measurement is taken"])
async def test_a_row_that_failed_forsakes_its_prefixes_although_its_reader_has_gone(engine, start, steered, when):
    gate = engine.gates[when] = asyncio.Event()
    engine.failed["all"] = "layer 2 was not reached"
    job = start(steered)
    reader = asyncio.ensure_future(_events(job))
    async with asyncio.timeout(5):
        while not engine.streams or (when == "take" and not engine.collector._collecting):
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    reader.cancel()
    job.cancel()
    await asyncio.sleep(0.01)
    gate.set()
    await _settled(engine)
    settings = engine.streams[0][2]
    assert engine.salts.of(settings) != CacheSalts().of(settings)


async def test_a_job_that_is_stopped_while_operators_are_loaded_says_so(engine, start, steered):
    engine.gates["load"] = asyncio.Event()
    job = start(steered)
    asyncio.get_running_loop().call_later(0.05, job.stop)
    with pytest.raises(ShuttingDownError):
        await _events(job)
    assert engine.streams == []
    await _settled(engine)


async def test_an_operator_that_cannot_be_loaded_is_the_rows_error(engine, start, steered, monkeypatch):
    async def broken(artifacts):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "load", broken)
    with pytest.raises(EngineFailedError, match="out of memory"):
        await _events(start(steered))
    await _settled(engine)
