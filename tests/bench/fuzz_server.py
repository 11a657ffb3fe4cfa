"""A server under requests that are many, huge, extreme and malformed, while its health and a small request are timed.

    python tests/bench/fuzz_server.py --requests 20000
    python tests/bench/fuzz_server.py --requests 20000 --access
    python tests/bench/fuzz_server.py --target 127.0.0.1:50051 --pid 4711 --requests 500 --json

Without a target, the server is started here, on a random model of four layers with an operator. It fails where a call
ends as INTERNAL or UNKNOWN, or the server does. STEERING_NOT_APPLIED, which is INTERNAL, is counted apart: a text may
end before the positions that were asked for, which nobody knows beforehand.

With --access the server asks for tokens, and lets operators be managed over the wire. The requests come with a token to
generate and read, with one of an administrator, with a wrong one, with what is no token, with two, or
without.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import psutil
from fuzz_messages import Fuzz
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steer_client import OperatorUse, SamplingParams, SteerClient

from operators.core.store import Store

_WORKERS = 8
_DEADLINE = 5.0
"""Seconds that a request may take: one that is in order may ask for a whole context of tokens."""
_MOST_ANSWERS = 64
_PERIOD = 0.2
_QUIET = 5.0
_REST = 8.0
_FAULTS = ("INTERNAL", "UNKNOWN")
_WATCHED = "watched-by-a-stranger"

Metadata: TypeAlias = tuple[tuple[str, str], ...]
Tokens: TypeAlias = tuple[Metadata, ...]


def main() -> None:
    """Prints what happened; exit status 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--access", action="store_true", help="with tokens, and operators managed over the wire")
    parser.add_argument("--watch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        watch(options.watch)
        return
    if options.target:
        found = run(options.target, options.pid, options.requests, options.seed)
    else:
        found = run_own(options.requests, options.seed, access=options.access)
    print(json.dumps(found) if options.json else json.dumps(found, indent=2, ensure_ascii=False))
    if found["faults"] or not found["alive"]:
        sys.exit(1)


def run(target: str, pid: int, requests: int, seed: int, tokens: Tokens = ()) -> dict[str, Any]:
    """Fuzzes a server that runs. ``tokens``: what its requests are sent with, drawn for each."""
    server = psutil.Process(pid)
    load = os.getloadavg()[0]
    with SteerClient(target, timeout=60) as client:
        names = tuple(each.name for each in client.operators() if not each.problem and each.name != _WATCHED)
    started = server.memory_info().rss
    # Fills what is kept: the tokenizer's words, and kernels by the shape of what they multiply.
    asyncio.run(fuzz(target, Fuzz(seed + 1, names), requests // 5, tokens))
    quiet = _watched(target, lambda: time.sleep(_QUIET if requests >= 2000 else 1.0))
    before, began = server.memory_info().rss, time.monotonic()
    codes: Counter[str] = Counter()
    examples: list[str] = []

    def attack() -> None:
        nonlocal codes, examples
        codes, examples = asyncio.run(fuzz(target, Fuzz(seed, names), requests, tokens))

    busy = _watched(target, attack)
    seconds = time.monotonic() - began
    time.sleep(_REST if requests >= 2000 else 1.0)
    alive = server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    after = server.memory_info().rss if alive else 0
    return {
        "requests": requests,
        "seed": seed,
        "seconds": round(seconds, 1),
        "codes": dict(codes.most_common()),
        "faults": sum(count for code, count in codes.items() if code in _FAULTS),
        "examples": examples[:20],
        "alive": alive,
        "quiet": quiet,
        "busy": busy,
        "resident MB at the start, warm, afterwards": [round(each / 1e6, 1) for each in (started, before, after)],
        "load before and after": [round(load, 1), round(os.getloadavg()[0], 1)],
    }


async def fuzz(target: str, source: Fuzz, requests: int, tokens: Tokens = ()) -> tuple[Counter[str], list[str]]:
    """Sends requests, a few at once: how many ended with each code, and what the faults were."""
    codes: Counter[str] = Counter()
    examples: list[str] = []
    supply = iter(source)
    left = requests
    draw = random.Random(requests)
    async with grpc.aio.insecure_channel(target, options=[("grpc.max_send_message_length", -1)]) as channel:

        async def work() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                method, data = next(supply)
                path = f"/{method.containing_service.full_name}/{method.name}"
                code, text = await _ask(channel, path, data, draw.choice(tokens) if tokens else ())
                codes[code] += 1
                if code in (*_FAULTS, "STEERING_NOT_APPLIED"):
                    examples.append(f"{path} {code} {text[:200]} {data[:60].hex()} ({len(data)} bytes)")

        await asyncio.gather(*(work() for _ in range(_WORKERS)))
    return codes, examples


async def _ask(channel: grpc.aio.Channel, path: str, data: bytes, metadata: Metadata) -> tuple[str, str]:
    # On the wire, a stream of one is one message. Sent in parts, it fails on the client where the server refuses early.
    call = channel.unary_stream(path)(data, timeout=_DEADLINE, metadata=metadata)
    try:
        answers = 0
        async for _ in call:
            answers += 1
            if answers >= _MOST_ANSWERS or path.endswith("/Watch"):
                call.cancel()
                return "OK (left)", ""
        return (await call.code()).name, ""
    except grpc.aio.AioRpcError as error:
        reason = _reason(error)
        code = error.code().name
        return ("STEERING_NOT_APPLIED" if reason == "STEERING_NOT_APPLIED" else code), error.details() or ""


def _reason(error: grpc.aio.AioRpcError) -> str:
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(packed).details:
        if detail.Unpack(info):
            return info.reason
    return ""


def _watched(target: str, action: Any) -> dict[str, float]:
    """What a watcher in a process of its own saw meanwhile; this one is too busy to tell the time."""
    command = [sys.executable, __file__, "--watch", target]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdin is not None
        assert watcher.stdout is not None
        watcher.stdout.readline()
        try:
            action()
        finally:
            watcher.stdin.close()
        found: dict[str, float] = json.loads(watcher.stdout.readline())
        return found


def watch(target: str) -> None:
    """Asks for health and for a small text every 0.2 s, until nobody listens."""
    ended = asyncio.Event()

    async def look() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), ended.set)
        checks: list[float] = []
        texts: list[float] = []
        with SteerClient(target, timeout=60) as client:
            operators = sorted(client.operators(), key=lambda each: each.name != _WATCHED)
            operator = [OperatorUse(each.name, 0.5) for each in operators if not each.problem][:1]
            sampling = SamplingParams(max_tokens=4, ignore_eos=True)

            def small() -> None:
                began = time.monotonic()
                client.generate("the golden gate", operators=operator, sampling=sampling)
                texts.append(time.monotonic() - began)

            async def generate() -> None:
                while not ended.is_set():
                    await asyncio.to_thread(small)
                    await asyncio.sleep(_PERIOD)

            async def check(stub: Any) -> None:
                began = time.monotonic()
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
                checks.append(time.monotonic() - began)

            small()
            print("watching", flush=True)
            async with grpc.aio.insecure_channel(target) as channel:
                # Health asks for no token.
                stub = health_pb2_grpc.HealthStub(channel)
                generating = asyncio.ensure_future(generate())
                while not ended.is_set():
                    await check(stub)
                    await asyncio.sleep(_PERIOD)
                await generating
        print(json.dumps({"health checks": len(checks), **_times("health", checks), **_times("generate", texts)}))

    asyncio.run(look())


def _times(name: str, seconds: list[float]) -> dict[str, float]:
    milliseconds = sorted(1000 * each for each in seconds)
    return {
        f"{name} ms median": round(statistics.median(milliseconds), 1),
        f"{name} ms p95": round(milliseconds[int(0.95 * (len(milliseconds) - 1))], 1),
        f"{name} ms worst": round(milliseconds[-1], 1),
    }


def run_own(requests: int, seed: int, *, access: bool = False) -> dict[str, Any]:
    """Fuzzes a server of its own."""
    from fuzz_model import make_model_and_store

    with tempfile.TemporaryDirectory() as folder:
        model, store = make_model_and_store(Path(folder))
        command = [str(Path(sys.executable).parent / "steer-server"), "--model", str(model), "--store", str(store)]
        tokens = _tokens(Path(folder) / "tokens") if access else ()
        if access:
            # One that no request knows: an administrator's may well delete the others.
            Store(store).save(_WATCHED, Store(store).load(Store(store).names()[0]))
            command += ["--tokens", str(Path(folder) / "tokens"), "--operator-admin"]
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(
                [*command, "--listen", "127.0.0.1:0", "--log-format", "json"],
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            try:
                found = run(_target(process, Path(folder) / "log"), process.pid, requests, seed, tokens)
                found["tracebacks in the log"] = (Path(folder) / "log").read_text().count("Traceback")
            finally:
                process.terminate()
                found["exit"] = process.wait(30)
    return found


def _tokens(file: Path) -> Tokens:
    """Makes the tokens of a server; that of the watcher goes into the environment, where the SDK finds it."""
    server = str(Path(sys.executable).parent / "steer-server")

    def made(name: str, *options: str) -> str:
        command = [server, "token", name, "--tokens", str(file), *options]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]

    os.environ["STEER_TOKEN"] = made("watcher")
    user, keeper = made("user"), made("keeper", "--scopes", "admin")
    sent = [user] * 12 + [keeper] * 4 + ["steer_" + "A" * 43, "x", "a" * 4000]
    one = [(("authorization", f"Bearer {each}"),) for each in sent]
    return (*one, one[0] * 2, ())


def _target(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        for line in log.read_text().splitlines():
            if '"event": "serving"' in line:
                return str(json.loads(line)["listen"])
        time.sleep(0.1)
    raise SystemExit(log.read_text())


if __name__ == "__main__":
    main()
