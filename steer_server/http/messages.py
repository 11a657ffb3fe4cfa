"""Messages of the contract as JSON, and back: protobuf's own mapping, under the names of the ``.proto`` files.

Reading is stricter than protobuf's: a field under both of its names, a list in place of a message and an unknown field
are refused, each with its path.
"""

from __future__ import annotations

import re
from functools import reduce
from typing import Any, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from steer_server.errors import InvalidRequestError
from steer_server.http.scalars import check_scalar, kind_of

_M = TypeVar("_M", bound=Message)
_FAILED = re.compile(r"Failed to parse (\w+) field: ")
_AT = re.compile(r" at \w+\.([\w.\[\]]+?)\.*$")
_OURS = "steering.v1"
_ROOT = "request"
_MAX_PROBLEM = 256
"""Characters."""
_LONG_TEXT = 64 << 10
"""Characters."""


def read_message(cls: type[_M], value: Any, path: str = "") -> _M:
    """The message that a JSON value is. ``path``: to it, for errors. Raises :class:`InvalidRequestError`."""
    _check_shape(cast("Descriptor", cls.DESCRIPTOR), value, path)
    long_texts: list[_LongText] = []
    value = _without_long_texts(cast("Descriptor", cls.DESCRIPTOR), value, (), long_texts)
    try:
        message = ParseDict(value, cls())
        for way, name, text in long_texts:
            setattr(reduce(_inside, way, message), name, text)
        return message
    except ParseError as error:
        text = str(error)
    except (TypeError, ValueError, AttributeError) as error:
        text = f"is no {cls.DESCRIPTOR.name}: {error}"
    at = _AT.search(text)
    inside = at[1] if at else ".".join(_FAILED.findall(text))
    problem = _AT.sub("", _FAILED.sub("", text)).rstrip(".")
    # With the value in it, which may be a text of any length.
    raise InvalidRequestError(_join(path, inside) or _ROOT, problem[:_MAX_PROBLEM])


def to_json(message: Message) -> dict[str, Any]:
    """A message as JSON has it: every field that is no alternative or optional one is there, empty or not."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _check_shape(message: Descriptor, value: Any, path: str) -> None:
    """Raises for what is no object, or has members that are no fields of the message."""
    if not isinstance(value, dict):
        raise InvalidRequestError(path or _ROOT, f"is {kind_of(value)}; an object is accepted")
    fields: dict[str, FieldDescriptor] = {}
    for name, member in value.items():
        field = message.fields_by_name.get(name) or message.fields_by_camelcase_name.get(name)
        if field is None:
            problem = (
                f"is no field of {message.name} in the contract of this server; what is asked for is never left out"
            )
            raise InvalidRequestError(_join(path, name[:256]), problem)
        place = _join(path, field.name)
        if field.name in fields:
            raise InvalidRequestError(place, "is there under both of its names; one is accepted")
        fields[field.name] = field
        if field.is_repeated and member is not None and not isinstance(member, list):
            raise InvalidRequestError(place, f"is {kind_of(member)}; a list is accepted")
        if member is None:
            continue
        check_scalar(field, member, place)
        if field.message_type is None or field.message_type.file.package != _OURS:
            continue
        if field.is_repeated:
            for index, each in enumerate(member):
                _check_shape(field.message_type, each, f"{place}[{index}]")
        else:
            _check_shape(field.message_type, member, place)


_LongText = tuple[tuple[str | int, ...], str, str]
"""The way to the message that it is of, the name of its field, and the text."""


def _without_long_texts(message: Descriptor, value: Any, way: tuple[str | int, ...], found: list[_LongText]) -> Any:
    """An object of the right shape with empty texts in place of long ones, which are ``found``.

    Protobuf's own mapping looks through each text for halves of surrogate pairs, and nothing else runs meanwhile: 0.4
    seconds for 16 MiB. Setting a field refuses them too, in a fortieth of that.
    """
    shortened = value
    for name, member in value.items():
        field = message.fields_by_name.get(name) or message.fields_by_camelcase_name[name]
        if isinstance(member, str) and len(member) > _LONG_TEXT and field.type == FieldDescriptor.TYPE_STRING:
            found.append((way, field.name, member))
            instead: Any = ""
        elif field.message_type is None or field.message_type.file.package != _OURS or not member:
            continue
        elif field.is_repeated:
            inside = (*way, field.name)
            instead = [
                _without_long_texts(field.message_type, each, (*inside, index), found)
                for index, each in enumerate(member)
            ]
        else:
            instead = _without_long_texts(field.message_type, member, (*way, field.name), found)
        # The object itself is its owner's.
        shortened = shortened if shortened is not value else dict(value)
        shortened[name] = instead
    return shortened


def _inside(message: Any, step: str | int) -> Any:
    return message[step] if isinstance(step, int) else getattr(message, step)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
