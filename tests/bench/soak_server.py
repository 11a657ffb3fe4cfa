"""The server of soak_vllm.py: a ``steer-server`` that also tells, on SIGUSR1, what its workers hold; and its memory.

    python tests/bench/soak_server.py OPTIONS OF STEER-SERVER

Nothing else about it differs from the command.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import statistics
import sys
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any, Self

import psutil
from prometheus_client.parser import text_string_to_metric_families

OPTIONS = {"enforce_eager": "true", "max_model_len": 512, "block_size": 32, "max_num_seqs": 256}
COUNTERS = {
    "tokens generated": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "prompt tokens found in the cache": "vllm:prefix_cache_hits_total",
    "hidden states pushed": "steer_positions_steered_total",
}
LEFT = {
    "rows running": "steer_jobs_running",
    "rows waiting": "steer_jobs_waiting",
    "running in vLLM": "vllm:num_requests_running",
    "waiting in vLLM": "vllm:num_requests_waiting",
}
_PERIOD = 3.0
"""Seconds between two looks at the server's memory."""
_PATIENCE = 30.0
"""Seconds that the server has to come to rest, and to end."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server:
    """``async with Server(store, blocks) as server:`` - serving inside the block, stopped after it."""

    target: str
    """Where it serves."""
    status: int | None = None
    """With which it ended."""
    errors: int = 0
    """Lines of its log that tell of one."""

    def __init__(self, directory: Path, blocks: int) -> None:
        """``blocks``: of the KV cache; 0 leaves it to vLLM."""
        self._store, self._blocks = directory, blocks
        self._held: asyncio.Queue[int] = asyncio.Queue()
        self._serving: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._metrics = f"127.0.0.1:{probe.getsockname()[1]}"
        options = OPTIONS | ({"num_gpu_blocks_override": self._blocks} if self._blocks else {})
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--engine", "vllm", "--dtype", "float32", "--store", str(self._store)),
            *(f"--engine-args={key}={value}" for key, value in options.items()),
            *("--listen", "127.0.0.1:0", "--metrics-port", self._metrics.rpartition(":")[2]),
            # Room for the operators of a minute or two of replacements, and of all requests under way.
            *("--max-queue", "1024", "--operator-memory", "320MiB", "--log-format", "json"),
            # vLLM logs to the one, the server to the other.
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
            limit=1 << 20,
        )
        self._reader = asyncio.create_task(self._read())
        self.target = await self._serving
        return self

    async def __aexit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self.status = await asyncio.wait_for(self._process.wait(), _PATIENCE)
        except TimeoutError:
            self._process.kill()
        await self._reader

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := (await self._process.stdout.readline()).decode(errors="replace"):
            if found := re.search(r'"listen": "([^"]+)".*"event": "serving"', line):
                self._serving.set_result(found[1])
            elif found := re.match(r"held (\d+)$", line):
                self._held.put_nowait(int(found[1]))
            elif '"level": "error"' in line or "ERROR" in line or "Traceback" in line:
                self.errors += 1
                print(line.rstrip(), file=sys.stderr, flush=True)
        if not self._serving.done():
            self._serving.set_exception(RuntimeError("the server did not start"))

    @property
    def processes(self) -> list[psutil.Process]:
        """The server and the processes of vLLM."""
        mine = psutil.Process(self._process.pid)
        return [mine, *mine.children(recursive=True)]

    async def counters(self) -> dict[str, float]:
        """What was counted since the start."""
        return await self.sample(COUNTERS)

    async def sample(self, names: dict[str, str]) -> dict[str, float]:
        """Metrics as they are now, by the names given to them; series of one name are added up."""
        found: dict[str, float] = defaultdict(float)
        page = await asyncio.to_thread(lambda: _DIRECT.open(f"http://{self._metrics}/metrics", timeout=30).read())
        for family in text_string_to_metric_families(page.decode()):
            for each in family.samples:
                found[each.name] += each.value
        return {ours: found[theirs] for ours, theirs in names.items()}

    async def held(self) -> int:
        """Requests that the workers hold something for."""
        self._process.send_signal(signal.SIGUSR1)
        return await asyncio.wait_for(self._held.get(), _PATIENCE)

    async def left(self) -> dict[str, float]:
        """What is still there when the server has had its time to come to rest: all 0 in a sound one."""
        end = time.monotonic() + _PATIENCE
        while True:
            found = {**await self.sample(LEFT), "held by workers": await self.held()}
            if not any(found.values()) or time.monotonic() > end:
                return found
            await asyncio.sleep(0.5)


class Watch:
    """Memory and load of a server, looked at every few seconds."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.peak: dict[str, float] = defaultdict(float)
        """The most rows that ran and that waited."""

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            now = time.monotonic()
            sizes = {_name(each): each.memory_info().rss / 1e6 for each in self._server.processes}
            for name, size in {**sizes, "all": sum(sizes.values())}.items():
                self._seen[name].append((now, size))
            for name, value in (await self._server.sample(LEFT)).items():
                self.peak[name] = max(self.peak[name], value)
            await asyncio.sleep(_PERIOD)

    def memory(self) -> dict[str, dict[str, float]]:
        """Resident MB by process: at the start, least, most, and MB per minute over the last two thirds of the time."""
        return {name: _summary(seen) for name, seen in self._seen.items()}


def _name(process: psutil.Process) -> str:
    """Its own name (vLLM's processes set theirs), or that of the script that it runs."""
    own, *words = process.cmdline()
    script = next((word for word in words[:1] if word.endswith(".py")), own)
    return f"{Path(script).name} {process.pid}"


def _summary(seen: list[tuple[float, float]]) -> dict[str, float]:
    sizes = [size for _, size in seen]
    later = [(at, size) for at, size in seen if at >= seen[0][0] + (seen[-1][0] - seen[0][0]) / 3]
    found = {"first": sizes[0], "min": min(sizes), "max": max(sizes), "last": sizes[-1]}
    if len(later) > 2:
        found["per minute"] = 60 * statistics.linear_regression(*zip(*later, strict=True)).slope
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    """``steer-server``, with an ear for SIGUSR1."""
    from steer_server import command, engines

    start = engines.ENGINES["vllm"]

    async def started(*options: Any) -> Any:
        engine, files = await start(*options)
        telling: set[asyncio.Task[None]] = set()

        async def tell() -> None:
            print(f"held {await engine.num_held_requests()}", file=sys.stderr, flush=True)

        asyncio.get_running_loop().add_signal_handler(
            signal.SIGUSR1, lambda: telling.add(asyncio.get_running_loop().create_task(tell()))
        )
        return engine, files

    engines.ENGINES["vllm"] = started
    command.app()


if __name__ == "__main__":
    main()
