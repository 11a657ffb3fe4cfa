"""Signing an operator of an earlier version anew, with the fingerprint over all of its model's weights."""

from __future__ import annotations

from operators.core.artifact import OperatorArtifact, with_header
from operators.core.errors import IncompatibleOperatorError
from operators.model.earlier_fingerprint import earlier_fingerprint
from operators.model.loading import LoadedModel


def signed_for(artifact: OperatorArtifact, loaded: LoadedModel) -> OperatorArtifact:
    """The same numbers, signed with this model's fingerprint. To be kept only where these are computed anew and agree.

    Raises:
        IncompatibleOperatorError: the sample of weights that it was signed with is not this model's.
    """
    header = artifact.header
    if (sampled := earlier_fingerprint(loaded.model)) != header.model_fingerprint:
        raise IncompatibleOperatorError(
            f"the sampled fingerprint of {loaded.name!r} is {sampled}; the operator was built on {header.model!r} with "
            f"{header.model_fingerprint}: it cannot be renewed on this model, and is to be built again"
        )
    return with_header(artifact, model_fingerprint=loaded.fingerprint)
