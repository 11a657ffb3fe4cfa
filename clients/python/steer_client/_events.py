"""Folds the events of a stream into its result, one event at a time. No input or output happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from steering.v1 import comparison_pb2
from steering.v1 import generation_pb2 as pb

from steer_client import _decode as decode
from steer_client._defaults import NORMAL
from steer_client._errors import ProtocolError
from steer_client._receipts import check_receipts
from steer_client._requests import OperatorUse
from steer_client._results import ABResult, ArmDelta, Generation, TextDelta

Item = TypeVar("Item", covariant=True)
Result = TypeVar("Result", covariant=True)


class Reducer(Protocol[Item, Result]):
    """Folds the events of one stream into its result."""

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """None until the stream has started."""

    def feed(self, event: Any) -> Item | None:
        """Takes the next event; returns the caller's item, or None if the event makes none."""

    def finish(self) -> Result:
        """Takes the end of the stream; returns its result."""


class GenerationReducer:
    """The events of one text: started, any number of deltas, finished. `arm` is for messages only."""

    def __init__(self, uses: Sequence[OperatorUse], arm: str = "") -> None:
        self._uses = uses
        self._of_arm = f" of arm {arm!r}" if arm else ""
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._result: Generation | None = None
        self.prompt_token_ids: tuple[int, ...] | None = None

    def feed(self, event: pb.GenerateEvent | comparison_pb2.CompareEvent) -> TextDelta | None:
        """Raises ProtocolError for an event out of order, or a result other than what was streamed.

        Raises SteeringNotAppliedError for missing proof.
        """
        kind = event.WhichOneof("event")
        if kind is None:
            raise ProtocolError("the server sent an event that this client does not know: update the client")
        if self._result is not None or (kind == "started") != (self.prompt_token_ids is None):
            raise ProtocolError(f"the server's events{self._of_arm} are out of order at `{kind}`")
        if kind == "started":
            self.prompt_token_ids = tuple(event.started.prompt_token_ids)
            return None
        if kind == "delta":
            self._text.append(event.delta.text)
            self._token_ids.extend(event.delta.token_ids)
            return decode.delta(event.delta)
        result = decode.generation(event.finished)
        if result.text != "".join(self._text):
            raise ProtocolError(f"the server's final text{self._of_arm} differs from the text that it streamed")
        if result.token_ids != tuple(self._token_ids):
            raise ProtocolError(
                f"the server's final token ids{self._of_arm} ({len(result.token_ids)}) differ from those that it "
                f"streamed ({len(self._token_ids)})"
            )
        self._result = check_receipts(self._uses, result)
        return None

    def finish(self) -> Generation:
        """Raises ProtocolError when no result came."""
        if self._result is None:
            raise ProtocolError(f"the stream{self._of_arm} ended without `finished`")
        return self._result


class ComparisonReducer:
    """The events of a comparison: those of every arm and sample, interleaved, then compared."""

    def __init__(self, arms: Mapping[str, Sequence[OperatorUse]], *, n: int = 1, normal: bool = True) -> None:
        self._names, self._n, self._normal = tuple(arms), n, normal
        every = ({NORMAL: ()} if normal else {}) | dict(arms)
        self._texts = {
            (name, sample): GenerationReducer(uses, name) for name, uses in every.items() for sample in range(n)
        }
        self._compared: comparison_pb2.CompareFinished | None = None

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """The same for every arm."""
        ids = (text.prompt_token_ids for text in self._texts.values())
        return next((each for each in ids if each is not None), None)

    def feed(self, event: comparison_pb2.CompareEvent) -> ArmDelta | None:
        """Raises like GenerationReducer.feed, and ProtocolError for a text that was not requested."""
        if self._compared is not None:
            raise ProtocolError("the server sent events after `compared`")
        if event.WhichOneof("event") == "compared":
            self._compared = event.compared
            return None
        text = self._texts.get((event.arm, event.sample))
        if text is None:
            sample = f" (sample {event.sample})" if event.sample else ""
            raise ProtocolError(f"the server sent an event of arm {event.arm!r}{sample}, which was not asked for")
        delta = text.feed(event)
        return None if delta is None else ArmDelta(event.arm, delta, event.sample)

    def finish(self) -> ABResult:
        """Raises ProtocolError when a text, or its comparison, did not come."""
        finished = {key: text.finish() for key, text in self._texts.items()}
        if self._compared is None:
            raise ProtocolError("the stream ended without `compared`")
        asked = [(name, sample) for name in self._names for sample in range(self._n)]
        compared = {(each.arm, each.sample): each for each in self._compared.comparisons}
        if list(compared) != asked or len(self._compared.comparisons) != len(asked):
            found = [each.arm for each in self._compared.comparisons]
            raise ProtocolError(f"the server compared the arms {found}; asked for were {[name for name, _ in asked]}")
        arms = {key: decode.arm_result(each, finished[key]) for key, each in compared.items()}
        first, *others = (
            ABResult(finished.get((NORMAL, sample)), {name: arms[name, sample] for name in self._names})
            for sample in range(self._n)
        )
        return replace(first, others=tuple(others))
