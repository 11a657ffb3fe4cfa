"""What an engine has computed, whether or not anybody was there to get it."""

from __future__ import annotations

import threading


class WorkDone:
    """Counts of tokens since the start; one thread or several add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.prompt_tokens = 0
        """As they were read, once for all texts of a request."""
        self.plain_tokens = 0
        self.steered_tokens = 0
        """Generated, and those of plain texts before."""

    def add(self, prompt_tokens: int, plain_tokens: int, steered_tokens: int) -> None:
        """Books a piece of work."""
        with self._lock:
            self.prompt_tokens += prompt_tokens
            self.plain_tokens += plain_tokens
            self.steered_tokens += steered_tokens
