"""Refuses a vLLM in which something moved that the worker relies on, instead of steering half of it."""

from __future__ import annotations

from collections.abc import Iterable


def require_names(owner: object, available: Iterable[str], *names: str) -> None:
    """Raises :class:`RuntimeError` for those of ``names`` that are not ``available`` in ``owner``."""
    missing = [name for name in names if name not in available]
    if missing:
        # Imported late: steps are also prepared, in tests, where vLLM is not installed.
        from vllm import __version__

        raise RuntimeError(
            f"{type(owner).__name__} of vLLM {__version__} has no {', '.join(missing)}: "
            "something moved since 0.32 and 0.33, for which this worker was written"
        )


def require_attributes(owner: object, *names: str) -> None:
    """Raises :class:`RuntimeError` for attributes that ``owner`` does not have."""
    require_names(owner, dir(owner), *names)
