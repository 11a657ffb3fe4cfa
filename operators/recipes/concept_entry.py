"""One operator to be built, as given on a command line or in a file of concepts."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeGuard, get_args

from operators.builder.concept import check_text
from operators.core.apply import Setting
from operators.core.errors import BuildError
from operators.core.header import MAX_TEXTS, MAX_WORDS, Anchor, FirstToken, Profile, Rule
from operators.core.positions import Positions
from operators.core.store import check_name
from operators.core.vector_source import MAX_WORD

_MAX_SHOWN = 60
"""Characters of a value in an error message."""


@dataclass(frozen=True)
class ConceptEntry:
    """What to build. None means not given: the build uses its default.

    Filled by :mod:`operators.recipes.concept_file` and the ``build`` command, from values of :func:`validate_value`.
    """

    name: str
    texts: tuple[str, ...]
    words: tuple[str, ...] | None = None
    profile: Profile | None = None
    layer: int | None = None
    rank: int | Literal["full"] | None = None
    tolerance: float | None = None
    strength: float | None = None
    rule: Rule | None = None
    blend: float | None = None
    positions: Positions | None = None
    anchor: Anchor | None = None
    first_token: FirstToken | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.tolerance is not None:
            raise BuildError(f"rank {self.rank} and tolerance {self.tolerance:g} were both given; one is accepted")


def validate_value(key: str, value: object) -> Any:
    """The value of a key, converted to the type that an entry has for it, after every check that needs no model.

    Beside the fields of :class:`ConceptEntry`, ``text`` (one text) and ``layers`` (several layers) are keys.

    Raises:
        OperatorError: the value is not accepted; a subclass by key. Says what the value is and what is accepted.
    """
    return _VALIDATORS[key](value)


def suggest(word: str, known: tuple[str, ...]) -> str:
    """``"; did you mean 'strength'?"`` where a known word is similar, else an empty text."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def format_value(value: object) -> str:
    """A value of the user for an error message, cut after 60 characters."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    try:
        text = repr(value) if isinstance(value, str | list) else str(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a very large number"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _invalid(key: str, value: object, accepted: str, suggestion: str = "") -> BuildError:
    return BuildError(f"{key} is {format_value(value)}; {accepted} accepted{suggestion}")


def _validate_name(value: object) -> str:
    if not isinstance(value, str):
        raise _invalid("name", value, "a text is")
    return check_name(value)


def _validate_text(value: object) -> tuple[str, ...]:
    if not isinstance(value, str):
        raise _invalid("text", value, "a text is")
    return (check_text(value),)


def _validate_texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise _invalid("texts", value, "a list of texts is")
    if len(value) > MAX_TEXTS:
        raise BuildError(f"texts has {len(value)} texts; at most {MAX_TEXTS} are accepted")
    return tuple(check_text(text) for text in value)


def _validate_words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(word, str) and word.strip() for word in value):
        raise _invalid("words", value, "a list of words is")
    if len(value) > MAX_WORDS:
        raise BuildError(f"words has {len(value)} words; at most {MAX_WORDS} are accepted")
    longest = max(value, key=len)
    if len(longest) > MAX_WORD:
        raise BuildError(f"words has one of {len(longest)} characters; at most {MAX_WORD} are accepted")
    return tuple(value)


def _validate_layer(value: object, key: str = "layer") -> int:
    if not _is_integer(value) or value < 1:
        raise _invalid(key, value, "a whole number of at least 1 is")
    return value


def _validate_layers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise _invalid("layers", value, "a list of whole numbers is")
    layers = tuple(_validate_layer(layer, "layers: one") for layer in value)
    repeated = next((layer for layer in layers if layers.count(layer) > 1), None)
    if repeated is not None:
        raise BuildError(f"layers has {repeated} twice; each layer once is accepted")
    return layers


def _validate_rank(value: object) -> int | Literal["full"]:
    if value == "full":
        return "full"
    if not _is_integer(value) or value < 1:
        raise _invalid("rank", value, "a whole number of at least 1 or 'full' is")
    return value


def _validate_tolerance(value: object) -> float:
    if not _is_number(value) or not 0.0 < value < 1.0:
        raise _invalid("tolerance", value, "a number between 0 and 1 is")
    return float(value)


def _validate_strength(value: object) -> float:
    return Setting(strength=_validate_number("strength", value), rule="cumulative", blend=0.0).strength


def _validate_blend(value: object) -> float:
    return Setting(strength=0.0, rule="cumulative", blend=_validate_number("blend", value)).blend


def _validate_positions(value: object) -> Positions:
    if not isinstance(value, str):
        raise _invalid("positions", value, "a text such as 'first' is")
    return Positions.parse(value)


def _choice_validator(key: str, values: tuple[str, ...]) -> Callable[[object], str]:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in values:
            accepted = " and ".join(map(repr, values)) + " are"
            raise _invalid(key, value, accepted, suggest(value, values) if isinstance(value, str) else "")
        return value

    return check


def _validate_number(key: str, value: object) -> float:
    if not _is_number(value):
        raise _invalid(key, value, "a number is")
    try:
        return float(value)
    except OverflowError:
        raise _invalid(key, value, "a number that a float can hold is") from None


def _is_integer(value: object) -> TypeGuard[int]:
    # bool is a subclass of int.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, float) or _is_integer(value)


_VALIDATORS: Mapping[str, Callable[[object], Any]] = MappingProxyType(
    {
        "name": _validate_name,
        "text": _validate_text,
        "texts": _validate_texts,
        "words": _validate_words,
        "profile": _choice_validator("profile", get_args(Profile)),
        "layer": _validate_layer,
        "layers": _validate_layers,
        "rank": _validate_rank,
        "tolerance": _validate_tolerance,
        "strength": _validate_strength,
        "rule": _choice_validator("rule", get_args(Rule)),
        "blend": _validate_blend,
        "positions": _validate_positions,
        "anchor": _choice_validator("anchor", get_args(Anchor)),
        "first_token": _choice_validator("first_token", get_args(FirstToken)),
    }
)

KEYS = tuple(_VALIDATORS)
