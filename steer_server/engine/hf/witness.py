"""Looking at the inputs of a model's blocks before and after their pushes, apart from what pushes them.

The blocks are found by the names of the model's modules, and the tokens by their places in the batch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from steer_server.engine.proof import Proof, Sample
from steer_server.errors import SteeringNotAppliedError

Place = tuple[int, int]
"""Row of the batch, and which of the tokens of the pass."""
_BLOCK = re.compile(r"(?:layers|h)\.(\d+)")


class Witness:
    """``with witness:`` after :meth:`watch`, entered after the hooks that push; leaves nothing behind."""

    def __init__(self, model: Any, layers: Iterable[int]) -> None:
        named = ((_BLOCK.fullmatch(name), module) for name, module in model.get_decoder().named_modules())
        blocks: dict[int, nn.Module] = {int(found[1]): module for found, module in named if found is not None}
        self._blocks = {layer: blocks[layer] for layer in sorted(set(layers))}
        self._places: dict[int, list[Place]] = {}
        self._seen: dict[int, list[torch.Tensor]] = defaultdict(list)
        """By layer, the states (P, d) at its places: before the push, and after it."""
        self._removal = ExitStack()

    def __enter__(self) -> Witness:
        with ExitStack() as removal:
            for layer, block in ((layer, self._blocks[layer]) for layer in self._places):
                for first in (True, False):
                    handle = block.register_forward_pre_hook(self._hook(layer), prepend=first, with_kwargs=True)
                    removal.callback(handle.remove)
            self._removal = removal.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._removal.close()

    def watch(self, places: Mapping[int, Sequence[Place]]) -> None:
        """Sets what is looked at in the next forward pass, by layer."""
        self._places = {layer: list(of_layer) for layer, of_layer in places.items()}
        self._seen.clear()

    def seen(self) -> dict[int, list[tuple[torch.Tensor, torch.Tensor, float]]]:
        """By layer, of each place in the order of :meth:`watch`: the state before, after, and |h| before.

        Raises :class:`SteeringNotAppliedError` for a layer that was not reached, or more than once.
        """
        found = {}
        for layer, places in self._places.items():
            states = self._seen[layer]
            if len(states) != 2:
                raise SteeringNotAppliedError(f"layer {layer} was reached {len(states) / 2:g} times in one pass")
            before, after = (state.cpu() for state in states)
            norms = before.float().norm(dim=-1).tolist()
            found[layer] = [(before[at], after[at], norms[at]) for at in range(len(places))]
        return found

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rows, tokens = zip(*self._places[layer], strict=True)
            self._seen[layer].append(hidden[list(rows), list(tokens)])

        return hook


class WitnessedPass:
    """The samples of one forward pass, for the proofs of its rows."""

    def __init__(self, witness: Witness, proofs: Mapping[int, Proof], ids: torch.Tensor, *, start: int) -> None:
        """Sets what the witness looks at.

        Args:
            proofs: of the steered rows of the batch, by index.
            ids: (B, T) of the pass, at the positions start, start + 1, ...
        """
        self._witness, self._proofs, self._ids, self._start = witness, proofs, ids, start
        self._places: dict[int, list[Place]] = defaultdict(list)
        for row, proof in proofs.items():
            for layer, position in proof.due(start, start + ids.shape[1]):
                self._places[layer].append((row, position - start))
        witness.watch(self._places)

    def check(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Holds what was seen against the reference.

        Args:
            texts: the ids of the same rows' texts, by the same index, up to the pass's last position.

        Raises:
            SteeringNotAppliedError: what was added in a row is not what its plan adds.
        """
        if not self._places:
            return
        for layer, seen in self._witness.seen().items():
            samples: dict[int, list[Sample]] = defaultdict(list)
            for (row, token), (before, after, norm) in zip(self._places[layer], seen, strict=True):
                fed = int(self._ids[row, token])
                samples[row].append(Sample(self._start + token, fed, norm, before, after))
            for row, of_row in samples.items():
                self._proofs[row].check(layer, of_row, texts[row])
