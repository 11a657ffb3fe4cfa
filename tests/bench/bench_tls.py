"""What TLS and a token cost: three servers asked in turn by the SDK for the same texts.

    python tests/bench/bench_tls.py [--model smollm2-135m] [--pairs 9] [--streams 1,8] [--tokens 64] [--json]

Starts them in processes of their own, without operators, as all that differs is the way to them. The arms:

    plain    plaintext, and no token; what the others are divided by
    tls      TLS
    token    TLS and a token, which the server looks up for every call

Reports, round by round in a random order, because machines drift and neighbours drift least: tokens per second and the
time to the first token of so many streams at once; the time of one small call (Tokenize) on an open connection; and of
the first call of a new connection, handshake included. Of each, the CPU time of server and client together too, which
neighbours disturb least. Medians, and ratios to the plain arm; above 1 is better than plaintext. Not a test; nothing
here passes or fails. The certificate is made by openssl.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import grpc
import psutil
from steer_client import AsyncSteerClient, SamplingParams
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc

PROMPT = "I went to see the"
REST = 0.5
"""Seconds between two runs."""
CALLS, CONNECTIONS = 200, 20
"""Of each round, one after the other."""


@dataclass(frozen=True)
class Arm:
    """A server, and how it is asked."""

    process: psutil.Process
    target: str
    ca: Path | None
    token: str | None

    def cpu(self) -> float:
        """Milliseconds of CPU that server and client have used so far."""
        return 1e3 * sum(sum(each.cpu_times()[:2]) for each in (self.process, psutil.Process()))


@contextmanager
def server(model: str, *options: str | Path) -> Iterator[tuple[psutil.Process, str]]:
    """A server in a process of its own, and its target."""
    command = [sys.executable, "-m", "steer_server", "--model", model, "--listen", "127.0.0.1:0", *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        target, line = "", ""
        for line in process.stderr or ():
            found = re.search(r"serving\s.*listen=(\S+)", line)
            if found:
                target = found[1]
                break
        if not target:
            raise SystemExit(f"the server did not start: {line}")
        # Lines that nobody reads would hold up the server.
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        yield psutil.Process(process.pid), target
        process.terminate()
        process.wait(60)
        drain.wait(10)
    finally:
        process.kill()


@contextmanager
def arms(model: str, directory: Path) -> Iterator[dict[str, Arm]]:
    """The three, up."""
    cert, key, tokens = directory / "cert.pem", directory / "key.pem", directory / "tokens.toml"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    named = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make, *named, "-keyout", key, "-out", cert], check=True, capture_output=True)
    token = f"steer_{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(token.encode()).hexdigest()
    tokens.write_text(f'[tokens.bench]\nsha256 = "{digest}"\nscopes = ["generate", "read"]\n')
    tokens.chmod(0o600)
    tls = ("--tls-cert", cert, "--tls-key", key)
    (store := directory / "store").mkdir()
    with ExitStack() as stack:
        plain, over_tls, with_token = (
            stack.enter_context(server(model, "--store", store, *options))
            for options in ((), tls, (*tls, "--tokens", tokens))
        )
        yield {
            "plain": Arm(*plain, None, None),
            "tls": Arm(*over_tls, cert, None),
            "token": Arm(*with_token, cert, token),
        }


async def streams(client: AsyncSteerClient, count: int, tokens: int, seed: int) -> tuple[float, float]:
    """Tokens per second of all together, and the median of their first tokens in seconds."""
    began = time.monotonic()

    async def one(number: int) -> float:
        sampling = SamplingParams(max_tokens=tokens, temperature=1.0, seed=seed + number, ignore_eos=True)
        first = 0.0
        async with client.stream(PROMPT, sampling=sampling) as stream:
            async for delta in stream:
                if delta.token_ids:
                    first = first or time.monotonic()
        if stream.result.usage.completion_tokens != tokens:
            raise SystemExit(f"{stream.result.usage.completion_tokens} tokens came; {tokens} were asked for")
        return first - began

    firsts = await asyncio.gather(*map(one, range(count)))
    return count * tokens / (time.monotonic() - began), statistics.median(firsts)


async def call(client: AsyncSteerClient) -> float:
    """Seconds of a small call, the median of many."""
    found = []
    for _ in range(CALLS):
        began = time.monotonic()
        await client.tokenize(PROMPT)
        found.append(time.monotonic() - began)
    return statistics.median(found)


async def connect(arm: Arm) -> float:
    """Seconds until a new connection has answered its first call, the median of many."""
    metadata = (("authorization", f"Bearer {arm.token}"),) if arm.token else ()
    options = (("grpc.use_local_subchannel_pool", 1),)
    found = []
    for _ in range(CONNECTIONS):
        began = time.monotonic()
        if arm.ca is None:
            channel = grpc.aio.insecure_channel(arm.target, options)
        else:
            credentials = grpc.ssl_channel_credentials(arm.ca.read_bytes())
            channel = grpc.aio.secure_channel(arm.target, credentials, options)
        async with channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            await stub.Tokenize(pb.TokenizeRequest(prompt={"text": PROMPT}), metadata=metadata)
            found.append(time.monotonic() - began)
    return statistics.median(found)


async def measure(given: argparse.Namespace, by_name: dict[str, Arm]) -> dict[str, dict[str, list[float]]]:
    """By what is measured and arm, a figure of each round; times in milliseconds."""
    found: dict[str, dict[str, list[float]]] = {}
    source = random.Random(0)
    clients = {name: AsyncSteerClient(arm.target, ca=arm.ca, token=arm.token) for name, arm in by_name.items()}
    sizes = [int(size) for size in given.streams.split(",")]

    async def round_of(name: str, seed: int) -> dict[str, float]:
        figures: dict[str, float] = {}
        arm = by_name[name]
        for size in sizes:
            worked = arm.cpu()
            rate, first = await streams(clients[name], size, given.tokens, seed)
            figures |= {f"{size} streams, tokens/s": rate, f"{size} streams, first token, ms": 1e3 * first}
            figures[f"{size} streams, CPU ms of a token"] = (arm.cpu() - worked) / (size * given.tokens)
            await asyncio.sleep(REST)
        worked = arm.cpu()
        figures["small call, ms"] = 1e3 * await call(clients[name])
        figures["small call, CPU ms"] = (arm.cpu() - worked) / CALLS
        worked = arm.cpu()
        figures["new connection, ms"] = 1e3 * await connect(arm)
        figures["new connection, CPU ms"] = (arm.cpu() - worked) / CONNECTIONS
        return figures

    for turn in range(-1, given.pairs):
        for name in source.sample(list(by_name), len(by_name)):
            figures = await round_of(name, 1000 * (turn + 1))
            print(f"round {turn + 1}, {name}: {figures}", file=sys.stderr, flush=True)
            # The first round warms up.
            for what, figure in figures.items() if turn >= 0 else ():
                found.setdefault(what, {}).setdefault(name, []).append(figure)
    for client in clients.values():
        await client.close()
    return found


def main() -> None:
    """Prints a table, or JSON with the figure of each round."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--pairs", type=int, default=9)
    options.add_argument("--streams", default="1,8")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as directory, arms(given.model, Path(directory)) as by_name:
        found: dict[str, Any] = asyncio.run(measure(given, by_name))
    if given.json:
        print(json.dumps(found))
        return
    print(f"{given.model}, {given.pairs} rounds, {given.tokens} tokens; ratio to plain: median (least to most)")
    for what, by_arm in found.items():
        for name, figures in by_arm.items():
            ratios = [
                figure / plain if what.endswith("/s") else plain / figure
                for figure, plain in zip(figures, by_arm["plain"], strict=True)
            ]
            spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
            print(f"{what:28} {name:6} {statistics.median(figures):9.2f} {spread}")


if __name__ == "__main__":
    main()
