"""Looking at hidden states before and after their pushes, at positions that the server names, apart from what pushes.

It knows nothing of operators: where to look, it is told by the server, and in which rows of a step, by vLLM. What it
saw is judged by the server. Positions at which a request begins, or comes back, behind cached keys and values are
looked at as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    residual: torch.Tensor | None = None
    """(P, d), where the hidden state is ``before + residual``."""
    after: torch.Tensor | None = None

    def see_before(self, rows: torch.Tensor, residual: torch.Tensor | None) -> None:
        """``rows`` (B, d) of the batch, about to be pushed."""
        self.before = rows[self.rows]
        self.residual = None if residual is None else residual[self.rows]

    def see_after(self, rows: torch.Tensor) -> None:
        """``rows`` (B, d) of the batch, as the layer is handed them."""
        self.after = rows[self.rows]


class _Watched:
    """Of one request: where to look, by layer in order of positions, and what was seen."""

    def __init__(self, positions: Mapping[int, Sequence[int]]) -> None:
        self._by_layer = {layer: sorted(at) for layer, at in positions.items()}
        self._of_any = sorted({position for at in positions.values() for position in at})
        self.seen: dict[int, list[SeenState]] = defaultdict(list)

    def add(self, position: int) -> None:
        """Looks at a position in every layer that is looked at."""
        for positions in (*self._by_layer.values(), self._of_any) if self._by_layer else ():
            place = bisect_left(positions, position)
            if positions[place : place + 1] != [position]:
                positions.insert(place, position)

    def due(self, first: int, end: int) -> list[tuple[int, int]]:
        """Layer and position of what is to be looked at among the positions ``first`` to ``end`` - 1."""
        place = bisect_left(self._of_any, first)
        if place == len(self._of_any) or self._of_any[place] >= end:
            # As in most steps.
            return []
        return [
            (layer, position)
            for layer, positions in self._by_layer.items()
            for position in positions[bisect_left(positions, first) : bisect_left(positions, end)]
        ]

    def see(self, layer: int, state: SeenState) -> None:
        """Keeps what was seen, up to a limit."""
        if sum(map(len, self.seen.values())) < _MAX_STATES:
            self.seen[layer].append(state)


class Witness:
    """What is to be looked at for each request, and what was seen."""

    def __init__(self) -> None:
        self._requests: dict[str, _Watched] = {}
        self._unread: list[tuple[int, LayerSight]] = []

    def add(self, request: str, positions: Mapping[int, Sequence[int]]) -> None:
        """A request, with the positions of its text to look at, by layer."""
        self._requests[request] = _Watched(positions)

    def start_at(self, request: str, position: int) -> None:
        """A request begins, or comes back, at a position. Does nothing for one that is not watched."""
        if position and request in self._requests:
            self._requests[request].add(position)

    def watch(self, spans: Sequence[TokenSpan], ids: torch.Tensor) -> dict[int, LayerSight]:
        """What to look at in the coming step, by layer; nothing where no position is in it.

        ``ids``: (B,), of the step's tokens.
        """
        found: dict[int, list[tuple[int, str, int]]] = defaultdict(list)
        for span in spans:
            watched = self._requests.get(span.request)
            for layer, position in watched.due(span.first_position, span.end_position) if watched is not None else ():
                found[layer].append((span.start_row + position - span.first_position, span.request, position))
        if not found:
            return {}
        # One copy to the device, and one choice of tokens, for all layers.
        rows = copy_to_device(torch.tensor([row for of_layer in found.values() for row, *_ in of_layer]), ids.device)
        seen_ids, sights, start = ids[rows], {}, 0
        for layer, of_layer in found.items():
            part = slice(start, start + len(of_layer))
            places = [(request, position) for _, request, position in of_layer]
            sights[layer] = LayerSight(rows[part], seen_ids[part], places)
            start = part.stop
        self._unread.extend(sights.items())
        return sights

    def read(self) -> None:
        """Reads what was seen from the device, which waits for it: all at once."""
        unread, self._unread = self._unread, []
        # Where the hook did not run, the server will miss the position.
        seen = [(layer, sight) for layer, sight in unread if sight.after is not None]
        # vLLM's first layer has no residual, all others have one.
        self._read([one for one in seen if one[1].residual is None])
        self._read([one for one in seen if one[1].residual is not None])

    def take(self, request: str) -> dict[int, list[SeenState]]:
        """What was seen of a request, by layer; it is then forgotten."""
        watched = self._requests.pop(request, None)
        return {} if watched is None else dict(watched.seen)

    def __len__(self) -> int:
        return len(self._requests)

    def _read(self, seen: Sequence[tuple[int, LayerSight]]) -> None:
        if not seen:
            return
        before, after, ids = (_joined(seen, name) for name in ("before", "after", "ids"))
        whole = before.float()
        if seen[0][1].residual is not None:
            whole = whole + _joined(seen, "residual").float()
        norms = torch.linalg.vector_norm(whole, dim=-1)
        places = [(layer, *place) for layer, sight in seen for place in sight.places]
        states = zip(ids.tolist(), norms.tolist(), _bytes_of(before), _bytes_of(after), strict=True)
        for (layer, request, position), state in zip(places, states, strict=True):
            if request in self._requests:
                self._requests[request].see(layer, (position, *state))


def _joined(seen: Sequence[tuple[int, LayerSight]], name: str) -> torch.Tensor:
    return torch.cat([getattr(sight, name) for _, sight in seen])


def _bytes_of(states: torch.Tensor) -> list[bytes]:
    """Each row of (P, d) as it lies in memory."""
    rows: Any = states.cpu().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in rows]
