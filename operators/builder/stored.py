"""Whether the operator that is in the store already is the one that a build would give."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from operators.builder.build import BuildSpec
from operators.builder.checks import dtype_name
from operators.core.errors import ArtifactError, StoreError
from operators.core.header import OperatorHeader
from operators.core.store import Store
from operators.core.version import __version__
from operators.maps.detach import RULE_SET
from operators.maps.sketch import OVERSAMPLE, POWER_ITERATIONS
from operators.model.loading import LoadedModel


@dataclass(frozen=True)
class Stored:
    """An operator in the store, without its numbers."""

    header: OperatorHeader
    digest: str


def stored_already(
    store: Store, name: str, spec: BuildSpec, loaded: LoadedModel, *, replace: bool = False, any_layer: bool = False
) -> Stored | None:
    """The operator of that name, if building ``spec`` would give it again; None when it is to be built.

    ``any_layer``: nobody asked for the layer of ``spec``, so that a calibration may have moved the operator.

    Raises:
        StoreError: another one has the name, and may not be replaced; says in what it differs.
    """
    if not os.path.lexists(store.check_free(name, replace=True)):
        return None
    found: Stored | None = None
    try:
        artifact = store.load(name)
        found = Stored(artifact.header, artifact.digest)
        if any_layer and found.header.calibration is not None:
            spec = dataclasses.replace(spec, layer=found.header.layer)
        others = differences(found.header, spec, loaded)
    except ArtifactError as error:
        others = [str(error)]
    if others and not replace:
        raise StoreError(
            f"operator {name!r} in {store.path} is another one: {'; '.join(others)} (--replace replaces it)"
        )
    return None if others else found


def differences(header: OperatorHeader, spec: BuildSpec, loaded: LoadedModel) -> list[str]:
    """In what a stored operator is not the one asked for: nothing, when building it again would give it again.

    ``spec`` has its layer, and a rank, "full" or a tolerance. What is only recommended is not compared.
    """
    low = header.low_rank
    asked = spec.rank if spec.tolerance is None else f"what tolerance {spec.tolerance} takes"
    rank = low.rank if low else "full"
    found = rank if header.tolerance is None else f"what tolerance {header.tolerance} takes"
    pairs: list[tuple[str, object, object]] = [
        ("profile", header.profile, spec.profile),
        ("layer", header.layer, spec.layer),
        ("weights", header.weights, spec.weights),
        ("members", header.members, spec.members),
        ("rank", found, asked),
        ("model", header.model_fingerprint, loaded.fingerprint),
        ("tokenizer", header.tokenizer_fingerprint, loaded.tokenizer_fingerprint),
        ("model dtype", header.model_dtype, dtype_name(loaded.dtype)),
        ("rule set", header.rule_set, RULE_SET),
        ("builder version", header.builder_version, __version__),
    ]
    if low is not None:
        sketch = (low.weighting, low.oversample, low.power_iterations, low.seed)
        pairs.append(("sketch", sketch, (spec.weighting, OVERSAMPLE, POWER_ITERATIONS, spec.seed)))
    texts = [(text.text, text.ids) for text in spec.texts]
    others = [f"its {what} is {found}, not {asked}" for what, found, asked in pairs if found != asked]
    return others if [(text.text, text.ids) for text in header.texts] == texts else ["its texts are others", *others]
