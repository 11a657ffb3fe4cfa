"""The file of a blind vote: a head, then one line per answer. No line names an arm before the vote is closed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import steer_client

_KIND = "steer vote"


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said of one prompt: "1" or "2", "tie", "skip", or "same" where both texts are the same."""

    prompt_id: str
    #: In the order in which they were shown.
    texts: tuple[str, str]
    vote: str


class VoteFile:
    """The answers so far, kept in a file where a path is given."""

    def __init__(self, path: Path | None, plan: str) -> None:
        """`plan`: a digest of what is voted on. Raises InvalidRequestError for a file of another vote, or of none."""
        self._path = path
        self.answers: dict[str, Answer] = {}
        #: The whole result, where the vote was closed before.
        self.result: dict[str, Any] | None = None
        # Decides the order of every pair, and says nothing of it to who looks into the file.
        self._salt = secrets.token_hex(16)
        try:
            content = path.read_bytes() if path is not None and path.exists() else b""
            # A line without an end was cut off while it was written.
            whole = content[: content.rfind(b"\n") + 1]
            if content and not content.startswith(f'{{"kind": "{_KIND}"'.encode()):
                raise _refused(f"{path} is no file of a vote, and is left as it is")
            if whole:
                self._read(whole.splitlines(), plan)
            if path is not None and len(whole) < len(content):
                os.truncate(path, len(whole))
            if not whole:
                self._append({"kind": _KIND, "version": 1, "plan": plan, "salt": self._salt})
        except OSError as error:
            raise _refused(f"cannot use {path}: {error.strerror or error}") from None

    def _read(self, lines: list[bytes], plan: str) -> None:
        try:
            head, *entries = map(json.loads, lines)
            self._salt, found = str(head["salt"]), head["plan"]
            for entry in entries:
                if "result" in entry:
                    self.result = entry["result"]
                else:
                    answer = Answer(entry["prompt_id"], tuple(entry["texts"]), entry["vote"])
                    self.answers[answer.prompt_id] = answer
        except (ValueError, TypeError, KeyError) as error:
            raise _refused(f"{self._path} is no whole file of a vote: {error}") from None
        if found != plan:
            raise _refused(
                f"{self._path} is of a vote on something else: other prompts, arms, sampling, model or version of an "
                "operator; name another file"
            )

    def is_swapped(self, prompt_id: str) -> bool:
        """Whether the second arm's text is shown first: drawn once for each prompt."""
        return hashlib.sha256(f"{self._salt} {prompt_id}".encode()).digest()[0] % 2 == 1

    def add(self, answer: Answer) -> None:
        """Keeps an answer."""
        self.answers[answer.prompt_id] = answer
        self._append(asdict(answer))

    def close(self, result: dict[str, Any]) -> None:
        """Ends the vote: what was whose may be known."""
        self.result = result
        self._append({"result": result})

    def _append(self, entry: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write((json.dumps(entry) + "\n").encode())


def _refused(problem: str) -> steer_client.InvalidRequestError:
    return steer_client.InvalidRequestError(f"out: {problem}", field="out")
