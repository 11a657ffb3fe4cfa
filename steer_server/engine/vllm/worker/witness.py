"""Looking at hidden states before and after their pushes, at positions that the server names, apart from what pushes.

It knows nothing of operators: where to look, it is told by the server, and in which rows of a step, by vLLM. What it
saw is judged by the server. Positions at which a request begins, or comes back, behind cached keys and values are
looked at as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steer_server.engine.vllm.worker.pushes import TokenSpan, copy_to_device
from steer_server.engine.vllm.worker_protocol import SeenState

_MAX_STATES = 256
"""Of one request: it may be preempted any number of times."""


@dataclass(eq=False)
class LayerSight:
    """What is looked at in one layer's input in one step. Filled by :meth:`Witness.watch`, then by the layer's hook."""

    rows: torch.Tensor
    """(P,): rows of the batch."""
    ids: torch.Tensor
    """(P,): their tokens."""
    places: Sequence[tuple[str, int]]
    """Request and position of each."""
    before: torch.Tensor | None = None
    """(P, d) in the model's dtype; None until the hook ran."""
    norms: torch.Tensor | None = None
    """(P,) float32: |h| before the push."""
    after: torch.Tensor | None = None

    def see_before(self, rows: torch.Tensor, residual: torch.Tensor | None) -> None:
        """``rows`` (B, d) of the batch, about to be pushed."""
        self.before = rows[self.rows]
        whole = self.before.float() if residual is None else self.before.float() + residual[self.rows].float()
        self.norms = torch.linalg.vector_norm(whole, dim=-1)

    def see_after(self, rows: torch.Tensor) -> None:
        """``rows`` (B, d) of the batch, as the layer is handed them."""
        self.after = rows[self.rows]


@dataclass(eq=False)
class _Watched:
    """Of one request: where to look, by layer in order of positions, and what was seen."""

    positions: dict[int, list[int]]
    seen: dict[int, list[SeenState]] = field(default_factory=lambda: defaultdict(list))

    def count(self) -> int:
        return sum(len(states) for states in self.seen.values())


class Witness:
    """What is to be looked at for each request, and what was seen."""

    def __init__(self) -> None:
        self._requests: dict[str, _Watched] = {}
        self._unread: list[Mapping[int, LayerSight]] = []

    def add(self, request: str, positions: Mapping[int, Sequence[int]]) -> None:
        """A request, with the positions of its text to look at, by layer."""
        self._requests[request] = _Watched({layer: sorted(at) for layer, at in positions.items()})

    def start_at(self, request: str, position: int) -> None:
        """A request begins, or comes back, at a position. Does nothing for one that is not watched."""
        watched = self._requests.get(request)
        for positions in watched.positions.values() if watched is not None and position else ():
            place = bisect_left(positions, position)
            if positions[place : place + 1] != [position]:
                positions.insert(place, position)

    def watch(self, spans: Sequence[TokenSpan], ids: torch.Tensor) -> dict[int, LayerSight]:
        """What to look at in the coming step, by layer; nothing where no position is in it.

        ``ids``: (B,), of the step's tokens.
        """
        found: dict[int, list[tuple[int, str, int]]] = defaultdict(list)
        for span in spans:
            watched = self._requests.get(span.request)
            for layer, positions in watched.positions.items() if watched is not None else ():
                for place in range(bisect_left(positions, span.first_position), len(positions)):
                    if positions[place] >= span.end_position:
                        break
                    row = span.start_row + positions[place] - span.first_position
                    found[layer].append((row, span.request, positions[place]))
        sights = {}
        for layer, of_layer in found.items():
            rows = copy_to_device(torch.tensor([row for row, _, _ in of_layer]), ids.device)
            places = [(request, position) for _, request, position in of_layer]
            sights[layer] = LayerSight(rows, ids[rows], places)
        if sights:
            self._unread.append(sights)
        return sights

    def read(self) -> None:
        """Reads what was seen from the device, which waits for it."""
        for sights in self._unread:
            for layer, sight in sights.items():
                self._read(layer, sight)
        self._unread.clear()

    def take(self, request: str) -> dict[int, list[SeenState]]:
        """What was seen of a request, by layer; it is then forgotten."""
        watched = self._requests.pop(request, None)
        return {} if watched is None else dict(watched.seen)

    def __len__(self) -> int:
        return len(self._requests)

    def _read(self, layer: int, sight: LayerSight) -> None:
        if sight.before is None or sight.norms is None or sight.after is None:
            # The hook did not run. The server will miss the position.
            return
        before, after = _bytes_of(sight.before), _bytes_of(sight.after)
        ids, norms = sight.ids.tolist(), sight.norms.tolist()
        for place, (request, position) in enumerate(sight.places):
            watched = self._requests.get(request)
            if watched is not None and watched.count() < _MAX_STATES:
                watched.seen[layer].append((position, ids[place], norms[place], before[place], after[place]))


def _bytes_of(states: torch.Tensor) -> list[bytes]:
    """Each row of (P, d) as it lies in memory."""
    rows: Any = states.cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in rows]
