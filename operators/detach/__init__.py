"""Detached models: the same values, other gradients.

:func:`detached` freezes the gains in a decoder's norms, gates and attention, so that autograd sees the linear
map that the model is at one prompt. ``rules`` holds the three rules, ``families`` a table per architecture,
``context`` the ``with`` block that applies a table and undoes it.

To support another architecture, add a :class:`Family` to ``families.py``: its norm classes with their rule,
its gated MLP classes, its attention classes, and the containers that only pass tensors on.
"""

from operators.detach.context import RULE_SET, detached
from operators.detach.families import Family, family_of

__all__ = ["RULE_SET", "Family", "detached", "family_of"]
