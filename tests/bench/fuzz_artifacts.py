"""Coverage-guided fuzzing of what reads an operator's file, and of what takes one over the wire.

    pip install atheris
    python tests/bench/fuzz_artifacts.py artifact --seconds 600
    python tests/bench/fuzz_artifacts.py upload --seconds 600

``artifact`` mutates real files: as bytes, within the JSON of their headers, and signed again, so that what is behind
the digest is reached too. A file may be refused by an ArtifactError, or be whole; anything else is a finding.
``upload`` plays sequences of calls (starts, chunks, breaks, the same id again, deletions) against the server's rooms. A
call may fail with an error that has a line in the table of statuses; in the store may be whole operators and nothing
else, once what is unfinished is given up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["operators.core", "steer_server.admin"]):
    from operators.core.artifact import OperatorArtifact, from_bytes, make_vector, to_bytes
    from operators.core.errors import ArtifactError
    from operators.core.file_format import FORMAT, FORMAT_VERSION
    from operators.core.store import Store
    from operators.core.vector_source import ImportedVector
    from steer_server.admin.keeper import Keeper
    from steer_server.admin.threads import FileThreads
    from steer_server.admin.uploads import Uploads
    from steer_server.errors import SteerServerError
    from steer_server.registry import Registry
    from steer_server.types import ModelInfo, UploadStart

_DATA = Path(__file__).parents[1] / "data"
_NAMES = ("a", "b", "../a", "", "x" * 65, "a.tmp")


def seeds() -> list[bytes]:
    """Files of an exact operator, one of low rank, and a vector."""
    found = [path.read_bytes() for path in sorted(_DATA.glob("*.safetensors"))]
    first = from_bytes(found[0], source="seed")
    source = ImportedVector(
        norm=float(first.anchor.double().norm()),
        file_format="gguf",
        file_digest=f"sha256:{'3' * 64}",
        tensor="direction.1",
        model_hint="llama",
    )
    header = first.header.model_copy(
        update={
            "concept_ids": (),
            "vector": source,
            "rule_set": "",
            "neutral": None,
            "reconstruction_error": None,
            "recommended": first.header.recommended.model_copy(update={"blend": 1.0}),
        }
    )
    return [*found, to_bytes(make_vector(header, first.anchor))]


def mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """A mutation of the whole, of the JSON header alone, or of the operator's own header, which is signed again."""
    kind = seed % 4
    size = int.from_bytes(data[:8], "little")
    if kind == 0 or len(data) < 8 or size > len(data) - 8:
        return bytes(atheris.Mutate(data, max_size))
    head, tensors = data[8 : 8 + size], data[8 + size :]
    if kind == 1:
        head = bytes(atheris.Mutate(head, max_size))
    else:
        try:
            head = _with_another_header(head, tensors, is_signed=kind == 3)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            head = bytes(atheris.Mutate(head, max_size))
    return (len(head).to_bytes(8, "little") + head + tensors)[:max_size]


def _with_another_header(head: bytes, tensors: bytes, *, is_signed: bool) -> bytes:
    entries = json.loads(head)
    metadata = entries["__metadata__"]
    metadata["header"] = bytes(atheris.Mutate(metadata["header"].encode(), 1 << 14)).decode(errors="ignore")
    if is_signed:
        digest = hashlib.sha256(f"{FORMAT}/{FORMAT_VERSION}\n{metadata['header']}\n".encode())
        for name in sorted(set(entries) - {"__metadata__"}):
            entry = entries[name]
            kind = {"F32": "float32", "F64": "float64", "BF16": "bfloat16"}[entry["dtype"]]
            digest.update(f"{name} torch.{kind} {tuple(entry['shape'])}\n".encode())
            digest.update(tensors[slice(*entry["data_offsets"])])
        metadata["digest"] = f"sha256:{digest.hexdigest()}"
    return json.dumps(entries).encode()


def read_one(data: bytes) -> None:
    """Refused, or whole: what is read is written as the very same operator."""
    try:
        artifact = from_bytes(data, source="fuzz")
    except ArtifactError as error:
        str(error).encode()
        return
    assert from_bytes(to_bytes(artifact), source="fuzz").digest == artifact.digest


def _model_of(artifact: OperatorArtifact) -> ModelInfo:
    header = artifact.header
    return ModelInfo(
        model=header.model,
        architecture=header.architecture,
        model_fingerprint=header.model_fingerprint,
        tokenizer_fingerprint=header.tokenizer_fingerprint,
        num_layers=header.num_layers,
        hidden_size=header.hidden_size,
        vocab_size=1 << 17,
        context_length=64,
        eos_token_ids=(0,),
        has_chat_template=False,
        engine="hf",
        dtype="float32",
        device="cpu",
        attention="sdpa",
    )


class UploadCalls:
    """Sequences of calls, each against an empty store."""

    def __init__(self, files: list[bytes], directory: Path) -> None:
        self._files = files
        self._store = Store(directory / "store")
        self._model = _model_of(from_bytes(files[0], source="seed"))
        self._loop = asyncio.new_event_loop()

    def play(self, data: bytes) -> None:
        """One sequence."""
        self._loop.run_until_complete(self._play(atheris.FuzzedDataProvider(data)))

    async def _play(self, given: atheris.FuzzedDataProvider) -> None:
        self._store.path.mkdir(exist_ok=True)
        for path in self._store.path.iterdir():
            path.unlink()
        registry = Registry(self._store, self._model, max_bytes=1 << 20, max_dose=1.0)
        keeper = Keeper(self._store, registry, max_served=1 << 30)
        threads = FileThreads()
        uploads = Uploads(keeper, threads, max_file=1 << 17, max_uploads=2, max_bytes=1 << 18, keep_seconds=60)
        for _ in range(given.ConsumeIntInRange(1, 6)):
            try:
                await self._call(given, keeper, uploads)
            except SteerServerError as error:
                str(error).encode()
        unfinished = sum(path.suffix == ".tmp" for path in self._store.path.iterdir())
        assert unfinished <= 2
        await uploads.close()
        threads.close()
        for path in self._store.path.iterdir():
            assert path.suffix in (".safetensors", ".unloaded"), path
        for name in self._store:
            self._store.load(name)
        assert {entry.name for entry in registry.entries()} == set(self._store)

    async def _call(self, given: atheris.FuzzedDataProvider, keeper: Keeper, uploads: Uploads) -> None:
        kind = given.ConsumeIntInRange(0, 9)
        name = given.PickValueInList(list(_NAMES))
        file = given.PickValueInList(self._files)
        digest = from_bytes(file, source="seed").digest
        if kind == 0:
            keeper.load(name)
        elif kind == 1:
            keeper.unload(name)
        elif kind == 2:
            keeper.delete(name, given.PickValueInList(["any", digest, "", given.ConsumeUnicode(80)]))
        elif kind == 3:
            uploads.find(given.PickValueInList(["1", "2", given.ConsumeUnicode(70)]))
        else:
            await self._upload(given, uploads, name, file, digest)

    async def _upload(
        self, given: atheris.FuzzedDataProvider, uploads: Uploads, name: str, file: bytes, digest: str
    ) -> None:
        if given.ConsumeBool():
            at, byte = given.ConsumeIntInRange(0, len(file) - 1), given.ConsumeIntInRange(0, 255)
            file = file[:at] + bytes([byte]) + file[at + 1 :]
        upload_id = given.PickValueInList(["1", "2", "3", given.ConsumeUnicode(70)])
        try:
            held, _ = uploads.find(upload_id)
        except SteerServerError:
            held = 0
        start = UploadStart(
            upload_id,
            name,
            given.PickValueInList([len(file), len(file), given.ConsumeInt(8)]),
            given.PickValueInList([f"sha256:{hashlib.sha256(file).hexdigest()}", given.ConsumeUnicode(80)]),
            given.PickValueInList([held, held, given.ConsumeInt(8)]),
            given.PickValueInList(["", "any", digest, given.ConsumeUnicode(80)]),
        )
        pieces = given.ConsumeIntInRange(1, 4)
        breaks = given.ConsumeIntInRange(0, 3) == 0
        end = given.ConsumeIntInRange(held, len(file)) if held <= len(file) and breaks else len(file)
        step = max(1, (end - held) // pieces)

        async def chunks() -> AsyncIterator[bytes]:
            for at in range(held, end, step):
                yield file[at : min(at + step, end)]
            if given.ConsumeIntInRange(0, 9) == 0:
                yield given.ConsumeBytes(100)
            if breaks and given.ConsumeBool():
                raise asyncio.CancelledError

        with contextlib.suppress(asyncio.CancelledError):
            await uploads.receive(start, chunks())


def main() -> None:
    """Runs one target for a while; libFuzzer prints the executions, and a crash with the input that led to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=["artifact", "upload"])
    parser.add_argument("--seconds", type=int, default=600)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        corpus.mkdir()
        files = seeds()
        options = [sys.argv[0], f"-max_total_time={given.seconds}", "-max_len=65536", "-rss_limit_mb=4096"]
        play: Callable[[bytes], None]
        if given.target == "artifact":
            for place, data in enumerate(files):
                (corpus / str(place)).write_bytes(data)
            play = read_one
            atheris.Setup([*options, str(corpus)], play, custom_mutator=mutated)
        else:
            play = UploadCalls(files, Path(directory)).play
            atheris.Setup([*options, "-max_len=512", str(corpus)], play)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
