"""Folds the events of a stream into its result, one event at a time. No input or output happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from steering.v1 import comparison_pb2
from steering.v1 import generation_pb2 as pb

from steer_client import _decode as decode
from steer_client._defaults import NORMAL
from steer_client._errors import ProtocolError
from steer_client._receipts import check_receipts
from steer_client._requests import OperatorUse
from steer_client._results import ABResult, ArmDelta, Generation, PromptResult, TextDelta, TokenLogprob

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
    """The events of one text: started, any number of deltas, finished. `arm` is for messages only.

    `repeats`: whether the last event has the whole text once more.
    """

    def __init__(self, uses: Sequence[OperatorUse], arm: str = "", *, repeats: bool = True) -> None:
        self._uses, self._repeats = uses, repeats
        self._of_arm = f" of arm {arm!r}" if arm else ""
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
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
            delta = decode.delta(event.delta)
            self._logprobs.extend(delta.logprobs)
            return delta
        result = decode.generation(event.finished)
        if not self._repeats:
            result = self._completed(result)
        if result.text != "".join(self._text):
            raise ProtocolError(f"the server's final text{self._of_arm} differs from the text that it streamed")
        if result.token_ids != tuple(self._token_ids):
            raise ProtocolError(
                f"the server's final token ids{self._of_arm} ({len(result.token_ids)}) differ from those that it "
                f"streamed ({len(self._token_ids)})"
            )
        self._result = check_receipts(self._uses, result)
        return None

    def _completed(self, result: Generation) -> Generation:
        count = result.usage.completion_tokens
        if count != len(self._token_ids) or result.text or result.token_ids:
            raise ProtocolError(
                f"the server says that the text{self._of_arm} has {count} tokens; it streamed {len(self._token_ids)}, "
                "and was asked not to repeat them"
            )
        text, ids, logprobs = "".join(self._text), tuple(self._token_ids), tuple(self._logprobs)
        return replace(result, text=text, token_ids=ids, logprobs=logprobs)

    def finish(self) -> Generation:
        """Raises ProtocolError when no result came."""
        if self._result is None:
            raise ProtocolError(f"the stream{self._of_arm} ended without `finished`")
        return self._result


class ComparisonReducer:
    """The events of a comparison: those of every arm and sample, interleaved, then compared."""

    def __init__(
        self,
        arms: Mapping[str, Sequence[OperatorUse]],
        *,
        n: int = 1,
        normal: bool = True,
        prompt_id: str = "",
        repeats: bool = True,
    ) -> None:
        self._names, self._n, self._prompt_id = tuple(arms), n, prompt_id
        every = ({NORMAL: ()} if normal else {}) | dict(arms)
        self._texts = {
            (name, sample): GenerationReducer(uses, name, repeats=repeats)
            for name, uses in every.items()
            for sample in range(n)
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
        return None if delta is None else ArmDelta(event.arm, delta, event.sample, self._prompt_id)

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


class ComparisonsReducer:
    """The events of comparisons of several prompts, interleaved, each ending with its own `compared`."""

    def __init__(
        self, prompt_ids: Sequence[str], arms: Mapping[str, Sequence[OperatorUse]], *, n: int = 1, normal: bool = True
    ) -> None:
        # Each is made when its prompt begins, and dropped when it ends.
        self._make = partial(ComparisonReducer, arms, n=n, normal=normal, repeats=False)
        self._prompts: dict[str, ComparisonReducer | ABResult | None] = dict.fromkeys(prompt_ids)

    @property
    def prompt_token_ids(self) -> None:
        """Each prompt has its own."""
        return None

    def feed(self, event: comparison_pb2.CompareEvent) -> ArmDelta | PromptResult | None:
        """Raises like ComparisonReducer, and ProtocolError for a prompt that was not asked for, or has ended."""
        name = event.prompt_id
        if name not in self._prompts:
            raise ProtocolError(f"the server sent an event of the prompt {name!r}, which was not asked for")
        prompt = self._prompts[name]
        if isinstance(prompt, ABResult):
            raise ProtocolError(f"the server sent events of the prompt {name!r} after its `compared`")
        if prompt is None:
            prompt = self._prompts[name] = self._make(prompt_id=name)
        delta = prompt.feed(event)
        if event.WhichOneof("event") != "compared":
            return delta
        result = self._prompts[name] = prompt.finish()
        return PromptResult(name, result)

    def finish(self) -> dict[str, ABResult]:
        """Raises ProtocolError when a prompt did not come to its end."""
        results = {name: found for name, found in self._prompts.items() if isinstance(found, ABResult)}
        if len(results) < len(self._prompts):
            missing = next(name for name in self._prompts if name not in results)
            raise ProtocolError(f"the stream ended without `compared` of the prompt {missing!r}")
        return results
