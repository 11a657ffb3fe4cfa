"""The map of texts with one block of the model in memory at a time.

A sketch multiplies by J and its transpose four times, each time a whole batch of vectors. Here every such product is
one sweep over the blocks: the weights of a block are read, all vectors of all texts go through it, and it is dropped.

    record   forward: the stream of each text, which is kept at every block; beside it the columns 0, x and
             (0 .. 0, x_{n-1}), which give c, the reconstruction and the last term; the plain model's streams of these
             and of other texts; and the gradients of the detached block, held to those of its replay
    jvp      forward: V (l, n, d) of each text
    vjp      backward: U (l, d), from the last block to the first

A block's frozen factors are recorded anew in each sweep, from the stream that it received: one more input beside l
vectors, and no memory that grows with depth but the streams themselves, (n, d) for each block and text.

Memory beside what stays: one block, its factors, the streams, and (l, n, d) for each text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from operators.core.header import Profile
from operators.core.progress import Progress, silent
from operators.maps.detach import Tape, recording, replaying
from operators.maps.frozen_block import BlockCall, FrozenBlock, block_calls, record
from operators.maps.jacobian import relative_error
from operators.maps.replay import VECTORS_PER_PASS, group_size
from operators.model.loading import LoadedModel, final_norm

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

GRADIENT_TOKENS = 8
PLAIN_POSITIONS = 1024
"""Positions of plain texts that go through a block at a time."""


@dataclass(eq=False)
class StreamedText:
    """One text's part of the map, with what a :class:`~operators.maps.replay.Replay` says of it.

    ``plain`` (d,) is the target of the plain model; ``value`` (d,) is sum_i J_i x_i + c.
    """

    x: torch.Tensor
    calls: list[BlockCall]
    streams: list[torch.Tensor]
    """(1, n, d), what each block receives, in the model's dtype."""
    norm: Tape | None = None
    """The factors of the final norm, for the profile golden."""
    y: torch.Tensor = field(init=False)
    offset: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)
    last: torch.Tensor = field(init=False)
    plain: torch.Tensor = field(init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return int(self.x.shape[0]), int(self.x.shape[1])

    def reconstruction(self) -> torch.Tensor:
        """sum_i J_i x_i + c, shape (d,): equal to ``y`` up to rounding."""
        return self.value

    def last_term(self) -> torch.Tensor:
        """J_{n-1} x_{n-1}, shape (d,)."""
        return self.last


@dataclass(eq=False)
class _Plain:
    """Texts of the plain model, side by side; shorter ones end in positions that no token before them sees."""

    lengths: list[int]
    stream: torch.Tensor
    calls: list[BlockCall]


class Sweeps:
    """Passes over the first ``layer`` blocks of a streamed model, each of which is read once in a pass."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        layer: int,
        profile: Profile,
        vectors_per_pass: int = VECTORS_PER_PASS,
        passes: int = 0,
        progress: Progress = silent,
    ) -> None:
        """``passes``: how many there will be, for the progress."""
        assert loaded.blocks is not None  # noqa: S101 - for the type checker
        self._blocks, self.model = loaded.blocks, loaded.model
        self.layer, self.profile, self._vectors_per_pass = layer, profile, vectors_per_pass
        self._progress, self._done, self._expected = progress, 0, passes * layer
        self.wide = torch.promote_types(loaded.dtype, torch.float32)
        self.device = loaded.device

    def forward(self, visit: Callable[[int, nn.Module], None]) -> None:
        """Calls ``visit`` with each block and its number, first to last."""
        self._sweep(range(self.layer), visit)

    def backward(self, visit: Callable[[int, nn.Module], None]) -> None:
        """The same, last to first."""
        self._sweep(range(self.layer - 1, -1, -1), visit)

    def _sweep(self, order: range, visit: Callable[[int, nn.Module], None]) -> None:
        for place, index in enumerate(order):
            following = order[place + 1] if place + 1 < len(order) else None
            with self._blocks.present(index, following) as block:
                visit(index, block)
            self._done += 1
            self._expected = max(self._expected, self._done)
            self._progress("blocks of weights", self._done, self._expected)

    def frozen(self, block: nn.Module, tape: Tape, n: int, *, last: bool) -> FrozenBlock:
        """The map of a block for texts of n tokens."""
        return FrozenBlock(self.model, block, tape, last=last, vectors_per_pass=group_size(self._vectors_per_pass, n))


@dataclass(frozen=True, eq=False)
class Recorded:
    """What the first pass gives. Filled by :func:`record_texts`.

    ``plain`` (m, d): targets of the other texts, in float64; ``gradient_error``: the largest of any block, relative.
    """

    texts: list[StreamedText]
    plain: torch.Tensor
    gradient_error: float


def record_texts(
    sweeps: Sweeps, texts: Sequence[tuple[int, ...]], others: Sequence[tuple[int, ...]], *, together: bool = True
) -> Recorded:
    """The first pass, for token ids of ``texts`` and of others whose targets are wanted and no map.

    Args:
        together: whether texts of different lengths may go through the plain model side by side.
    """
    model, layer = sweeps.model, sweeps.layer
    recorded = [_start(sweeps, ids) for ids in texts]
    columns = [_columns(text) for text in recorded]
    # A short text is itself what gradients are checked with, and is recorded on the way.
    probe = recorded[0] if len(texts[0]) <= GRADIENT_TOKENS else _start(sweeps, texts[0][:GRADIENT_TOKENS])
    errors: list[float] = []
    batches = [_plain(sweeps, group) for group in _groups([*texts, *others], together=together)]

    def visit(index: int, block: nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                batch.stream = batch.calls[index](block, batch.stream)
        checked = _check_gradient(model, block, probe.calls[index], probe.streams[-1])
        errors.append(checked.error)
        if probe is not recorded[0]:
            probe.streams[:] = [checked.output]
        tapes = []
        for text in recorded:
            if text is probe:
                tape, output = checked.tape, checked.output
            else:
                tape, output = record(model, block, text.calls[index], text.streams[index])
            text.streams.append(output)
            tapes.append(tape)
        block.to(sweeps.wide)
        for which, (text, tape) in enumerate(zip(recorded, tapes, strict=True)):
            frozen = sweeps.frozen(block, tape, text.shape[0], last=index == layer - 1)
            columns[which] = frozen.push(columns[which])

    sweeps.forward(visit)
    if sweeps.profile == "golden":
        errors.append(_check_gradient(model, final_norm(model), BlockCall((), {}), probe.streams[-1]).error)
    for text, values in zip(recorded, columns, strict=True):
        _finish(sweeps, text, values)
    targets = torch.cat([_targets(sweeps, batch) for batch in batches])
    for text, plain in zip(recorded, targets[: len(texts)], strict=True):
        text.plain = plain
    return Recorded(recorded, targets[len(texts) :].double(), max(errors))


def _start(sweeps: Sweeps, ids: tuple[int, ...]) -> StreamedText:
    x, calls = block_calls(sweeps.model, torch.tensor([ids], device=sweeps.device), sweeps.layer)
    return StreamedText(x[0].to(sweeps.wide), calls, [x])


def _columns(text: StreamedText) -> torch.Tensor:
    """(3, n, d): 0, x, and x at the last position alone."""
    columns = torch.zeros_like(text.x).repeat(3, 1, 1)
    columns[1], columns[2, -1] = text.x, text.x[-1]
    return columns


def _finish(sweeps: Sweeps, text: StreamedText, values: torch.Tensor) -> None:
    final = text.streams.pop()[:, -1]
    if sweeps.profile == "golden":
        norm = final_norm(sweeps.model)
        text.norm, final = record(sweeps.model, norm, BlockCall((), {}), final)
        values = normed(sweeps, text, values)
    text.y = final[0].to(sweeps.wide)
    text.offset, text.value = values[0], values[1]
    text.last = values[2] - values[0]


def normed(sweeps: Sweeps, text: StreamedText, values: torch.Tensor) -> torch.Tensor:
    """What the target is of streams (l, d) at the last position."""
    if text.norm is None:
        return values
    return _norm(sweeps, text.norm).push(values[:, None])


def norm_pulled(sweeps: Sweeps, text: StreamedText, cotangents: torch.Tensor) -> torch.Tensor:
    if text.norm is None:
        return cotangents
    return _norm(sweeps, text.norm).pull(cotangents, 1)[:, 0]


def _norm(sweeps: Sweeps, tape: Tape) -> FrozenBlock:
    return FrozenBlock(sweeps.model, final_norm(sweeps.model), tape, last=True, vectors_per_pass=1 << 30)


def _groups(texts: Sequence[tuple[int, ...]], *, together: bool) -> list[list[tuple[int, ...]]]:
    groups: list[list[tuple[int, ...]]] = []
    for ids in texts:
        longest = max([len(ids), *(len(other) for other in groups[-1])]) if groups else len(ids)
        if groups and together and longest * (len(groups[-1]) + 1) <= PLAIN_POSITIONS:
            groups[-1].append(ids)
        else:
            groups.append([ids])
    return groups


def _plain(sweeps: Sweeps, texts: Sequence[tuple[int, ...]]) -> _Plain:
    longest = max(map(len, texts))
    padded = [(*ids, *[ids[-1]] * (longest - len(ids))) for ids in texts]
    stream, calls = block_calls(sweeps.model, torch.tensor(padded, device=sweeps.device), sweeps.layer)
    return _Plain([len(ids) for ids in texts], stream, calls)


def _targets(sweeps: Sweeps, batch: _Plain) -> torch.Tensor:
    """(b, d)."""
    last = torch.stack([stream[length - 1] for stream, length in zip(batch.stream, batch.lengths, strict=True)])
    if sweeps.profile == "residual":
        return last
    with torch.no_grad():
        target: torch.Tensor = final_norm(sweeps.model)(last[:, None])[:, 0]
    return target


@dataclass(frozen=True, eq=False)
class _Checked:
    """A block recorded at a text (:func:`~operators.maps.frozen_block.record`), and how far its gradients are off."""

    tape: Tape
    output: torch.Tensor
    error: float


def _check_gradient(model: PreTrainedModel, block: nn.Module, call: BlockCall, stream: torch.Tensor) -> _Checked:
    """How far the detached block's gradients are from its replay's, for a random cotangent, relative.

    Two ways to the same map: what one of them leaves live that the other froze shows here.
    """
    wide = torch.promote_types(stream.dtype, torch.float32)
    with torch.enable_grad():
        live = stream.detach().clone().requires_grad_(True)
        with recording(model, within=block) as tape:
            output = call(block, live)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        (gradient,) = torch.autograd.grad(output, live, cotangent)
        zero = torch.zeros_like(stream, dtype=wide, requires_grad=True)
        with replaying(model, tape, within=block):
            (expected,) = torch.autograd.grad(block(zero), zero, cotangent.to(wide))
    return _Checked(tape, output.detach(), relative_error(gradient, expected))
