"""Detached models: the same values, other gradients.

A decoder's norms, gates and attention multiply the stream by factors that depend on it. Inside :func:`detached` these
factors are constants for autograd, so that the Jacobian is that of the affine map which the model is at one prompt.
:func:`recording` keeps the factors of a forward pass, and :func:`replaying` runs the affine map with them on any input.

``rules`` and ``experts`` hold the rules, ``family`` says what a table is, ``tables`` has one per architecture,
``families`` finds that of a model, and ``context`` has the ``with`` blocks that apply it and undo that.
docs/ARCHITECTURES.md says how another architecture gets its table; :func:`register`, or an entry point of an installed
package, adds it.
"""

from operators.maps.detach.context import RULE_SET, detached, recording, replaying
from operators.maps.detach.experts import Mixture
from operators.maps.detach.families import FamilyRules, families, family_of, register
from operators.maps.detach.family import Attention, Family, GatedMLP, PlainMLP
from operators.maps.detach.rules import (
    Tape,
    late_rms_norm,
    layer_norm,
    offset_rms_norm,
    products_in,
    rms_norm,
    rounded_to,
)
from operators.maps.detach.tables import projected_values

__all__ = [
    "RULE_SET",
    "Attention",
    "Family",
    "FamilyRules",
    "GatedMLP",
    "Mixture",
    "PlainMLP",
    "Tape",
    "detached",
    "families",
    "family_of",
    "late_rms_norm",
    "layer_norm",
    "offset_rms_norm",
    "products_in",
    "projected_values",
    "recording",
    "register",
    "replaying",
    "rms_norm",
    "rounded_to",
]
