"""A mixture: several operators, each with a signed weight, built as one.

With w_m the weight of member m and y_m its anchor, the mixture's map is

    J = s sum_m w_m/|y_m| J^m        (and c, y, b likewise),        s = mean |y_m|,

so that weights compare directions and not the sizes of hidden states. It is built anew from the members' texts, as a
:class:`~operators.maps.weighted_map.WeightedMap`: its basis, residuals and errors are its own, and it can be verified
like any other operator. It has one direction, so its dose is that of one operator: at most |lambda|/2, whatever the
weights.

Vectors have no map: theirs is the sum of their directions (:mod:`operators.builder.vector_mixture`), without a build.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from operators.builder.build import build_operator
from operators.builder.concept import Concept
from operators.builder.spec import BuildSpec
from operators.builder.vector_mixture import mix_vectors
from operators.builder.verify import check_compatible
from operators.core.artifact import OperatorArtifact
from operators.core.errors import BuildError
from operators.core.header import MAX_MEMBERS, MAX_TEXTS, Member, NeutralTexts, OperatorHeader
from operators.core.progress import Progress, silent
from operators.model.loading import LoadedModel

_CANCELLED = 1e-3
"""Weights cancel where their weighted unit anchors sum to less than this share of the weights' total size."""


@dataclass(frozen=True, eq=False)
class WeightedOperator:
    """One member of a mixture: its name in the store, the operator, and its signed weight."""

    name: str
    artifact: OperatorArtifact
    weight: float


def combine(
    members: Sequence[WeightedOperator],
    loaded: LoadedModel,
    *,
    rank: int | None = None,
    max_memory: int | None = None,
    progress: Progress = silent,
) -> OperatorArtifact:
    """The mixture of two or more operators of one model, profile and layer, all of them vectors or none.

    Args:
        rank: of the mixture; None means the largest of its members', and exact where one of them is.
        max_memory: bytes beside the model; None means most of what is free.
        progress: as in :func:`~operators.builder.build.build_operator`.

    Raises:
        BuildError: fewer than two members, one of them twice, a weight that is zero or not finite, members of
            different layers, profiles or neutral texts, vectors among others, a rank for vectors, or weights that
            cancel.
        IncompatibleOperatorError: a member belongs to another model.
    """
    _check(members, loaded)
    listed = tuple(Member(name=member.name, digest=member.artifact.digest, weight=member.weight) for member in members)
    if members[0].artifact.header.vector is not None:
        if rank is not None:
            raise BuildError(f"rank is {rank}; a mixture of vectors is a vector, of rank 0")
        return mix_vectors([(one, member.artifact) for one, member in zip(listed, members, strict=True)])
    norms = [float(torch.linalg.vector_norm(member.artifact.anchor.double())) for member in members]
    scale = sum(norms) / len(norms)
    headers = [member.artifact.header for member in members]
    spec = BuildSpec(
        texts=tuple(Concept(text.text, text.ids) for header in headers for text in header.texts),
        weights=tuple(
            scale * member.weight / norm * share
            for member, norm in zip(members, norms, strict=True)
            for share in member.artifact.header.shares
        ),
        members=listed,
        profile=headers[0].profile,
        layer=headers[0].layer,
        rank=_rank(headers) if rank is None else rank,
        recommended=headers[0].recommended,
        neutral=_neutral(members),
    )
    return build_operator(spec, loaded, max_memory=max_memory, progress=progress)


def _check(members: Sequence[WeightedOperator], loaded: LoadedModel) -> None:
    if len(members) < 2:
        raise BuildError(f"a mixture of {len(members)} operators; two or more are needed")
    texts = sum(len(member.artifact.header.texts) for member in members)
    if len(members) > MAX_MEMBERS or texts > MAX_TEXTS:
        raise BuildError(
            f"a mixture of {len(members)} operators of {texts} texts; at most {MAX_MEMBERS} of {MAX_TEXTS} are accepted"
        )
    names = [member.name for member in members]
    for name in names:
        if names.count(name) > 1:
            raise BuildError(f"operator {name!r} is in the mixture {names.count(name)} times; once is accepted")
    first = members[0].artifact.header
    for member in members:
        header = member.artifact.header
        check_compatible(header, loaded)
        if header.lens is not None:
            raise BuildError(f"{member.name!r} is a lens, which has no direction of its own; operators are accepted")
        if not (math.isfinite(member.weight) and member.weight != 0.0):
            raise BuildError(
                f"the weight of {member.name!r} is {member.weight}; a finite number other than 0 is accepted"
            )
        if (header.vector is None) != (first.vector is None):
            raise BuildError(
                f"of {members[0].name!r} and {member.name!r} one is a vector, which has no map to mix; a mixture of "
                "vectors alone, or of none, is accepted (a request may name several operators of either kind)"
            )
        if (header.profile, header.layer) != (first.profile, first.layer):
            raise BuildError(
                f"operator {member.name!r} is {header.profile} at layer {header.layer}, {members[0].name!r} is "
                f"{first.profile} at layer {first.layer}; a mixture has one layer and profile (a request may name "
                "several operators, each at its own)"
            )
    units = [_unit(member.artifact.anchor) * member.weight for member in members]
    if float(torch.linalg.vector_norm(torch.stack(units).sum(0))) < _CANCELLED * sum(
        abs(member.weight) for member in members
    ):
        raise BuildError("the weighted operators cancel: their sum has no direction")


def _neutral(members: Sequence[WeightedOperator]) -> NeutralTexts | None:
    """The neutral texts that members have in common; None, for those that ship, where none has any."""
    having = [member for member in members if member.artifact.header.neutral is not None]
    for member in having[1:]:
        first, other = having[0].artifact.header.neutral, member.artifact.header.neutral
        if first != other:
            raise BuildError(
                f"operators {having[0].name!r} and {member.name!r} have different neutral texts; a mixture has one "
                "contrast, so that members with the same are accepted"
            )
    return having[0].artifact.header.neutral if having else None


def _rank(headers: Sequence[OperatorHeader]) -> int | Literal["full"]:
    ranks = [header.low_rank.rank for header in headers if header.low_rank is not None]
    return max(ranks) if len(ranks) == len(headers) else "full"


def _unit(vector: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = vector.double() / torch.linalg.vector_norm(vector.double())
    return unit
