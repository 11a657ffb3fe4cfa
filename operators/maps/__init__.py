"""The mathematics of detached maps. Nothing here reads or writes files, or knows a command.

``detach`` freezes a model at one prompt. ``replay`` applies the affine map that results and its transpose, without
forming them; ``weighted_map`` sums the maps of several texts. Both are an :class:`~operators.maps.replay.AffineMap`,
from which ``jacobian`` forms the dense matrices and ``sketch`` a low-rank approximation.
"""
