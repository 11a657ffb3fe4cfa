"""What a measured dose may be: the bound of the strengths, and what rounding adds to it."""

from __future__ import annotations

import torch

_ARITHMETIC = 1e-5
"""Relative error of norms and unit vectors of any hidden size, worked out in float32."""


def dose_limit(bound: float, dtype: torch.dtype) -> float:
    """What |h' - h|/|h| may be where the strengths give at most ``bound``, h' = h + |h| push rounded to ``dtype``."""
    return bound * (1.0 + _ARITHMETIC) + (1.0 + bound) * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def dose_floor(bound: float) -> float:
    """What |h' - h|/|h| must pass to be more than the rounding of strengths that cancel and add up to ``bound``."""
    return bound * _ARITHMETIC
