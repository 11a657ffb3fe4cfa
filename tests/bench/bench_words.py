"""Words through a server: does a word that somebody types come up in the text, and at which KL?

    python tests/bench/bench_words.py --store DIR [--model smollm2-135m] [--engine hf] [--lens lens] [--kl 0.5]
        [--tokens 24] [--repetition-penalty 1] [--words 20] [--prompts 20] [--texts FILE] [--json]

Starts a server in a process of its own on a store that holds a lens, and asks it for each of twenty words on each of
twenty prompts, as anybody would: by the SDK, the strength left to the lens's dose curve. Words and prompts were written
down before any of them was run, and none is used to search for a lens or to measure its curve.

Per word: the share of the texts that hold it (any text in which it begins a word, whatever its case), the share that
hold it and repeat no four tokens (*useful*), the same of the plain texts, and mean and 95th percentile over the tokens
of KL(plain || steered), beside the p95 that the strength was read off the curve for. Then medians over the words, and a
bootstrap interval over words and prompts for the shares. Not a test; nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from steer_client import ArmResult, Generation, SamplingParams, SteerClient, Word

from operators.core.statistics import percentile

BIN = Path(sys.executable).parent
WORDS = (
    *("guitar", "penguin", "bicycle", "lighthouse", "perfume", "thunder", "cathedral", "tennis", "chocolate"),
    *("microscope", "carnival", "desert", "vampire", "bakery", "submarine", "orchard", "circus", "passport"),
    *("butterfly", "pizza"),
)
PROMPTS = (
    "We spent the whole afternoon talking about",
    "My uncle called to say that",
    "A stranger came up and asked for",
    "In the old photograph there is a",
    "They decided to build a",
    "Last summer we travelled to",
    "The teacher asked the class to",
    "I have always wanted to own a",
    "At the market you can find",
    "The story is about a young",
    "He put the box down and",
    "Everyone at the party was",
    "After lunch they went back to",
    "It was raining, so we",
    "The shop around the corner sells",
    "The old woman told us about her",
    "I woke up and thought of",
    "On the wall there was a",
    "The best part of the trip was",
    "She wrote in her diary that",
)
ARMS_PER_CALL = 10
RESAMPLES = 2000
START_SECONDS = 300.0


@dataclass(frozen=True)
class Text:
    """One steered text: what it holds, and what it cost."""

    hit: bool
    repeats: bool
    kl: tuple[float, ...]


@dataclass(frozen=True)
class WordRow:
    """One word over all prompts. Shares of texts; KL in nats."""

    word: str
    strength: float
    kl_asked: float | None
    kl_p95: float
    kl_mean: float
    hits: float
    useful: float
    repeating: float
    plain_hits: float


def main() -> None:
    """Prints a table (or JSON), and writes the texts where that is asked for."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--store", required=True)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--engine", default="hf")
    options.add_argument("--lens", default="lens")
    options.add_argument("--kl", type=float, help="budget (p95, nats); the lens's own without it")
    options.add_argument("--strength", type=float, help="in place of a budget, for lenses that recommend none")
    options.add_argument("--tokens", type=int, default=24)
    options.add_argument("--repetition-penalty", type=float, default=1.0)
    options.add_argument("--words", type=int, default=len(WORDS))
    options.add_argument("--prompts", type=int, default=len(PROMPTS))
    options.add_argument("--texts", type=Path, help="file for all texts")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    with server(given) as target, SteerClient(target, timeout=600) as client:
        rows, texts, shown = measure(client, given)
    if given.texts:
        given.texts.write_text("\n".join(shown) + "\n", encoding="utf-8")
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    report(given, rows, texts)


@contextmanager
def server(given: argparse.Namespace) -> Iterator[str]:
    """A server on the store, in a process of its own."""
    command = [BIN / "steer-server", "--model", given.model, "--engine", given.engine, "--store", given.store]
    command += ["--listen", "127.0.0.1:0", "--dtype", "float32", "--log-format", "json"]
    if given.engine == "vllm":
        command += ["--engine-args", "max_model_len=256", "--engine-args", "enforce_eager=true"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield _address(process.stderr)
        finally:
            process.terminate()


def _address(log: Iterator[str]) -> str:
    deadline = time.monotonic() + START_SECONDS
    for line in log:
        found = re.search(r'"listen": "([^"]+)"', line)
        if found:
            return found[1]
        if time.monotonic() > deadline:
            break
    sys.exit("bench_words: the server did not start")


def measure(client: SteerClient, given: argparse.Namespace) -> tuple[list[WordRow], dict[str, list[Text]], list[str]]:
    """Every word on every prompt, several words in one comparison: rows, texts by word, and the texts in words."""
    sampling = SamplingParams(max_tokens=given.tokens, repetition_penalty=given.repetition_penalty)
    words = WORDS[: given.words]
    texts: dict[str, list[Text]] = {word: [] for word in words}
    plain: dict[str, list[bool]] = {word: [] for word in words}
    last: dict[str, ArmResult] = {}
    shown = []
    for prompt in PROMPTS[: given.prompts]:
        for first in range(0, len(words), ARMS_PER_CALL):
            arms = {
                word: [Word(word, given.strength, kl=given.kl, lens=given.lens)]
                for word in words[first : first + ARMS_PER_CALL]
            }
            result = client.compare(prompt, arms=arms, sampling=sampling)
            shown += [] if first else [f"\n{prompt}", f"  {'(plain)':12} {result.normal.text!r}"]
            for word, arm in result.steered.items():
                assert arm.kl is not None
                text = Text(holds(arm.generation, word), repeats(arm.generation.token_ids), arm.kl.per_token)
                texts[word].append(text)
                plain[word].append(holds(result.normal, word))
                last[word] = arm
                mark = "+" if text.hit else " "
                shown.append(f"{mark}{'~' if text.repeats else ' '}{word:12} {arm.generation.text!r}")
        print(f"{prompt!r}: done", file=sys.stderr, flush=True)
    rows = [row(word, texts[word], plain[word], last[word]) for word in words]
    return rows, texts, shown


def holds(generation: Generation, word: str) -> bool:
    """Whether a word of the text begins with it."""
    return re.search(rf"\b{re.escape(word)}", generation.text, re.IGNORECASE) is not None


def repeats(ids: Sequence[int]) -> bool:
    """Whether four tokens in a row come twice."""
    fours = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return len(set(fours)) < len(fours)


def row(word: str, texts: Sequence[Text], plain: Sequence[bool], last: ArmResult) -> WordRow:
    """The figures of one word; strength and budget are those of its receipt."""
    (receipt,) = last.generation.receipts
    kl = [value for text in texts for value in text.kl]
    return WordRow(
        word,
        receipt.strength,
        receipt.kl,
        percentile(kl, 0.95),
        statistics.fmean(kl),
        statistics.fmean(text.hit for text in texts),
        statistics.fmean(text.hit and not text.repeats for text in texts),
        statistics.fmean(text.repeats for text in texts),
        statistics.fmean(plain),
    )


def report(given: argparse.Namespace, rows: Sequence[WordRow], texts: dict[str, list[Text]]) -> None:
    """The table, the medians over the words, and intervals."""
    penalty = given.repetition_penalty
    print(
        f"{given.model} on {given.engine}: {len(rows)} words x {given.prompts} prompts x {given.tokens} tokens, ",
        end="",
    )
    print(
        f"greedy, repetition penalty {penalty:g}; p95 KL asked for: {rows[0].kl_asked}, strength {rows[0].strength:g}"
    )
    print(f"{'word':12} {'hits':>6} {'useful':>7} {'repeat':>7} {'plain':>6} {'KL p95':>7} {'mean':>6}")
    for each in rows:
        print(
            f"{each.word:12} {each.hits:6.2f} {each.useful:7.2f} {each.repeating:7.2f} {each.plain_hits:6.2f} "
            f"{each.kl_p95:7.3f} {each.kl_mean:6.3f}"
        )
    medians = {
        name: statistics.median(getattr(each, name) for each in rows)
        for name in ("hits", "useful", "repeating", "kl_p95", "kl_mean")
    }
    print("median over words:", ", ".join(f"{name} {value:.3f}" for name, value in medians.items()))
    for name, of in (("hits", lambda text: text.hit), ("useful", lambda text: text.hit and not text.repeats)):
        shares = [[of(text) for text in of_word] for of_word in texts.values()]
        low, high = interval(shares)
        mean = statistics.fmean(value for of_word in shares for value in of_word)
        print(f"mean {name} {mean:.3f} [{low:.3f}, {high:.3f}]: 95 % over words and prompts")
    kl = [value for of_word in texts.values() for text in of_word for value in text.kl]
    print(f"KL over all tokens: p95 {percentile(kl, 0.95):.3f}, mean {statistics.fmean(kl):.3f}")


def interval(shares: Sequence[Sequence[bool]]) -> tuple[float, float]:
    """Bootstrap over words and prompts alike: the 2.5th and the 97.5th percentile of the mean."""
    source, means = random.Random(0), []
    prompts = range(len(shares[0]))
    for _ in range(RESAMPLES):
        picked = source.choices(prompts, k=len(prompts))
        means.append(
            statistics.fmean(of_word[at] for of_word in source.choices(shares, k=len(shares)) for at in picked)
        )
    return percentile(means, 0.025), percentile(means, 0.975)


if __name__ == "__main__":
    main()
