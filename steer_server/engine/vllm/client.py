"""Talks to a running vLLM: requests, and calls to its workers with a time limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vllm import SamplingParams as VLLMSamplingParams
from vllm import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from steer_server.engine.distributions import NO_REPORT, score_of
from steer_server.engine.vllm.cache_salts import CacheSalts
from steer_server.engine.vllm.measurements import merge_measurements
from steer_server.engine.vllm.worker_protocol import OperatorSetting, SteeringArgs, positions_per_call
from steer_server.errors import EngineFailedError
from steer_server.types import Report, Score

_POLL_SECONDS = 0.5
_CALL_SECONDS = 600.0
"""Time limit of a call to the workers: longer than the longest step, compiling the model included."""
_STATES_OF_REQUESTS = ("requests", "keys", "kept_states", "steered", "watched")
"""Entries of ``steering_state`` that count what a worker holds for requests."""


class _SamplingParams(VLLMSamplingParams):  # type: ignore[misc]
    """Without the EOS tokens that vLLM adds to those that ``min_tokens`` bars, ``ignore_eos`` or not: the server has
    named every token that ends a text."""

    def update_from_generation_config(self, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM. With ``ignore_eos``, which all requests have, it does nothing else."""


class VLLMClient:
    """One vLLM engine and its workers."""

    def __init__(self, llm: AsyncLLM, salts: CacheSalts) -> None:
        self._llm = llm
        self._salts = salts
        self.attention = ""
        """What computes attention in the workers. Filled when they have started."""
        self._unanswered = ""
        """Why the workers are given up: the call that they left without an answer. Empty while they answer."""

    @property
    def config(self) -> Any:
        """vLLM's configuration."""
        return self._llm.vllm_config

    @property
    def max_logprobs(self) -> int:
        """Most alternatives per token that vLLM returns; -1 stands for the whole vocabulary."""
        return int(self._llm.model_config.max_logprobs)

    @property
    def died(self) -> bool:
        """Whether vLLM's engine core has ended."""
        return bool(self._llm.errored)

    def generate(
        self,
        ids: Sequence[int],
        params: Mapping[str, Any],
        settings: Sequence[OperatorSetting],
        key: str,
        *,
        keep_from: int | None = None,
        private_cache: bool = False,
        looks_at: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ) -> Any:
        """vLLM's stream of outputs for one request.

        Args:
            ids: the prompt.
            params: arguments of vLLM's ``SamplingParams``.
            key: names the request in calls to the workers.
            keep_from: position from which on the workers keep the hidden states that a score is made of.
            looks_at: by layer, the positions at which the workers look at what was added.
            private_cache: share no keys and values with any other request, so that every token is computed.
        """
        prompt = TokensPrompt(prompt_token_ids=list(ids))
        salt = ""
        if private_cache or settings:
            prompt["cache_salt"] = salt = key if private_cache else self._salts.of(settings)
        extra_args = None
        if settings or keep_from is not None:
            extra_args = SteeringArgs(key, salt, tuple(settings), keep_from, looks_at).to_extra_args()
        sampling = _SamplingParams(
            detokenize=False, output_kind=RequestOutputKind.DELTA, extra_args=extra_args, **params
        )
        return self._llm.generate(prompt, sampling, key)

    async def score(
        self, steered_key: str, plain_key: str, ids: Sequence[int], report: Report = NO_REPORT
    ) -> tuple[Score, ...]:
        """The tokens of a text, from the hidden states that the workers kept of two requests."""
        asked = (report.top, [list(word) for word in report.words])
        scores: list[Score] = []
        size = positions_per_call(int(self._llm.model_config.get_vocab_size()))
        for start in range(0, len(ids), size):
            # In pieces: vLLM runs no step during a call.
            chunk = list(ids[start : start + size])
            # Every rank computes the logits, rank 0 returns them.
            found = (await self.call("steering_score", steered_key, plain_key, chunk, start, *asked))[0]
            scores.extend(map(score_of, found))
        return tuple(scores)

    async def take_measurements(self, keys: list[str]) -> Sequence[Mapping[str, Any] | None]:
        """The measurements of requests, merged over the workers, which forget them."""
        return merge_measurements(await self.call("steering_take", keys))

    async def unload(self, digests: list[str]) -> None:
        """Removes operators from the workers."""
        await self.call("steering_unload", digests)

    async def num_held_requests(self) -> int:
        """The most requests for which a worker holds anything; 0 once all have ended and been measured."""
        states = await self.call("steering_state")
        return max(int(state[kind]) for state in states for kind in _STATES_OF_REQUESTS)

    async def call(self, method: str, *args: Any) -> Sequence[Any]:
        """Calls a ``steering_`` method of every worker and returns their answers, in order of their ranks.

        Raises:
            EngineFailedError: a worker could not do it, or gave no answer in time; says why.
            EngineDeadError: the engine died, so that no answer will come.
        """
        call = asyncio.ensure_future(self._llm.collective_rpc("steering_call", args=(method, args)))
        deadline = time.monotonic() + _CALL_SECONDS
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=_POLL_SECONDS)
                if not call.done() and self._llm.errored:
                    raise EngineDeadError
                if not call.done() and time.monotonic() > deadline:
                    # Workers wait for each other in collective operations, so one that failed leaves the others stuck.
                    # Whether the call took effect is unknown: no later call can rely on the state of the workers.
                    self._unanswered = f"{method}: the workers gave no answer in {_CALL_SECONDS:g} seconds"
                    raise EngineFailedError(self._unanswered)
        finally:
            # Also where the caller was cancelled: nobody would retrieve the result, or the error.
            call.cancel()
        answers = call.result()
        for _, problem in answers:
            if problem:
                raise EngineFailedError(f"{method}: {problem}")
        return [answer for answer, _ in answers]

    async def failed(self) -> str:
        """Returns, with the reason, when the engine has died or its workers are stuck; not before."""
        while not (self._llm.errored or self._unanswered):
            await asyncio.sleep(_POLL_SECONDS)
        return self._unanswered or "the vLLM engine died; its log says why"

    async def shutdown(self) -> None:
        """Stops vLLM's processes."""
        await asyncio.to_thread(self._llm.shutdown)
