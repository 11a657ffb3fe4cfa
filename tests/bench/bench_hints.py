"""What a client that honours hints is served beside a hundred that do not.

    python tests/bench/bench_hints.py [--others 100] [--seconds 120]

A server on a tiny random model, one process of clients that ask by bare gRPC, each on a connection of its own, and
again 0.2 s after each refusal whatever its hint, and in this process an SDK client as it comes: it tries again when it
was told to.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from pathlib import Path

import grpc
from bench_bursts import started_server
from fuzz_model import make_model_and_store
from steer_client import SamplingParams, SteerClient
from steering.v1 import generation_pb2, generation_pb2_grpc, text_pb2

_LEAD = 5.0
"""Seconds that the others have to fill the queue before, and to go on after."""
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))

Times = tuple[list[float], list[float]]
"""When a client was served, and when it was refused."""


def ask_at_once(target: str, count: int, seconds: float, tokens: int) -> list[Times]:
    """The times of each of so many clients that pay no heed to hints."""

    async def all_of_them() -> list[Times]:
        end = time.monotonic() + seconds
        return await asyncio.gather(*(_ask(target, end, tokens) for _ in range(count)))

    return asyncio.run(all_of_them())


async def _ask(target: str, end: float, tokens: int) -> Times:
    served, refused = list[float](), list[float]()
    request = generation_pb2.GenerateRequest(
        prompt=text_pb2.Prompt(text="The bay"),
        sampling=text_pb2.SamplingParams(max_tokens=tokens, ignore_eos=True),
    )
    async with grpc.aio.insecure_channel(target, _OPTIONS) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        while time.monotonic() < end:
            try:
                await stub.Generate(request, timeout=60, wait_for_ready=True)
                served.append(time.monotonic())
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                refused.append(time.monotonic())
                await asyncio.sleep(0.2)
    return served, refused


def served_by_the_sdk(target: str, end: float, tokens: int) -> int:
    """Texts that an SDK client gets, one after another, until then."""
    sampling, served = SamplingParams(max_tokens=tokens, ignore_eos=True), 0
    with SteerClient(target, timeout=None) as client:
        while time.monotonic() < end:
            client.generate("The bay", sampling=sampling)
            served += time.monotonic() < end
    return served


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--others", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("options", nargs="*", help="of steer-server, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model, store = map(str, make_model_and_store(Path(directory)))
        with (
            started_server("--model", model, "--store", store, *args.options) as (target, _),
            multiprocessing.get_context("spawn").Pool(1) as process,
        ):
            # Returns when the process has imported what it needs.
            process.apply(time.monotonic)
            others = process.apply_async(ask_at_once, (target, args.others, args.seconds + 2 * _LEAD, args.tokens))
            time.sleep(_LEAD)
            # One clock for all processes of a machine.
            began, end = time.monotonic(), time.monotonic() + args.seconds
            served = served_by_the_sdk(target, end, args.tokens)
            found = others.get()
    each, refusals = (sorted(sum(began < at < end for at in times[which]) for times in found) for which in (0, 1))
    share = (served + sum(each)) / (1 + len(each))
    print(
        f"{args.seconds:g} s: the SDK client was served {served} texts, each of the {len(each)} others "
        f"{sum(each) / len(each):.1f} ({each[0]} to {each[-1]}; {sum(refusals)} refusals): "
        f"{served / share:.2f} of an equal share"
    )


if __name__ == "__main__":
    main()
