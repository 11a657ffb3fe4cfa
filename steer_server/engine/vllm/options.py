"""Options that are passed on to vLLM: ``KEY=VALUE``, or a YAML file of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from operators.core.numbers import read_decimal
from steer_server.errors import StartupError

SERVER_OPTIONS = {
    "model": "--model",
    "tokenizer": "--model",
    "dtype": "--dtype",
    "device": "--device",
    "worker_cls": "nothing: the server has a worker of its own",
    "skip_tokenizer_init": "nothing: text is needed",
    "tokens_only": "nothing: text is needed",
    "seed": "the seed of a request",
}
"""Options of vLLM that this server sets itself, and what the user is to use instead."""

MODEL_OPTIONS = {
    "model_weights": "weights",
    "weight_transfer_config": "weights",
    "hf_config_path": "a configuration",
    "config_format": "a configuration",
    "hf_overrides": "a configuration",
    "model_class_overrides": "code",
    "trust_remote_code": "code",
    "code_revision": "code",
    "revision": "a version",
    "tokenizer_revision": "a tokenizer",
}
"""Options by which vLLM would serve another model than the one that operators were built for, and what they replace."""

LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "pt", "npcache")
"""Those that read the weights files of ``--model``; others of vLLM read other files, other processes or nothing."""


def read_engine_args(arguments: Iterable[str]) -> dict[str, Any]:
    """Options from ``KEY=VALUE`` arguments, the value in YAML, and from YAML files; later ones override earlier ones.

    Raises:
        StartupError: an argument that is neither, or a file that cannot be read.
    """
    options: dict[str, Any] = {}
    for item in arguments:
        key, equals, value = item.partition("=")
        try:
            if equals:
                options[key.strip().replace("-", "_")] = _value(value)
                continue
            content = yaml.safe_load(Path(item).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise StartupError(
                f"engine_args: {_named(item)} is neither KEY=VALUE nor a YAML file: {_why(error)}"
            ) from None
        if not isinstance(content, dict):
            raise StartupError(f"engine_args: {item} does not hold KEY: VALUE lines")
        options |= {str(key).replace("-", "_"): value for key, value in content.items()}
    return options


def _named(item: str) -> str:
    """An option without its value, which may be a secret."""
    name, sign, _ = item.replace(":", "=", 1).partition("=")
    return repr(name + "=…" if sign else item)


def _why(error: Exception) -> str:
    """Without the text that was read: YAML's own message repeats it."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        return f"{error.problem}{line}"
    return getattr(error, "strerror", None) or type(error).__name__


def _value(text: str) -> Any:
    """A value in YAML, but for what that takes for another number: 010 for 8, 1:30 for 90, 4_0 for 40."""
    value = yaml.safe_load(text)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            as_written = read_decimal(text)
        except ValueError:
            as_written = math.nan
        if as_written != value:
            raise yaml.MarkedYAMLError(problem="its value is no number in decimal digits")
    return value


def check_engine_args(options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises :class:`StartupError` for an option that vLLM does not have, or that the user may not set.

    Operators belong to a model's weights, configuration and tokenizer. Those are fingerprinted in the files of
    ``--model``, so vLLM must serve exactly these.

    Args:
        known: names of all options of vLLM.
    """
    names = set(known)
    for key, value in options.items():
        if key in SERVER_OPTIONS:
            raise StartupError(f"engine_args.{key} is set by this server; use {SERVER_OPTIONS[key]}")
        if key not in names:
            near = difflib.get_close_matches(key, names, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise StartupError(f"engine_args.{key} is not an option of this vLLM{hint}")
        if key in MODEL_OPTIONS:
            raise StartupError(
                f"engine_args.{key} is refused: it gives vLLM {MODEL_OPTIONS[key]} that operators were not built for; "
                "use --model with a directory that holds what is to be served"
            )
        if key == "load_format" and value not in LOAD_FORMATS:
            raise StartupError(
                f"engine_args.load_format {value!r} is refused: it may read other weights than those of --model; "
                f"accepted are {', '.join(LOAD_FORMATS)}"
            )
        if key == "additional_config" and not (value is None or isinstance(value, Mapping)):
            raise StartupError(f"engine_args.additional_config {value!r} does not hold KEY: VALUE pairs")
