"""Certificate and token renewed every second under many streams: is a text lost, and how long is an old token let in?

    python -m tests.bench.bench_rotation [--seconds 60] [--streams 32]

A real server with TLS and tokens on a tiny random model. Half of the streams keep their connection, the others open one
for each text. Of two tokens that the file has, the older goes each second, and a new one comes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import torch
from steer_client import AsyncSteerClient, SamplingParams, SteerError, UnauthenticatedError
from transformers import LlamaConfig, LlamaForCausalLM

from tests.server.http.authority import Authority
from tests.tiny_tokenizer import make_tokenizer

SAMPLING = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
PERIOD = 1.0
HANDED_OUT = 0.6
"""Seconds after a token is in the server's file at which clients get it."""


def save_model(folder: Path) -> None:
    """A random Llama of two layers."""
    tokenizer = make_tokenizer()
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def replace(path: Path, content: bytes) -> None:
    """In one step."""
    made = path.with_suffix(".new")
    made.write_bytes(content)
    made.chmod(0o600)
    made.replace(path)


class Rotation:
    """The files of a server and of its clients, and what is measured while they change."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.authority = folder, Authority()
        self.cert, self.key, self.tokens, self.given = (folder / name for name in ("crt", "key", "tokens", "token"))
        (folder / "ca").write_bytes(self.authority.pem)
        self.valid = [self.new_token()]
        self.lags: list[float] = []
        self.renewals = 0
        self.write()
        replace(self.given, self.valid[-1].encode())

    @staticmethod
    def new_token() -> str:
        return f"steer_{secrets.token_urlsafe(32)}"

    def write(self) -> None:
        """Another certificate and key, and the tokens that are valid."""
        certificate, key = self.authority.issue()
        replace(self.cert, certificate)
        replace(self.key, key)
        entries = (
            f'[tokens.t{number}]\nsha256 = "{sha256(token.encode()).hexdigest()}"\nscopes = ["generate", "read"]\n'
            for number, token in enumerate(self.valid)
        )
        replace(self.tokens, "".join(entries).encode())

    async def run(self, target: str, seconds: float) -> None:
        """Renews all, each second, and waits for each old token to be refused."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            old = self.valid.pop(0) if len(self.valid) > 1 else None
            self.valid.append(self.new_token())
            self.write()
            self.renewals += 1
            if old is not None:
                self.lags.append(await self.refused(target, old, began))
            await asyncio.sleep(max(0.0, began + HANDED_OUT - time.monotonic()))
            replace(self.given, self.valid[-1].encode())
            await asyncio.sleep(max(0.0, began + PERIOD - time.monotonic()))

    async def refused(self, target: str, token: str, began: float) -> float:
        """Seconds until a token is refused."""
        async with AsyncSteerClient(target, ca=self.folder / "ca", token=token, retry=False) as client:
            while True:
                asked = time.monotonic()
                try:
                    await client.model_info()
                except UnauthenticatedError:
                    return asked - began
                await asyncio.sleep(0.01)


async def stream(rotation: Rotation, target: str, end: float, said: Counter[str], *, keeps: bool) -> None:
    """Texts, one after the other, as long as there is time."""
    kept = None
    while time.monotonic() < end:
        client = kept or AsyncSteerClient(
            target, ca=rotation.folder / "ca", token_file=rotation.given, retry=False, timeout=60
        )
        kept = client if keeps else None
        try:
            text = ""
            async with client.stream("The golden bridge", sampling=SAMPLING) as deltas:
                async for delta in deltas:
                    text += delta.text
            said[text] += 1
        except SteerError as error:
            said[f"{type(error).__name__}: {error}"] += 1
        if not keeps:
            await client.close()
    if kept is not None:
        await kept.close()


async def measure(streams: int, seconds: float) -> dict[str, object]:
    """Starts the server, and renews its files under load."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        (folder / "store").mkdir()
        rotation = Rotation(folder)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "steer_server", "--model", str(folder / "model"), "--store", str(folder / "store")),
            *("--listen", "127.0.0.1:0", "--tokens", str(rotation.tokens), "--max-queue", "256"),
            *("--tls-cert", str(rotation.cert), "--tls-key", str(rotation.key), "--log-format", "json"),
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert process.stderr is not None
        target, log = "", Counter[str]()
        while not target:
            line = json.loads(await process.stderr.readline())
            target = line.get("listen", "")

        async def read() -> None:
            async for line in process.stderr:
                log[json.loads(line)["event"]] += 1

        reading = asyncio.ensure_future(read())
        client = AsyncSteerClient(target, ca=folder / "ca", token_file=rotation.given)
        idle = (await client.generate("The golden bridge", sampling=SAMPLING)).text
        await client.close()
        said: Counter[str] = Counter()
        end = time.monotonic() + seconds
        running = (stream(rotation, target, end, said, keeps=number % 2 == 0) for number in range(streams))
        await asyncio.gather(rotation.run(target, seconds), *running)
        process.terminate()
        await process.wait()
        await reading
    lags = sorted(rotation.lags)
    return {
        "renewals": rotation.renewals,
        "taken by the server": log["changed and taken"],
        "texts as of an idle server": said.pop(idle, 0),
        "others": dict(said),
        "old token refused after, s (median, most)": (round(lags[len(lags) // 2], 3), round(lags[-1], 3)),
    }


def main() -> None:
    """Prints what was found; fails where a text was lost or an old token let in for a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=32)
    given = parser.parse_args()
    found = asyncio.run(measure(given.streams, given.seconds))
    print(json.dumps(found, indent=2, ensure_ascii=False))
    _, most = found["old token refused after, s (median, most)"]
    sys.exit(bool(found["others"]) or most >= 1.0)


if __name__ == "__main__":
    main()
