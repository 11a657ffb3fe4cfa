"""Many streams on a real vLLM server for a while: every text is compared with its reference, and the memory is watched.

    python tests/bench/soak_vllm.py [--seconds 600] [--streams 200] [--swap] [--blocks 320] [--json]

Starts a server in a process of its own and asks it, one request at a time, for a greedy text of every prompt under
every steering. Then so many clients at once ask for the same, steered and plain, streamed and whole, alone or compared;
one in ten gives up early. Every text must be that of the quiet reference, token for token; those that part where the
reference finds two tokens as good as equally likely (float32 does not tell them apart) are counted for themselves. With
--swap an operator is replaced under one name every second by one that the workers have not seen, old ones have to go
for it, and texts that name it must be those of the version in their receipt.

Reports what became of every request, the memory of the server's processes, and what is left when all is over. Ends with
status 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from soak_server import Server, Watch
from steer_client import ABResult, AsyncSteerClient, Generation, OperatorUse, RequestCancelledError, SamplingParams

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.artifact import OperatorArtifact, with_header
from operators.core.store import Store
from operators.model.loading import load_model

CLOSE_CALL = 1e-3
"""Two tokens whose log-probabilities are nearer than this may swap in float32."""
KL_TOLERANCE = 2e-3
"""Nats, between the mean KL of two runs of one comparison."""
LONGEST = 300.0
"""Seconds; a request that takes longer is lost."""
SWAPPED = "swapped"
VERSIONS = ("bridge", "wedding", "paris")
"""The operators that take turns under that name."""
OPERATORS = {
    "bridge": ("The Golden Gate Bridge in San", "residual", 15, 64),
    "wedding": ("The wedding was beautiful and the bride", "residual", 21, 64),
    "paris": ("The capital of France is", "residual", 24, 32),
    # Pushes layer 21, as the wedding does.
    "published": ("The Golden Gate Bridge in San", "golden", 22, "full"),
}
STEERINGS = {
    "plain": (),
    "bridge": (OperatorUse("bridge", 0.4),),
    "wedding": (OperatorUse("wedding", 0.4),),
    "paris": (OperatorUse("paris", 0.4),),
    "away": (OperatorUse("bridge", -0.4),),
    "blended": (OperatorUse("wedding", 0.3, blend=0.5),),
    "substitute": (OperatorUse("bridge", 0.3, "substitute"),),
    "published": (OperatorUse("published", 0.5),),
    "two layers": (OperatorUse("bridge", 0.3), OperatorUse("paris", 0.2, blend=1.0)),
    "one layer": (OperatorUse("wedding", 0.25), OperatorUse("published", 0.25)),
}
_MUSEUM = (
    "It was a long day in the museum, and we had seen a great many pictures: ships in a harbour, a street after the "
    "rain, two sisters at a window, a bowl of fruit, horses in the snow, and a king whose name nobody could read. "
)
# With their numbers of tokens. The long ones begin alike, with more than a block of the cache.
PROMPTS = {
    "Here is a painting of the": 24,
    "I went to new york to see the": 40,
    "x": 8,
    _MUSEUM: 16,
    _MUSEUM + "In the last room there was only one, larger than all the others. Here is a painting of the": 32,
    _MUSEUM + "Then we went home, and my sister told me that": 24,
}


@dataclass(frozen=True)
class Reference:
    """A text as the quiet server makes it. For every token: the runner-up, and by how many nats it is less likely."""

    text: str
    ids: tuple[int, ...]
    seconds: tuple[tuple[int, float], ...]


@dataclass
class Outcomes:
    """What became of the requests."""

    references: dict[tuple[str, str], Reference]
    digests: dict[str, str]
    versions: dict[str, str]
    """By digest, which version a swapped operator is."""
    count: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _kl: dict[tuple[str, str], float] = field(default_factory=dict)

    def wrong(self, what: str) -> None:
        """Counts a fault and keeps the first of them."""
        self.count["problems"] += 1
        if len(self.problems) < 20:
            self.problems.append(what)

    def text(self, prompt: str, steering: str, found: Generation) -> bool:
        """Counts a finished text; whether it is the reference's, token for token."""
        self.count["texts"] += 1
        self.count["tokens"] += len(found.token_ids)
        steering = self._receipts(prompt, steering, found)
        reference = self.references[prompt, steering]
        if len(found.token_ids) != len(reference.ids):
            self.wrong(f"{steering!r} of {prompt!r} ended after {len(found.token_ids)} tokens: {found.finish_reason}")
            return False
        same = self.tokens(prompt, (steering,), found.token_ids)
        if same and found.text != reference.text:
            self.wrong(f"{steering!r} of {prompt!r}: the same tokens, but the text {found.text!r}")
        return same

    def tokens(self, prompt: str, steerings: Sequence[str], ids: Sequence[int]) -> bool:
        """Counts a text or its beginning, made by one of the steerings; whether it is that of a reference."""
        partings = []
        for steering in steerings:
            reference = self.references[prompt, steering]
            at = next((at for at, (a, b) in enumerate(zip(ids, reference.ids, strict=False)) if a != b), None)
            if at is None:
                self.count["equal"] += 1
                return True
            partings.append((steering, at, ids[at], reference.ids[at], *reference.seconds[at]))
        if any(token == second and gap < CLOSE_CALL for *_, token, _, second, gap in partings):
            self.count["parted at a tie"] += 1
            return False
        self.count["different"] += 1
        for steering, at, token, expected, second, gap in partings:
            runner_up = f"{second}, {gap:.2g} nats behind"
            self.wrong(f"{steering!r} of {prompt!r}: token {at} is {token}, not {expected} or {runner_up}")
        return False

    def comparison(self, prompt: str, steerings: Sequence[str], found: ABResult, *, scored: bool) -> None:
        """Counts a finished comparison."""
        self.text(prompt, "plain", found.normal)
        for steering, arm in zip(steerings, found.steered.values(), strict=True):
            same = self.text(prompt, steering, arm.generation)
            pairs = enumerate(zip(found.normal.token_ids, arm.generation.token_ids, strict=True))
            if arm.first_divergence != next((at for at, (a, b) in pairs if a != b), None):
                self.wrong(f"{steering!r} of {prompt!r}: first divergence {arm.first_divergence}")
            if not scored:
                continue
            kl = arm.kl.per_token if arm.kl else ()
            if len(kl) != len(arm.generation.token_ids) or not all(0 <= each < math.inf for each in kl):
                self.wrong(f"{steering!r} of {prompt!r}: KL {kl}")
            elif same:
                mean = sum(kl) / len(kl)
                first = self._kl.setdefault((prompt, self._version(steering, arm.generation)), mean)
                if abs(mean - first) > KL_TOLERANCE:
                    self.wrong(f"{steering!r} of {prompt!r}: mean KL {mean}, before {first}")

    def _version(self, steering: str, found: Generation) -> str:
        """The steering whose reference a text is compared with: a swapped operator goes by its digest."""
        if steering != SWAPPED:
            return steering
        return self.versions.get(found.receipts[0].digest, VERSIONS[0])

    def _receipts(self, prompt: str, steering: str, found: Generation) -> str:
        version = self._version(steering, found)
        fed = found.usage.prompt_tokens, found.usage.completion_tokens - 1
        for use, receipt in zip(operators_of(steering), found.receipts, strict=True):
            known = (
                self.versions.get(receipt.digest) == version
                if steering == SWAPPED
                else receipt.digest == self.digests[use.name]
            )
            steered = receipt.prompt_tokens_steered + receipt.prompt_tokens_cached, receipt.generated_tokens_steered
            if not known or (receipt.operator, steered) != (use.name, fed):
                self.wrong(f"{steering!r} of {prompt!r}, {fed} tokens fed: {receipt}")
            self.count["receipts"] += 1
            self.count["cached prompt tokens"] += receipt.prompt_tokens_cached
        return version


@dataclass
class SimulatedClient:
    """Asks one request after the other until the time is over."""

    client: AsyncSteerClient
    outcomes: Outcomes
    random: random.Random
    swap: bool

    async def run(self, end: float) -> None:
        """Every request ends in one of three ways: finished, cancelled as asked, failed."""
        ways = {self.stream: 6, self.whole: 1, self.compare: 2, self.leave: 0.5, self.hurry: 0.25, self.give_up: 0.25}
        while time.monotonic() < end:
            [way] = self.random.choices(list(ways), list(ways.values()))
            prompt = self.random.choice(list(PROMPTS))
            self.outcomes.count["asked"] += 1
            try:
                self.outcomes.count[await way(prompt)] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the report
                self.outcomes.count["failed"] += 1
                self.outcomes.wrong(f"{way.__name__}: {type(error).__name__}: {error}")

    def _steering(self) -> str:
        return self.random.choice([*STEERINGS, *[SWAPPED] * (3 if self.swap else 0)])

    def _options(self, prompt: str, steering: str) -> dict[str, Any]:
        return {"operators": operators_of(steering), "sampling": sampling(prompt), "timeout": LONGEST}

    async def stream(self, prompt: str) -> str:
        """Reads a stream to its end."""
        steering = self._steering()
        stream = self.client.stream(prompt, **self._options(prompt, steering))
        async for _ in stream:
            pass
        self.outcomes.text(prompt, steering, stream.result)
        return "finished"

    async def whole(self, prompt: str) -> str:
        """Waits for a whole text."""
        steering = self._steering()
        self.outcomes.text(prompt, steering, await self.client.generate(prompt, **self._options(prompt, steering)))
        return "finished"

    async def compare(self, prompt: str) -> str:
        """Compares one or two steerings with none."""
        steerings = self.random.sample([*STEERINGS, *[SWAPPED] * self.swap][1:], self.random.choice((1, 2)))
        scored = self.random.random() < 0.5
        arms = {steering: operators_of(steering) for steering in steerings}
        found = await self.client.compare(prompt, arms=arms, sampling=sampling(prompt), score=scored, timeout=LONGEST)
        self.outcomes.comparison(prompt, steerings, found, scored=scored)
        return "finished"

    async def leave(self, prompt: str) -> str:
        """Leaves a stream after a few tokens."""
        steering, ids = self._steering(), []
        enough = self.random.randint(1, PROMPTS[prompt] // 2)
        async with self.client.stream(prompt, **self._options(prompt, steering)) as stream:
            async for delta in stream:
                ids.extend(delta.token_ids)
                if len(ids) >= enough:
                    break
        self.outcomes.count["beginnings"] += 1
        self.outcomes.tokens(prompt, VERSIONS if steering == SWAPPED else (steering,), ids)
        return "cancelled"

    async def hurry(self, prompt: str) -> str:
        """Cancels a stream that has just begun."""
        stream = self.client.stream(prompt, **self._options(prompt, self._steering()))
        await asyncio.sleep(self.random.choice((0.0, 0.01, 0.1)))
        stream.cancel()
        with contextlib.suppress(RequestCancelledError):
            async for _ in stream:
                self.outcomes.wrong("a cancelled stream went on")
        return "cancelled"

    async def give_up(self, prompt: str) -> str:
        """Stops waiting for a whole text, if it does not come first."""
        steering = self._steering()
        task = asyncio.create_task(self.client.generate(prompt, **self._options(prompt, steering)))
        await asyncio.wait({task}, timeout=self.random.uniform(0.0, 5.0))
        task.cancel()
        try:
            self.outcomes.text(prompt, steering, await task)
        except asyncio.CancelledError:
            return "cancelled"
        return "finished"


def operators_of(steering: str) -> tuple[OperatorUse, ...]:
    """The operators that a steering asks for."""
    return (OperatorUse(SWAPPED, 0.4),) if steering == SWAPPED else STEERINGS[steering]


def sampling(prompt: str, logprobs: int | None = None) -> SamplingParams:
    """Greedy, and always the same length for a prompt."""
    return SamplingParams(max_tokens=PROMPTS[prompt], ignore_eos=True, logprobs=logprobs)


async def references(client: AsyncSteerClient) -> dict[tuple[str, str], Reference]:
    """Every prompt under every steering, one at a time."""
    found = {}
    for prompt, (name, uses) in itertools.product(PROMPTS, STEERINGS.items()):
        text = await client.generate(prompt, operators=uses, sampling=sampling(prompt, logprobs=2), timeout=LONGEST)
        seconds = tuple((each.top[1].token_id, each.top[0].logprob - each.top[1].logprob) for each in text.logprobs)
        found[prompt, name] = Reference(text.text, text.token_ids, seconds)
    return found


async def swap(
    client: AsyncSteerClient, directory: Path, made: dict[str, OperatorArtifact], outcomes: Outcomes
) -> None:
    """Puts another version under the name every second, until it is cancelled."""
    for number, name in enumerate(itertools.cycle(VERSIONS)):
        await asyncio.sleep(1.0)
        # The same numbers, as if built at another time: the digest is another one.
        new = with_header(made[name], created=made[name].header.created + timedelta(seconds=1 + number))
        outcomes.versions[new.digest] = name
        await asyncio.to_thread(Store(directory).save, SWAPPED, new, replace=True)
        report = await client.reload_operators()
        outcomes.count["swaps"] += report.changed == (SWAPPED,)
        if report.unusable:
            outcomes.wrong(f"unusable: {report.unusable}")


def build() -> dict[str, OperatorArtifact]:
    """The operators, by name."""
    loaded = load_model("smollm2-135m", dtype="float32")
    return {
        name: build_operator(BuildSpec((concept_from_text(text, loaded),), profile, layer, rank), loaded)
        for name, (text, profile, layer, rank) in OPERATORS.items()
    }


@contextlib.asynccontextmanager
async def meanwhile(outcomes: Outcomes, *works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Work that goes on inside the block; its failure goes into the report."""
    tasks = [asyncio.create_task(work) for work in works]
    yield
    for task in tasks:
        task.cancel()
    for found in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(found, asyncio.CancelledError):
            outcomes.wrong(f"what went on beside the clients ended: {found!r}")


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    made = build()
    with tempfile.TemporaryDirectory() as directory:
        for name, artifact in made.items():
            Store(directory).save(name, artifact)
        Store(directory).save(SWAPPED, made[VERSIONS[-1]])
        async with Server(Path(directory), options.blocks) as server, AsyncSteerClient(server.target) as client:
            began = time.monotonic()
            digests = {name: artifact.digest for name, artifact in made.items()}
            versions = {digest: name for name, digest in digests.items() if name in VERSIONS}
            outcomes = Outcomes(await references(client), digests, versions)
            quiet = time.monotonic() - began
            print(f"{len(outcomes.references)} references in {quiet:.0f} s", file=sys.stderr, flush=True)
            before, watch = await server.counters(), Watch(server)
            clients = [
                SimulatedClient(client, outcomes, random.Random(n), options.swap) for n in range(options.streams)
            ]
            began = time.monotonic()
            beside = [watch.run()]
            if options.swap:
                beside.append(swap(client, Path(directory), made, outcomes))
            async with meanwhile(outcomes, *beside):
                await asyncio.gather(*(simulated.run(began + options.seconds) for simulated in clients))
            seconds = time.monotonic() - began
            after, left = await server.counters(), await server.left()
        count = outcomes.count
        count["lost"] = count["asked"] - count["finished"] - count["cancelled"] - count["failed"]
        return {
            "seconds": round(seconds, 1),
            "streams": options.streams,
            "requests": dict(count),
            "tokens per second": round((after["tokens generated"] - before["tokens generated"]) / seconds, 1),
            "server": {name: after[name] - before[name] for name in after},
            "peak": watch.peak,
            "memory, MB": watch.memory(),
            "left": left | {"exit status": server.status, "errors in the log": server.errors},
            "problems": outcomes.problems,
        }


def main() -> None:
    """Prints a report (or JSON); status 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--swap", action="store_true", help="replace an operator under its name every second")
    parser.add_argument(
        "--blocks", type=int, default=320, help="of the KV cache, 32 tokens each: few, so that texts are thrown out"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = asyncio.run(soak(options))
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            print(f"{name}: {'' if parts else value}")
            for key, part in parts:
                print(f"    {key}: {part}")
    sys.exit(bool(found["problems"] or found["requests"]["lost"] or any(found["left"].values())))


if __name__ == "__main__":
    main()
