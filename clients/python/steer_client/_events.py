"""Folds the events of a stream into its result, one event at a time. No input or output happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The events of a comparison: those of every arm, interleaved, then compared."""

    def __init__(self, arms: Mapping[str, Sequence[OperatorUse]]) -> None:
        self._arms = {NORMAL: GenerationReducer((), NORMAL)}
        self._arms |= {name: GenerationReducer(uses, name) for name, uses in arms.items()}
        self._compared: comparison_pb2.CompareFinished | None = None

    @property
    def prompt_token_ids(self) -> tuple[int, ...] | None:
        """The same for every arm."""
        ids = (arm.prompt_token_ids for arm in self._arms.values())
        return next((each for each in ids if each is not None), None)

    def feed(self, event: comparison_pb2.CompareEvent) -> ArmDelta | None:
        """Raises like GenerationReducer.feed, and ProtocolError for an arm that was not requested."""
        if self._compared is not None:
            raise ProtocolError("the server sent events after `compared`")
        if event.WhichOneof("event") == "compared":
            self._compared = event.compared
            return None
        if event.arm not in self._arms:
            raise ProtocolError(f"the server sent an event of arm {event.arm!r}, which was not asked for")
        delta = self._arms[event.arm].feed(event)
        return None if delta is None else ArmDelta(event.arm, delta)

    def finish(self) -> ABResult:
        """Raises ProtocolError when an arm, or its comparison, did not come."""
        finished = {name: arm.finish() for name, arm in self._arms.items()}
        if self._compared is None:
            raise ProtocolError("the stream ended without `compared`")
        steered = [name for name in finished if name != NORMAL]
        compared = [each.arm for each in self._compared.comparisons]
        if compared != steered:
            raise ProtocolError(f"the server compared the arms {compared}; asked for were {steered}")
        return ABResult(
            normal=finished[NORMAL],
            steered={each.arm: decode.arm_result(each, finished[each.arm]) for each in self._compared.comparisons},
        )
