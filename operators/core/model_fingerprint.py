"""How a model is named in an operator, and what is said of operators of another model.

A fingerprint is a scheme and a sha256. Earlier versions wrote ``sha256:`` alone, over a sample of the weights: it does
not tell a model from one with other numbers between the samples, so that such an operator is not applied until
``steer-operators renew`` has held it against its model.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

SCHEME = "weights-sha256"
"""Over every number of the weights."""
EARLIER_SCHEME = "sha256"
ModelFingerprint = Annotated[str, Field(pattern=rf"^(?:{SCHEME}|{EARLIER_SCHEME}):[0-9a-f]{{64}}$")]


def needs_renewal(model_fingerprint: str) -> bool:
    """Whether a fingerprint in an operator is of the earlier scheme."""
    return model_fingerprint.startswith(f"{EARLIER_SCHEME}:")


def renewal_hint(model_fingerprint: str, name: str = "NAME") -> str:
    """What is to be done with the operator ``name`` of this fingerprint; "" where it is of the present scheme.

    Begins with "; ", to end a message.
    """
    if not needs_renewal(model_fingerprint):
        return ""
    return (
        "; an earlier version signed it, whose fingerprint covers only a sample of the weights: 'steer-operators renew "
        f"{name}' holds it against its model and signs it anew, or build it again"
    )
