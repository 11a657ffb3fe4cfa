"""Run as a process of its own: renders conversations with one chat template, a line of JSON in, a line of JSON out.

A template is a program of the model's author, fed by whoever asks. It gets a share of time and memory here, and a
process that has used up its time is ended by the system; so nothing but Jinja is imported, and nothing of the server.

The first line has ``template``, ``variables``, ``max_characters``, ``max_memory`` in bytes and ``max_seconds`` of
computing; every other has ``messages``, ``options`` and ``mark``, which is empty where no turn is continued. Answers
have ``text`` or ``problem``, and with it ``option`` where that is what is wrong: its index.
"""

import json
import math
import resource
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

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
    except MemoryError:
        return {"problem": "needs more memory than it may have"}
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return {"problem": f"refuses it: {str(error)[:500] or type(error).__name__}"}
    text = "".join(pieces)
    if not mark:
        return {"text": text}
    if text.count(mark) != 1:
        return {"problem": "does not show the last turn as it is, so that it cannot be continued"}
    return {"text": text[: text.index(mark)]}


def answer(template: Template, used: set[str], setup: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """To one line: what is wrong with its options, or what the template makes of its messages."""
    messages, options, mark = asked["messages"], asked["options"], asked["mark"]
    own = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": not mark}
    own |= setup["variables"]
    accepted = sorted(used.difference(own))
    for index, name in enumerate(options):
        if name not in accepted:
            which = f"accepted: {', '.join(accepted)}" if accepted else "it has none"
            return {"option": index, "problem": f"is {name!r}, which is no option of this chat template; {which}"}
    if mark:
        messages[-1]["content"] += mark
    return render(template, options | own, mark, setup["max_characters"])


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """One for each line after the first."""
    setup = json.loads(next(lines))
    resource.setrlimit(resource.RLIMIT_AS, (setup["max_memory"], setup["max_memory"]))
    template, used, problem = None, set[str](), ""
    try:
        template = environment().from_string(setup["template"])
        used = meta.find_undeclared_variables(environment().parse(setup["template"]))
    except Exception as error:  # noqa: BLE001 - a broken template is no broken process
        problem = f"cannot be read: {str(error)[:500]}"
    for line in lines:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        # The system counts whole seconds, and ends this process when they are over.
        end = math.ceil(usage.ru_utime + usage.ru_stime) + setup["max_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
        if template is None:
            yield {"problem": problem}
        else:
            yield answer(template, used, setup, json.loads(line))


if __name__ == "__main__":
    for each in answers(iter(sys.stdin)):
        sys.stdout.write(json.dumps(each) + "\n")
        sys.stdout.flush()
