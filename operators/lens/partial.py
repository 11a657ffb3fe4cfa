"""What an interrupted build of a lens has done, in a hidden file of the store: sums over the first texts.

The file's name has a digest of everything that the sums depend on, so that only the same build goes on with it. A file
that is damaged is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from operators.core.errors import ArtifactError, StoreError
from operators.core.file_format import MAX_BYTES, open_regular
from operators.core.store import Store, check_name, temporary_file
from operators.core.version import __version__
from operators.maps.detach import RULE_SET
from operators.model.loading import LoadedModel

_SUFFIX = "lens-part"


class PartialSums:
    """The sums of one build, of the lens ``name``: ``load`` what there is, ``save`` after each text, ``remove``."""

    def __init__(
        self, store: Store, name: str, loaded: LoadedModel, texts: Sequence[tuple[int, ...]], layers: Sequence[int]
    ) -> None:
        """``texts``: as token ids."""
        self._store, self._name, self._num_texts = store, check_name(name), len(texts)
        d = loaded.hidden_size
        self._shapes = {f"{kind}.{layer}": (d, d) for layer in layers for kind in ("first", "others")}
        everything = [
            *(loaded.fingerprint, loaded.tokenizer_fingerprint, str(loaded.dtype), RULE_SET, __version__),
            *(list(texts), sorted(layers)),
        ]
        key = hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]
        self.path = store.path / f".{name}.{key}.{_SUFFIX}"

    def load(self) -> tuple[int, float, dict[str, torch.Tensor]] | None:
        """How many texts are done, their worst reconstruction error, and the sums; None without a whole file."""
        try:
            with open_regular(self.path, MAX_BYTES) as (file, num_bytes):
                data = file.read(num_bytes)
            tensors = load(data[32:])
            done, error = (float(number) for number in tensors.pop("state").tolist())
        except (ArtifactError, SafetensorError, KeyError, ValueError):
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32] or not 1 <= done <= self._num_texts:
            return None
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != self._shapes:
            return None
        return int(done), error, tensors

    def save(self, done: int, error: float, sums: Mapping[str, torch.Tensor]) -> None:
        """Writes the sums of the first ``done`` texts, atomically. Raises :class:`StoreError`."""
        data = save({**sums, "state": torch.tensor([done, error], dtype=torch.float64)})
        try:
            self._store.path.mkdir(parents=True, exist_ok=True)
            with temporary_file(self._store.path, self._name) as file:
                file.write(hashlib.sha256(data).digest())
                file.write(data)
                file.flush()
                os.replace(file.name, self.path)
        except OSError as error_:
            raise StoreError(f"{self.path} cannot be written: {error_.strerror}") from error_

    def remove(self) -> None:
        """Removes the sums of this and of any earlier build of a lens of this name."""
        pattern = re.compile(rf"\.{re.escape(self._name)}\.[0-9a-f]{{16}}\.{_SUFFIX}")
        with suppress(OSError):
            for file in filter(pattern.fullmatch, os.listdir(self._store.path)):
                with suppress(OSError):
                    os.unlink(self._store.path / file)

    @staticmethod
    def left_in(store: Store) -> list[Path]:
        """Files of interrupted builds."""
        return sorted(store.path.glob(f".*.{_SUFFIX}"))
