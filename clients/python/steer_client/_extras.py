"""Packages that only some results need."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def need(module: str, extra: str) -> Any:
    """The module. Raises ImportError, which names the extra that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{package} is needed: install it, or 'steering-operators[{extra}]'", name=error.name
        ) from error
