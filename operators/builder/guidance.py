"""What is accepted, but will hardly do what its user wants: said at the build, and not after minutes of trial."""

from __future__ import annotations

import re
from collections.abc import Iterable

from operators.builder.concept import Concept
from operators.core.scripts import SPACELESS

MIN_TOKENS = 3
"""Tokens, special ones left out, below which a text is too short to be a context."""
DEFAULT_MAX_DOSE = 1.0
"""A server's bound on |lambda|/2 where it was given no other (its option --max-dose)."""
BFLOAT16_RESOLUTION = 2.0**-7
"""Weaker pushes are rounded away where a model runs in bfloat16."""
_SPACELESS = re.compile(f"[{SPACELESS}]")


def text_warnings(texts: Iterable[Concept], special_ids: Iterable[int]) -> list[str]:
    """One line for each text that is one word, or has fewer than MIN_TOKENS tokens besides the special ones.

    An operator is read off the model's map at the text's last position, so what it does depends on the sentence that
    leads there; a word alone has none. In a script without spaces, tokens alone decide.
    """
    special = set(special_ids)
    found = []
    for text in texts:
        count = sum(token not in special for token in text.ids)
        is_word = len(text.text.split()) == 1 and not _SPACELESS.search(text.text)
        if is_word or count < MIN_TOKENS:
            what = "is one word" if is_word else f"has {count} token{'' if count == 1 else 's'}"
            found.append(
                f"text {text.text!r} {what}: an operator of so little context hardly steers; give a few sentences that "
                "end where the concept is expected next, each as a --text (docs/CONCEPTS.md)"
            )
    return found


def strength_warnings(strength: float) -> list[str]:
    """A line where the recommended strength does nothing, or some server of default settings would refuse it."""
    dose = abs(strength) / 2
    if strength == 0.0:
        return ["strength 0 leaves every text as it is: a request must give another to steer"]
    if abs(strength) < BFLOAT16_RESOLUTION:
        return [
            f"strength {strength:g} is less than hidden states in bfloat16 resolve ({BFLOAT16_RESOLUTION:.1g}); a "
            "server in bfloat16 refuses it"
        ]
    if dose <= DEFAULT_MAX_DOSE:
        return []
    return [
        f"strength {strength:g} pushes each hidden state by {dose:g} times its norm; a server refuses more than "
        f"{DEFAULT_MAX_DOSE:g} (strength {2 * DEFAULT_MAX_DOSE:g}) unless it is started with a higher --max-dose"
    ]
