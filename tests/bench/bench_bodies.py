"""How long the largest bodies over HTTP take to read, and for how long they hold the event loop.

    python tests/bench/bench_bodies.py --context 8192 --prompt-bytes 1048576

A task wakes every millisecond; the longest that it overslept while a body was read is what every other caller waited.
"""

import argparse
import asyncio
import json
import time
from types import SimpleNamespace

from google.protobuf import descriptor_pool
from steering.v1 import comparison_pb2, generation_pb2

from steer_server.errors import SteerServerError
from steer_server.http.bodies import BodyLimits
from steer_server.http.body_reader import BodyReader
from steer_server.http.contract import admit
from steer_server.http.messages import read_message
from steer_server.rpc.admission import Admission

_SERVICE = "steering.v1.GenerationService"


def _bodies(context: int, prompt_bytes: int, limits: BodyLimits) -> dict[str, bytes]:
    texts = ["x" * (2**21 // 256)] * 256
    ids = [[12345] * 1020] * 256
    turns = [{"role": "user", "content": "x"}] * 1023
    least = limits.max_values - 8
    return {
        "a text": json.dumps({"prompt": {"text": "x" * prompt_bytes}}).encode(),
        "a text of escapes": json.dumps({"prompt": {"text": "\u2603" * (prompt_bytes // 3)}}).encode(),
        "token ids": json.dumps({"prompt": {"token_ids": {"ids": [12345] * (context - 1)}}}).encode(),
        "256 texts": _prompts({"text": text} for text in texts),
        "256 lists of ids": _prompts({"token_ids": {"ids": each}} for each in ids),
        "1023 turns": json.dumps({"prompt": {"chat": {"messages": turns}}}).encode(),
        "refused: line breaks": b'{"a":"' + b"\\n" * (limits.max_bytes // 2 - 8) + b'"}',
        "refused: numbers": b'{"a":[' + b"1e300," * least + b"1]}",
        "refused: names": b'{"a":{' + b",".join(b'"%d":1' % number for number in range(least)) + b"}}",
    }


def _prompts(prompts) -> bytes:
    return json.dumps({"prompts": [{"id": str(n), "prompt": each} for n, each in enumerate(prompts)]}).encode()


async def _longest(stop: asyncio.Event) -> float:
    """Milliseconds."""
    longest = 0.0
    while not stop.is_set():
        began = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - began - 0.001)
    return 1e3 * longest


async def _main(context: int, prompt_bytes: int) -> None:
    pool = descriptor_pool.Default()
    admission = Admission(
        pool, [_SERVICE], SimpleNamespace(context_length=context), max_prompt_bytes=prompt_bytes, max_arms=16
    )
    reader = BodyReader(BodyLimits.of(admission.limits, context))
    methods = pool.FindServiceByName(_SERVICE).methods_by_name
    for name, data in _bodies(context, prompt_bytes, reader.limits).items():
        kind = "Compare" if "256" in name else "Generate"
        cls = comparison_pb2.CompareRequest if kind == "Compare" else generation_pb2.GenerateRequest

        def make(body, cls=cls, kind=kind):
            return admit(SimpleNamespace(admission=admission), methods[kind], read_message(cls, body))

        stop = asyncio.Event()
        watching = asyncio.ensure_future(_longest(stop))
        await asyncio.sleep(0.05)
        began, answer = time.perf_counter(), "read"
        try:
            await reader.read(data, make)
        except SteerServerError as error:
            answer = f"{error}"[:60]
        seconds = time.perf_counter() - began
        stop.set()
        print(f"{name:22s} {len(data):9d} bytes {1e3 * seconds:7.1f} ms, loop held {await watching:6.1f} ms: {answer}")
    reader.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--prompt-bytes", type=int, default=1 << 20)
    arguments = parser.parse_args()
    asyncio.run(_main(arguments.context, arguments.prompt_bytes))
