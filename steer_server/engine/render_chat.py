"""Run as a process of its own: renders conversations with one chat template, a line of JSON in, a line of JSON out.

A template is a program of the model's author, fed by whoever asks. It gets a share of time and memory here, and a
process that has used up its time is ended by the system; so nothing but Jinja is imported, and nothing of the server.

The first line has ``template``, ``variables``, ``max_characters``, ``max_memory`` in bytes and ``max_seconds`` of
computing; every other is a list of messages. Answers have ``text`` or ``problem``.
"""

import json
import math
import resource
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
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


def render(template: Template, variables: dict[str, Any], messages: list[Any], max_characters: int) -> dict[str, Any]:
    """The answer for one conversation."""
    pieces, size = [], 0
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **variables}
    try:
        for piece in template.generate(**given):
            size += len(piece)
            if size > max_characters:
                return {"problem": f"makes more than {max_characters} characters of it"}
            pieces.append(piece)
    except MemoryError:
        return {"problem": "needs more memory than it may have"}
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return {"problem": f"refuses it: {str(error)[:500] or type(error).__name__}"}
    return {"text": "".join(pieces)}


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """One for each line after the first."""
    setup = json.loads(next(lines))
    resource.setrlimit(resource.RLIMIT_AS, (setup["max_memory"], setup["max_memory"]))
    template, problem = None, ""
    try:
        template = environment().from_string(setup["template"])
    except Exception as error:  # noqa: BLE001 - a broken template is no broken process
        problem = f"cannot be read: {str(error)[:500]}"
    for line in lines:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # The system counts whole seconds, and ends this process when they are over.
        end = math.ceil(used.ru_utime + used.ru_stime) + setup["max_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        if template is None:
            yield {"problem": problem}
        else:
            yield render(template, setup["variables"], json.loads(line), setup["max_characters"])


if __name__ == "__main__":
    for answer in answers(iter(sys.stdin)):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
