"""An engine in the place of vLLM that answers what a test tells it to."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from operators.core.apply import Setting
from steer_server.engine.reference import EmbeddingRows, ReferencePushes
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.decode_context import DecodeContext
from steer_server.engine.vllm.job import VLLMJob
from steer_server.engine.vllm.measurements import MeasurementCollector
from steer_server.errors import EngineFailedError
from steer_server.types import (
    Application,
    DecodeJob,
    Row,
    RowFinished,
    SamplingParams,
    Score,
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

    async def score(self, steered, plain, ids, report):
        await self._wait("score")
        return (Score(0.25, -1.0, -2.0),) * len(ids)

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

    def leave(self, job):
        """Whether it has not begun."""
        return not job._tasks


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
    def run(*rows, operators=(), text=(), begin=True, **sampling):
        job = DecodeJob.of(PROMPT, SamplingParams(**sampling), rows, forced_ids=text)
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
        made = VLLMJob(context, job, operators, on_end=engine.end_job, on_leave=engine.leave)
        if begin:
            made.begin()
        return made

    return run


@pytest.fixture
def scored(steered):
    return Row(steered.plan, score=True)


@pytest.fixture
def silent(scored):
    [use] = scored.plan.applications
    return Row(SteeringPlan((replace(use, setting=Setting(0.0, "cumulative", 0.0)),)), score=True)


async def events_of(job):
    async with asyncio.timeout(5):
        return [event async for event in job]


async def ends_of(job):
    events = await events_of(job)
    tokens = [event.token_id for event in events if isinstance(event, TokenEvent)]
    return tokens, [event for event in events if isinstance(event, RowFinished)]


async def settled(engine):
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


async def over(engine, *jobs):
    """When all of them are over, and whatever a callback still has to say has been said."""
    async with asyncio.timeout(5):
        await asyncio.gather(*(job.wait() for job in jobs))
    await asyncio.sleep(0.01)
