"""The files of a checkpoint: when each was last changed, and in which dtypes its numbers are stored."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from operators.core.errors import ModelError

_WEIGHTS = (".safetensors", ".bin", ".pt")
_READ = (*_WEIGHTS, ".json", ".jinja", ".model", ".txt")
"""Ends of the names of what a model and a tokenizer are loaded from."""
_NAMES_IN_ORDER = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Of the checkpoints in a directory, the first of these is loaded."""
_MAX_INDEX = 64 << 20
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _FLOATS.items()}
_PICKLE_ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError)


@dataclass(frozen=True)
class FileStamp:
    """What changes when a file is written to or replaced. Filled by :meth:`CheckpointFiles.of`."""

    path: str
    size: int
    modified_ns: int
    changed_ns: int
    """Of the file's entry: unlike the time of modification, no program can set it back."""
    inode: int
    device: int


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint as they were at one moment."""

    directory: Path
    stamps: tuple[FileStamp, ...]

    @classmethod
    def of(cls, directory: Path) -> CheckpointFiles:
        """The files that a model or a tokenizer may be read from. Raises :class:`ModelError` where they cannot be."""
        try:
            top = [path for path in directory.iterdir() if path.suffix.lower() in _READ]
            paths = {path.absolute() for path in (*top, *_named_elsewhere(top)) if path.is_file()}
            return cls(directory, tuple(stamp_of(path) for path in sorted(paths)))
        except OSError as error:
            raise ModelError(f"{error.filename or directory} cannot be read: {error.strerror or error}") from error

    @property
    def weights(self) -> tuple[Path, ...]:
        """Those that may hold tensors."""
        return tuple(path for stamp in self.stamps if (path := Path(stamp.path)).suffix.lower() in _WEIGHTS)

    def check_unchanged(self, name: str) -> None:
        """Raises :class:`ModelError` naming the first file that was written, replaced, added or removed since."""
        now = CheckpointFiles.of(self.directory).stamps
        if now != self.stamps:
            # Of two stamps of one file, either names it.
            changed = min(stamp.path for stamp in set(now) ^ set(self.stamps))
            raise changed_error(name, changed)


def changed_error(name: str, file: Path | str) -> ModelError:
    """What is said of the model ``name`` whose file is another than it was."""
    return ModelError(
        f"model {name!r}: {file} was changed after the model began to load; start again when its files are complete, "
        "and write new weights to another directory"
    )


def check_complete(name: str, *, missing: list[str], shapes: list[str]) -> None:
    """Refuses a checkpoint that lacks a parameter: transformers makes a random one, another at every start."""
    for problem, keys in (("has no", missing), ("has another shape of", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(
                f"model {name!r}: its checkpoint {problem} {', '.join(keys[:3])}{more}; weights for every parameter, "
                "not quantised in a way that transformers cannot read, are needed"
            )


def tied_error(name: str) -> ModelError:
    """What is said of a head that is tied by the configuration and has numbers of its own in the files."""
    return ModelError(
        f"model {name!r}: its configuration ties the head to the embedding table (tie_word_embeddings), and its "
        "checkpoint has other numbers for the two; set it to false, or remove the head from the checkpoint"
    )


def loaded_weights(directory: Path) -> frozenset[Path]:
    """Of all weights in a directory, those that transformers loads. Raises :class:`ModelError` where it has none."""
    try:
        chosen = json.loads((directory / "config.json").read_bytes()).get("transformers_weights")
        named = _NAMES_IN_ORDER if chosen is None else (str(chosen),)
        first = next((directory / name for name in named if (directory / name).is_file()), None)
        if first is None:
            raise ModelError(f"{directory} has none of {', '.join(named)}")
        if first.suffix.lower() != ".json":
            return frozenset({first})
        return frozenset(directory / str(name) for name in json.loads(first.read_bytes())["weight_map"].values())
    except (OSError, ValueError, RecursionError, KeyError, AttributeError) as error:
        raise ModelError(f"{directory}: its list of weights cannot be read: {error}") from error


def check_shards(name: str, directory: Path) -> None:
    """Refuses a checkpoint whose index names files that are not there, or that are cut short, before any is loaded.

    Raises:
        ModelError: names the files; also where the directory has no weights.
    """
    try:
        files = sorted(loaded_weights(directory))
    except ModelError as error:
        raise ModelError(f"model {name!r} cannot be loaded: {error}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"model {name!r} cannot be loaded: {directory} lacks {', '.join(missing[:3])}{more}, which its index names"
        )
    for file in files:
        if file.suffix.lower() == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"model {name!r} cannot be loaded: {file.name} is no whole safetensors file ({error})"
                ) from error


def stored_dtypes(files: Iterable[Path]) -> frozenset[torch.dtype]:
    """The floating-point dtypes of all tensors in these files; those of a file that is no checkpoint do not count."""
    return frozenset(_FLOATS[dtype] for file in files for dtype in _tensors(file).values() if dtype in _FLOATS)


def packed_weights(files: Iterable[Path]) -> list[str]:
    """Weights in these files that are no floating-point numbers of 16 bits or more, but quantised: "NAME (DTYPE)"."""
    found = (item for file in files for item in _tensors(file).items())
    return sorted(f"{name} ({dtype})" for name, dtype in found if name.endswith(".weight") and dtype not in _FLOATS)


def _tensors(file: Path) -> dict[str, str]:
    """Name -> dtype, as safetensors names it or as torch does; of a file that is no checkpoint, none."""
    with suppress(OSError, SafetensorError, UnpicklingError, *_PICKLE_ERRORS):
        if file.suffix.lower() == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                return {name: opened.get_slice(name).get_dtype() for name in names}
        # On the device "meta" no number is read; "weights_only" runs no code of the file.
        loaded = torch.load(file, map_location="meta", weights_only=True)
        entries = loaded.items() if isinstance(loaded, dict) else ()
        return {
            str(name): _NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
            for name, value in entries
            if isinstance(value, torch.Tensor)
        }
    return {}


def _named_elsewhere(top: Iterable[Path]) -> Iterable[Path]:
    """What the indices and the configuration beside them name, which may lie in a folder below."""
    for path in top:
        if path.suffix.lower() == ".json" and path.stat().st_size <= _MAX_INDEX:
            with suppress(OSError, ValueError, RecursionError):
                content = path.read_bytes()
                # A tokenizer's vocabulary takes a while to parse, and names no file.
                if any(key in content for key in (b"weight_map", b"transformers_weights")):
                    yield from (path.parent / name for name in _file_names(json.loads(content)))


def _file_names(content: Any) -> set[str]:
    if not isinstance(content, dict):
        return set()
    weights = content.get("weight_map")
    named = [*weights.values()] if isinstance(weights, dict) else []
    return {name for name in (*named, content.get("transformers_weights")) if isinstance(name, str)}


def stamp_of(path: Path) -> FileStamp:
    """The stamp of a file that is there. Raises :class:`OSError`."""
    found = path.stat()
    return FileStamp(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
