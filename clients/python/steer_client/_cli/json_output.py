"""Results as strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import steer_client
from steer_client._defaults import NORMAL

Json = dict[str, Any]


def print_json(value: Json) -> None:
    """Prints one object on stdout. What JSON cannot express (NaN, infinity) is null."""
    print(json.dumps(_plain(value), allow_nan=False, ensure_ascii=_is_escaped(), indent=2))


def fields(result: Any) -> Json:
    """Every field of a dataclass by its name."""
    return {each.name: getattr(result, each.name) for each in dataclasses.fields(result)}


def generation(result: steer_client.Generation, *, logprobs: bool) -> Json:
    """Every field by its name, `logprobs` only when they were requested."""
    return {name: value for name, value in fields(result).items() if logprobs or name != "logprobs"}


def print_comparison(result: steer_client.ABResult, *, logprobs: bool, lines: bool, one: bool) -> None:
    """One object for each text, on lines of their own or under "texts"; `one`: one steered text beside the plain."""
    if lines:
        for text in texts(result, logprobs=logprobs):
            print_json_line(text)
    elif one:
        print_json(comparison(result, logprobs=logprobs))
    else:
        print_json({"texts": list(texts(result, logprobs=logprobs))})


def comparison(result: steer_client.ABResult, *, logprobs: bool) -> Json:
    """The one steered arm beside the normal one."""
    [arm] = result.steered.values()
    perplexity = {"normal": arm.normal_perplexity, "steered": arm.steered_perplexity}
    return {
        "normal": generation(result.normal, logprobs=logprobs),
        "steered": generation(arm.generation, logprobs=logprobs),
        "first_divergence": arm.first_divergence,
        "kl": arm.kl,
        "perplexity": None if all(value is None for value in perplexity.values()) else perplexity,
    }


def print_json_line(value: Json) -> None:
    """Prints one object on one line of stdout."""
    print(json.dumps(_plain(value), allow_nan=False, ensure_ascii=_is_escaped()), flush=True)


def texts(result: steer_client.ABResult, *, logprobs: bool) -> Iterator[Json]:
    """Every text of a comparison as one object: the plain one first, sample by sample, with what its arm measured."""
    for sample in result.samples:
        yield {"arm": NORMAL, **generation(sample.normal, logprobs=logprobs)}
        for name, arm in sample.steered.items():
            yield {
                "arm": name,
                **generation(arm.generation, logprobs=logprobs),
                "first_divergence": arm.first_divergence,
                "kl": arm.kl,
                "normal_perplexity": arm.normal_perplexity,
                "steered_perplexity": arm.steered_perplexity,
            }


def _is_escaped() -> bool:
    """Characters beyond ASCII are escaped only where stdout cannot encode them."""
    return not (sys.stdout.encoding or "").lower().startswith("utf")


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
