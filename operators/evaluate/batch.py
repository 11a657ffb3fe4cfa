"""Many texts in one batch: the layout of their tokens, and the pushes of each pass over them.

Column 0 holds every text's first token, the next ones padding where a text is short, the last the rest of it. So the
first token, where pushes by constant directions matter, is fed in a pass of its own, and its cache can be edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from operators.core.errors import SteeringError, TrialError
from operators.core.hooks import LayerPush, PushHooks
from operators.evaluate.directions import Constant, Push, Running
from operators.model.loading import LoadedModel, embed
from operators.model.rope import check_one_rope

_NO_END = 1 << 40


@dataclass(frozen=True, eq=False)
class TextJob:
    """One text to write: its prompt, and what steers it (None: the plain model).

    ``scored``: what the plain model is given in the prompt's place when it scores the text; None means the prompt.
    ``number``: that of the prompt, which its random numbers belong to.
    """

    prompt: tuple[int, ...]
    number: int
    push: Push | None = None
    strength: float = 0.0
    scored: tuple[int, ...] | None = None


class TextBatch:
    """The tokens of R texts of two or more tokens: ``first`` (R, 1), ``rest`` (R, W-1), ``mask`` (R, W)."""

    def __init__(self, prompts: Sequence[tuple[int, ...]], loaded: LoadedModel, *, tokens: int) -> None:
        """``tokens``: how many may follow. Raises :class:`TrialError` for a prompt that is too short or too long."""
        self.lengths = np.array([len(prompt) for prompt in prompts])
        width = int(self.lengths.max())
        short = next((prompt for prompt in prompts if len(prompt) < 2), None)
        if short is not None:
            text = loaded.tokenizer.decode(short)
            raise TrialError(
                f"prompt {text!r} has {len(short)} tokens; two or more are needed, or pushes of all but the first "
                "leave nothing to steer"
            )
        if width + tokens > _longest(loaded):
            raise TrialError(
                f"prompt of {width} tokens; {loaded.name} takes at most {_longest(loaded)} with {tokens} more"
            )
        # The first token is fed alone.
        check_one_rope(loaded.model.config.get_text_config(), 1, width + tokens - 1)
        device = loaded.device
        # Padding repeats the first token: a repetition penalty must not see one that is not in the text.
        rest = [prompt[:1] * (width - len(prompt)) + prompt[1:] for prompt in prompts]
        self.first = torch.tensor([prompt[:1] for prompt in prompts], device=device)
        self.rest = torch.tensor(rest, device=device)
        padding = torch.tensor(width - self.lengths, device=device)[:, None]
        columns = torch.arange(1, width, device=device)[None]
        real = columns > padding
        self.mask = torch.cat([torch.ones_like(real[:, :1]), real], 1)
        self.positions = (columns - padding).clamp_min(0)
        """Of ``rest``, (R, W-1)."""


def _longest(loaded: LoadedModel) -> int:
    """Tokens of a text, its padding included: a window shorter than a batch is wide would count the padding."""
    config = loaded.model.config.get_text_config()
    windows = [loaded.context_length]
    window = getattr(config, "sliding_window", None)
    if window and any("sliding" in kind for kind in getattr(config, "layer_types", None) or ("sliding",)):
        windows.append(int(window))
    return min(windows)


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
        doses = self._hooks.doses()
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
        x = embed(self._loaded.model, ids)
        table = getattr(self._loaded.model.get_decoder(), "wpe", None)
        return (x if table is None else x + table.weight[positions]).float()


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
