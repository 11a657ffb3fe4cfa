"""Files of prompts: one per line; blank lines and lines that begin with # are skipped."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from operators.core.errors import TrialError


def calibration_prompts() -> tuple[str, ...]:
    """Neutral openings of texts, on which calibration evaluates settings."""
    return _packaged_prompts("prompts_calibration.txt")


def neutral_prompts() -> tuple[str, ...]:
    """Neutral openings of texts for measuring operators; none of them is a calibration prompt."""
    return _packaged_prompts("prompts_neutral.txt")


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a file. Raises :class:`TrialError` where it cannot be read or has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrialError(f"prompts {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TrialError(f"prompts {path}: not UTF-8 text (at byte {error.start})") from error
    prompts = _lines(text)
    if not prompts:
        raise TrialError(f"prompts {path}: there are none; one per line is accepted")
    return prompts


def prompts_digest(prompts: Sequence[str]) -> str:
    """sha256 of the prompts, one per line."""
    return f"sha256:{hashlib.sha256(''.join(f'{prompt}{chr(10)}' for prompt in prompts).encode()).hexdigest()}"


def _packaged_prompts(name: str) -> tuple[str, ...]:
    return _lines((resources.files("operators") / "data" / name).read_text(encoding="utf-8"))


def _lines(text: str) -> tuple[str, ...]:
    stripped = (line.strip() for line in text.splitlines())
    return tuple(line for line in stripped if line and not line.startswith("#"))
