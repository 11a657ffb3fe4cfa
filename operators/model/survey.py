"""What can be said of a model that is named, with no weights downloaded, converted or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from operators.core.capacity import format_bytes
from operators.core.dtypes import DTYPES
from operators.core.errors import ModelError, OperatorError
from operators.core.header import AttentionName, DTypeName
from operators.model.block_weights import without_weights
from operators.model.checkpoint_files import CheckpointFiles, check_shards, stored_dtypes
from operators.model.digest_cache import cached_digest
from operators.model.fingerprints import model_fingerprint, tokenizer_fingerprint
from operators.model.loading import LoadedModel, check_device, check_not_adapter, decoder_layers, near_name
from operators.model.obtain import ACCEPTED, BUILT_IN, locate
from operators.model.preflight import ModelCheck, check_fits, examine
from operators.model.tokenizer_files import load_tokenizer


@dataclass(frozen=True)
class ModelSurvey:
    """Filled by :func:`survey_model`.

    ``model``: without weights, on the device "meta"; its ``fingerprint`` is empty where the weights were never
    digested on this machine. None where the model is not on this machine.
    """

    said: str
    """One sentence about it, without its name."""
    model: LoadedModel | None


@dataclass(frozen=True, eq=False)
class ModelOutline:
    """A model by its configuration. Filled by :func:`outline_model`.

    ``model`` is without weights, on the device "meta", and ``tokenizer`` None where its directory has none. ``fits``
    says whether its weights fit into the memory; ``digested`` whether they have been digested on this machine;
    ``stored`` is the dtype of its files, or of its configuration where it has no files.
    """

    loaded: LoadedModel
    has_tokenizer: bool
    fits: bool
    digested: bool
    stored: torch.dtype
    files: tuple[Path, ...]


def outline_model(
    name: str,
    *,
    dtype: DTypeName,
    device: str,
    attention: AttentionName | None,
    checks: Sequence[ModelCheck] = (),
    device_memory: int | None = None,
) -> ModelOutline:
    """What a configuration says of a model, whether its weights are there or not.

    Raises:
        ModelError: its configuration is not on this machine, or it cannot be loaded as far as that tells.
    """
    missing = torch.device(device).type == "cuda" and not torch.cuda.is_available()
    if missing and device_memory is None:
        raise ModelError(
            f"device {device!r}: this machine has none that could be asked for its memory; a plan for another machine "
            "needs --device-memory, such as 80GiB"
        )
    if not missing:
        check_device(device, device_memory)
    directory = _directory_here(name)
    if directory is None:
        raise ModelError(f"model {name!r} {_how_to_get(name)}: a plan needs its configuration here")
    try:
        examined = examine(
            *(name, str(directory), "main"),
            dtype=dtype,
            device=torch.device(device),
            device_memory=device_memory,
            attention=attention,
            checks=[decoder_layers, *checks],
        )
    except OperatorError:
        raise
    except Exception as error:
        # transformers raises errors of any class for files that are damaged.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {name!r} cannot be planned for{near_name(name)}: {reason} ({ACCEPTED})") from error
    model = without_weights(examined, DTYPES[dtype])
    tokenizer = _tokenizer(name, directory)
    files = CheckpointFiles.of(directory)
    dtypes = stored_dtypes(files.weights) or {model.config.get_text_config().dtype or torch.bfloat16}
    loaded = LoadedModel(
        *(name, model, tokenizer, "", "", files), device_memory=device_memory, meant_for=torch.device(device)
    )
    return ModelOutline(
        loaded,
        has_tokenizer=tokenizer is not None,
        fits=examined.need <= examined.have,
        digested=cached_digest(files) is not None,
        stored=max(dtypes, key=lambda stored: stored.itemsize),
        files=files.weights,
    )


def _directory_here(name: str) -> Path | None:
    """Where the files of a model are on this machine; None where they are not."""
    found = locate(name)
    if found is None or Path(found).is_dir():
        return None if found is None else Path(found)
    return _cached_hub_directory(str(found))


def _tokenizer(name: str, directory: Path) -> Any:
    try:
        return load_tokenizer(name, str(directory), "main", directory)
    except ModelError:
        # A plan does without.
        return None


def survey_model(name: str, *, dtype: DTypeName, device: str, attention: AttentionName | None) -> ModelSurvey:
    """Looks for a model as :func:`operators.model.loading.load_model` does.

    Raises:
        ModelError: it cannot be loaded, as far as its configuration, tokenizer and the names of its files tell.
    """
    check_device(device)
    directory = _directory_here(name)
    if directory is None:
        return ModelSurvey(_how_to_get(name), None)
    check_not_adapter(name, str(directory))
    check_shards(name, directory)
    try:
        examined = examine(
            *(name, str(directory), "main"),
            dtype=dtype,
            device=torch.device(device),
            attention=attention,
            checks=[decoder_layers],
        )
        check_fits(name, examined, dtype, device)
        tokenizer = load_tokenizer(name, str(directory), "main", directory)
    except OperatorError:
        raise
    except Exception as error:
        # transformers raises errors of any class for files that are damaged.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {name!r} cannot be loaded{near_name(name)}: {reason} ({ACCEPTED})") from error
    files = CheckpointFiles.of(directory)
    weights = cached_digest(files)
    fingerprint = "" if weights is None else model_fingerprint(examined.model, weights=weights)
    said = (
        f"is {type(examined.model).__name__} in {directory}; its weights take {format_bytes(examined.need)} in {dtype}"
    )
    loaded = LoadedModel(name, examined.model, tokenizer, fingerprint, tokenizer_fingerprint(tokenizer), files)
    return ModelSurvey(said, loaded)


def _cached_hub_directory(source: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        return Path(str(cached_file(source, "config.json", local_files_only=True))).parent
    except (OSError, ValueError):
        return None


def _how_to_get(name: str) -> str:
    """What a start does for a model that is not here. Raises :class:`ModelError` where it can do nothing."""
    built_in = BUILT_IN.get(name)
    if built_in is not None:
        return f"is not on this machine; the first start downloads {built_in.megabytes} MB and converts them"
    if name.lower().endswith(".gguf") or Path(name).expanduser().is_dir():
        return "is a GGUF file; the first start converts it"
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"model {name!r} is not on this machine, and HF_HUB_OFFLINE is set{near_name(name)} ({ACCEPTED})"
        )
    if "/" not in name and (near := near_name(name)):
        raise ModelError(f"model {name!r} is not on this machine, and is no built-in one{near} ({ACCEPTED})")
    return f"is not on this machine; the first start asks the Hugging Face hub for it{near_name(name)}"
