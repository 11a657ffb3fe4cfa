"""What the SDK costs: the same texts from a running server by SDK and by bare stubs, in turn.

    python tests/bench/bench_sdk.py [--target HOST:PORT] [--operator ocean=0.4] [--pairs 9] [--texts 20] [--tokens 64]

The smaller the model, the larger the share of the SDK, which reads the answers and checks their receipts. Reports of
`generate` and `stream` the ratio of tokens per second, SDK over stubs, pair by pair in a random order. Not a test;
nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import grpc
from steer_client import OperatorUse, SamplingParams, SteerClient
from steering.v1 import generation_pb2 as pb
from steering.v1 import generation_pb2_grpc

PROMPT = "I went to see the"
Text = Callable[[int], int]
"""Given a seed: how many tokens came."""


def arms(client: SteerClient, stub: generation_pb2_grpc.GenerationServiceStub, given: argparse.Namespace):
    """By method, the two ways to ask for a text."""
    use = OperatorUse.parse(given.operator)

    def params(seed: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, seed=seed, max_tokens=given.tokens, ignore_eos=True)

    def request(seed: int) -> pb.GenerateRequest:
        sampling = {"temperature": 1.0, "seed": seed, "max_tokens": given.tokens, "ignore_eos": True}
        operators = [{"name": use.name, "strength": use.strength}]
        return pb.GenerateRequest(prompt={"text": PROMPT}, sampling=sampling, operators=operators)

    def sdk_stream(seed: int) -> int:
        with client.stream(PROMPT, operators=use, sampling=params(seed)) as stream:
            return sum(len(delta.token_ids) for delta in stream)

    def bare_stream(seed: int) -> int:
        return sum(len(event.delta.token_ids) for event in stub.GenerateStream(request(seed)))

    return {
        "generate": (
            lambda seed: len(client.generate(PROMPT, operators=use, sampling=params(seed)).token_ids),
            lambda seed: len(stub.Generate(request(seed)).token_ids),
        ),
        "stream": (sdk_stream, bare_stream),
    }


def rate(text: Text, texts: int, tokens: int, seed: int) -> float:
    """Tokens per second of texts one after the other."""
    began = time.monotonic()
    count = sum(text(seed + number) for number in range(texts))
    if count != texts * tokens:
        raise SystemExit(f"{count} tokens came; {texts * tokens} were asked for")
    return count / (time.monotonic() - began)


def main() -> None:
    """Prints rates and ratios."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--target", default="127.0.0.1:50051")
    options.add_argument("--operator", default="ocean=0.4")
    options.add_argument("--pairs", type=int, default=9)
    options.add_argument("--texts", type=int, default=20)
    options.add_argument("--tokens", type=int, default=64)
    given = options.parse_args()
    source = random.Random(0)
    with SteerClient(given.target) as client, grpc.insecure_channel(given.target) as channel:
        both = arms(client, generation_pb2_grpc.GenerationServiceStub(channel), given)
        for name, ways in both.items():
            pairs = []
            for turn in range(-1, given.pairs):
                order = source.sample([0, 1], 2)
                found = {way: rate(ways[way], given.texts, given.tokens, 1000 * (turn + 1)) for way in order}
                # The first round warms up.
                if turn >= 0:
                    pairs.append((found[0], found[1]))
            ratios = [sdk / bare for sdk, bare in pairs]
            print(
                f"{name:8} SDK {statistics.median(sdk for sdk, _ in pairs):8.1f} tokens/s, stubs "
                f"{statistics.median(bare for _, bare in pairs):8.1f}, ratio {statistics.median(ratios):.3f} "
                f"({min(ratios):.3f}-{max(ratios):.3f}), {given.pairs} pairs of {given.texts} × {given.tokens} tokens"
            )


if __name__ == "__main__":
    main()
