"""Detached models: the same values, other gradients.

A decoder's norms, gates and attention multiply the stream by factors that depend on it. Inside :func:`detached` these
factors are constants for autograd, so that the Jacobian is that of the affine map which the model is at one prompt.
:func:`recording` keeps the factors of a forward pass, and :func:`replaying` runs the affine map with them on any input.

``rules`` holds the rules, ``families`` a table per architecture, ``context`` the ``with`` blocks that apply a table
and undo it. docs/ARCHITECTURES.md says how another architecture gets its table; :func:`register` adds it.
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
