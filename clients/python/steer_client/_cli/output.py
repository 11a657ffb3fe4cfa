"""What scripts read: strict JSON, and one-line errors with their exit status."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import typer

from steer_client._errors import InvalidRequestError, ServerBusyError, SteerError
from steer_client._results import ABResult, Generation

Json = dict[str, Any]


def print_json(value: Json) -> None:
    """One object on stdout. What JSON cannot say (NaN, infinity) is null."""
    # Characters are spelled out only where stdout could not carry them.
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(_plain(value), allow_nan=False, ensure_ascii=escaped, indent=2))


def fields(result: Any) -> Json:
    """Every field by its name."""
    return {each.name: getattr(result, each.name) for each in dataclasses.fields(result)}


def generation(result: Generation, *, logprobs: bool) -> Json:
    """Every field by its name; `logprobs` only when they were asked for."""
    return {name: value for name, value in fields(result).items() if logprobs or name != "logprobs"}


def comparison(result: ABResult, steered: str, *, logprobs: bool) -> Json:
    """One steered arm beside the normal one."""
    arm = result.steered[steered]
    perplexity = {"normal": arm.normal_perplexity, "steered": arm.steered_perplexity}
    return {
        "normal": generation(result.normal, logprobs=logprobs),
        "steered": generation(arm.generation, logprobs=logprobs),
        "first_divergence": arm.first_divergence,
        "kl": arm.kl,
        "perplexity": None if all(value is None for value in perplexity.values()) else perplexity,
    }


@contextlib.contextmanager
def reported(*, as_json: bool) -> Iterator[None]:
    """Turns a failed request into a line on stderr and exit status 1, and Ctrl-C into 130."""
    try:
        yield
    except SteerError as error:
        if as_json:
            print_json({"error": _error(error)})
        print(f"steer: {' '.join(error.message.split())}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _error(error: SteerError) -> Json:
    shown: Json = {
        "code": error.code.name if error.code else None,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
    }
    if isinstance(error, InvalidRequestError):
        shown["field"] = error.field
    if isinstance(error, ServerBusyError):
        shown["retry_after"] = error.retry_after
    return shown


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return _plain(fields(value))
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
