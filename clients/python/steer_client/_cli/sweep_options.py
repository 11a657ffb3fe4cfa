"""What `steer sweep` reads from its command line: operators with several strengths."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import steer_client
from steer_client._numbers import read_decimal
from steer_client._requests import LENS

_NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
# Strengths end where a choice such as ",anchor=concept" begins, which is no number.
_OPERATOR = re.compile(rf"(?P<name>[^=:]+)=(?P<strengths>{_NUMBER}(?:,{_NUMBER})*)(?P<rest>(?:[@:,].*)?)")
_WORDS = re.compile(rf"(?P<words>[^=]+)=(?P<strengths>{_NUMBER}(?:,{_NUMBER})*)(?P<rest>(?::.*)?)")

if TYPE_CHECKING:
    # Evaluated, it would import gRPC, and the commands' help does without.
    Strengths: TypeAlias = dict[str | steer_client.OperatorUse, list[float]]


def read_operator(
    text: str, *, rule: steer_client.Rule | None = None
) -> tuple[str | steer_client.OperatorUse, list[float]]:
    """Reads `NAME=λ,λ,λ` and behind it what `OperatorUse.parse` reads.

    Raises ValueError, naming the text, a strength that is no number and the accepted form, for anything else.
    """
    found = _OPERATOR.fullmatch(text)
    where = found["rest"].partition(",")[0].partition(":") if found else ("", "", "")
    if where[1]:
        # It says of positions what is wrong with them.
        steer_client.Positions.parse(where[2])
    try:
        if found is None:
            raise ValueError(text)
        use = steer_client.OperatorUse.parse(f"{found['name']}=1{found['rest']}", rule=rule)
    except ValueError:
        raise ValueError(
            f"cannot read {text!r}: {_no_strength(text)}write NAME=λ,λ,λ, for example ocean=0.2,0.4, and behind it @β "
            "and :POSITIONS, for example ocean=0.2,0.4@0.5:first, then ,anchor=contrast|concept, "
            ",first_token=operator|anchor and ,digest=sha256:DIGITS"
        ) from None
    # As a text it is called in tables what it is called here.
    is_text = use.rule is None and use.blend is None
    key = found["name"] + found["rest"] if is_text else replace(use, strength=None)
    return key, _numbers(found["strengths"])


def read_words_use(text: str, *, lens: str = LENS) -> tuple[steer_client.OperatorUse, list[float]]:
    """Reads `WORD=λ,λ` or `WORD, WORD*WEIGHT=λ,λ`, and `:POSITIONS` behind it. Raises ValueError for anything else."""
    found = _WORDS.fullmatch(text)
    if found is None:
        raise ValueError(
            f"cannot read {text!r}: {_no_strength(text)}write WORD=λ,λ, for example coffee=0.05,0.1, or of several "
            'words "ocean, storm*-0.5=0.1,0.2"; and :POSITIONS behind it'
        )
    return steer_client.Words.parse_words(found["words"] + found["rest"], lens=lens), _numbers(found["strengths"])


def _no_strength(text: str) -> str:
    """The first strength that is no number, to begin a hint; empty where all are, or where there is none."""
    _, has_strengths, strengths = text.partition("=")
    for each in strengths.split(",") if has_strengths else ():
        if "=" in each:
            break
        strength = re.split("[@:]", each, maxsplit=1)[0]
        if not re.fullmatch(_NUMBER, strength):
            return f"the strength {strength!r} is no number; "
    return ""


def _numbers(text: str) -> list[float]:
    return [read_decimal(each) for each in text.split(",")]
