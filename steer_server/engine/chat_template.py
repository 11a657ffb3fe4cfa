"""Conversations to text by the model's chat template, in processes that can be ended.

A thread that renders a template cannot be stopped. So each rendering happens in a small process, kept for the next one;
one that takes too long, or too much memory, is ended and replaced.
"""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from steer_server.errors import InvalidRequestError, ShuttingDownError
from steer_server.fair_threads import FairThreads
from steer_server.types import Chat

_SCRIPT = Path(__file__).with_name("render_chat.py")
_PROCESSES = 2
_MAX_SECONDS = 2
"""Of computing, for one conversation. A usual one takes milliseconds."""
_MAX_WAIT = 20.0
"""Seconds that pass until an answer is no longer waited for, however busy the machine is."""
_MAX_MEMORY = 512 << 20
_BYTES_PER_CHARACTER = 64
"""Of memory: a text is there as JSON, as values, in pieces and whole."""


class ChatTemplate:
    """The chat template of one model."""

    def __init__(self, tokenizer: Any, *, max_characters: int) -> None:
        """``max_characters``: of a rendered conversation."""
        setup = {
            "template": tokenizer.get_chat_template(),
            "variables": dict(tokenizer.special_tokens_map),
            "max_characters": max_characters,
            "max_memory": _MAX_MEMORY + _BYTES_PER_CHARACTER * max_characters,
            "max_seconds": _MAX_SECONDS,
        }
        self._setup = json.dumps(setup) + "\n"
        self._idle: list[_Process] = []
        self._all: set[_Process] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = FairThreads(_PROCESSES, "chat")
        self._idle.append(self._start())

    async def render(self, chat: Chat) -> str:
        """The text of a conversation, generation prompt appended; or up to the end of the turn that is continued.

        Raises:
            InvalidRequestError: the template refuses it, takes too long or makes too much of it, lacks an option,
                leaves a turn out, or does not have the turn that is to be continued in its text.
            ShuttingDownError: this was closed.
        """
        return await self._threads.run(partial(self._render, chat))

    def close(self) -> None:
        """Ends the processes, whatever they do."""
        with self._lock:
            self._closed = True
            for process in self._all:
                process.end()
        self._threads.close()

    def _render(self, chat: Chat) -> str:
        asked = _question(chat)
        answer = self._ask(asked)
        if answer is None:
            # Not for its time: something killed the process, which may have happened long ago.
            answer = self._ask(asked) or {"problem": "ends the process that renders it"}
        if "part" in answer:
            raise InvalidRequestError(f"prompt.chat.{answer['part']}", str(answer["problem"]))
        if "problem" in answer:
            raise InvalidRequestError("prompt.chat", f"the chat template {answer['problem']}")
        return str(answer["text"])

    def _ask(self, asked: Sequence[bytes]) -> dict[str, Any] | None:
        """The answer of a process; None of one that was killed."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        process = process or self._start()
        answer = process.ask(asked)
        with self._lock:
            if answer is None or process.took_too_long:
                # Also of one that was given up at the moment it answered.
                self._all.discard(process)
            else:
                self._idle.append(process)
            if self._closed:
                raise ShuttingDownError
        if answer is None and process.took_too_long:
            return {"problem": f"does not end within {_MAX_SECONDS} s of computing"}
        return answer

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise ShuttingDownError
            process = _Process(self._setup)
            self._all.add(process)
        return process


def _question(chat: Chat) -> list[bytes]:
    """What a process is asked, in pieces. See :mod:`steer_server.engine.render_chat`."""
    texts = [turn.content.encode() for turn in chat.messages]
    asked = {
        "messages": [{"role": turn.role, "size": len(text)} for turn, text in zip(chat.messages, texts, strict=True)],
        "options": {option.name: option.value for option in chat.template_options},
        # Put behind the turn that is continued, to find its end: nobody can have written it.
        "mark": secrets.token_hex(16) + "end" if chat.continue_final_message else "",
    }
    return [json.dumps(asked).encode(), b"\n", *texts]


class _Process:
    """One process, asked by one thread at a time."""

    def __init__(self, setup: str) -> None:
        # Not through ``PATH`` or a shell, and without the folder of the script among those that are imported from.
        command = [sys.executable, "-P", str(_SCRIPT)]
        self._process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the server, which ends this itself.
            start_new_session=True,
        )
        self._setup = setup.encode()
        self.took_too_long = False
        """Whether that is why it ended."""

    def ask(self, asked: Sequence[bytes]) -> dict[str, Any] | None:
        """Its answer; None where it ended without one."""
        guard = threading.Timer(_MAX_WAIT, self._give_up)
        guard.start()
        try:
            answer = self._exchange((self._setup, *asked))
        finally:
            guard.cancel()
            guard.join()
        self._setup = b""
        if answer is None:
            self.end()
            self.took_too_long |= self._process.returncode == -signal.SIGXCPU
        return answer

    def _exchange(self, pieces: Sequence[bytes]) -> dict[str, Any] | None:
        to, back = self._process.stdin, self._process.stdout
        if to is None or back is None:
            return None
        try:
            to.writelines(pieces)
            to.flush()
            line = back.readline()
            if not line.endswith(b"\n"):
                return None
            answer: dict[str, Any] = json.loads(line)
            text = back.read(answer["size"])
        except (OSError, ValueError):
            # A pipe to a process that has ended.
            return None
        return answer | {"text": text.decode()} if len(text) == answer["size"] else None

    def _give_up(self) -> None:
        self.took_too_long = True
        self.end()

    def end(self) -> None:
        """Kills it. Whoever waits for its answer gets None."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
