"""Detached models: the same values, other gradients.

:func:`detached` freezes the gains in a decoder's norms, gates and attention, so that autograd sees the linear map
that the model is at one prompt. :func:`recording` keeps what was frozen, and :func:`replaying` runs the map alone.
``rules`` holds the rules, ``families`` a table per architecture, ``context`` the ``with`` blocks that apply a table
and undo it.

docs/ARCHITECTURES.md says how another architecture gets its table, and :func:`register` takes it.
"""

from operators.maps.detach.context import RULE_SET, detached, recording, replaying
from operators.maps.detach.families import (
    Attention,
    Family,
    GatedMLP,
    PlainMLP,
    families,
    family_of,
    projected_values,
    register,
)
from operators.maps.detach.rules import Tape, late_rms_norm, layer_norm, offset_rms_norm, rms_norm

__all__ = [
    "RULE_SET",
    "Attention",
    "Family",
    "GatedMLP",
    "PlainMLP",
    "Tape",
    "detached",
    "families",
    "family_of",
    "late_rms_norm",
    "layer_norm",
    "offset_rms_norm",
    "projected_values",
    "recording",
    "register",
    "replaying",
    "rms_norm",
]
