"""Texts about nothing in particular, against which what a concept adds is measured."""

from __future__ import annotations

from importlib import resources


def neutral_texts() -> tuple[str, ...]:
    """The sentences that ship with the package."""
    text = (resources.files("operators") / "data" / "neutral_texts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))
