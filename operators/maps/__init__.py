"""The mathematics of detached maps. Nothing here reads or writes files, or knows a command.

``detach`` freezes a model at one prompt. ``replay`` applies the affine map that results and its transpose, without
forming them; ``weighted_map`` sums the maps of several texts. Both are an :class:`~operators.maps.replay.AffineMap`,
from which ``jacobian`` forms the dense matrices and ``sketch`` a low-rank approximation.

Symbols, everywhere in this package: n positions, d hidden size, L blocks; x (n, d) the input of the first block; h or y
(d,) the target at the last position; J_i (d, d) and c (d,) of the affine map; l vectors in a batch. "Golden" is J. R.
Golden, Equivalent Linear Mappings of Large Language Models, TMLR 2025, arXiv 2505.24293.
"""
