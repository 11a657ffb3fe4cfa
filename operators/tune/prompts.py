"""Files of prompts: one per line; blank lines and those that begin with # are not prompts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from operators.core.errors import TrialError


def calibration_prompts() -> tuple[str, ...]:
    """Neutral openings that settings are tried on."""
    return _shipped("prompts_calibration.txt")


def neutral_prompts() -> tuple[str, ...]:
    """Neutral openings, none of them a calibration prompt, that operators are measured on."""
    return _shipped("prompts_neutral.txt")


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file. Raises :class:`TrialError` where it cannot be read or holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrialError(f"prompts {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrialError(f"prompts {path}: not UTF-8 text (at byte {error.start})") from error
    found = _lines(text)
    if not found:
        raise TrialError(f"prompts {path}: there are none; one per line is accepted")
    return found


def _shipped(name: str) -> tuple[str, ...]:
    return _lines((resources.files("operators") / "data" / name).read_text(encoding="utf-8"))


def _lines(text: str) -> tuple[str, ...]:
    stripped = (line.strip() for line in text.splitlines())
    return tuple(line for line in stripped if line and not line.startswith("#"))
