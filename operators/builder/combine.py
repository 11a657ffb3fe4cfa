"""A stored mixture: several operators, each with a signed weight, as one.

With w_m the weight of member m and y_m its anchor, the mixture's map is

    J = s sum_m w_m/|y_m| J^m        (and c, y, b likewise),        s = mean |y_m|,

so that weights compare directions and not the sizes of hidden states. It is built anew from the members' texts: its
basis, residuals and errors are its own, and it can be verified like any other operator. It has one direction, so its
dose is that of one operator: at most |lambda|/2, whatever the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from operators.builder.build import BuildSpec, Progress, build_operator
from operators.builder.concept import Concept
from operators.builder.verify import check_compatible
from operators.core.artifact import OperatorArtifact
from operators.core.errors import BuildError
from operators.core.header import MAX_MEMBERS, MAX_TEXTS, Member, OperatorHeader
from operators.model.loading import LoadedModel

_CANCELLED = 1e-3
"""Weighted unit anchors whose sum is shorter than this share of their weights have no direction in common."""


@dataclass(frozen=True, eq=False)
class Part:
    """One member of a mixture: its name in the store, itself, and its signed weight."""

    name: str
    artifact: OperatorArtifact
    weight: float


def combine(
    parts: Sequence[Part],
    loaded: LoadedModel,
    *,
    rank: int | None = None,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> OperatorArtifact:
    """The mixture of two or more operators of one model, profile and layer.

    Args:
        rank: that of the mixture; the largest of its members' when not given, and exact where one of them is.

    Raises:
        BuildError: fewer than two members, one of them twice, a weight that is zero or not finite, members of
            different layers or profiles, or weights that cancel.
        IncompatibleOperatorError: a member belongs to another model.
    """
    _check(parts, loaded)
    norms = [float(torch.linalg.vector_norm(part.artifact.anchor.double())) for part in parts]
    scale = sum(norms) / len(norms)
    headers = [part.artifact.header for part in parts]
    spec = BuildSpec(
        texts=tuple(Concept(text.text, text.ids) for header in headers for text in header.texts),
        weights=tuple(
            scale * part.weight / norm * share
            for part, norm in zip(parts, norms, strict=True)
            for share in part.artifact.header.shares
        ),
        members=tuple(Member(name=part.name, digest=part.artifact.digest, weight=part.weight) for part in parts),
        profile=headers[0].profile,
        layer=headers[0].layer,
        recommended=headers[0].recommended,
    )
    spec = replace(spec, rank=_rank(headers) if rank is None else rank)
    return build_operator(spec, loaded, max_memory=max_memory, progress=progress)


def _check(parts: Sequence[Part], loaded: LoadedModel) -> None:
    if len(parts) < 2:
        raise BuildError(f"a mixture of {len(parts)} operators; two or more are needed")
    texts = sum(len(part.artifact.header.texts) for part in parts)
    if len(parts) > MAX_MEMBERS or texts > MAX_TEXTS:
        raise BuildError(
            f"a mixture of {len(parts)} operators of {texts} texts; at most {MAX_MEMBERS} of {MAX_TEXTS} are accepted"
        )
    names = [part.name for part in parts]
    for name in names:
        if names.count(name) > 1:
            raise BuildError(f"operator {name!r} is in the mixture {names.count(name)} times; once is accepted")
    first = parts[0].artifact.header
    for part in parts:
        header = part.artifact.header
        check_compatible(header, loaded)
        if not (math.isfinite(part.weight) and part.weight != 0.0):
            raise BuildError(f"the weight of {part.name!r} is {part.weight}; a finite number other than 0 is accepted")
        if (header.profile, header.layer) != (first.profile, first.layer):
            raise BuildError(
                f"operator {part.name!r} is {header.profile} at layer {header.layer}, {parts[0].name!r} is "
                f"{first.profile} at layer {first.layer}; a mixture has one layer and profile (a request may name "
                "several operators, each at its own)"
            )
    units = [_unit(part.artifact.anchor) * part.weight for part in parts]
    if float(torch.linalg.vector_norm(torch.stack(units).sum(0))) < _CANCELLED * sum(abs(p.weight) for p in parts):
        raise BuildError("the weighted operators cancel: their sum has no direction")


def _rank(headers: Sequence[OperatorHeader]) -> int | Literal["full"]:
    found = [header.low_rank for header in headers]
    return "full" if None in found else max(one.rank for one in found if one is not None)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = vector.double() / torch.linalg.vector_norm(vector.double())
    return unit
