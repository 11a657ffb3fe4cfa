"""A mixture of vectors: v = s sum_m w_m v_m/|v_m|, with s = mean |v_m|, as :mod:`operators.builder.combine` mixes maps.

Nothing is computed from a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from operators.core.artifact import OperatorArtifact, make_vector
from operators.core.built_at import built_at
from operators.core.header import MAX_CONCEPT, Member
from operators.core.vector_source import VectorMixture
from operators.core.version import __version__


def mix_vectors(members: Sequence[tuple[Member, OperatorArtifact]]) -> OperatorArtifact:
    """The weighted sum of vectors of one model and layer, whose directions do not cancel.

    Weights are those of the members, the dtype is the finest of theirs, the recommended setting the first one's.
    """
    vectors = [artifact.anchor.double() for _, artifact in members]
    norms = [float(torch.linalg.vector_norm(vector)) for vector in vectors]
    scale = sum(norms) / len(norms)
    weights = [scale * member.weight / norm for (member, _), norm in zip(members, norms, strict=True)]
    total = torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)]).sum(0)
    # Of two that round differently, the one that holds both.
    finest = max((artifact for _, artifact in members), key=lambda artifact: artifact.anchor.element_size())
    mixture = total.to(finest.anchor.dtype)
    concept = "; ".join(f"{member.weight:+g} {artifact.header.concept}" for member, artifact in members)
    header = members[0][1].header.model_copy(
        update={
            "concept": concept[:MAX_CONCEPT],
            "vector": VectorMixture(norm=float(torch.linalg.vector_norm(mixture.double()))),
            "members": tuple(member for member, _ in members),
            "dtype": finest.header.dtype,
            "words": (),
            "calibration": None,
            "builder_version": __version__,
            "created": built_at(),
        }
    )
    return make_vector(header, mixture)
