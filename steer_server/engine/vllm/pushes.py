"""The pushes of one step, for the tokens of many requests at once.

What rows do not share with their neighbours is worked out for all rows together; per operator there remain two matrix
products (the first one per block in use), so that 64 different operators in a batch cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from operators.core.apply import PreparedOperator, cumulative, substitute, terms
from operators.core.header import Rule


@dataclass(frozen=True)
class Segment:
    """``count`` tokens of one request in a step: rows ``start``... of the batch, positions ``first``... of its text."""

    request: str
    start: int
    first: int
    count: int


@dataclass(eq=False)
class Task:
    """One operator over one segment.

    ``use``: which of the request's operators; ``at``: the segment's first row in the step's embeddings; ``half``:
    lambda/2. ``total`` (r,): s of the published rule before the segment, which :func:`work_out` moves to its end; other
    rules have none.
    """

    segment: Segment
    use: int
    at: int
    half: float
    blend: float
    total: torch.Tensor | None

    @property
    def first(self) -> int:
        """Position of its first token."""
        return self.segment.first

    @property
    def count(self) -> int:
        """Its tokens."""
        return self.segment.count


@dataclass(frozen=True, eq=False)
class Group:
    """The tasks of a step that use one operator by one rule; None is the anchor alone (blend 1)."""

    operator: PreparedOperator
    rule: Rule | None
    tasks: list[Task]

    @property
    def count(self) -> int:
        """Its tokens."""
        return sum(task.count for task in self.tasks)


def work_out(groups: Sequence[Group], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(lambda/2) d_k/|d_k| for every token of every task.

    Args:
        x: (R, d) float32, the step's embeddings.

    Returns:
        Pushes (T, d) float32, group after group and task after task; and which of them (T,) have a direction. Those
        that have none are 0. Tasks are put in another order within their group. Nothing is read from the device.
    """
    for group in groups:
        group.tasks.sort(key=partial(_order, group.operator.factors.shape[0]))
    tasks = [task for group in groups for task in group.tasks]
    mine = x[send(indices([task.at for task in tasks], [task.count for task in tasks]), x.device)]
    parts, at = [], 0
    for group in groups:
        end = at + group.count
        parts.append(_raw(group, mine[at:end]))
        at = end
    unit, usable = _unit(parts[0] if len(parts) == 1 else torch.cat(parts))
    if any(0.0 < task.blend < 1.0 for task in tasks):
        blend = _per_token([task.blend for task in tasks], tasks, x)
        anchors = torch.cat([group.operator.unit_anchor.expand(group.count, -1) for group in groups])
        # The bits of a row without a blend do not depend on its neighbours' blends.
        mixed, still = _unit((1.0 - blend) * unit + blend * anchors)
        unit, usable = torch.where(blend > 0, mixed, unit), usable & (still | (blend == 0).squeeze(-1))
    push = _per_token([task.half for task in tasks], tasks, x) * unit
    return torch.where(usable[:, None], push, torch.zeros_like(push)), usable


def _raw(group: Group, x: torch.Tensor) -> torch.Tensor:
    """a_k (T, d)."""
    if group.rule is None:
        return group.operator.unit_anchor.expand(x.shape[0], -1)
    if group.rule == "substitute":
        return substitute(group.operator, x)
    return cumulative(group.operator, _sums(group.operator, group.tasks, x))


def _sums(operator: PreparedOperator, tasks: Sequence[Task], x: torch.Tensor) -> torch.Tensor:
    """s_k (T, r). Each task's total moves on to its last token."""
    blocks, rank, _ = operator.factors.shape
    sums = x.new_empty(x.shape[0], rank)
    before = torch.stack([task.total for task in tasks if task.total is not None])
    long = [task for task in tasks if task.count > 1]
    at = sum(task.count for task in long)
    if long:
        counts = [task.count for task in long]
        sums[:at] = terms(operator, x[:at], indices([task.first for task in long], counts))
        for task, part, total in zip(long, torch.split(sums[:at], counts), before, strict=False):
            part[0] += total
            task.total = part.cumsum_(0)[-1].clone()
    single = tasks[len(long) :]
    end = at
    for block, some in groupby(single, key=lambda task: task.first % blocks):
        start, end = end, end + len(list(some))
        torch.mm(x[start:end], operator.factors[block].T, out=sums[start:end])
    sums[at:] += before[len(long) :]
    for task, total in zip(single, sums[at:].unbind(), strict=True):
        task.total = total
    return sums


def _order(blocks: int, task: Task) -> int:
    """Texts of several tokens first; then one row each, those that meet the same block side by side."""
    return -1 if task.count > 1 else task.first % blocks


def _unit(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v/|v| (T, d), and which rows (T,) have a direction."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms, (torch.isfinite(norms) & (norms > 0)).squeeze(-1)


def _per_token(values: list[float], tasks: Sequence[Task], like: torch.Tensor) -> torch.Tensor:
    """A value per task as one per token, (T, 1)."""
    found = torch.tensor(values, dtype=torch.float32)
    if any(task.count > 1 for task in tasks):
        found = found.repeat_interleave(torch.tensor([task.count for task in tasks]))
    return send(found[:, None], like.device)


def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on a device, which has them in its own time: the host does not wait for its queue."""
    return values.to(device, non_blocking=True)


def indices(starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """start, start + 1, ..., ``count`` numbers for each start: (sum of counts,)."""
    if all(count == 1 for count in counts):
        return torch.tensor(starts)
    return torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
