"""A job that is being decoded, turn by turn."""

from __future__ import annotations

from steer_server.engine.hf.decode import Decoder
from steer_server.engine.hf.queue import QueuedJob
from steer_server.types import RowFinished, TokenEvent


class RunningJob:
    """What the decoding thread keeps of a job between its turns."""

    def __init__(self, queued: QueuedJob, decoder: Decoder) -> None:
        self.queued = queued
        self.seconds = 0.0
        """That the engine has worked for it."""
        self._decoder = decoder
        self._turns = decoder.turns()
        self._num_rows = len(queued.job.rows)
        queued.job.caller.grant.charge.use(len(queued.job.forced_ids) * self._num_rows)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to decode."""
        return not self._num_rows

    def take_turn(self) -> tuple[int, int, int]:
        """One forward pass; its events go to the reader of the job.

        Returns:
            Tokens read, of a prompt or a given text, and tokens of plain and of steered rows that were generated.
        """
        read = self._decoder.num_prompt_tokens_read
        generated = [0, 0]
        events = tuple(next(self._turns))
        for event in events:
            if isinstance(event, TokenEvent) and not self.queued.job.forced_ids:
                generated[self.queued.job.rows[event.row].plan is not None] += 1
            self._num_rows -= isinstance(event, RowFinished)
        self.queued.job.caller.grant.charge.use(sum(generated))
        self.queued.post(*events)
        return self._decoder.num_prompt_tokens_read - read, generated[0], generated[1]
