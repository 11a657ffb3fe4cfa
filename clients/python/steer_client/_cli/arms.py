"""Arms as the command line names them: `NAME: OPERATOR OPERATOR word(WORD, WORD*WEIGHT)=λ`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import steer_client
from steer_client._defaults import NORMAL
from steer_client._requests import LENS

# A setting may have a colon too (ocean=0.4:first), but no space behind it.
_ARM = re.compile(r"\s*(?P<name>\S.*?)\s*:\s+(?P<operators>\S.*)", re.DOTALL)
# The words of a lens may have spaces between them, so their brackets hold them together.
_PART = re.compile(r"word\((?P<words>[^()]*)\)(?P<setting>\S*)|(?P<operator>\S+)")


def read_arms(
    texts: Sequence[str], *, rule: steer_client.Rule | None = None, kl: float | None = None, lens: str = LENS
) -> dict[str, tuple[steer_client.OperatorUse, ...]]:
    """The operators of each arm by its name; a part in `word(...)` is what `Words.parse_words` reads.

    Raises ValueError, naming the text and the accepted form, for anything else and for a name that comes twice.
    """
    arms: dict[str, tuple[steer_client.OperatorUse, ...]] = {}
    for text in texts:
        found = _ARM.fullmatch(text)
        if found is None:
            raise ValueError(
                f'cannot read the arm {text!r}: write NAME: OPERATOR ..., for example "mild: ocean=0.2", '
                '"both: ocean=0.4@0.5:first tea=0.2" or "cup: word(coffee, storm*-0.5)=0.12"'
            )
        name = found["name"]
        if name == NORMAL:
            raise ValueError(f"cannot read the arm {text!r}: the plain text's arm is named {NORMAL!r}")
        if name in arms:
            raise ValueError(f"two arms are named {name!r}: give each a name of its own")
        arms[name] = tuple(_uses(found["operators"], rule=rule, kl=kl, lens=lens))
    return arms


def _uses(
    text: str, *, rule: steer_client.Rule | None, kl: float | None, lens: str
) -> Iterator[steer_client.OperatorUse]:
    for part in _PART.finditer(text):
        if part["operator"] is None:
            yield steer_client.Words.parse_words(part["words"] + part["setting"], kl=kl, lens=lens)
        else:
            yield steer_client.OperatorUse.parse(part["operator"], rule=rule, kl=kl)


def concept_words(uses: Iterable[steer_client.OperatorUse]) -> tuple[str, ...]:
    """What a text is steered towards, each once: the words of a lens that it pushes towards, or an operator's name."""
    words = (word for use in uses for word in _words_of(use))
    return tuple(dict.fromkeys(words))


def _words_of(use: steer_client.OperatorUse) -> tuple[str, ...]:
    return tuple(each.text for each in use.words if each.weight > 0) if use.words else (use.name,)
