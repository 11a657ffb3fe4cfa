"""The clients' methods: signature, docstring and logic of each in one place, for both clients.

A method awaits nothing but `_answer` and `_read_to_end`, which each client implements over its own transport; it may
await them any number of times. `_dual_method` says how one coroutine serves the blocking and the asyncio client.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from steer_client import _calls as calls
from steer_client import _encode as encode
from steer_client._access import access
from steer_client._admin_methods import AdminMethods
from steer_client._aio_streams import AsyncComparisonsStream, AsyncComparisonStream, AsyncGenerationStream
from steer_client._call_metadata import Token, call_metadata
from steer_client._channel import Stubs, target_or_default
from steer_client._defaults import CLIENT_TIMEOUT, DEFAULT_TIMEOUT, Probe, Timeout
from steer_client._dual_method import method, stream_method
from steer_client._errors import SteerError
from steer_client._pool import Pool
from steer_client._requests import SERVER_DEFAULTS, Arm, Operators, Prompt, Prompts, SamplingParams, TokenReport
from steer_client._results import (
    ABResult,
    ArmDelta,
    Generation,
    ModelInfo,
    PromptResult,
    TextDelta,
    TextScore,
    Tokenization,
)
from steer_client._retry import Retries
from steer_client._store import OperatorInfo, ReloadReport
from steer_client._streams import StartedCall
from steer_client._sweep.plan import Strengths
from steer_client._sweep.result import SweepResult
from steer_client._sweep.sweep import sweep
from steer_client._sync_streams import ComparisonsStream, ComparisonStream, GenerationStream
from steer_client._tls import PathLike
from steer_client._translate import translate_error

Item = TypeVar("Item")
Result = TypeVar("Result")


class Methods(AdminMethods):
    """Base of SteerClient and AsyncSteerClient, whose docstrings say what the parameters are."""

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        retry: bool = True,
        tls: bool | None = None,
        ca: PathLike | None = None,
        cert: PathLike | None = None,
        key: PathLike | None = None,
        server_name: str | None = None,
        token: Token | None = None,
        token_file: PathLike | None = None,
        metadata: Mapping[str, str] | None = None,
        insecure_token: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self.target = target_or_default(target)
        self._timeout = encode.seconds(timeout)
        self._retry = retry
        call, files = call_metadata(token, token_file, metadata), {"ca": ca, "cert": cert, "key": key}
        self._access = access(credentials, tls, files, server_name, call, insecure_token=insecure_token)
        self._open()

    @method
    async def close(self) -> None:
        """Cancels what is under way and closes the connection."""
        self._is_closed = True
        await self._disconnect()

    @method
    async def generate(
        self,
        prompt: Prompt,
        *,
        operators: Operators = (),
        sampling: SamplingParams = SERVER_DEFAULTS,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Generation:
        """Decodes one prompt and waits for its end. No operators: a plain text."""
        return await self._answer(calls.generate(prompt, operators, sampling, request_id), timeout)

    @method
    async def samples(
        self,
        prompt: Prompt,
        n: int,
        *,
        operators: Operators = (),
        sampling: SamplingParams = SERVER_DEFAULTS,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> tuple[Generation, ...]:
        """Decodes one prompt `n` times in one batch: sample s is what `generate` gives with the seed plus s."""
        return await self._answer(calls.samples(prompt, n, operators, sampling, request_id), timeout)

    @stream_method(GenerationStream, AsyncGenerationStream)
    def stream(
        self,
        prompt: Prompt,
        *,
        operators: Operators = (),
        sampling: SamplingParams = SERVER_DEFAULTS,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> StartedCall[TextDelta, Generation]:
        """As `generate`, piece by piece; the server's errors are raised while the stream is read."""
        return self._start(calls.stream(prompt, operators, sampling, request_id), timeout)

    @method
    async def compare(
        self,
        prompt: Prompt,
        *,
        operators: Operators = (),
        arms: Mapping[str, Operators | Arm] | None = None,
        sampling: SamplingParams = SERVER_DEFAULTS,
        score: bool = True,
        n: int = 1,
        normal: bool = True,
        report: TokenReport | None = None,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> ABResult:
        """Decodes one prompt plain and steered, side by side.

        `operators` make one arm named "steered"; `arms` names several, each by its operators or as an `Arm` that has a
        sampling too. `score` asks for KL and perplexities, `n` for several samples of each text, with one seed after
        the other. `normal=False` leaves the plain text out. `report` asks for figures of every token.
        """
        options: dict[str, Any] = {"score": score, "n": n, "normal": normal, "report": report}
        call = calls.compare(prompt, operators, arms, sampling, request_id, **options)
        return await self._read_to_end(self._start(call, timeout))

    @stream_method(ComparisonStream, AsyncComparisonStream)
    def compare_stream(
        self,
        prompt: Prompt,
        *,
        operators: Operators = (),
        arms: Mapping[str, Operators | Arm] | None = None,
        sampling: SamplingParams = SERVER_DEFAULTS,
        score: bool = True,
        n: int = 1,
        normal: bool = True,
        report: TokenReport | None = None,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> StartedCall[ArmDelta, ABResult]:
        """As `compare`, piece by piece; the arms' pieces interleave."""
        options: dict[str, Any] = {"score": score, "n": n, "normal": normal, "report": report}
        call = calls.compare(prompt, operators, arms, sampling, request_id, **options)
        return self._start(call, timeout)

    @method
    async def compare_many(
        self,
        prompts: Prompts,
        *,
        operators: Operators = (),
        arms: Mapping[str, Operators | Arm] | None = None,
        sampling: SamplingParams = SERVER_DEFAULTS,
        score: bool = True,
        n: int = 1,
        normal: bool = True,
        report: TokenReport | None = None,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> Mapping[str, ABResult]:
        """As `compare`, of several prompts in one request; the results by the prompts' ids, in the prompts' order.

        A mapping gives the ids, a sequence has the ids "0", "1", and so on. Where a prompt is not accepted, the call
        fails before anything is decoded.
        """
        options: dict[str, Any] = {"score": score, "n": n, "normal": normal, "report": report}
        call = calls.compare_many(prompts, operators, arms, sampling, request_id, **options)
        return await self._read_to_end(self._start(call, timeout))

    @stream_method(ComparisonsStream, AsyncComparisonsStream)
    def compare_many_stream(
        self,
        prompts: Prompts,
        *,
        operators: Operators = (),
        arms: Mapping[str, Operators | Arm] | None = None,
        sampling: SamplingParams = SERVER_DEFAULTS,
        score: bool = True,
        n: int = 1,
        normal: bool = True,
        report: TokenReport | None = None,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> StartedCall[ArmDelta | PromptResult, Mapping[str, ABResult]]:
        """As `compare_many`, piece by piece: ArmDeltas as they come, and a PromptResult when a prompt is finished."""
        options: dict[str, Any] = {"score": score, "n": n, "normal": normal, "report": report}
        call = calls.compare_many(prompts, operators, arms, sampling, request_id, **options)
        return self._start(call, timeout)

    @method
    async def score(
        self,
        text: str | Sequence[int],
        *,
        prompt: Prompt | None = None,
        operators: Operators = (),
        arms: Mapping[str, Operators | Arm] | None = None,
        words: Sequence[str] = (),
        top: int = 0,
        doses: bool = False,
        time_limit: float | None = None,
        request_id: str = "",
        timeout: Timeout = CLIENT_TIMEOUT,
    ) -> TextScore:
        """Reads a text, or its token ids, under the plain model and steered; nothing is decoded.

        `operators` make one arm named "steered"; `arms` names several; without both the plain model reads it alone.
        Without a prompt the text's first token is the prompt. `words`, `top` and `doses` are those of `TokenReport`.
        `time_limit` is the server's, in seconds: when it runs out, that is a DeadlineExceededError.
        """
        report = TokenReport(top, words, doses)
        return await self._answer(calls.score(text, prompt, operators, arms, report, request_id, time_limit), timeout)

    @method
    async def sweep(
        self,
        prompts: Prompts | str | Path,
        *,
        operators: Strengths,
        words: Sequence[str] | Mapping[str, Sequence[str]] = (),
        seeds: int | Sequence[int] | None = None,
        sampling: SamplingParams = SERVER_DEFAULTS,
        out: str | Path | None = None,
        targets: Sequence[str] = (),
        in_flight: int = 4,
        progress: bool | None = None,
        timeout: Timeout = None,
    ) -> SweepResult:
        """Decodes every prompt plain and under every operator at every strength, and looks for `words` in the texts.

        `operators` is {"ocean": [0.2, 0.4], "tea:first": 0.3}: by operator, the strengths λ. `prompts` may be a file:
        one prompt per line, or of .jsonl one {"id": …, "prompt": …}. `seeds` are those of the texts, or how many (0, 1,
        …); by default the sampling's, or 0. `words` are matched whole, in any script; where they are a mapping, each
        operator's texts are searched for its own, and the plain ones for all of them. Arms share requests as far as the
        server's limits go, and the plain text of a prompt and seed is decoded once.

        `out` is a file that every text is added to when it is finished. Named again, for the same sweep, it goes on
        where the file ends; with another plan, model or version of an operator it is an InvalidRequestError. `targets`
        are HOST:PORT of servers that share the work, in place of the client's own; they must serve the same. Up to
        `in_flight` requests are under way at each, of `timeout` seconds each, None for no limit. `progress` shows a bar
        on stderr; by default on a terminal alone.

        A text at strength 0 must be the plain one: a ControlChangedError, which has the result, where it is not.
        """
        servers = [self._sibling(target) for target in targets or [self.target]]
        try:
            return await sweep(
                prompts,
                operators,
                words,
                seeds,
                sampling,
                callers=servers,
                pool=self._pool(),
                out=out,
                in_flight=in_flight,
                progress=progress,
                timeout=timeout,
            )
        finally:
            # Ends what is still under way, on whatever thread.
            for server in servers:
                server._is_closed = True
                await server._disconnect()

    @method
    async def operators(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> tuple[OperatorInfo, ...]:
        """Every operator in the server's store, the unusable ones with their problem."""
        return await self._answer(calls.list_operators(), timeout)

    @method
    async def operator(self, name: str, *, timeout: Timeout = CLIENT_TIMEOUT) -> OperatorInfo:
        """One operator. Raises UnknownOperatorError."""
        return await self._answer(calls.get_operator(name), timeout)

    @method
    async def reload_operators(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> ReloadReport:
        """Makes the server read its store again; requests under way keep what they started with.

        One server at a time: a target that may stand for several is an InvalidRequestError.
        """
        return await self._answer(calls.reload_operators(self.target), timeout)

    @method
    async def model_info(self, *, timeout: Timeout = CLIENT_TIMEOUT) -> ModelInfo:
        """The model, its limits and the engine that serves it."""
        return await self._answer(calls.model_info(), timeout)

    @method
    async def tokenize(self, prompt: Prompt, *, timeout: Timeout = CLIENT_TIMEOUT) -> Tokenization:
        """The prompt as it reaches the model."""
        return await self._answer(calls.tokenize(prompt), timeout)

    @method
    async def health(self, *, probe: Probe = "ready", timeout: Timeout = CLIENT_TIMEOUT) -> bool:
        """Whether the server takes requests. Raises ServerUnavailableError when nobody answers.

        `probe` asks something else: "started", whether it has loaded its model, which stays true while it stops;
        "live", whether it need not be ended. With several servers, one that takes requests answers; the error is raised
        when there is none.
        """
        return await self._answer(calls.health("" if probe == "ready" else probe), timeout)

    def _open(self) -> None:
        self._access.check(self.target)
        self._is_closed = False
        self._connect()

    @abstractmethod
    def _connect(self) -> None:
        """Prepares the channel. Called once."""

    @abstractmethod
    async def _disconnect(self) -> None:
        """Closes the channel, if it is open."""

    @abstractmethod
    def _pool(self) -> Pool:
        """Runs several requests at once."""

    def _sibling(self, target: str) -> Self:
        """A client like this one, with a connection of its own."""
        other = copy.copy(self)
        other.target = target_or_default(target)
        other._open()
        return other

    @abstractmethod
    def _stubs(self) -> Stubs:
        """The services over the open channel."""

    @abstractmethod
    async def _answer(self, call: calls.Unary[Result], timeout: Timeout) -> Result:
        """Sends one request and decodes its answer. Raises a SteerError."""

    @abstractmethod
    async def _read_to_end(self, call: StartedCall[Item, Result]) -> Result:
        """Reads a stream to its end and returns its result. Raises a SteerError."""

    def _start(self, call: calls.Streaming[Item, Result], timeout: Timeout) -> StartedCall[Item, Result]:
        seconds = self._seconds(timeout)
        send = partial(self._stubs().method(call.service, call.method), call.request)
        translate = partial(self._translate, timeout=seconds)
        return StartedCall(send, call.reducer, translate, Retries(seconds, enabled=self._retry))

    def _translate(self, error: grpc.RpcError, *, timeout: float | None) -> SteerError:
        has_tls, has_token = self._access.credentials is not None, self._access.metadata.has_credentials
        return translate_error(error, target=self.target, timeout=timeout, has_tls=has_tls, has_token=has_token)

    def _seconds(self, timeout: Timeout) -> float | None:
        if self._is_closed:
            raise RuntimeError("the client is closed")
        return self._timeout if timeout is CLIENT_TIMEOUT else encode.seconds(timeout)
