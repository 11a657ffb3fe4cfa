"""Many calls at once: how each ended, how soon, and what a health check meanwhile took.

    .venv/bin/python tests/bench/bench_bursts.py --calls 1500 5000 --channels 1 50

Starts a server in a process of its own (with ``--target`` it asks one that runs), sends every call of a burst at the
same moment, and waits for all. Every call must be served, or refused as RESOURCE_EXHAUSTED with a hint.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import psutil
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steering.v1 import generation_pb2, generation_pb2_grpc, text_pb2

_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
_REQUEST = generation_pb2.GenerateRequest(
    prompt=text_pb2.Prompt(text="The bay"),
    sampling=text_pb2.SamplingParams(max_tokens=4, ignore_eos=True),
)


@contextmanager
def started_server(*options: str) -> Iterator[tuple[str, int]]:
    """Target and process id of a server that is killed at the end."""
    command = [Path(sys.executable).parent / "steer-server", "--listen", "127.0.0.1:0", *options]
    log = Path("/tmp/bench_bursts.log")
    with log.open("w") as file, subprocess.Popen(command, stderr=file) as process:
        try:
            while not (found := re.search(r"serving\s.*listen=(\S+)", log.read_text())):
                if process.poll() is not None:
                    raise SystemExit(f"the server did not start; see {log}")
                time.sleep(0.2)
            yield found[1], process.pid
        finally:
            process.terminate()


def has_hint(error: grpc.aio.AioRpcError) -> bool:
    """Whether the status says when to try again."""
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    retry = error_details_pb2.RetryInfo()
    return packed is not None and any(
        detail.Unpack(retry) and retry.retry_delay.ToNanoseconds() > 0
        for detail in status_pb2.Status.FromString(packed).details
    )


async def ask(channel: grpc.aio.Channel, timeout: float) -> tuple[str, float]:
    """How a call ended, and after how many seconds."""
    began = time.monotonic()
    try:
        await generation_pb2_grpc.GenerationServiceStub(channel).Generate(_REQUEST, timeout=timeout)
        outcome = "OK"
    except grpc.aio.AioRpcError as error:
        outcome = f"{error.code().name}{' with a hint' if has_hint(error) else f' {error.details()!r}'}"
    return outcome, time.monotonic() - began


async def watch_health(target: str, seconds: list[float]) -> None:
    """Adds what each health check took, one every 0.2 s, on a channel of its own."""
    async with grpc.aio.insecure_channel(target, _OPTIONS) as channel:
        while True:
            began = time.monotonic()
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
            seconds.append(time.monotonic() - began)
            await asyncio.sleep(0.2)


async def burst(target: str, calls: int, channels: int, timeout: float) -> tuple[list[tuple[str, float]], list[float]]:
    """The outcomes of a burst, and the health checks beside it."""
    opened = [grpc.aio.insecure_channel(target, _OPTIONS) for _ in range(channels)]
    await asyncio.gather(*(channel.channel_ready() for channel in opened))
    checks: list[float] = []
    watching = asyncio.ensure_future(watch_health(target, checks))
    outcomes = await asyncio.gather(*(ask(opened[number % channels], timeout) for number in range(calls)))
    watching.cancel()
    await asyncio.gather(*(channel.close() for channel in opened))
    return outcomes, checks


def report(target: str, pid: int | None, args: argparse.Namespace) -> None:
    """One line for each burst."""
    for calls in args.calls:
        for channels in args.channels:
            outcomes, checks = asyncio.run(burst(target, calls, channels, args.timeout))
            counted = Counter(outcome for outcome, _ in outcomes)
            refused = sorted(seconds for outcome, seconds in outcomes if outcome != "OK")
            memory = f", server {psutil.Process(pid).memory_info().rss >> 20} MiB" if pid else ""
            print(
                f"{calls} calls, {channels} channels: {dict(counted)}; last refusal after "
                f"{refused[-1] if refused else 0:.2f} s, all done after {max(s for _, s in outcomes):.1f} s; "
                f"slowest health check {max(checks, default=0):.2f} s{memory}",
                flush=True,
            )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="a running server; without it one is started")
    parser.add_argument("--calls", type=int, nargs="+", default=[1500, 5000])
    parser.add_argument("--channels", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for each call")
    parser.add_argument("options", nargs="*", help="of steer-server, after --")
    args = parser.parse_args()
    if args.target:
        report(args.target, None, args)
        return
    with started_server(*args.options) as (target, pid):
        report(target, pid, args)


if __name__ == "__main__":
    main()
