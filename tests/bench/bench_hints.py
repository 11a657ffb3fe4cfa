"""What a client that honours hints is served beside a hundred that do not.

    python tests/bench/bench_hints.py [--others 100] [--seconds 60]

A server on a tiny random model, one process of clients that ask by bare gRPC, each on a connection of its own, and
again 0.2 s after each refusal whatever its hint, and in this process an SDK client as it comes: it tries again when it
was told to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_bursts import started_server
from fuzz_model import make_model_and_store
from steer_client import SamplingParams, SteerClient

_OTHERS = """
import asyncio, json, sys, time
import grpc
from steering.v1 import generation_pb2 as pb, generation_pb2_grpc

target, count, seconds, tokens = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
request = pb.GenerateRequest(
    prompt=pb.Prompt(text="The bay"), sampling=pb.SamplingParams(max_tokens=tokens, ignore_eos=True)
)
options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))

async def ask(end, served, refused):
    async with grpc.aio.insecure_channel(target, options) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        await channel.channel_ready()
        while time.monotonic() < end:
            try:
                await stub.Generate(request, timeout=60)
                served.append(time.monotonic())
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
                refused.append(time.monotonic())
                await asyncio.sleep(0.2)

async def main():
    times = [([], []) for _ in range(count)]
    print("begun", flush=True)
    await asyncio.gather(*(ask(time.monotonic() + seconds, *each) for each in times))
    print(json.dumps(times), flush=True)

asyncio.run(main())
"""
_LEAD = 5.0
"""Seconds that the others have to fill the queue before, and to go on after."""


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
        with started_server("--model", model, "--store", store, *args.options) as (target, _):
            command = [sys.executable, "-c", _OTHERS, target]
            figures = (str(args.others), str(args.seconds + 2 * _LEAD), str(args.tokens))
            with subprocess.Popen([*command, *figures], stdout=subprocess.PIPE, text=True) as others:
                others.stdout.readline()  # type: ignore[union-attr]
                time.sleep(_LEAD)
                # One clock for all processes of a machine.
                began, end = time.monotonic(), time.monotonic() + args.seconds
                served = served_by_the_sdk(target, end, args.tokens)
                found = json.loads(others.communicate()[0])
    each, refusals = (sorted(sum(began < at < end for at in times[which]) for times in found) for which in (0, 1))
    share = (served + sum(each)) / (1 + len(each))
    print(
        f"{args.seconds:g} s: the SDK client was served {served} texts, each of the {len(each)} others "
        f"{sum(each) / len(each):.1f} ({each[0]} to {each[-1]}; {sum(refusals)} refusals): "
        f"{served / share:.2f} of an equal share"
    )


if __name__ == "__main__":
    main()
