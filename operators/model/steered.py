"""A model that is steered inside a ``with`` block: ``generate`` and any other forward pass of transformers.

    h_k <- h_k + (lambda/2) |h_k| d_k/|d_k|        at the input of the operator's injection layer, at the setting's
                                                   positions k

The directions are those of :mod:`operators.core.apply`, hence those of the server. One sequence at a time, with a KV
cache or without; a pass that continues another sequence than the last one is an error, never a wrong direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from operators.core.apply import Setting, prepare, recommended_setting
from operators.core.artifact import OperatorArtifact
from operators.core.errors import SteeringError
from operators.core.hooks import PushHooks, layer_push
from operators.core.pushes import SequencePushes
from operators.model.identity import check_fingerprints
from operators.model.loading import LoadedModel, block_input, decoder_layers, embed


@contextmanager
def steered(loaded: LoadedModel, operator: OperatorArtifact, setting: Setting | None = None) -> Iterator[None]:
    """Inside the block, ``loaded.model`` is steered by one operator; afterwards it is the plain model again.

    Args:
        setting: strength lambda, rule, blend beta and positions; None means what the operator recommends. A strength of
            0 leaves every bit of the model's output alone. The prompt is what the first pass over a sequence is given.

    Raises:
        IncompatibleOperatorError: the operator was built on another model or tokenizer.
        SteeringError: at entry, the anchor has no direction; in a forward pass, the batch has more than one row, the
            input is not token ids, the KV cache is not that of the last pass, or a hidden state was not moved; or the
            positions are those of the prompt or of what is generated, and there is no KV cache to tell them apart.
    """
    header = operator.header
    check_fingerprints(header, loaded)
    if setting is None:
        setting = recommended_setting(header)
    if setting.strength == 0.0:
        yield
        return
    layer = header.injection_layer
    with PushHooks(decoder_layers(loaded.model), [layer]) as hooks, ExitStack() as removal:
        steering = _SequenceSteering(loaded, operator, setting, hooks)
        decoder = loaded.model.get_decoder()
        removal.callback(decoder.register_forward_pre_hook(steering.before_pass, with_kwargs=True).remove)
        removal.callback(decoder.register_forward_hook(steering.after_pass).remove)
        yield


class _SequenceSteering:
    """The pushes of each forward pass over one sequence, from the token ids of the pass and the length of its cache."""

    def __init__(self, loaded: LoadedModel, operator: OperatorArtifact, setting: Setting, hooks: PushHooks) -> None:
        self._model, self._hooks, self._setting = loaded.model, hooks, setting
        self._layer = operator.header.injection_layer
        self._prepared = prepare(operator, loaded.device)
        self._pushes = SequencePushes(self._prepared, setting, prompt_tokens=0)
        self._num_fed = 0
        self._at = slice(0, 0)
        self._cache: object = None
        """The KV cache that the last pass filled; None where there was none, or the pass failed."""

    def before_pass(self, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or ids.shape[0] != 1:
            found = "embeddings" if ids is None else f"{ids.shape[0]} rows"
            raise SteeringError(f"a forward pass over {found}; token ids of one sequence are accepted")
        cache = kwargs.get("past_key_values")
        start = 0 if cache is None else int(cache.get_seq_length())
        if start == 0:
            self._begin(prompt_tokens=len(ids[0]), cached=cache is not None)
        elif cache is not self._cache:
            raise SteeringError(
                f"a forward pass after {start} tokens in a KV cache that the last pass did not fill: what is in it may "
                "be another text, or not steered"
            )
        if start != self._num_fed:
            raise SteeringError(
                f"a forward pass after {start} tokens; the last one ended after {self._num_fed}, and a sequence is "
                "steered token by token"
            )
        # Until the pass is over: one that fails leaves a cache that nobody may continue.
        self._cache = None
        self._num_fed += len(ids[0])
        if self._pushes.over:
            return
        self._at, push = self._pushes.advance(block_input(self._model, embed(self._model, ids[0]), start=start))
        if len(push):
            self._hooks.load({self._layer: layer_push({0: [(self._at, push)]}, len(ids[0]))})

    def _begin(self, *, prompt_tokens: int, cached: bool) -> None:
        positions = self._setting.positions
        if positions.part != "all" and not cached:
            raise SteeringError(
                f"positions {positions} in a forward pass without a KV cache, which tells the prompt from what follows"
            )
        self._pushes = SequencePushes(self._prepared, self._setting, prompt_tokens=prompt_tokens)
        self._num_fed = 0

    def after_pass(self, _decoder: nn.Module, _args: Any, output: Any) -> None:
        for doses in self._hooks.take_doses().values():
            pushed = doses[:, self._at]
            if not bool(((pushed > 0) & torch.isfinite(pushed)).all()):
                raise SteeringError(
                    f"layer {self._layer}: a hidden state was moved by {float(pushed.min())} of its norm; a positive, "
                    "finite change is needed"
                )
        self._cache = getattr(output, "past_key_values", None)
