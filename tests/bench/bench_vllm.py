"""What steering costs on vLLM: plain vLLM against ours, idle, steered, and through the gRPC server.

    python tests/bench/bench_vllm.py [--pairs 7] [--batches 32,64] [--tokens 64] [--rows 64] [--arms NAME,...]
                                      [--json]

Boots vLLM itself (no worker of ours), the engine, and a server in a process of its own, all with the same options, and
sends each the same requests in turn. The arms:

    plain     AsyncLLM, called directly for token ids; what all others are divided by
    idle      our engine, nothing steered
    steered   our engine, every row steered by one operator
    varied    our engine, every row steered by another (operator, strength, layer)
    first     the same as varied, at the first token only
    words     our engine, every row steered by the vector of another word, at the first token only
    grpc      our server, nothing steered, asked for text by one SDK client in a third process
    steered-grpc  the same, every row steered

Operators are random, of rank 64 and 6 positions. Reports, per arm and batch size (1 among them, for the time to the
first token), the ratio of throughputs round by round: machines drift, and neighbours drift least.
Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import AsyncEngineArgs, TokensPrompt
from vllm import SamplingParams as VLLMSamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from operators.core.artifact import OperatorArtifact, make_artifact, make_vector
from operators.core.header import LowRank, OperatorHeader, Recommended
from operators.core.positions import Positions
from operators.core.store import Store
from operators.core.vector_source import LensWord, WordVector
from operators.model.loading import LoadedModel, load_model
from operators.model.obtain import obtain
from steer_server.engine.vllm.engine import VLLMEngine
from steer_server.engine.vllm.worker_protocol import OperatorSetting

BIN = Path(sys.executable).parent
LAYERS = (7, 12, 17, 22)
OPERATORS_PER_LAYER = 4
POSITIONS, RANK = 6, 64
OPTIONS = {"enforce_eager": True, "max_model_len": 512, "block_size": 32}

REST = 2.0
"""Seconds between two runs: for one after its last step, a vLLM process waits busily on a core that others need."""

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One batch: tokens per second, and seconds from a request to its first token, request by request."""

    rate: float
    first: tuple[float, ...]


Arm = Callable[[Prompts, int], Awaitable[Run]]


def main() -> None:
    """Prints a table (or JSON) of rates and ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=7)
    options.add_argument("--batches", default="32,64")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    options.add_argument("--rows", type=int, default=64, help="vLLM's max_num_seqs; a client of ours keeps 1/8 free")
    options.add_argument("--arms", default="idle,steered,varied,first,words,grpc,steered-grpc")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--json", action="store_true")
    options.add_argument("--client", metavar="TARGET", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.client:
        asyncio.run(answer(given.client))
        return
    found = asyncio.run(measure(given))
    if given.json:
        print(json.dumps(found))
        return
    print(f"{given.pairs} rounds, prompts of {given.prompt} tokens, {given.tokens} generated, {given.dtype}")
    print(
        f"{'batch':>5} {'arm':13} {'tokens/s':>9} {'ratio: min':>11} {'median':>7} {'max':>6} {'first token, ms':>16}"
    )
    for row in found:
        ratios = row["ratios"]
        print(
            f"{row['batch']:5} {row['arm']:13} {row['rate']:9.0f} {min(ratios):11.3f} "
            f"{statistics.median(ratios):7.3f} {max(ratios):6.3f} {1e3 * row['first']:10.1f}"
        )


async def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm in every round, in another order each time."""
    names = given.arms.split(",")
    batches = [1, *map(int, given.batches.split(","))]
    loaded = load_model("smollm2-135m", dtype="float32")
    made = operators(loaded)
    with tempfile.TemporaryDirectory() as directory:
        for index, artifact in enumerate(made):
            Store(directory).save(f"op-{index}", artifact)
        async with arms(names, loaded, made, directory, given.dtype, {**OPTIONS, "max_num_seqs": given.rows}) as ways:
            found: dict[tuple[int, str], list[Run]] = {(size, name): [] for size in batches for name in ways}
            source = random.Random(0)
            for turn in range(-1, given.pairs):
                for size in batches:
                    for name in source.sample(list(ways), len(ways)):
                        prompts = [[source.randrange(50, 40_000) for _ in range(given.prompt)] for _ in range(size)]
                        await asyncio.sleep(REST)
                        run = await ways[name](prompts, given.tokens)
                        # The first round warms up.
                        if turn >= 0:
                            found[size, name].append(run)
                        where = f"round {turn + 1} of {given.pairs}, batch {size}"
                        print(f"{where}, {name}: {run.rate:.0f} tokens/s", file=sys.stderr, flush=True)
    rows = []
    for (size, name), runs in found.items():
        plain = found[size, "plain"]
        rows.append(
            {
                "batch": size,
                "arm": name,
                "rate": statistics.median(run.rate for run in runs),
                "ratios": [run.rate / other.rate for run, other in zip(runs, plain, strict=True)],
                "first": statistics.median(statistics.median(run.first) for run in runs),
            }
        )
    return rows


@asynccontextmanager
async def arms(
    names: Sequence[str],
    loaded: LoadedModel,
    made: Sequence[OperatorArtifact],
    directory: str,
    dtype: str,
    options: dict[str, Any],
) -> AsyncIterator[dict[str, Arm]]:
    """The ways to be measured, by name, each on an engine that is up."""
    source = str(obtain("smollm2-135m"))
    plain = AsyncLLM.from_engine_args(AsyncEngineArgs(model=source, dtype=dtype, **options))
    ways: dict[str, Arm] = {"plain": lambda prompts, tokens: direct(plain, prompts, tokens)}
    engine = server = None
    try:
        if {"idle", "steered", "varied", "first", "words"} & set(names):
            engine = await VLLMEngine.start(loaded, source, dtype=dtype, max_queue=64, engine_args=options)
            vectors = [word_vector(made[0], index) for index in range(options["max_num_seqs"])]
            engine._operator_cache.room.add([*made, *vectors])
            await engine._operator_cache.load([*made, *vectors])
            ways |= {
                name: way
                for name, way in {
                    "idle": lambda prompts, tokens: steered(engine, [], prompts, tokens),
                    "steered": lambda prompts, tokens: steered(engine, [setting(made[0], 0.3)], prompts, tokens),
                    "varied": lambda prompts, tokens: steered(engine, varied(made), prompts, tokens),
                    "first": lambda prompts, tokens: steered(engine, at_first_token(made), prompts, tokens),
                    "words": lambda prompts, tokens: steered(engine, of_words(vectors), prompts, tokens),
                }.items()
                if name in names
            }
        if {"grpc", "steered-grpc"} & set(names):
            server, client = await remote(directory, dtype, options)
            ways |= {
                name: way
                for name, way in {
                    "grpc": lambda prompts, tokens: ask(client, "", prompts, tokens),
                    "steered-grpc": lambda prompts, tokens: ask(client, "op-0", prompts, tokens),
                }.items()
                if name in names
            }
        yield ways
    finally:
        plain.shutdown()
        if engine is not None:
            await engine.close()
        if server is not None:
            client.terminate()
            server.terminate()
            await server.wait()


async def direct(llm: AsyncLLM, prompts: Prompts, tokens: int) -> Run:
    """Every prompt at once, greedily, by vLLM's own interface; token ids only, as the engine asks for them."""
    sampling = VLLMSamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
    )

    async def one(ids: Sequence[int], key: str) -> float:
        began, first = time.perf_counter(), 0.0
        async for _ in llm.generate(TokensPrompt(prompt_token_ids=list(ids)), sampling, key):
            first = first or time.perf_counter() - began
        return first

    return await timed([one(ids, os.urandom(8).hex()) for ids in prompts], tokens)


async def steered(engine: VLLMEngine, settings: Sequence[OperatorSetting], prompts: Prompts, tokens: int) -> Run:
    """The same on the engine; where it is steered, with the measurement of each request."""
    params = {"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True}

    async def one(ids: Sequence[int], own: Sequence[OperatorSetting], key: str) -> float:
        began, first = time.perf_counter(), 0.0
        async for _ in engine._client.generate(ids, params, own, key):
            first = first or time.perf_counter() - began
        if own:
            measurement = await engine._context.measurements.take(key)
            assert measurement is not None
            assert not measurement["failure"]
        return first

    jobs = [
        one(ids, [settings[index % len(settings)]] if settings else [], os.urandom(8).hex())
        for index, ids in enumerate(prompts)
    ]
    return await timed(jobs, tokens)


async def timed(jobs: Sequence[Awaitable[float]], tokens: int) -> Run:
    """Seconds of all jobs together."""
    began = time.perf_counter()
    first = await asyncio.gather(*jobs)
    return Run(len(jobs) * tokens / (time.perf_counter() - began), tuple(first))


async def remote(
    directory: str, dtype: str, options: dict[str, Any]
) -> tuple[asyncio.subprocess.Process, asyncio.subprocess.Process]:
    """A server and its client, each in a process of its own."""
    args = [f"--engine-args={key}={str(value).lower()}" for key, value in options.items()]
    command = [str(BIN / "steer-server"), "--engine", "vllm", "--dtype", dtype, "--store", directory, *args]
    server = await asyncio.create_subprocess_exec(
        *command,
        *("--listen", "127.0.0.1:0", "--max-queue", "64", "--log-format", "json"),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert server.stderr is not None
    while line := (await server.stderr.readline()).decode():
        if found := re.search(r'"listen": "([^"]+)".*"event": "serving"', line):
            break
    else:
        sys.exit("bench: the server did not start")
    drain = asyncio.create_task(server.stderr.read())
    drain.add_done_callback(lambda task: task.cancelled() or task.result())
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, "--client", found[1]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=1 << 24,
    )
    return server, client


async def ask(client: asyncio.subprocess.Process, operator: str, prompts: Prompts, tokens: int) -> Run:
    """Has the client process send the requests, and takes its figures."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(json.dumps([operator, prompts, tokens]).encode() + b"\n")
    rate, first = json.loads(await client.stdout.readline())
    return Run(rate, tuple(first))


async def answer(target: str) -> None:
    """The client process: a line of requests in, a line of figures out."""
    from steer_client import AsyncSteerClient, OperatorUse, SamplingParams

    async with AsyncSteerClient(target) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            operator, prompts, tokens = json.loads(line)
            sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
            uses = [OperatorUse(operator, 0.3)] if operator else []

            async def one(ids: Sequence[int], uses: Sequence[Any], sampling: Any, tokens: int) -> float:
                began, first, count = time.perf_counter(), 0.0, 0
                async for delta in client.stream(ids, operators=uses, sampling=sampling):
                    first = first or time.perf_counter() - began
                    count += len(delta.token_ids)
                assert count == tokens
                return first

            run = await timed([one(ids, uses, sampling, tokens) for ids in prompts], tokens)
            print(json.dumps([run.rate, run.first]), flush=True)


def operators(loaded: LoadedModel) -> list[OperatorArtifact]:
    """Random operators of the default model: the time depends on their sizes, not on their values."""
    d, made = loaded.hidden_size, []
    for index, layer in enumerate(LAYERS * OPERATORS_PER_LAYER):
        generator = torch.Generator().manual_seed(index)
        basis = torch.linalg.qr(torch.randn(d, RANK, generator=generator)).Q
        factors = torch.randn(POSITIONS, RANK, d, generator=generator)
        anchor, base = torch.randn(2, d, generator=generator)
        header = OperatorHeader(
            concept="a random direction",
            concept_ids=tuple(range(POSITIONS)),
            model="smollm2-135m",
            architecture=type(loaded.model).__name__,
            model_fingerprint=loaded.fingerprint,
            tokenizer_fingerprint=loaded.tokenizer_fingerprint,
            profile="residual",
            rule_set="up-live/1",
            layer=layer,
            injection_layer=layer,
            num_layers=loaded.num_layers,
            hidden_size=d,
            dtype="float32",
            model_dtype="float32",
            recommended=Recommended(),
            reconstruction_error=1e-6,
            builder_version="0.1.0",
            created=datetime(2030, 1, 2, tzinfo=UTC),
            low_rank=LowRank(
                rank=RANK,
                residuals=(0.0,) * POSITIONS,
                weighting="white",
                oversample=8,
                power_iterations=1,
                seed=index,
            ),
        )
        made.append(make_artifact(header, factors, anchor, base, basis=basis))
    return made


def setting(artifact: OperatorArtifact, strength: float) -> OperatorSetting:
    """An operator by the published rule."""
    return OperatorSetting(artifact.digest, "cumulative", strength, 0.0)


def varied(made: Sequence[OperatorArtifact]) -> list[OperatorSetting]:
    """64 of them, no two alike."""
    return [setting(artifact, 0.1 * step) for step in (1, 2, 3, 4) for artifact in made]


def at_first_token(made: Sequence[OperatorArtifact]) -> list[OperatorSetting]:
    """Those of :func:`varied`, each pushing the first token only."""
    return [dataclasses.replace(one, end=1) for one in varied(made)]


def word_vector(like: OperatorArtifact, index: int) -> OperatorArtifact:
    """A random vector as a lens makes them, of the model of another operator."""
    vector = torch.randn(like.header.hidden_size, generator=torch.Generator().manual_seed(index))
    source = WordVector(
        norm=float(vector.double().norm()),
        lens=f"sha256:{'0' * 64}",
        words=(LensWord(text=f"word {index}", weight=1.0, ids=(index,)),),
    )
    of_maps = {"concept_ids": (), "rule_set": "", "low_rank": None, "reconstruction_error": None}
    recommended = Recommended(strength=0.12, blend=1.0, positions=Positions(end=1))
    update = {**of_maps, "vector": source, "recommended": recommended, "layer": 21, "injection_layer": 21}
    return make_vector(OperatorHeader(**{**dict(like.header), **update}), vector)


def of_words(vectors: Sequence[OperatorArtifact]) -> list[OperatorSetting]:
    """One word for each row, at the first token."""
    return [OperatorSetting(vector.digest, "cumulative", 0.12, 1.0, end=1) for vector in vectors]


if __name__ == "__main__":
    main()
