"""Whether an operator belongs to a model: by fingerprint, not by name."""

from __future__ import annotations

from operators.core.errors import IncompatibleOperatorError
from operators.core.header import OperatorHeader
from operators.core.model_fingerprint import renewal_hint
from operators.model.loading import LoadedModel


def check_fingerprints(header: OperatorHeader, loaded: LoadedModel) -> None:
    """Raises :class:`IncompatibleOperatorError` where model or tokenizer are not the header's; names both."""
    built_on = f"the operator was built on {header.model!r} with"
    same_tokenizer = loaded.tokenizer_fingerprint == header.tokenizer_fingerprint
    if loaded.fingerprint != header.model_fingerprint:
        raise IncompatibleOperatorError(
            f"model fingerprint of {loaded.name!r} is {loaded.fingerprint}; {built_on} {header.model_fingerprint}"
            f"{renewal_hint(header.model_fingerprint) if same_tokenizer else ''}"
        )
    if not same_tokenizer:
        raise IncompatibleOperatorError(
            f"tokenizer fingerprint of {loaded.name!r} is {loaded.tokenizer_fingerprint}; {built_on} "
            f"{header.tokenizer_fingerprint}"
        )
