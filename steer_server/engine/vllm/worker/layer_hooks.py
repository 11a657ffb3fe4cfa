"""Hooks on the model in a vLLM worker (0.32, 0.33): the push into each layer's input, and the last hidden states kept.

A layer's hook calls the op ``steering::push``, which is opaque to Dynamo. It changes the rows of the step's pushes in
place and leaves the bits of all others alone. In most of vLLM's models a layer receives its input as
``hidden_states + residual``; the norm is taken of the sum, and the push is added to ``hidden_states``. In some it is
handed a ``residual`` that it does not read (attention and MLP side by side, norms after them): there its input is
``hidden_states`` alone.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from operators.core.apply import steer
from steer_server.engine.vllm.worker.chunked_pushes import tokens_per_chunk
from steer_server.engine.vllm.worker.pushes import TokenSpan
from steer_server.engine.vllm.worker.scoring import KeptStates
from steer_server.engine.vllm.worker.step_movements import PushedStates, StepMovements
from steer_server.engine.vllm.worker.step_push import StepPush
from steer_server.engine.vllm.worker.version_check import require_names
from steer_server.engine.vllm.worker.witness import LayerSight

PUSH_OP = "steering::push"
_LAYERS = ("model.layers", "transformer.h", "language_model.model.layers")
"""Where models have their decoder layers; the last, those that have a vision tower too."""


class ForwardPass:
    """What the hooks do in the forward pass under way. Filled by the worker before it, cleared after it."""

    def __init__(self) -> None:
        self.input_error = 0.0
        """Largest difference so far between the first layer's input and ``expected_inputs``, relative to them."""
        self.clear()

    def clear(self) -> None:
        """No later pass, of whatever kind, may find the pushes of this one."""
        self.pushes: Mapping[int, StepPush] = {}
        """By layer."""
        self.movements = StepMovements()
        """What the hooks found where they pushed, to be measured when the pass is over."""
        self.sights: Mapping[int, LayerSight] = {}
        """By layer, what is looked at before and after the push."""
        self.kept: Sequence[tuple[KeptStates, TokenSpan]] = ()
        """Requests whose last hidden states are kept, with their tokens of this pass."""
        self.expected_inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        """In the self-test: rows (R,) and what the first layer must receive there (R, d)."""


forward_pass = ForwardPass()
"""That of this process: a worker has one model, and runs one pass at a time."""


def _push(hidden: torch.Tensor, residual: torch.Tensor | None, layer: int) -> None:
    if layer == 0 and forward_pass.expected_inputs is not None:
        _check_inputs(hidden, *forward_pass.expected_inputs)
    step_push, sight = forward_pass.pushes.get(layer), forward_pass.sights.get(layer)
    width = hidden.shape[-1]
    rows, residual_rows = hidden.view(-1, width), None if residual is None else residual.view(-1, width)
    if sight is not None:
        sight.see_before(rows, residual_rows)
    if step_push is not None:
        push_rows(step_push, rows, residual_rows, forward_pass.movements)
    if sight is not None:
        sight.see_after(rows)


def push_rows(step_push: StepPush, rows: torch.Tensor, residual: torch.Tensor | None, movements: StepMovements) -> None:
    """Pushes ``rows`` (B, d) of the batch in place, and keeps what stands there before and then, to be measured."""
    step_push.times += 1
    size = tokens_per_chunk(rows.shape[1])
    if step_push.rows.shape[0] <= size:
        movements.add(_push_part(step_push, rows, residual, step_push.rows, step_push.push))
        return
    for places, push in zip(torch.split(step_push.rows, size), torch.split(step_push.push, size), strict=True):
        movements.add(_push_part(step_push, rows, residual, places, push))


def _push_part(
    step_push: StepPush, rows: torch.Tensor, residual: torch.Tensor | None, places: torch.Tensor, push: torch.Tensor
) -> PushedStates:
    before, others = rows[places], None if residual is None else residual[places]
    after = steer(before, push, others)
    rows.index_copy_(0, places, after)
    # Read again: what is measured is what the layer is handed, whatever was said of it.
    return PushedStates(step_push, push, before, rows[places], others)


def _check_inputs(hidden: torch.Tensor, rows: torch.Tensor, expected: torch.Tensor) -> None:
    received = hidden.view(-1, hidden.shape[-1])[rows]
    error = float((received - expected).abs().max() / expected.abs().max())
    forward_pass.input_error = max(forward_pass.input_error, error)


_LIBRARY: Any = torch.library.Library("steering", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("push(Tensor(a!) hidden, Tensor? residual, int layer) -> ()")
_LIBRARY.impl("push", _push, "CompositeExplicitAutograd")
_LIBRARY._register_fake("push", lambda _hidden, _residual, _layer: None)


def install_hooks(model: nn.Module) -> int:
    """Hooks every decoder layer and the model's output; returns the number of layers.

    Raises :class:`RuntimeError` for a model whose layers are not found, or have no ``hidden_states``.
    """
    layers = _decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    for layer, module in enumerate(layers):
        # Whatever found them: a push is measured by the hook that makes it, and so cannot tell where that is.
        if names[id(module)].rpartition(".")[2] != str(layer):
            raise RuntimeError(f"{type(model).__name__}: {names[id(module)]} was taken for its decoder layer {layer}")
        module.register_forward_pre_hook(_push_hook(module, layer), with_kwargs=True)
    model.register_forward_hook(_keep_states)
    return len(layers)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    for path in _LAYERS:
        layers: Any = model
        for name in path.split("."):
            layers = getattr(layers, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise RuntimeError(f"{type(model).__name__} has its decoder layers in none of {', '.join(_LAYERS)}")


def _push_hook(module: nn.Module, layer: int) -> Callable[..., None]:
    names = list(inspect.signature(module.forward).parameters)
    require_names(module, names, "hidden_states")
    adds_residual = reads_residual(type(module).forward)

    def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Any:
        if name in kwargs:
            return kwargs[name]
        place = names.index(name) if name in names else len(args)
        return args[place] if place < len(args) else None

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiled model always holds the op; in eager mode a layer without pushes does not even call it.
        if (
            not torch.compiler.is_compiling()
            and layer not in forward_pass.pushes
            and layer not in forward_pass.sights
            and forward_pass.expected_inputs is None
        ):
            return
        residual = argument(args, kwargs, "residual") if adds_residual else None
        torch.ops.steering.push(argument(args, kwargs, "hidden_states"), residual, layer)

    return hook


def reads_residual(forward: Callable[..., Any]) -> bool:
    """Whether a layer's forward reads the ``residual`` that it is handed, and does not write over it first."""
    for instruction in dis.get_instructions(inspect.unwrap(forward)):
        if "_FAST" in instruction.opname:
            # One instruction may treat two variables, in this order.
            names = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
            for name, kind in zip(names, re.findall("LOAD|STORE", instruction.opname), strict=False):
                if name == "residual":
                    return bool(kind == "LOAD")
    return False


def _keep_states(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
    for kept, span in forward_pass.kept:
        first = max(span.first_position, kept.first)
        end_row = span.start_row + span.num_tokens
        states = output[span.start_row + first - span.first_position : end_row]
        if len(states):
            # Cloned: the output's memory is used again in the next pass.
            kept.add(states.clone(), first)


def make_embedder(model: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """``embed(ids, positions)``: (T, d) as the first block receives them.

    That is with GPT-2's learned positions, and times what Granite's model multiplies embeddings by.
    """
    learned_positions = getattr(getattr(model, "transformer", None), "wpe", None)
    scale = float(getattr(getattr(model, "config", None), "embedding_multiplier", 1.0))

    def embed(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = model.embed_input_ids(ids)
        x = x if scale == 1.0 else x * scale
        return x if learned_positions is None else x + learned_positions(positions)

    return embed
