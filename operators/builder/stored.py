"""Whether an operator in the store is the one that a build would give, so that it need not be built again."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from operators.builder.checks import dtype_name
from operators.builder.neutral import tokenise_neutral
from operators.builder.spec import BuildSpec
from operators.core.errors import ArtifactError, StoreError
from operators.core.header import NeutralTexts, OperatorHeader
from operators.core.model_fingerprint import renewal_hint
from operators.core.store import Store
from operators.core.version import __version__
from operators.maps.detach import RULE_SET
from operators.maps.sketch import OVERSAMPLE
from operators.model.loading import LoadedModel


@dataclass(frozen=True)
class StoredOperator:
    """An operator in the store, without its tensors."""

    header: OperatorHeader
    digest: str


def find_up_to_date(
    store: Store,
    name: str,
    spec: BuildSpec,
    loaded: LoadedModel,
    *,
    replace: bool = False,
    layer_is_default: bool = False,
) -> StoredOperator | None:
    """The stored operator of that name, where building ``spec`` would give the same one; None means build it.

    Args:
        spec: with its layer, and a rank, "full" or a tolerance: what the defaults come to.
        replace: whether another operator of that name may be replaced, and None returned for it.
        layer_is_default: the layer was not given, so that one to which a calibration moved the operator is accepted.

    Raises:
        StoreError: another operator has the name and may not be replaced; says in what it differs.
    """
    if not os.path.lexists(store.check_free(name, replace=True)):
        return None
    existing: StoredOperator | None = None
    try:
        artifact = store.load(name)
        existing = StoredOperator(artifact.header, artifact.digest)
        if layer_is_default and existing.header.calibration is not None:
            spec = dataclasses.replace(spec, layer=existing.header.layer)
        problems = differences(existing.header, spec, loaded)
    except ArtifactError as error:
        problems = [str(error)]
    if problems and not replace:
        hint = "" if existing is None else renewal_hint(existing.header.model_fingerprint, name)
        raise StoreError(
            f"operator {name!r} in {store.path} is another one: {'; '.join(problems)} (--replace replaces it){hint}"
        )
    return None if problems else existing


def differences(header: OperatorHeader, spec: BuildSpec, loaded: LoadedModel) -> list[str]:
    """In what a stored operator differs from the one that ``spec`` describes; empty when building would give it again.

    ``spec`` has its layer, and a rank, "full" or a tolerance. Words and recommendation are not compared: they change no
    number of the operator.
    """
    low_rank = header.low_rank
    requested_size = spec.rank if spec.tolerance is None else f"what tolerance {spec.tolerance} takes"
    rank = low_rank.rank if low_rank else "full"
    size = rank if header.tolerance is None else f"what tolerance {header.tolerance} takes"
    properties: list[tuple[str, object, object]] = [
        ("profile", header.profile, spec.profile),
        ("layer", header.layer, spec.layer),
        ("neutral texts", _neutral_digest(header.neutral), _neutral_digest(spec.neutral or tokenise_neutral(loaded))),
        ("weights", header.weights, spec.weights),
        ("members", header.members, spec.members),
        ("rank", size, requested_size),
        ("model", header.model_fingerprint, loaded.fingerprint),
        ("tokenizer", header.tokenizer_fingerprint, loaded.tokenizer_fingerprint),
        ("model dtype", header.model_dtype, dtype_name(loaded.dtype)),
        ("rule set", header.rule_set, RULE_SET),
        ("builder version", header.builder_version, __version__),
    ]
    if low_rank is not None:
        sketch = (low_rank.weighting, low_rank.oversample, low_rank.power_iterations, low_rank.seed)
        properties.append(("sketch", sketch, (spec.weighting, OVERSAMPLE, spec.power_iterations, spec.seed)))
    found = [
        f"its {name} is {stored}, not {requested}" for name, stored, requested in properties if stored != requested
    ]
    texts = [(text.text, text.ids) for text in spec.texts]
    if [(text.text, text.ids) for text in header.texts] != texts:
        found.insert(0, "its texts are others")
    return found


def _neutral_digest(neutral: NeutralTexts | None) -> str:
    return "none" if neutral is None else neutral.digest
