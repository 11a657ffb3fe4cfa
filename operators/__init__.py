"""Concept in, steering operator out.

The offline half of the project: computes the detached Jacobian of a decoder language model at a concept
(J. R. Golden, "Equivalent Linear Mappings of Large Language Models", TMLR 2025) and stores it as an artifact.
"""

from operators.core.version import __version__

__all__ = ["__version__"]
