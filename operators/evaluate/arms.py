"""The arms of an evaluation: what each form makes of each concept, and the plain texts that they are held against."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from operators.core.progress import Progress, silent
from operators.evaluate.concepts import EvalConcept
from operators.evaluate.directions import Push
from operators.evaluate.form import IMPORTED, PREFIX, Form
from operators.evaluate.material import Material
from operators.evaluate.protocol import digest

PLAIN = "plain"
_NO_FORM = digest("")
_AWAY_BAND = 2


@dataclass(frozen=True, eq=False)
class Arm:
    """One push of one form, for one concept or (``subject`` None) for all. Without a push, the plain model.

    ``prefixed``: the texts continue the concept's first text and the prompt; then ``scored_bare`` says that the plain
    model that scores them is given the prompt alone. ``digest``: of the source of the form.
    """

    form: str
    digest: str
    variant: int
    subject: EvalConcept | None
    push: Push | None
    prefixed: bool = False
    scored_bare: bool = False

    @property
    def label(self) -> str:
        """For messages."""
        return self.form if self.subject is None else f"{self.form} of {self.subject.name}"


def steering_arms(
    forms: Sequence[Form], concepts: Sequence[EvalConcept], material: Material, progress: Progress = silent
) -> list[Arm]:
    """The arms with a push, in the order of the forms.

    Raises:
        OperatorError: a form cannot be made of a concept.
    """
    steering = [form for form in forms if form.name != PREFIX]
    total = sum(1 if form.shared else len(concepts) for form in steering)
    arms: list[Arm] = []
    done = 0
    for form in steering:
        for concept in concepts[:1] if form.shared else concepts:
            subject = None if form.shared else concept
            pushes = form.make(material, concept)
            source = form_digest(form)
            if form.name == IMPORTED and pushes:
                source = f"{source}/{vector_digest(material, concept)}"
            arms += [Arm(form.name, source, variant, subject, push) for variant, push in enumerate(pushes)]
            done += 1
            progress("forms made", done, total)
    return arms


def plain_arms(forms: Sequence[Form], concepts: Sequence[EvalConcept], *, away: bool) -> list[Arm]:
    """The plain texts: of the prompts, and those of the form that writes the concept in front of them.

    ``away``: of prompts with the concept in front, which the plain model then goes on about.
    """
    if away:
        return [Arm(PLAIN, _NO_FORM, 0, concept, None, prefixed=True) for concept in concepts]
    arms = [Arm(PLAIN, _NO_FORM, 0, None, None)]
    for form in forms:
        if form.name == PREFIX:
            arms += [
                Arm(PREFIX, form_digest(form), 0, concept, None, prefixed=True, scored_bare=True)
                for concept in concepts
            ]
    return arms


def per_concept(arms: Sequence[Arm], concepts: Sequence[EvalConcept]) -> list[Arm]:
    """The same with an arm for each concept in place of one that all share; of a band, the first two."""
    found: list[Arm] = []
    for arm in arms:
        if arm.subject is not None:
            found.append(arm)
        elif arm.variant < _AWAY_BAND:
            found += [replace(arm, subject=concept) for concept in concepts]
    return found


def vector_digest(material: Material, concept: EvalConcept) -> str:
    """Of the file of a concept's vector; empty where it has none."""
    found = material.imported(concept.name)
    return "" if found is None else digest(found[1])


def form_digest(form: Form) -> str:
    """Of the file that the form is written in: rows of an earlier version of it are not its rows."""
    return digest(inspect.getsource(sys.modules[form.make.__module__]))


def prefixed_text(concept: EvalConcept, prompt: str) -> str:
    """The concept's first text as a sentence, and the prompt."""
    return f"{concept.texts[0].rstrip('.')}. {prompt}"
