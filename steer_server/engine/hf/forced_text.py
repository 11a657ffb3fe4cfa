"""Reading a given text, in place of choosing one: several of its tokens in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from steer_server.engine.distributions import compare_positions
from steer_server.engine.hf.rows import BatchSlot, end_all, end_row
from steer_server.types import EngineEvent, FinishReason, TokenEvent


def read_text(
    slots: list[BatchSlot],
    text: Sequence[int],
    logits: torch.Tensor,
    *,
    chunk: int,
    forward: Callable[[torch.Tensor], torch.Tensor],
    check_interruption: Callable[[], FinishReason | None],
) -> Generator[list[EngineEvent], None, None]:
    """The events of every row's tokens, and of its end, in turns of one forward pass.

    Args:
        slots: the rows, the plain one first.
        text: ids (m,).
        logits: (B, V), of the text's first token.
        chunk: tokens of a pass, at most.
        forward: a pass over ids (T,), the same for every row; its logits (B, T, V).
    """
    ids = torch.tensor(text, device=logits.device)
    begin, end, logits = 0, 1, logits[:, None]
    _append(slots, text[:1])
    while True:
        yield list(_score(slots, text[begin:end], logits))
        if end == len(text):
            return
        if interruption := check_interruption():
            yield list(end_all(slots, interruption))
            return
        begin, end = end, min(end + chunk, len(text))
        # Before the pass, whose states are held against them. The last token of all is never fed.
        _append(slots, text[begin:end])
        del logits
        logits = forward(ids[begin - 1 : end - 1])


def _append(slots: list[BatchSlot], ids: Sequence[int]) -> None:
    for slot in slots:
        slot.state.sequence.extend(ids)


def _score(slots: list[BatchSlot], tokens: Sequence[int], logits: torch.Tensor) -> Iterator[EngineEvent]:
    for row, slot in enumerate(slots):
        state = slot.state
        for token, score in zip(tokens, compare_positions(logits[0], logits[row], tokens, state.report), strict=True):
            piece, reason = state.text.push(token)
            yield TokenEvent(state.index, token, piece.text, score=score)
            if reason is not None:
                yield end_row(state, reason, piece.stop_string)
