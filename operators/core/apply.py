"""The steering equation, once.

For a sequence with embeddings x_0, x_1, ... (as the first block receives them) and an operator with blocks
J_i = U B_i, i = 0..n-1 (U = 1 for an exact one):

    cumulative   a_k = c + U s_k,          s_k = sum_{j<=k} B_{j mod n} x_j
    substitute   a_k = b + U B_{n-1} x_k,  b = y - J_{n-1} x_{n-1} (of the concept)

    d_k = (1-beta) a_k/|a_k| + beta z/|z|,  z the anchor of the setting:
        concept    z = y, the concept's own hidden state
        contrast   z = y_c = y - m, m the mean of what y is for texts about nothing in particular (``neutral``)
    d_0 = z/|z|                                   where the setting puts the anchor at the first token
    h_k <- h_k + (lambda/2) |h_k| d_k/|d_k|       at the positions k of the setting

At k = 0 the published direction is c + J_0 x_0, which is of the prompt and not of the concept, and the first token is
where most of a constant push acts: hence ``first_token``. It changes d_0 alone; x_0 stays in the running sum.

a_k depends on token ids only, so it is worked out beside the model; the only request state is one running
sum s_k of r numbers, and decoding with a KV cache equals recomputing everything. All arithmetic here is float32.

A vector is an operator of rank 0: it has no a_k and no m, y is the vector, and beta is 1.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch

from operators.core.artifact import OperatorArtifact
from operators.core.errors import SettingError, SteeringError
from operators.core.header import SETTING_FIELDS, Anchor, FirstToken, OperatorHeader, Recommended, Rule
from operators.core.positions import ALL_POSITIONS, Positions
from operators.core.vector_source import VectorMixture, WordVector


@dataclass(frozen=True)
class Setting:
    """How strongly, by which rule and where an operator is applied.

    ``strength`` is lambda, any finite number: 0 leaves every bit alone, negative pushes away. ``blend`` is beta
    in [0, 1]. ``positions`` are those of the text that are pushed; the others keep their bits. ``anchor`` is what a
    blend blends with, and what ``first_token`` "anchor" puts at position 0 whatever the blend.
    """

    strength: float
    rule: Rule
    blend: float
    positions: Positions = ALL_POSITIONS
    anchor: Anchor = "concept"
    first_token: FirstToken = "operator"

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise SettingError("strength", f"is {self.strength}; a finite number is accepted")
        if not 0.0 <= self.blend <= 1.0:
            raise SettingError("blend", f"is {self.blend}; a number from 0 (operator) to 1 (anchor) is accepted")
        if self.rule not in ("cumulative", "substitute"):
            raise SettingError("rule", f"is {self.rule!r}; 'cumulative' and 'substitute' are accepted")
        if self.anchor not in ("contrast", "concept"):
            raise SettingError("anchor", f"is {self.anchor!r}; 'contrast' and 'concept' are accepted")
        if self.first_token not in ("operator", "anchor"):
            raise SettingError("first_token", f"is {self.first_token!r}; 'operator' and 'anchor' are accepted")
        self.positions.check()

    @classmethod
    def of(cls, recommended: Recommended) -> Setting:
        """The setting that an operator recommends."""
        return cls(**{name: getattr(recommended, name) for name in SETTING_FIELDS})

    def blend_at(self, position: int) -> float:
        """beta at a position of the text: 1 at the first one where the anchor is put there."""
        return 1.0 if position == 0 and self.first_token == "anchor" else self.blend


@dataclass(frozen=True, eq=False)
class PreparedOperator:
    """An artifact's tensors in float32 on the device that steers. Immutable, shared between requests.

    ``factors`` (n, r, d), ``basis`` (d, r) or None for the identity; ``offset``, ``base``, ``unit_anchor`` = y/|y| and
    ``unit_contrast`` = y_c/|y_c| (d,), None without a neutral mean.
    Of a vector, ``factors`` (0, 0, d) and ``base`` (0,) are empty.
    """

    factors: torch.Tensor
    basis: torch.Tensor | None
    offset: torch.Tensor | None
    base: torch.Tensor
    unit_anchor: torch.Tensor
    unit_contrast: torch.Tensor | None = None

    @property
    def is_vector(self) -> bool:
        """Whether only the anchor pushes: there are no blocks."""
        return self.factors.shape[0] == 0

    def unit_of(self, anchor: Anchor) -> torch.Tensor:
        """z/|z| (d,). Raises :class:`SettingError` for a contrast anchor that the operator does not have."""
        if anchor == "concept":
            return self.unit_anchor
        if self.unit_contrast is None:
            raise SettingError("anchor", f"is 'contrast'; {_ONLY_CONCEPT}")
        return self.unit_contrast

    @cached_property
    def transposed_factors(self) -> tuple[torch.Tensor, ...]:
        """B_i^T (d, r) of every block: views, made once for the steps that need one each."""
        return tuple(block.T for block in self.factors.unbind())

    @cached_property
    def transposed_basis(self) -> torch.Tensor | None:
        """U^T (r, d), a view; None for the identity."""
        return None if self.basis is None else self.basis.T

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.factors, self.basis, self.offset, self.base, self.unit_anchor, self.unit_contrast)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, device: torch.device) -> PreparedOperator:
        """The same operator on ``device``; without a copy where it is there already."""

        def place(tensor: torch.Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device)

        return PreparedOperator(**{field.name: place(getattr(self, field.name)) for field in fields(self)})


_ONLY_CONCEPT = "the operator has no neutral mean, so that only 'concept' is accepted"


def check_setting(setting: Setting, header: OperatorHeader, name: str) -> None:
    """Raises :class:`SettingError` where ``setting`` asks the operator ``name`` for what it does not have."""
    # What steers of a lens are the vectors of its words.
    if header.vector is not None or header.lens is not None:
        check_blend(setting, name)
        if setting.anchor == "contrast":
            raise SettingError("anchor", f"is 'contrast'; {name} is a vector (rank 0), and only 'concept' is accepted")
    elif setting.anchor == "contrast" and header.neutral is None:
        raise SettingError(
            "anchor",
            f"is 'contrast'; {name} was built without a neutral mean, so that only 'concept' is accepted (build it "
            "again with --replace to have one)",
        )


def check_blend(setting: Setting, name: str) -> None:
    """Raises :class:`SettingError` where ``setting`` asks the vector ``name`` for anything but its anchor."""
    if setting.blend != 1.0:
        raise SettingError(
            "blend", f"is {setting.blend:g}; {name} is a vector (rank 0), and only 1 (anchor) is accepted"
        )


def recommended_setting(header: OperatorHeader) -> Setting:
    """The setting that an operator recommends.

    Raises:
        SettingError: of the field "strength": it is a word, or a mixture of words, of a lens that recommends none.
    """
    if isinstance(header.vector, WordVector | VectorMixture) and header.recommended.strength == 0.0:
        raise SettingError("strength", "is needed: the lens recommends none, because nothing steered or was measured")
    return Setting.of(header.recommended)


def prepared_bytes(artifact: OperatorArtifact) -> int:
    """Bytes of the :class:`PreparedOperator` that :func:`prepare` makes of it."""
    return artifact.nbytes // artifact.anchor.element_size() * torch.float32.itemsize


def prepare(artifact: OperatorArtifact, device: torch.device) -> PreparedOperator:
    """An operator's tensors in float32 on ``device``, with its anchors normalised: y/|y| and y_c/|y_c|.

    Raises:
        SteeringError: it is a lens; or an anchor is zero or not finite, so that it has no direction.
    """
    if artifact.lens is not None:
        raise SteeringError("this is a lens, which pushes along words; an operator, or words for the lens, are needed")

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=device, dtype=torch.float32)

    return PreparedOperator(
        factors=place(artifact.factors),
        basis=None if artifact.basis is None else place(artifact.basis),
        offset=None if artifact.offset is None else place(artifact.offset),
        base=place(artifact.substitute_base),
        unit_anchor=_unit(place(artifact.anchor)[None], first=0)[0],
        unit_contrast=None
        if artifact.neutral is None
        # The difference before any rounding to float32.
        else _unit(place(artifact.anchor.double() - artifact.neutral.double())[None], first=0)[0],
    )


class Direction:
    """The unit directions d_k/|d_k| of one operator along one sequence.

    Keeps the running sum and the position; feed it every token of the sequence exactly once, in order.
    """

    def __init__(self, operator: PreparedOperator, setting: Setting) -> None:
        """Raises :class:`SettingError` for a vector with a blend other than 1, whose rule makes no difference, and for
        a contrast anchor that the operator does not have.
        """
        if operator.is_vector:
            check_blend(setting, "the operator")
        self.operator, self.setting = operator, setting
        self.anchor = operator.unit_of(setting.anchor)
        self.position = 0
        self.sum = operator.factors.new_zeros(operator.factors.shape[1])
        """s_k (r,) of the rule "cumulative", of all tokens that were fed."""

    @property
    def group(self) -> Hashable:
        """Equal for those that :func:`advance_directions` takes at once: at one position, of one operator and form."""
        setting = self.setting
        return id(self.operator), setting.rule, setting.blend, setting.anchor, setting.first_token, self.position

    def advance(self, x: torch.Tensor, at: slice = slice(None)) -> torch.Tensor:
        """:func:`advance_directions` of one sequence: embeddings (T, d), and directions (P, d)."""
        return advance_directions([self], x[None], at)[0]


def advance_directions(directions: Sequence[Direction], x: torch.Tensor, at: slice = slice(None)) -> torch.Tensor:
    """Unit directions for the next T tokens of N sequences whose directions are of one ``group``.

    All T tokens enter the running sums; a direction that is not asked for may be zero.

    Args:
        x: the tokens' embeddings (N, T, d).
        at: which of the T directions are asked for.

    Returns:
        (N, P, d) of those P.

    Raises:
        SteeringError: a direction is zero or not finite at some position.
    """
    one = directions[0]
    first, (low, high, _) = one.position, at.indices(x.shape[1])
    for direction in directions:
        direction.position += x.shape[1]
    anchors = one.anchor.expand(len(directions), max(high - low, 0), -1)
    if one.setting.blend == 1.0:
        return anchors
    if high <= low or one.setting.blend_at(first + low) != 1.0:
        return _directions(directions, x, first, at)
    # Apart from the others: where the anchor is put, the operator need not have a direction.
    return torch.cat((anchors[:, :1], _directions(directions, x, first, slice(low + 1, high))), dim=1)


def _directions(directions: Sequence[Direction], x: torch.Tensor, first: int, at: slice) -> torch.Tensor:
    low, blend = at.indices(x.shape[1])[0], directions[0].setting.blend
    unit = _unit(_raw(directions, x.to(torch.float32), first, at), first + low)
    if blend == 0.0:
        return unit
    return _unit((1.0 - blend) * unit + blend * directions[0].anchor, first + low)


def _raw(directions: Sequence[Direction], x: torch.Tensor, first: int, at: slice) -> torch.Tensor:
    operator, (sequences, tokens, _) = directions[0].operator, x.shape
    if directions[0].setting.rule == "substitute":
        return substitute(operator, x[:, at])
    if tokens == 0:
        return x
    positions = torch.arange(first, first + tokens).repeat(sequences)
    products = terms(operator, x.flatten(0, 1), positions).view(sequences, tokens, -1)
    sums = torch.stack([direction.sum for direction in directions])[:, None] + products.cumsum(1)
    for direction, last in zip(directions, sums[:, -1].clone(), strict=True):
        direction.sum = last
    return cumulative(operator, sums[:, at])


def terms(operator: PreparedOperator, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """B_{j mod n} x_j, (T, r): ``x`` (T, d) float32, ``positions`` (T,) = j on the CPU, of any sequences."""
    n, rank, _ = operator.factors.shape
    blocks = positions % n
    used = sorted(set(blocks.tolist()))
    if len(used) == 1:
        return x @ operator.factors[used[0]].T
    products = x.new_empty(x.shape[0], rank)
    for block in used:
        rows = (blocks == block).nonzero().squeeze(-1).to(x.device)
        products[rows] = x[rows] @ operator.factors[block].T
    return products


def cumulative(operator: PreparedOperator, sums: torch.Tensor) -> torch.Tensor:
    """a_k = c + U s_k, (..., d), for running sums ``sums`` (..., r)."""
    a = _expand(operator, sums)
    return a if operator.offset is None else a + operator.offset


def substitute(operator: PreparedOperator, x: torch.Tensor) -> torch.Tensor:
    """a_k = b + U B_{n-1} x_k, (..., d), for ``x`` (..., d) float32."""
    return operator.base + _expand(operator, x @ operator.factors[-1].T)


def _expand(operator: PreparedOperator, coefficients: torch.Tensor) -> torch.Tensor:
    """U s, (..., d), for s (..., r)."""
    return coefficients if operator.basis is None else coefficients @ operator.basis.T


def steer(hidden: torch.Tensor, push: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Adds |h_k| push_k to each hidden state, in float32. What that did is measured by :mod:`operators.core.movement`.

    Args:
        hidden: (..., d) in the model's dtype.
        push: (..., d) float32, sum over the operators of this layer of (lambda/2) d_k/|d_k|.
        residual: (..., d), where a model hands the hidden state on in two parts: h = hidden + residual.

    Returns:
        The steered ``hidden`` (..., d) in the model's dtype.
    """
    before = hidden.to(torch.float32)
    whole = before if residual is None else before + residual.to(torch.float32)
    norm = torch.linalg.vector_norm(whole, dim=-1, keepdim=True)
    after: torch.Tensor = (before + norm * push).to(hidden.dtype)
    return after


def _unit(vectors: torch.Tensor, first: int) -> torch.Tensor:
    """v/|v| of vectors (..., P, d) at the positions first, first + 1, ..."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    for place, norm in enumerate(norms.flatten().tolist()):
        # Negated, so that NaN is none as well.
        if not 0.0 < norm < math.inf:
            raise SteeringError(
                f"the steering direction at position {first + place % norms.shape[-2]} has norm {norm}; a positive, "
                "finite one is needed"
            )
    unit: torch.Tensor = vectors / norms
    return unit
