"""The pushes of each pass over a batch of texts, and the pass over their first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from operators.core.errors import SteeringError
from operators.core.hooks import LayerPush, PushHooks
from operators.evaluate.batch import TextBatch, TextJob
from operators.evaluate.directions import Constant, Running
from operators.model.loading import LoadedModel, block_input, embed

_NO_END = 1 << 40


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows with one kind of direction. ``low`` and ``high`` (R,): the positions [low, high) that are pushed."""

    rows: np.ndarray
    running: Running
    units: torch.Tensor | None
    half_strengths: torch.Tensor
    low: np.ndarray
    high: np.ndarray
    interval: torch.Tensor
    """(R, 2) int64 on the device: low and high."""


class BatchPushes:
    """The pushes of a batch's rows, pass after pass, each over the next tokens of every row."""

    def __init__(self, jobs: Sequence[TextJob], loaded: LoadedModel, hooks: PushHooks, layer: int) -> None:
        self._loaded, self._hooks, self._layer = loaded, hooks, layer
        self._jobs = jobs
        self._refused = torch.zeros(len(jobs), dtype=torch.bool, device=loaded.device)
        self._pushed: tuple[torch.Tensor, torch.Tensor] | None = None
        """Of the pass under way: rows (R,) and where (R, T) they are pushed."""
        by_kind: dict[int, list[int]] = {}
        for row, job in enumerate(jobs):
            if job.push is not None and job.strength:
                kind = 0 if isinstance(job.push.directions, Constant) else id(job.push.directions)
                by_kind.setdefault(kind, []).append(row)
        self._groups = [self._group(rows) for rows in by_kind.values()]
        self._states = any(group.units is None for group in self._groups)

    def _group(self, rows: list[int]) -> _Group:
        pushes = [push for row in rows if (push := self._jobs[row].push) is not None]
        device = self._loaded.device
        intervals = [
            push.positions.interval(len(self._jobs[row].prompt)) for row, push in zip(rows, pushes, strict=True)
        ]
        bounds = np.array([(low, _NO_END if high is None else high) for low, high in intervals])
        directions = [push.directions for push in pushes]
        units = [one.unit for one in directions if isinstance(one, Constant)]
        return _Group(
            rows=np.array(rows),
            running=directions[0].begin(len(rows)),
            units=torch.stack(units) if units else None,
            half_strengths=torch.tensor([self._jobs[row].strength / 2.0 for row in rows], device=device),
            low=bounds[:, 0],
            high=bounds[:, 1],
            interval=torch.tensor(bounds, device=device),
        )

    def load(self, ids: torch.Tensor, positions: torch.Tensor, real: torch.Tensor, start: np.ndarray) -> None:
        """Before a pass over ``ids`` (R, T): the tokens at ``positions``, from ``start`` (R,) on, where ``real``."""
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        end = start + ids.shape[1]
        x = self._embedded(ids, positions) if self._states else None
        for group in self._groups:
            active = (group.low < end[group.rows]) & (group.high > start[group.rows])
            if group.units is None:
                rows = torch.from_numpy(group.rows).to(ids.device)
                chosen = torch.arange(len(rows), device=ids.device)
                assert x is not None  # noqa: S101 - for the type checker
                # Every token enters the running sum, pushed or not.
                units = group.running.advance(x[rows], positions[rows], real[rows])
            else:
                chosen = torch.from_numpy(np.flatnonzero(active)).to(ids.device)
                rows = torch.from_numpy(group.rows[active]).to(ids.device)
                units = group.units[chosen][:, None].expand(-1, ids.shape[1], -1)
            if not active.any():
                continue
            at, bounds = positions[rows], group.interval[chosen]
            where = real[rows] & (at >= bounds[:, :1]) & (at < bounds[:, 1:])
            pieces.append((rows, units * group.half_strengths[chosen, None, None], where))
        if not pieces:
            self._pushed = None
            self._hooks.load({})
            return
        rows, push, where = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        self._pushed = rows, where
        self._hooks.load({self._layer: LayerPush(rows, push, where)})

    def collect(self) -> None:
        """After a pass: notes which rows were not moved where they should have been."""
        doses = self._hooks.take_doses()
        if self._pushed is not None:
            rows, where = self._pushed
            dose = doses[self._layer]
            self._refused[rows] |= (where & ~((dose > 0) & torch.isfinite(dose))).any(-1)

    def check(self, names: Sequence[str] | None = None) -> None:
        """Raises :class:`SteeringError` where a pass left a row unmoved."""
        refused = self._refused.nonzero().flatten().tolist()
        if refused:
            row = refused[0]
            name = "" if names is None else f"{names[row]}: "
            raise SteeringError(f"{name}a push of strength {self._jobs[row].strength:g} did not move a hidden state")

    def _embedded(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (R, T, d) float32 as the first block receives it, for rows whose texts are at different positions."""
        model = self._loaded.model
        return block_input(model, embed(model, ids), positions=positions).float()


def first_token(jobs: Sequence[TextJob], batch: TextBatch, loaded: LoadedModel, pushes: BatchPushes) -> DynamicCache:
    """The KV cache of the first tokens. Of texts whose push moves values alone, it has the plain keys."""
    cache = _feed_first(batch.first, loaded, pushes)
    rows = [row for row, job in enumerate(jobs) if job.push is not None and job.strength and job.push.part == "values"]
    if rows:
        plain = _feed_first(batch.first[rows], loaded, None)
        for steered_layer, plain_layer in zip(cache.layers, plain.layers, strict=True):
            steered_layer.keys[rows] = plain_layer.keys
    return cache


def _feed_first(first: torch.Tensor, loaded: LoadedModel, pushes: BatchPushes | None) -> DynamicCache:
    cache, zeros = DynamicCache(config=loaded.model.config), torch.zeros_like(first)
    if pushes is not None:
        pushes.load(first, zeros, torch.ones_like(first, dtype=torch.bool), np.zeros(len(first), dtype=int))
    loaded.model(
        input_ids=first,
        attention_mask=torch.ones_like(first),
        position_ids=zeros,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    if pushes is not None:
        pushes.collect()
    return cache
