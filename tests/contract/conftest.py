"""Operators of the default model, and an engine to hold against independent computations."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable

import pytest

from operators.apply import Setting
from operators.artifact import OperatorArtifact
from operators.build import BuildSpec, build_operator
from operators.concept import concept_from_text
from operators.models import LoadedModel
from steer_server.engine.hf import HFEngine
from steer_server.types import (
    Admitted,
    Application,
    DecodeJob,
    EngineEvent,
    Prompt,
    Row,
    RowFinished,
    SamplingParams,
    SteeringPlan,
)

Build = Callable[[str, str, int], OperatorArtifact]


@pytest.fixture(scope="session")
def operator_of(smollm: Callable[..., LoadedModel]) -> Build:
    """``operator_of(text, profile, layer)``: an operator of the default model, built once."""

    @functools.cache
    def build(text: str, profile: str, layer: int) -> OperatorArtifact:
        loaded = smollm()
        return build_operator(BuildSpec(concept_from_text(text, loaded), profile, layer), loaded)

    return build


@pytest.fixture
async def engine(smollm: Callable[..., LoadedModel]) -> AsyncIterator[HFEngine]:
    """The hf engine on the default model in float32."""
    engine = HFEngine(smollm(), max_queue=64)
    yield engine
    await engine.close()


@pytest.fixture
def decode() -> Callable[..., object]:
    """``await decode(engine, prompt, sampling, *rows)``: the token ids of each row, and its end."""

    async def run(
        engine: HFEngine, prompt: str, sampling: SamplingParams, *rows: Row
    ) -> list[tuple[list[int], RowFinished]]:
        ids: list[list[int]] = [[] for _ in rows]
        ends: dict[int, RowFinished] = {}
        event: EngineEvent
        async for event in engine.submit(DecodeJob(engine.encode(Prompt(text=prompt)), sampling, rows)):
            if isinstance(event, RowFinished):
                ends[event.row] = event
            elif not isinstance(event, Admitted):
                ids[event.row].append(event.token_id)
        return [(ids[row], ends[row]) for row in range(len(rows))]

    return run


@pytest.fixture(scope="session")
def steered_row() -> Callable[..., Row]:
    """``steered_row(artifact, strength, rule="cumulative", blend=0.0)``."""

    def make(artifact: OperatorArtifact, strength: float, rule: str = "cumulative", blend: float = 0.0) -> Row:
        setting = Setting(strength=strength, rule=rule, blend=blend)
        return Row(SteeringPlan((Application("operator", artifact, setting, ()),)))

    return make
