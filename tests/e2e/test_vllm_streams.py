"""Streams under way on a vLLM server: while their operator is replaced, and when its process group is told to stop."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta

import psutil
import pytest
from steer_client import (
    AsyncSteerClient,
    FinishReason,
    OperatorUse,
    SamplingParams,
    ServerBusyError,
    SteerClient,
)

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.apply import prepared_bytes
from operators.core.artifact import with_header
from operators.core.defaults import PUBLISHED
from operators.core.store import Store
from steer_server.engine.vllm.job_memory import StepSizes

pytestmark = [pytest.mark.model, pytest.mark.vllm]

VERSIONS = {
    "bridge": ("The Golden Gate Bridge in San", 15),
    "wedding": ("The wedding was beautiful and the bride", 21),
    # Another text at the layer of the first.
    "paris": ("The capital of France is", 15),
}
PROMPTS = ("Here is a painting of the", "I went to new york to see the", "My friend told me that")
STRENGTH = 0.45
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True)
STREAMS = 16
SECONDS = 12.0
PERIOD = 1.0
ROOM = 5
"""Operators that the workers may hold: fewer than come by, so that old ones go while streams run."""
OPTIONS = ("--engine", "vllm", "--engine-args", "enforce_eager=true", "--engine-args", "max_model_len=256")


@dataclass(frozen=True)
class Text:
    """One finished stream. Times are of the monotonic clock: the call, its first token, its end."""

    prompt: str
    ids: tuple[int, ...]
    digest: str
    asked: float
    begun: float
    ended: float


@dataclass
class Reign:
    """A version's time under the name: it began in the first of these spans and ended in the second."""

    digest: str
    came: tuple[float, float]
    went: tuple[float, float]


@pytest.fixture(scope="module")
def artifacts(smollm):
    loaded = smollm()
    return {
        name: build_operator(BuildSpec((concept_from_text(text, loaded),), layer=layer, recommended=PUBLISHED), loaded)
        for name, (text, layer) in VERSIONS.items()
    }


@pytest.fixture(scope="module")
def directory(artifacts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    for name, artifact in artifacts.items():
        Store(directory).save(name, artifact)
    Store(directory).save("swapped", artifacts["bridge"])
    return directory


@pytest.fixture(scope="module")
def server(artifacts, directory, start_server):
    # Beside the operators, the pushes of a step as large as vLLM's default is, and some running sums.
    pushes = StepSizes(tokens=2048, width=576, itemsize=4).pushes(1) + (1 << 20)
    room = pushes + ROOM * max(map(prepared_bytes, artifacts.values()))
    options = (
        "--store",
        str(directory),
        "--dtype",
        "float32",
        "--operator-memory",
        str(room),
        "--grace",
        "2",
        *OPTIONS,
    )
    with start_server(*options, model="smollm2-135m", metrics=True, timeout=300) as running:
        yield running


async def ask(client, prompt, name):
    stream = client.stream(prompt, operators=[OperatorUse(name, STRENGTH)], sampling=SAMPLING, timeout=120)
    asked, begun = time.monotonic(), 0.0
    async for _ in stream:
        begun = begun or time.monotonic()
    [receipt] = stream.result.receipts
    assert receipt.operator == name
    assert receipt.generated_tokens_steered == SAMPLING.max_tokens - 1
    assert receipt.prompt_tokens_steered + receipt.prompt_tokens_cached == stream.result.usage.prompt_tokens
    return Text(prompt, stream.result.token_ids, receipt.digest, asked, begun, time.monotonic())


async def swap(client, directory, artifacts, names, end):
    """Every ``PERIOD`` another version takes the name, one that no worker has seen; ``names`` learns its digest."""
    long_ago = (0.0, 0.0)
    reigns = [Reign(artifacts["bridge"].digest, long_ago, long_ago)]
    for number, name in enumerate(itertools.islice(itertools.cycle(artifacts), 1, None)):
        await asyncio.sleep(PERIOD)
        if time.monotonic() > end:
            break
        # The same numbers, as if built at another time: the digest is another one.
        old = artifacts[name]
        new = with_header(old, created=old.header.created + timedelta(seconds=1 + number))
        names[new.digest] = name
        await asyncio.to_thread(Store(directory).save, "swapped", new, replace=True)
        began = time.monotonic()
        report = await client.reload_operators()
        assert report.changed == ("swapped",)
        reigns[-1].went = now = (began, time.monotonic())
        reigns.append(Reign(new.digest, now, long_ago))
    reigns[-1].went = (time.monotonic(),) * 2
    return reigns


async def test_streams_keep_the_version_they_began_with_while_it_is_replaced_every_second(
    server, artifacts, directory, record_property
):
    async with AsyncSteerClient(server.target) as client:
        expected = {(prompt, name): (await ask(client, prompt, name)).ids for prompt in PROMPTS for name in artifacts}
        assert len(set(expected.values())) == len(expected)
        names = {artifact.digest: name for name, artifact in artifacts.items()}
        end = time.monotonic() + SECONDS

        async def one_after_another(number):
            texts = []
            # Spread over the versions' turns: streams that begin together might never begin under one of them.
            await asyncio.sleep(PERIOD * len(VERSIONS) * number / STREAMS)
            while time.monotonic() < end:
                try:
                    texts.append(await ask(client, PROMPTS[(number + len(texts)) % len(PROMPTS)], "swapped"))
                except ServerBusyError as error:
                    # So many versions are in use that there is no room for one more: it says when to come back.
                    await asyncio.sleep(error.retry_after)
            return texts

        reigns, *found = await asyncio.gather(
            swap(client, directory, artifacts, names, end), *(one_after_another(number) for number in range(STREAMS))
        )
    texts = list(itertools.chain(*found))
    for text in texts:
        assert text.ids == expected[text.prompt, names[text.digest]], text
        assert any(
            reign.digest == text.digest and reign.came[0] <= text.begun and text.asked <= reign.went[1]
            for reign in reigns
        ), f"{text} is of a version that had gone, or was yet to come"
    across = sum(any(text.begun < reign.came[0] and reign.came[1] < text.ended for reign in reigns) for text in texts)
    counts = {"streams": len(texts), "swaps": len(reigns) - 1, "across_a_swap": across}
    for name, count in counts.items():
        record_property(name, count)
    print(counts)
    # However slow the machine: there were swaps, old versions had to go, and texts went on across swaps.
    assert len(reigns) > 3
    assert len({text.digest for text in texts} | {artifact.digest for artifact in artifacts.values()}) > ROOM
    assert across > 0
    server.wait_for_jobs(0, 0)


def test_a_signal_to_the_whole_process_group_ends_streams_with_what_they_have(server):
    """The last one: it ends the server."""
    sampling = SamplingParams(max_tokens=240, ignore_eos=True)
    with SteerClient(server.target, timeout=60) as client:
        stream = client.stream(PROMPTS[0], operators=[OperatorUse("bridge", STRENGTH)], sampling=sampling)
        items = iter(stream)
        count = len(next(items).token_ids)
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert any("VLLM" in process.name() for process in family)
        # Ctrl-C in a terminal.
        os.killpg(server.process.pid, signal.SIGINT)
        count += sum(len(delta.token_ids) for delta in items)
    assert stream.result.finish_reason is FinishReason.CANCELLED
    assert 1 < stream.result.usage.completion_tokens == count < sampling.max_tokens
    assert stream.result.receipts[0].generated_tokens_steered == count - 1
    assert server.exit_code(30) == 0
    assert "Traceback" not in "\n".join(server.log)
    end = time.monotonic() + 10
    while left := [process for process in family if _runs(process)]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def _runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
