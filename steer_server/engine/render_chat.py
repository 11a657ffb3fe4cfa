"""Run as a process of its own: renders conversations with one chat template.

A template is a program of the model's author, fed by whoever asks. It gets a share of time and memory here, and a
process that has used up its time is ended by the system; so nothing but Jinja is imported, and nothing of the server.

The first line of JSON has ``template``, ``variables``, ``max_characters``, ``max_memory`` in bytes and ``max_seconds``
of computing; every other has ``messages``, ``options`` and ``mark``, which is empty where no turn is continued. A
message has a ``role`` and the ``size`` in bytes of its text: all texts follow the line, one behind another. The answer
is a line with ``size`` and so many bytes of text behind it; or with ``problem``, and ``part`` where one part of the
conversation is what is wrong: its path. No text is in the JSON: nothing else runs in the server while it makes or reads
JSON of a long one.
"""

import json
import math
import os
import re
import resource
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any, BinaryIO

from jinja2 import Environment, Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """``{% generation %}`` marks what an assistant said, for training; here it is text like any other."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def environment() -> Environment:
    """What templates find in transformers."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def render(template: Template, given: dict[str, Any], mark: str, max_characters: int) -> dict[str, Any]:
    """The answer for one conversation."""
    pieces, size = [], 0
    try:
        for piece in template.generate(**given):
            size += len(piece)
            if size > max_characters:
                return {"problem": f"makes more than {max_characters} characters of it"}
            pieces.append(piece)
        text = "".join(pieces)
        text.encode()
    except MemoryError:
        return {"problem": "needs more memory than it may have"}
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return {"problem": f"refuses it: {str(error)[:500] or type(error).__name__}"}
    if not mark:
        return {"text": text}
    if text.count(mark) != 1:
        return {"problem": "does not show the last turn as it is, so that it cannot be continued"}
    return {"text": text[: text.index(mark)]}


def left_out(template: Template, given: dict[str, Any], max_characters: int) -> dict[str, Any] | None:
    """The answer that refuses the first turn whose end is in no text that the template makes; None where all are.

    Each turn gets a number behind it, which nobody can have written and a template has no reason to change.
    """
    turns = given["messages"]
    numbers = {
        place: f"{int.from_bytes(os.urandom(16)):039}" for place, turn in enumerate(turns) if turn["content"].strip()
    }
    marked = [turn | {"content": turn["content"] + numbers.get(place, "")} for place, turn in enumerate(turns)]
    # Twice the room: a template may show a turn, and so its number, several times.
    rendered = render(template, given | {"messages": marked}, "", 2 * max_characters)
    if "problem" in rendered:
        # It would be taken on trust otherwise that the model reads every turn.
        how = "shows it, but with digits behind each turn, to see that all are read"
        return {"problem": f"{how}, {rendered['problem']}"}
    # Not the whole of a long text once for each turn.
    runs = re.findall("[0-9]{39,}", rendered["text"])
    alone, joined = set(runs), " ".join(runs)
    lost = next((place for place, number in numbers.items() if number not in alone and number not in joined), None)
    if lost is None:
        return None
    what = f"is left out by the chat template, wholly or its end (its role is {turns[lost]['role']!r})"
    return {"part": f"messages[{lost}]", "problem": f"{what}: the model would not read it"}


def answer(template: Template, used: set[str], setup: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """To one line: what is wrong with its options, or what the template makes of its messages."""
    messages, options, mark = asked["messages"], asked["options"], asked["mark"]
    own = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": not mark}
    own |= setup["variables"]
    accepted = sorted(used.difference(own))
    for index, name in enumerate(options):
        if name not in accepted:
            which = f"accepted: {', '.join(accepted)}" if accepted else "it has none"
            part, problem = f"template_options[{index}].name", f"is {name!r}, which is no option of this chat template"
            return {"part": part, "problem": f"{problem}; {which}"}
    if mark:
        messages[-1]["content"] += mark
    given = options | own
    rendered = render(template, given, mark, setup["max_characters"])
    if "problem" in rendered:
        return rendered
    return left_out(template, given, setup["max_characters"]) or rendered


def read(source: BinaryIO) -> Iterator[dict[str, Any]]:
    """Every conversation, with the texts of its turns."""
    for line in iter(source.readline, b""):
        asked = json.loads(line)
        for turn in asked["messages"]:
            turn["content"] = source.read(turn.pop("size")).decode()
        yield asked


def answers(source: BinaryIO) -> Iterator[dict[str, Any]]:
    """One for each conversation."""
    setup = json.loads(source.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["max_memory"], setup["max_memory"]))
    template, used, problem = None, set[str](), ""
    try:
        template = environment().from_string(setup["template"])
        used = meta.find_undeclared_variables(environment().parse(setup["template"]))
    except Exception as error:  # noqa: BLE001 - a broken template is no broken process
        problem = f"cannot be read: {str(error)[:500]}"
    for asked in read(source):
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # The system counts whole seconds, and ends this process when they are over.
        end = math.ceil(usage.ru_utime + usage.ru_stime) + setup["max_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        yield {"problem": problem} if template is None else answer(template, used, setup, asked)


def write(said: dict[str, Any], to: BinaryIO) -> None:
    """One answer."""
    text = said.pop("text", "").encode()
    to.write(json.dumps(said | {"size": len(text)}).encode() + b"\n")
    to.write(text)
    to.flush()


if __name__ == "__main__":
    for each in answers(sys.stdin.buffer):
        write(each, sys.stdout.buffer)
