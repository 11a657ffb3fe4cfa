"""Rows of a model's unembedding W_U (V, d) by token id, read from its files: the model is not loaded.

Rows come as float32 whatever dtype the file or a loaded model has, so that every engine gets the same numbers. W_U is
the embedding table where the configuration ties the two, and the weight of the head otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from operators.core.errors import ModelError
from operators.model.checkpoint_files import CheckpointFiles, FileStamp, changed_error, stamp_of
from operators.model.decoders import stored_tie
from operators.model.obtain import obtain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_INDEX = 64 << 20
_HEADS = ("lm_head.weight", "embed_out.weight")
_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ROWS_PER_READ = 8192


@dataclass(frozen=True)
class Unembedding:
    """Where W_U (V, d) is. Filled by :func:`find_unembedding`; nothing of it is kept in memory."""

    model: str
    """As the caller named it, for messages."""
    file: Path
    tensor: str
    tied: bool
    """Whether it is the embedding table."""
    vocabulary: int
    """V, its number of rows; a vocabulary that is padded has more than its tokenizer has tokens."""
    hidden_size: int
    stamp: FileStamp
    """Of the file, as it was when the rows were found."""

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """The rows of ``ids``, (len(ids), d) float32 on the CPU.

        Raises:
            ModelError: a token has no row, or the file cannot be read or was changed.
        """
        for token in ids:
            if not 0 <= token < self.vocabulary:
                raise ModelError(f"{self.model}: token {token} has no row; the unembedding has {self.vocabulary}")
        with _opened(self.model, self.file) as file:
            table = file.get_slice(self.tensor)
            # Copies: until its numbers are checked to be those that were there, the file is read.
            found = [table[token : token + 1].to(torch.float32, copy=True) for token in ids]
        self._check_unchanged()
        rows = torch.cat(found) if found else torch.empty(0, self.hidden_size)
        if not bool(torch.isfinite(rows).all()):
            raise ModelError(f"{self.model}: {self.tensor!r} has values that are not finite")
        return rows

    def mean(self) -> torch.Tensor:
        """The mean of all rows, (d,) float32, summed in float64. Raises :class:`ModelError`."""
        total = torch.zeros(self.hidden_size, dtype=torch.float64)
        with _opened(self.model, self.file) as file:
            table = file.get_slice(self.tensor)
            for first in range(0, self.vocabulary, _ROWS_PER_READ):
                total += table[first : min(first + _ROWS_PER_READ, self.vocabulary)].double().sum(0)
        self._check_unchanged()
        return (total / self.vocabulary).to(torch.float32)

    def _check_unchanged(self) -> None:
        """After reading: what was written meanwhile may have been read."""
        if _stamp(self.model, self.file) != self.stamp:
            raise changed_error(self.model, self.file)


@dataclass(frozen=True, eq=False)
class LoadedUnembedding:
    """W_U of a model in memory, for models without files, with the same methods."""

    weight: torch.Tensor
    """(V, d) in the model's dtype, on its device."""
    tied: bool

    @property
    def vocabulary(self) -> int:
        """V, its number of rows."""
        return int(self.weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """d."""
        return int(self.weight.shape[1])

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """The rows of ``ids``, (len(ids), d) float32 on the CPU. Raises :class:`ModelError`."""
        for token in ids:
            if not 0 <= token < self.vocabulary:
                raise ModelError(f"token {token} has no row; the unembedding has {self.vocabulary}")
        return self.weight[list(ids)].detach().to(device="cpu", dtype=torch.float32)

    def mean(self) -> torch.Tensor:
        """The mean of all rows, (d,) float32, summed in float64."""
        total = torch.zeros(self.hidden_size, dtype=torch.float64)
        for first in range(0, self.vocabulary, _ROWS_PER_READ):
            total += self.weight[first : first + _ROWS_PER_READ].detach().double().sum(0).cpu()
        return (total / self.vocabulary).to(torch.float32)


def loaded_unembedding(model: PreTrainedModel) -> LoadedUnembedding:
    """W_U of a model in memory. Raises :class:`ModelError` where it has no plain head."""
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(f"{type(model).__name__} has no unembedding of floating-point numbers")
    return LoadedUnembedding(weight, tied=weight.data_ptr() == model.get_input_embeddings().weight.data_ptr())


def find_unembedding(name: str, files: CheckpointFiles | None = None) -> Unembedding:
    """Where the unembedding of a model is: a built-in name, directory, GGUF file or Hugging Face id in the cache.

    Args:
        files: of the model as it is being served, in whose directory it is then looked for: rows of changed files,
            or of what ``name`` has come to mean since, would be another model's.

    Raises:
        ModelError: there is no checkpoint of safetensors files, its index or configuration is damaged, or W_U is not
            there as a matrix of floating-point numbers (quantised): names what was found. Or ``files`` were changed.
    """
    source = obtain(name) if files is None else files.directory
    config = _read_json(name, _file_of(name, source, "config.json"))
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    tied = _is_tied(config, text or {})
    tensors = _tensor_files(name, source, config)
    # A tied model may have a head in its file too: a model where that has other numbers is not loaded.
    wanted = _TABLES if tied else _HEADS
    found = [key for key in tensors if key in wanted or key.endswith(tuple(f".{end}" for end in wanted))]
    if not found and not tied:
        raise ModelError(
            f"{name}: its files have no {' or '.join(wanted)}, and its configuration does not tie the head to the "
            "embedding table: a head of another form (quantised) is not read"
        )
    if len(found) != 1:
        raise ModelError(f"{name}: {sorted(found)} could be the unembedding; one {' or '.join(wanted)} is accepted")
    located = _located(name, tensors[found[0]], found[0], tied=tied)
    if files is not None:
        files.check_unchanged(name)
    return located


def _is_tied(config: dict[str, Any], text: dict[str, Any]) -> bool:
    """Whether head and table are one; where the files do not say it, what transformers takes for this kind of model."""
    if (tied := stored_tie(config)) is not None:
        return tied
    from transformers import CONFIG_MAPPING

    kind = text.get("model_type") or config.get("model_type")
    default = CONFIG_MAPPING[kind]() if kind in CONFIG_MAPPING else None
    return bool(getattr(default, "tie_word_embeddings", False))


def _located(name: str, file: Path, tensor: str, *, tied: bool) -> Unembedding:
    stamp = _stamp(name, file)
    with _opened(name, file) as opened:
        table = opened.get_slice(tensor)
        shape, dtype = tuple(table.get_shape()), table.get_dtype()
    if len(shape) != 2 or dtype not in _FLOATS:
        raise ModelError(f"{name}: {tensor!r} is {dtype} of shape {shape}; a matrix of {', '.join(_FLOATS)} is read")
    return Unembedding(name, file, tensor, tied, *shape, stamp)


def _stamp(name: str, file: Path) -> FileStamp:
    try:
        return stamp_of(file)
    except OSError as error:
        raise ModelError(f"{name}: {file.name} cannot be read: {error.strerror}") from error


def _tensor_files(name: str, source: Path | str, config: dict[str, Any]) -> dict[str, Path]:
    """Tensor -> file of a checkpoint, sharded or not: of those that transformers loads where there are several."""
    chosen = config.get("transformers_weights")
    named = (_SINGLE, _INDEX) if chosen is None else (_beside(name, "config.json", chosen),)
    there = (_file_of(name, source, each, missing_is_none=True) for each in named)
    # Where nothing is there, the error names the first.
    found = next((path for path in there if path is not None), None) or _file_of(name, source, named[0])
    if found.suffix != ".json":
        with _opened(name, found) as file:
            return dict.fromkeys(file.keys(), found)
    weights = _read_json(name, found).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(part, str) for part in weights.values()):
        raise ModelError(f"{name}: {found.name} has no map of tensors to files")
    wanted = {
        key: _beside(name, found.name, part) for key, part in weights.items() if key.endswith((*_HEADS, *_TABLES))
    }
    return {key: _file_of(name, source, part) for key, part in wanted.items()}


def _beside(name: str, listing: str, part: Any) -> str:
    if not isinstance(part, str) or Path(part).name != part:
        raise ModelError(f"{name}: {listing} names the file {str(part)[:80]!r}, which is not beside it")
    return part


def _file_of(name: str, source: Path | str, file: str, *, missing_is_none: bool = False) -> Any:
    """The path of one of a checkpoint's files; of a Hugging Face id, in the cache or downloaded."""
    if isinstance(source, Path):
        found: Path | None = source / file if (source / file).is_file() else None
    else:
        from transformers.utils import cached_file

        path = cached_file(
            source, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        found = None if path is None else Path(path)
    if found is None and not missing_is_none:
        raise ModelError(f"{name}: it has no {file}; the unembedding is read from safetensors files")
    return found


def _read_json(name: str, file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_INDEX:
            raise ModelError(f"{name}: {file.name} has {file.stat().st_size} bytes; at most {_MAX_INDEX} are read")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: {file.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{name}: {file.name} is no JSON object")
    return found


def _opened(name: str, file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{name}: {file.name} is no whole safetensors file ({error})") from error
