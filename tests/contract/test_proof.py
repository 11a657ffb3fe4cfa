"""A ``steer`` that does something else than it should: on a live engine every request fails, and later ones do not."""

from __future__ import annotations

import asyncio

import pytest
import torch

from operators.core import hooks
from operators.core.apply import steer
from steer_server.engine.hf.engine import HFEngine
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import DecodeJob, Prompt, RowFinished, SamplingParams

SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)


def _random(push):
    noise = torch.randn(push.shape)
    return noise / noise.norm(dim=-1, keepdim=True) * push.norm(dim=-1, keepdim=True)


MUTATIONS = {
    "one hundredth": lambda push: 0.01 * push,
    "a random direction": _random,
    "the opposite sign": torch.neg,
    "rows swapped": lambda push: push.flip(0),
    "numbers swapped": lambda push: push.roll(1, -1),
    "the first row only": lambda push: torch.cat((push[:1], 0 * push[1:])),
}


@pytest.fixture
def rows(operator_of, steered_row):
    """Two of one strength, each with an operator of its own."""
    texts = "The Golden Gate Bridge in San", "The wedding was beautiful and the bride"
    return [steered_row(operator_of(text, "residual", 15), 0.4) for text in texts]


@pytest.fixture
def mutated(tmp_path):
    """A ``steer`` that does what a file names, in whatever process."""
    chosen = tmp_path / "mutation"
    chosen.write_text("")

    def wrong(hidden, push, residual=None):
        name = chosen.read_text()
        done = push if not name else MUTATIONS[name](push)
        return steer(hidden, done, residual)

    wrong.choose = chosen.write_text
    return wrong


async def _receipts(engine, rows):
    ids = await engine.encode(Prompt(text="Here is a painting of the"))
    ends = {}
    async for event in engine.submit(DecodeJob.of(ids, SAMPLING, tuple(rows))):
        if isinstance(event, RowFinished):
            ends[event.row] = event.receipts
    return [ends[row][0] for row in range(len(rows))]


async def _check(engine, rows, choose):
    for name in ("", *MUTATIONS, ""):
        choose(name)
        if name:
            with pytest.raises(SteeringNotAppliedError):
                await _receipts(engine, rows)
            # As arms they fail together. Alone, each other than the first row of a batch is one more.
            if name not in ("rows swapped", "the first row only"):
                done = await asyncio.gather(*(_receipts(engine, [row]) for row in rows), return_exceptions=True)
                assert [type(error) for error in done] == [SteeringNotAppliedError] * len(rows)
        else:
            for receipt in await _receipts(engine, rows):
                assert receipt.positions_checked >= 4
                assert receipt.worst_cosine > 0.9999


@pytest.mark.model
async def test_no_request_passes_on_an_hf_engine_that_steers_otherwise(smollm, rows, mutated, monkeypatch):
    monkeypatch.setattr(hooks, "steer", mutated)
    engine = HFEngine(smollm(), max_queue=4)
    await _check(engine, rows, mutated.choose)
    await engine.close()


@pytest.mark.model
@pytest.mark.vllm
async def test_no_request_passes_on_a_vllm_engine_that_steers_otherwise(vllm_engine, rows, tmp_path, monkeypatch):
    from steer_server.engine.vllm import engine_config
    from tests.contract.mutated_worker import CHOSEN

    # In a process of its own, which knows this one's environment.
    chosen = tmp_path / "mutation"
    chosen.write_text("")
    monkeypatch.setenv(CHOSEN, str(chosen))
    monkeypatch.setattr(engine_config, "WORKER", "tests.contract.mutated_worker.MutatedWorker")
    await _check(await vllm_engine(max_num_seqs=8), rows, chosen.write_text)
