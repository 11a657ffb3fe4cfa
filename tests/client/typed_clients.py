"""What a type checker must see of the two clients: checked by mypy in test_dual_methods.py, never run.

mypy refuses a `type: ignore` that hides nothing, so each of those below states that its line is an error.
"""

from collections.abc import Coroutine, Mapping
from typing import Any, assert_type

import steer_client
from steer_client import (
    ABResult,
    Arm,
    ArmDelta,
    AsyncComparisonsStream,
    AsyncComparisonStream,
    AsyncGenerationStream,
    AsyncSteerClient,
    ComparisonsStream,
    ComparisonStream,
    Generation,
    GenerationStream,
    ModelInfo,
    OperatorInfo,
    Operators,
    OperatorUse,
    PromptResult,
    ReloadReport,
    SamplingParams,
    SteerClient,
    TextDelta,
    Tokenization,
)

USES = [OperatorUse("golden-gate")]


def blocking(client: SteerClient) -> None:
    assert_type(client.generate("x", operators=USES, request_id="1", timeout=None), Generation)
    assert_type(client.stream("x", operators=USES), GenerationStream)
    assert_type(client.compare([1, 2], arms={"a": USES}, score=False, timeout=2.5), ABResult)
    assert_type(client.compare_stream("x", operators=USES), ComparisonStream)
    assert_type(client.samples("x", 2, operators={"a": 0.4}), tuple[Generation, ...])
    arms: Mapping[str, Operators | Arm] = {"a": "tea=0.2", "b": Arm(USES, SamplingParams(top_k=1)), "c": {"tea": 1}}
    assert_type(client.compare_many({"p": "x", "q": [1]}, arms=arms, n=2), Mapping[str, ABResult])
    for item in assert_type(client.compare_many_stream(["x"], operators="tea"), ComparisonsStream):
        assert_type(item, ArmDelta | PromptResult)
    assert_type(client.operators(), tuple[OperatorInfo, ...])
    assert_type(client.operator("golden-gate"), OperatorInfo)
    assert_type(client.reload_operators(), ReloadReport)
    assert_type(client.model_info(), ModelInfo)
    assert_type(client.tokenize("x"), Tokenization)
    assert_type(client.health(timeout=1), bool)
    for delta in client.stream("x"):
        assert_type(delta, TextDelta)
    with client.compare_stream("x", operators=USES) as stream:
        for piece in stream:
            assert_type(piece, ArmDelta)
        assert_type(stream.result, ABResult)
    client.close()


async def asynchronous(client: AsyncSteerClient) -> None:
    pending = assert_type(client.generate("x", request_id="1", timeout=None), Coroutine[Any, Any, Generation])
    assert_type(await pending, Generation)
    assert_type(client.stream("x", operators=USES), AsyncGenerationStream)
    assert_type(await client.compare([1, 2], arms={"a": USES}, score=False), ABResult)
    assert_type(client.compare_stream("x", operators=USES), AsyncComparisonStream)
    assert_type(await client.samples("x", 2), tuple[Generation, ...])
    assert_type(await client.compare_many(["x"], operators="tea"), Mapping[str, ABResult])
    assert_type(client.compare_many_stream(["x"], operators="tea"), AsyncComparisonsStream)
    assert_type(await client.operators(), tuple[OperatorInfo, ...])
    assert_type(await client.operator("golden-gate"), OperatorInfo)
    assert_type(await client.reload_operators(), ReloadReport)
    assert_type(await client.model_info(), ModelInfo)
    assert_type(await client.tokenize("x"), Tokenization)
    assert_type(await client.health(timeout=1), bool)
    async for delta in client.stream("x"):
        assert_type(delta, TextDelta)
    async with client.compare_stream("x", operators=USES) as stream:
        async for piece in stream:
            assert_type(piece, ArmDelta)
        assert_type(stream.result, ABResult)
    await client.close()


async def refused(client: SteerClient, async_client: AsyncSteerClient) -> None:
    client.generate()  # type: ignore[call-arg]
    client.generate("x", USES)  # type: ignore[call-arg]
    client.generate("x", operator=USES)  # type: ignore[call-arg]
    client.generate("x", timeout="soon")  # type: ignore[arg-type]
    client.operator(name=1)  # type: ignore[arg-type]
    await client.generate("x")  # type: ignore[misc]
    await async_client.generate("x", operator=USES)  # type: ignore[call-arg]
    async_client.stream("x", sampling=USES)  # type: ignore[arg-type]
    steer_client.Generator  # type: ignore[attr-defined]  # noqa: B018
