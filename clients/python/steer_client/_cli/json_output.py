"""Results as strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import steer_client

Json = dict[str, Any]


def print_json(value: Json) -> None:
    """Prints one object on stdout. What JSON cannot express (NaN, infinity) is null."""
    # Characters beyond ASCII are escaped only where stdout cannot encode them.
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(_plain(value), allow_nan=False, ensure_ascii=escaped, indent=2))


def fields(result: Any) -> Json:
    """Every field of a dataclass by its name."""
    return {each.name: getattr(result, each.name) for each in dataclasses.fields(result)}


def generation(result: steer_client.Generation, *, logprobs: bool) -> Json:
    """Every field by its name, `logprobs` only when they were requested."""
    return {name: value for name, value in fields(result).items() if logprobs or name != "logprobs"}


def comparison(result: steer_client.ABResult, steered: str, *, logprobs: bool) -> Json:
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
