"""Mixtures of experts: a router weighs a few experts for each token, and each of these is a gated MLP.

    y = sum_e w_e down_e(act(gate_e x) * up_e x)        live up_e x       frozen w, the choice of experts, act(gate)

Frozen, the choice and its weights are those of the prompt's tokens, so that the map goes through the same experts
whatever its input is. Experts of a token that were not chosen are not computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from operators.maps.detach.rules import Tape, frozen_ratio, wide_linear

ExpertGate = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""(experts, gate, up) -> factor and constant, with ``factor * up + constant`` what the down projection receives."""


def activated_gate(experts: Any, gate: torch.Tensor, _up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``act(gate) * up``."""
    return experts.act_fn(gate), None


def clamped_gate(experts: Any, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """GPT-OSS: ``glu * (clamp(up) + 1)``, with ``glu = g sigmoid(alpha g)`` for ``g = clamp(gate)``.

    As in a plain MLP, the ratio clamp(up)/up is frozen, which is 1 within the limit.
    """
    limited = gate.clamp(max=experts.limit)
    glu = limited * torch.sigmoid(limited * experts.alpha)
    return glu * frozen_ratio(lambda x: x.clamp(min=-experts.limit, max=experts.limit), up), glu


@dataclass(frozen=True)
class Mixture:
    """The attributes of a block of experts: its router, its experts, and an MLP that every token goes through.

    Experts are as transformers keeps them, in one tensor each of all experts' weights, ``gate_up_proj`` and
    ``down_proj``.
    """

    router: str
    experts: str
    shared: str | None = None
    gate: ExpertGate = activated_gate
    with_weights: bool = False
    """Whether the block returns the router's weights beside its output."""


def mix_experts(module: nn.Module, table: Mixture, tape: Tape, x: torch.Tensor) -> Any:
    """The block's output (l, m, d) for x (l, m, d), with what its router and gates give on the tape."""
    router, experts = getattr(module, table.router), getattr(module, table.experts)
    shape = (*x.shape[:-1], -1)
    routed = functools.cache(lambda: router(x.flatten(0, -2)))
    weights = tape.factor(router, lambda: routed()[1].reshape(shape), multiplies=x)
    chosen = tape.factor(module, lambda: routed()[2].reshape(shape), multiplies=x)
    flat = x
    if len(chosen) > 1:
        # Each input has experts of its own: the tokens of all of them, as one long input.
        flat, weights, chosen = (part.reshape(1, -1, part.shape[-1]) for part in (x, weights, chosen))
    parts = list(_by_expert(chosen[0]))
    gates = tape.factor(experts, lambda: _gates(experts, table, flat, chosen[0], parts).reshape(shape), multiplies=x)
    gates = gates.reshape(*chosen.shape[1:], -1)
    output = torch.zeros_like(flat)
    for expert, tokens, slots in parts:
        _, up, down = _projections(experts, expert)
        factor, *constant = gates[tokens, slots].tensor_split(gates.shape[-1] // up[0].shape[0], dim=-1)
        inner = factor * wide_linear(flat[:, tokens], *up)
        for part in constant:
            inner = inner + part
        expert_output = wide_linear(inner, *down) * weights[0, tokens, slots, None]
        output.index_add_(1, tokens, expert_output.to(output.dtype))
    output = output.reshape(x.shape)
    if table.shared is not None:
        output = output + getattr(module, table.shared)(x)
    return (output, weights) if table.with_weights else output


def _by_expert(chosen: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Each expert that some token chose, with these tokens, and the place of the expert among the choices of each.

    ``chosen`` (m, k) has k different experts for every token.
    """
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, slots = torch.where(chosen == expert)
        yield expert, tokens, slots


def _gates(
    experts: Any,
    table: Mixture,
    flat: torch.Tensor,
    chosen: torch.Tensor,
    parts: list[tuple[int, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """(1, m, k i) for experts of inner width i, or twice that: factors and, where there are any, constants."""
    gates: torch.Tensor | None = None
    for expert, tokens, slots in parts:
        gate, up, _ = _projections(experts, expert)
        x = flat[0, tokens].detach()
        found = table.gate(experts, wide_linear(x, *gate), wide_linear(x, *up))
        both = torch.cat([part for part in found if part is not None], dim=-1)
        if gates is None:
            gates = both.new_empty(*chosen.shape, both.shape[-1])
        gates[tokens, slots] = both
    assert gates is not None  # noqa: S101 - for the type checker; there is a token, and it has an expert
    return gates[None].flatten(2)


_Projection = tuple[torch.Tensor, torch.Tensor | None]


def _projections(experts: Any, expert: int) -> tuple[_Projection, _Projection, _Projection]:
    """Weight (out, in) and bias of an expert's gate, up and down projections."""
    both, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    if experts.is_transposed:
        both, down = both.T, down.T
    both_bias = experts.gate_up_proj_bias[expert] if experts.has_bias else None
    down_bias = experts.down_proj_bias[expert] if experts.has_bias else None
    size = both.shape[0] // 2
    places = (slice(size), slice(size, None)) if experts.is_concatenated else (slice(0, None, 2), slice(1, None, 2))
    gate, up = ((both[place], None if both_bias is None else both_bias[place]) for place in places)
    return gate, up, (down, down_bias)
