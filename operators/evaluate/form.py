"""A form of steering: a name, one line about it, and what it makes of a concept. One small file each, in ``forms``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from operators.core.errors import TrialError
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push
from operators.evaluate.material import Material

CONTRAST = "contrast-anchor"
"""The form that paired differences are taken to."""
IMPORTED = "imported"
"""The form of vectors from files."""
PREFIX = "prompt-prefix"
"""The form that only writes the concept in front of the prompt."""


@dataclass(frozen=True)
class Form:
    """One way to steer, and a row of the table.

    ``make`` gives the pushes for a concept: one, or several that are shown as a band; none where the form has nothing
    for that concept. ``shared``: they are the same for every concept, and made once. ``quick``: part of a quick run.
    """

    name: str
    about: str
    make: Callable[[Material, EvalConcept], tuple[Push, ...]]
    shared: bool = False
    quick: bool = False


def all_forms() -> dict[str, Form]:
    """Every form by its name, in the order of the files' names: each file of the folder has a tuple ``FORMS``."""
    package = importlib.import_module("operators.evaluate.forms")
    found: dict[str, Form] = {}
    for file in sorted(pkgutil.iter_modules(package.__path__), key=lambda file: file.name):
        for form in importlib.import_module(f"{package.__name__}.{file.name}").FORMS:
            if form.name in found:
                raise TrialError(f"form {form.name!r} is defined twice; a name of its own is needed")
            found[form.name] = form
    return found


def choose_forms(names: Sequence[str] | None, *, quick: bool = False) -> tuple[Form, ...]:
    """The forms of these names, or all; the one that others are compared with comes first, and is never left out.

    Raises:
        TrialError: there is no form of that name; lists those that there are.
    """
    there = all_forms()
    if names is None:
        chosen = [form for form in there.values() if form.quick or not quick]
    else:
        unknown = next((name for name in names if name not in there), None)
        if unknown is not None:
            raise TrialError(f"form {unknown!r} does not exist; there are: {', '.join(there)}")
        chosen = [there[name] for name in dict.fromkeys(names)]
    rest = [form for form in chosen if form.name != CONTRAST]
    return (there[CONTRAST], *rest)
