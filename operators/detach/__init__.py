"""Detached models: the same values, other gradients.

:func:`detached` freezes the gains in a decoder's norms, gates and attention, so that autograd sees the linear map
that the model is at one prompt. :func:`recording` keeps what was frozen, and :func:`replaying` runs the map alone.
``rules`` holds the rules, ``families`` a table per architecture, ``context`` the ``with`` blocks that apply a table
and undo it.

To support another architecture, add a :class:`Family` to ``families.py``: its norm classes with their rule, its MLP
classes with the attribute of their activation (and of the gate's projection), its attention classes with how to get
V and the attribute of the output projection, and the containers that only pass tensors on. Every module class of the
model must be in one of these or among the linear ones; the error of an unknown model names the first that is not.
"""

from operators.detach.context import RULE_SET, detached, recording, replaying
from operators.detach.families import Attention, Family, GatedMLP, PlainMLP, family_of
from operators.detach.rules import Tape

__all__ = [
    "RULE_SET",
    "Attention",
    "Family",
    "GatedMLP",
    "PlainMLP",
    "Tape",
    "detached",
    "family_of",
    "recording",
    "replaying",
]
