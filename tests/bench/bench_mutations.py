"""Damaged operators and changed weights: is every one refused?

    python tests/bench/bench_mutations.py [--model smollm2-135m] [--mutations 400] [--weights 50] [--seed 0]

Builds a low-rank operator of the model, changes the bytes of its file (any byte to any other, in header and
numbers; cut anywhere; bytes added, taken out or swapped) and reads each as a server does. Then changes one bit of
one number anywhere in a copy of the model's checkpoint, again and again, loads it as a server does, and asks a
registry of that model for the operator of the unchanged one. Prints the counts, and every change that was not
refused; exits with 1 where there is one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from operators.builder.build import build_operator
from operators.builder.concept import concept_from_text
from operators.builder.spec import BuildSpec
from operators.core.artifact import OperatorArtifact, from_bytes, to_bytes
from operators.core.errors import ArtifactError
from operators.core.store import Store
from operators.model.loading import LoadedModel, load_model
from operators.model.obtain import obtain


def _other_byte(data: bytes, draw: random.Random, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]


def _head(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a byte of the header": lambda data, draw: _other_byte(data, draw, draw.randrange(_head(data))),
    "a byte of the header's end": lambda data, draw: _other_byte(data, draw, _head(data) - 1 - draw.randrange(8)),
    "a byte of the numbers": lambda data, draw: _other_byte(data, draw, draw.randrange(_head(data), len(data))),
    "cut": lambda data, draw: data[: draw.randrange(len(data))],
    "bytes added at the end": lambda data, draw: data + draw.randbytes(draw.randrange(1, 64)),
    "bytes added within": lambda data, draw: _spliced(data, draw, draw.randbytes(draw.randrange(1, 9)), 0),
    "bytes taken out": lambda data, draw: _spliced(data, draw, b"", draw.randrange(1, 9)),
    "bytes swapped": lambda data, draw: _swapped(data, draw),
}


def _spliced(data: bytes, draw: random.Random, added: bytes, removed: int) -> bytes:
    place = draw.choice([draw.randrange(_head(data)), draw.randrange(len(data) - removed)])
    return data[:place] + added + data[place + removed :]


def _swapped(data: bytes, draw: random.Random) -> bytes:
    """Two neighbouring runs of eight numbers, which differ."""
    while True:
        place = draw.randrange(_head(data), len(data) - 64)
        one, other = data[place : place + 32], data[place + 32 : place + 64]
        if one != other:
            return data[:place] + other + one + data[place + 64 :]


def mutations(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged files, each another than ``data``, with what was done to it; the kinds in turn."""
    draw, kinds = random.Random(seed), list(MUTATIONS)
    while count:
        kind = kinds[count % len(kinds)]
        damaged = MUTATIONS[kind](data, draw)
        if damaged != data:
            yield kind, damaged
            count -= 1


def is_refused(data: bytes) -> bool:
    """Whether the bytes are read as no operator."""
    try:
        from_bytes(data, source="damaged")
    except ArtifactError:
        return True
    return False


def flip_one_number(checkpoint: Path, seed: int) -> str:
    """Flips one bit of one number of a safetensors file, in place; says where."""
    draw = random.Random(seed)
    with checkpoint.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(start - 8))
        entries.pop("__metadata__", None)
        name = draw.choice(sorted(entries))
        first, last = entries[name]["data_offsets"]
        place = start + draw.randrange(first, last)
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ (1 << draw.randrange(8))]))
    return f"{name}, byte {place}"


def refusals(directory: Path, store: Store, *, seed: int) -> tuple[str, list[str]]:
    """Changes one number of the checkpoint; says where, and what a server of it finds wrong with each operator."""
    from steer_server.engine.describe import describe_model
    from steer_server.registry import Registry

    where = flip_one_number(directory / "model.safetensors", seed)
    loaded = load_model(str(directory))
    registry = Registry(store, describe_model(loaded, engine="hf"), max_bytes=1 << 30, max_dose=1.0)
    return where, [entry.problem for entry in registry.entries()]


def built(loaded: LoadedModel) -> OperatorArtifact:
    """A small operator of the model."""
    concept = concept_from_text("The Golden Gate Bridge", loaded)
    return build_operator(BuildSpec((concept,), layer=loaded.num_layers // 2, rank=8), loaded)


def main() -> None:
    """Prints the counts as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--mutations", type=int, default=400)
    parser.add_argument("--weights", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    accepted: list[str] = []
    operator = built(load_model(given.model))
    data, counts = to_bytes(operator), Counter[str]()
    for kind, damaged in mutations(data, given.mutations, given.seed):
        counts[kind] += 1
        if not is_refused(damaged):
            accepted.append(kind)
    print(json.dumps({"bytes": len(data), "mutations": counts, "accepted": accepted}))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store, directory = Store(Path(folder) / "store"), Path(folder) / "model"
        store.save("bridge", operator)
        shutil.copytree(obtain(given.model), directory)
        for number in range(given.weights):
            where, [problem] = refusals(directory, store, seed=given.seed + number)
            if "built for model" not in problem:
                accepted.append(where)
            print(json.dumps({"number": number, "where": where, "refused": problem[:160]}), flush=True)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"weights": given.weights, "accepted": accepted, "seconds_of_weights": seconds}))
    sys.exit(bool(accepted))


if __name__ == "__main__":
    main()
