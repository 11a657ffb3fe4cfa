"""Which operators a body asks for: under ``steering``, or behind the model's name (``model+ocean=0.4+tea=0.2@0.5``).

An operator is an ``OperatorUse`` of the contract, or a text as the command line has it:
``NAME=λ@β:POSITIONS,anchor=...,first_token=...,digest=...``, all but the name optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steering.v1 import steering_pb2 as sp

from operators.core.errors import SettingError
from operators.core.numbers import read_decimal
from operators.core.positions import Positions
from steer_server.errors import InvalidRequestError
from steer_server.http.messages import read_message
from steer_server.http.refused import RefusedError

_MAX_TEXT = 1024
"""Characters of one operator: more than the longest name and all that there is to say of it."""
_ENUMS = {"rule": sp.Rule, "anchor": sp.Anchor, "first_token": sp.FirstToken}
_FORM = (
    "NAME, NAME=λ or NAME=λ@β, such as ocean=0.4@0.5; behind it :POSITIONS, such as ocean=0.4:first; then "
    ",anchor=contrast|concept ,first_token=operator|anchor ,digest=sha256:DIGITS"
)


def operators_of(body: Any, model: str, served: str) -> tuple[list[sp.OperatorUse], str]:
    """The operators of a request, and the field that has them.

    Args:
        body: what the request has under ``steering``, if anything.
        model: the name that the request gives.
        served: that of the model being served.

    Raises:
        InvalidRequestError: an operator is not understood, or both places name some.
        RefusedError: there is no such model.
    """
    behind = _behind(model, served)
    if body is None:
        return [read_operator(text, "model") for text in behind], "model"
    if behind:
        raise InvalidRequestError("steering", "is given beside operators behind the model's name; one is accepted")
    field = "steering.operators"
    if not isinstance(body, dict) or body.keys() != {"operators"} or not isinstance(body["operators"], list):
        raise InvalidRequestError("steering", 'is not understood; {"operators": [...]} is accepted')
    return [_operator(each, f"{field}[{index}]") for index, each in enumerate(body["operators"])], field


def read_operator(text: str, field: str) -> sp.OperatorUse:
    """An operator that is written as a text. Raises :class:`InvalidRequestError`."""
    if len(text) > _MAX_TEXT:
        raise InvalidRequestError(field, f"has an operator of {len(text)} characters; at most {_MAX_TEXT} are accepted")
    head, *choices = text.split(",")
    setting, has_positions, positions = head.partition(":")
    name, has_strength, values = setting.partition("=")
    strength, has_blend, blend = values.partition("@")
    use = sp.OperatorUse(name=name)
    try:
        if not name or name != name.strip() or "@" in name:
            raise ValueError(name)
        if has_strength:
            use.strength = read_decimal(strength)
        if has_blend:
            use.blend = read_decimal(blend)
        for choice in choices:
            _choose(use, choice)
    except ValueError:
        raise InvalidRequestError(field, f"has the operator {text[:256]!r}; accepted: {_FORM}") from None
    if has_positions:
        use.positions.CopyFrom(_positions(positions, field))
    return use


def _behind(model: str, served: str) -> Sequence[str]:
    if model == served:
        return ()
    if not model.startswith(f"{served}+"):
        raise RefusedError(
            404,
            "model_not_found",
            f"there is no model {model[:256]!r}; this server has {served!r}, and operators behind it, as in "
            f"{served}+NAME=λ",
            param="model",
        )
    return model[len(served) + 1 :].split("+")


def _choose(use: sp.OperatorUse, choice: str) -> None:
    name, _, value = choice.partition("=")
    if not value or name not in ("anchor", "first_token", "digest") or name in {f.name for f, _ in use.ListFields()}:
        raise ValueError(choice)
    setattr(use, name, value if name == "digest" else _ENUMS[name].Value(_enum_name(name, value)))


def _operator(value: Any, field: str) -> sp.OperatorUse:
    if isinstance(value, str):
        return read_operator(value, field)
    positions = None
    if isinstance(value, dict):
        value = dict(value)
        for name in _ENUMS.keys() & value.keys():
            if isinstance(value[name], str):
                value[name] = _enum_name(name, value[name])
        if isinstance(value.get("positions"), str):
            positions = _positions(value.pop("positions"), f"{field}.positions")
        if isinstance(value.get("words"), list):
            value["words"] = [{"text": word} if isinstance(word, str) else word for word in value["words"]]
    use = read_message(sp.OperatorUse, value, field)
    if positions is not None:
        use.positions.CopyFrom(positions)
    return use


def _positions(text: str, field: str) -> sp.Positions:
    try:
        found = Positions.parse(text)
    except SettingError as error:
        raise InvalidRequestError(field, error.problem) from None
    part = sp.Positions.Part.Value(f"PART_{found.part.upper()}")
    return sp.Positions(part=part, start=found.start, end=found.end)


def _enum_name(field: str, value: str) -> str:
    """ "cumulative" is RULE_CUMULATIVE; a name of the contract stays."""
    prefix = f"{field.upper()}_"
    return value if value.startswith(prefix) else prefix + value.upper()
