"""An hour of everything at once on one server: does its memory, or the number of its files and threads, grow?

    python tests/bench/soak_mixed.py --minutes 60 --plot soak.png

The server runs here, on a random model of four layers, with tokens and with operators managed over the wire. Streams,
comparisons, uploads, deletions, builds, reloads and wrong tokens come at once, each in a loop of its own. Whatever ends
otherwise than it should is counted by its error; slopes are of the last two thirds of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
from fuzz_model import make_model_and_store
from fuzz_server import _target
from steer_client import AsyncSteerClient, OperatorUse, SamplingParams, SteerError, UnauthenticatedError

from operators.core.store import Store

_PERIOD = 5.0
_SAMPLING = SamplingParams(max_tokens=48, ignore_eos=True)
Step = Callable[[], Awaitable[None]]


async def main() -> None:
    """Prints counts and slopes; exit status 1 where anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, store = make_model_and_store(folder)
        token = _admin_token(folder / "tokens")
        command = [str(Path(sys.executable).parent / "steer-server"), "--model", str(model), "--store", str(store)]
        command += ["--tokens", str(folder / "tokens"), "--operator-admin", "--listen", "127.0.0.1:0"]
        with open(folder / "log", "w+") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            server = subprocess.Popen([*command, "--log-format", "json"], stderr=log, env=environment)
            try:
                soak = _Soak(_target(server, folder / "log"), token, store, psutil.Process(server.pid))
                await soak.run(60 * options.minutes)
            finally:
                server.terminate()
                code = server.wait(30)
        tracebacks = (folder / "log").read_text().count("Traceback")
    print(json.dumps({**soak.summary(), "tracebacks in the log": tracebacks, "exit": code}, indent=2))
    if options.plot:
        _plot(soak.seen, options.plot)
    if soak.problems or tracebacks or code:
        sys.exit(1)


def _admin_token(file: Path) -> str:
    command = [str(Path(sys.executable).parent / "steer-server"), "token", "soak", "--tokens", str(file)]
    command += ["--scopes", "generate,read,admin"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]


class _Soak:
    def __init__(self, target: str, token: str, store: Path, server: psutil.Process) -> None:
        self._target, self._token, self._server = target, token, server
        self._store = Store(store)
        self.done: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.seen: list[tuple[float, dict[str, float]]] = []

    async def run(self, seconds: float) -> None:
        """Everything at once, for so long."""
        name = self._store.names()[0]
        file, uses = self._store.path_of(name), [OperatorUse(name, 0.5)]
        async with AsyncSteerClient(self._target, token=self._token, timeout=120) as client:
            plain = (await client.generate("the golden gate", sampling=_SAMPLING)).text
            steered = (await client.generate("the golden gate", operators=uses, sampling=_SAMPLING)).text

            async def stream() -> None:
                async with client.stream("the golden gate", operators=uses, sampling=_SAMPLING) as pieces:
                    text = "".join([piece.text async for piece in pieces])
                self._hold(text == steered, "a streamed text is another")

            async def compare() -> None:
                found = await client.compare("the golden gate", operators=uses, sampling=_SAMPLING)
                self._hold(found.normal is not None and found.normal.text == plain, "a plain text is another")

            async def upload() -> None:
                sent = await client.upload_operator(file, name="uploaded", replace="any")
                await client.generate("x", operators=[OperatorUse("uploaded", 0.5)], sampling=_SAMPLING)
                await client.delete_operator("uploaded", sent.digest)

            async def build() -> None:
                await client.wait_for_build(await client.build_operator("built", ["the bay"], layer=2, replace="any"))

            async def reload() -> None:
                await client.reload_operators()

            async def knock() -> None:
                async with AsyncSteerClient(self._target, token="steer_" + "A" * 43, retry=False) as stranger:
                    try:
                        await stranger.generate("x")
                    except UnauthenticatedError:
                        return
                self._hold(False, "a wrong token was served")

            until = time.monotonic() + seconds
            loops = [("stream", stream, 0.0)] * 3 + [("compare", compare, 0.5), ("upload", upload, 2.0)]
            loops += [("build", build, 20.0), ("reload", reload, 3.0), ("wrong token", knock, 0.2)]
            tasks = [self._again(*each, until) for each in loops]
            await asyncio.gather(self._watch(until), *tasks)

    async def _again(self, name: str, step: Step, pause: float, until: float) -> None:
        while time.monotonic() < until:
            try:
                await step()
                self.done[name] += 1
            except SteerError as error:
                self.problems[f"{name}: {type(error).__name__}: {str(error)[:160]}"] += 1
            await asyncio.sleep(pause)

    async def _watch(self, until: float) -> None:
        while time.monotonic() < until:
            with self._server.oneshot():
                found = {
                    "resident MB": self._server.memory_info().rss / 1e6,
                    "files": self._server.num_fds(),
                    "threads": self._server.num_threads(),
                }
            self.seen.append((time.monotonic(), found))
            await asyncio.sleep(_PERIOD)

    def _hold(self, holds: bool, problem: str) -> None:
        if not holds:
            self.problems[problem] += 1

    def summary(self) -> dict[str, Any]:
        """Counts, and of each size the first, the last, the most, and the slope per hour."""
        later = self.seen[len(self.seen) // 3 :]
        sizes = {}
        for name in self.seen[0][1]:
            values = [found[name] for _, found in self.seen]
            slope = statistics.linear_regression([at for at, _ in later], [found[name] for _, found in later]).slope
            sizes[name] = {
                "first": round(values[0], 1),
                "last": round(values[-1], 1),
                "most": round(max(values), 1),
                "per hour": round(3600 * slope, 2),
            }
        return {"done": dict(self.done), "problems": dict(self.problems), **sizes}


def _plot(seen: list[tuple[float, dict[str, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(seen[0][1])
    figure = Figure((8, 6), layout="constrained")
    minutes = [(at - seen[0][0]) / 60 for at, _ in seen]
    for name, axes in zip(names, figure.subplots(len(names), sharex=True), strict=True):
        axes.plot(minutes, [found[name] for _, found in seen], linewidth=1)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xlabel("minutes")
    figure.savefig(path)


if __name__ == "__main__":
    asyncio.run(main())
