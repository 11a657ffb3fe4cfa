"""De-quantising a GGUF file, weights and tokenizer, to a directory of safetensors in float32."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from operators.core.capacity import format_bytes, free_memory
from operators.core.errors import ModelError

_LOG = logging.getLogger(__name__)
# What scales rotary positions, and transformers does not read from a GGUF file: without it, positions would be others.
_LOST_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LOST_SCALING = "rope.scaling.type"
_KEEPS_SCALING = "gpt-oss"
_FLOAT32 = 4
"""Bytes of a number."""

_LONG_WORD, _WORDS_TRIED = 6, 64
_CHECKED = "tokenizer_checked.txt"
"""Mark of a conversion whose tokenizer finds words: the version of transformers that it was checked with."""


def convert_gguf(gguf: Path, scratch: Path) -> Path:
    """Writes weights (float32) and tokenizer of a GGUF file into a directory inside ``scratch``, and returns it.

    Raises:
        ModelError: transformers cannot read the file, or not all of it; it takes more memory than there is; or
            ``scratch`` cannot be written to. Says which and why.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    _LOG.info("converting %s to safetensors (about a minute)", gguf.name)
    transformers_logging.disable_progress_bar()
    converted = scratch / "model"
    architecture = "unknown"
    try:
        settings = _read_settings(gguf)
        architecture = settings["general.architecture"]
        _check_complete(gguf, settings)
        _check_memory(gguf, settings["numbers"])
        with _progress_bar_on_terminals_only():
            model, loading_info = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype="float32",
                trust_remote_code=False,
                output_loading_info=True,
            )
        if missing := sorted(loading_info["missing_keys"]):
            raise ModelError(f"{gguf.name} lacks {len(missing)} weights of {type(model).__name__}: {missing[0]}, ...")
        _save(model, converted)
        _LOG.info("converting its tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, add_bos_token=adds_bos(settings))
        check_tokenizer(gguf.name, tokenizer)
        _save(tokenizer, converted)
        _mark_checked(converted)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError, struct.error) as error:
        raise ModelError(
            f"{gguf.name} cannot be converted; its architecture is {architecture!r}, and those that transformers "
            f"reads from GGUF are {', '.join(_readable_architectures())}. {_reason(error)}"
        ) from error
    return converted


def _save(model_or_tokenizer: Any, converted: Path) -> None:
    try:
        model_or_tokenizer.save_pretrained(converted)
    except Exception as error:  # on a full disk, safetensors and tokenizers raise errors of several types
        raise ModelError(f"{converted.parent.parent} cannot be written to: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of its message."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_memory(gguf: Path, numbers: int) -> None:
    need, have = _FLOAT32 * numbers, free_memory(torch.device("cpu"))
    if need > have:
        raise ModelError(
            f"{gguf.name} takes {format_bytes(need)} of memory where it is de-quantised, to float32; "
            f"{format_bytes(have)} may be used"
        )


def _read_settings(gguf: Path) -> dict[str, Any]:
    """The file's scalar settings, under "tensors" the names of its tensors, and how many numbers these have."""
    from gguf import GGUFReader, GGUFValueType

    reader = GGUFReader(gguf)
    scalars = {key: field for key, field in reader.fields.items() if GGUFValueType.ARRAY not in field.types}
    return {key: field.contents() for key, field in scalars.items()} | {
        "tensors": tuple(tensor.name for tensor in reader.tensors),
        "numbers": sum(int(tensor.n_elements) for tensor in reader.tensors),
    }


def _check_complete(gguf: Path, settings: dict[str, Any]) -> None:
    architecture = settings["general.architecture"]
    if settings.get("split.count", 1) > 1:
        raise ModelError(f"{gguf.name} is one of {settings['split.count']} parts of a model; merge them into one file")
    scaling = settings.get(f"{architecture}.{_LOST_SCALING}", "none")
    lost = [name for name in _LOST_TENSORS if name in settings["tensors"]]
    if scaling != "none" and architecture != _KEEPS_SCALING:
        lost.append(f"{architecture}.{_LOST_SCALING} = {scaling!r}")
    if lost:
        raise ModelError(
            f"{gguf.name} scales its rotary positions ({', '.join(lost)}), which transformers does not read from "
            "GGUF: it would be another model. Its safetensors checkpoint is accepted"
        )


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuses a tokenizer that does not find the long words of its own vocabulary, but spells them.

    transformers 5.17 loses the merges of Gemma's: every number of the model is right then, and every text wrong.
    """
    from transformers import __version__ as version

    tokens = (token.lstrip("▁Ġ") for token in sorted(tokenizer.get_vocab()))
    words = [token for token in tokens if len(token) >= _LONG_WORD and token.isascii() and token.isalpha()]
    words = words[:: max(1, len(words) // _WORDS_TRIED)]
    # Two: some tokenizers make a token of the space before a word.
    found = sum(len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) <= 2 for word in words)
    if 2 * found < len(words):
        raise ModelError(
            f"{name}: the tokenizer that transformers {version} makes of it finds {found} of {len(words)} words of its "
            "own vocabulary and spells the others; 5.19 is known to read Gemma's"
        )


def is_checked(converted: Path) -> bool:
    """Whether the tokenizer of a conversion finds words. Looked at once: conversions that passed are marked.

    Those of earlier versions are not, and transformers 5.17 lost the merges of some.
    """
    if (converted / _CHECKED).exists():
        return True
    from transformers import AutoTokenizer

    try:
        check_tokenizer(converted.name, AutoTokenizer.from_pretrained(converted))
    except (ModelError, OSError, ValueError):
        return False
    # A cache that cannot be written to is looked at every time.
    with suppress(OSError):
        _mark_checked(converted)
    return True


def _mark_checked(converted: Path) -> None:
    from transformers import __version__ as version

    (converted / _CHECKED).write_text(f"{version}\n", encoding="utf-8")


def adds_bos(settings: dict[str, Any]) -> bool:
    """Whether texts begin with BOS: as the file says, else as the format's default for its kind of tokenizer.

    transformers reads everything else about the tokenizer, and not this.
    """
    return bool(settings.get("tokenizer.ggml.add_bos_token", settings.get("tokenizer.ggml.model") == "llama"))


def _readable_architectures() -> list[str]:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})


@contextmanager
def _progress_bar_on_terminals_only() -> Iterator[None]:
    """Replaces transformers' progress bar, which has no setting: with ``disable=None`` it needs a terminal."""
    from transformers import modeling_gguf_pytorch_utils as reader

    original = reader.tqdm
    reader.tqdm = partial(original, disable=None)
    try:
        yield
    finally:
        reader.tqdm = original
