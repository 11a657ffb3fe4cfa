"""One row of a job on vLLM: its operators loaded, its text decoded and scored, its measurements collected."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from steer_server.engine.distributions import NO_REPORT, plain_scores
from steer_server.engine.dose import check_strengths
from steer_server.engine.proof import Proof
from steer_server.engine.receipts import empty_receipts
from steer_server.engine.row_text import RowText
from steer_server.engine.special_stops import special_stops
from steer_server.engine.text import Detokenizer
from steer_server.engine.vllm.decode_context import READING, DecodeContext, prove_receipts
from steer_server.engine.vllm.measurements import generated_doses
from steer_server.engine.vllm.sampling import vllm_sampling
from steer_server.engine.vllm.worker_protocol import operator_settings
from steer_server.errors import EngineFailedError
from steer_server.types import (
    DecodeJob,
    EngineEvent,
    FinishReason,
    RowFinished,
    Score,
    SteeringPlan,
    TokenEvent,
    TokenLogprob,
    TopLogprob,
)


@dataclass(frozen=True)
class _DecodedText:
    """Why a text ended, by which stop string if by one, and its tokens' own log-probabilities where requested."""

    reason: FinishReason
    stop_string: str
    logprobs: tuple[float, ...]


class RowDecoder:
    """Decodes one row of a job, once."""

    def __init__(
        self,
        context: DecodeContext,
        job: DecodeJob,
        index: int,
        *,
        deadline: float | None,
        emit: Callable[[EngineEvent], None],
        on_first_output: Callable[[Any], None],
        is_stopping: Callable[[], bool],
    ) -> None:
        """Nothing runs before :meth:`run`.

        Args:
            deadline: end of the job's time limit, by the clock of the event loop.
            emit: takes the row's token events.
            on_first_output: called once, with vLLM's metrics of the request, when its first output has come.
            is_stopping: whether a cancellation is the server's shutdown, at which the row ends with the text it has.
        """
        self._context, self._job, self._index, self._row = context, job, index, job.rows[index]
        self._deadline = deadline
        self._emit, self._on_first_output, self._is_stopping = emit, on_first_output, is_stopping
        self._key = uuid.uuid4().hex

    async def run(self) -> RowFinished:
        """Decodes the row to its end.

        Raises:
            SteeringNotAppliedError: the plan was not applied at all of its positions, so the text is withheld.
            Exception: whatever vLLM raises.
        """
        plan, prompt = self._row.plan, self._job.prompt_ids
        if plan is not None:
            check_strengths(plan, self._context.dtype)
            if not await self._load_operators(plan):
                return RowFinished(self._index, FinishReason.TIME_LIMIT, "", "", empty_receipts(plan))
        text = RowText(
            Detokenizer(self._context.tokenizer, prompt, skip_special_tokens=self._row.sampling.skip_special_tokens),
            self._row.sampling,
            prompt_tokens=len(prompt),
            context_length=self._context.model.context_length,
            eos_ids=frozenset(self._context.model.eos_token_ids),
            special_stops=special_stops(self._row.sampling, self._context.tokenizer),
        )
        settings = () if plan is None else operator_settings(plan, len(prompt))
        # The text's first token is chosen from the hidden state of the prompt's last one.
        keep_from = len(prompt) - 1 if self._row.score and plan is not None else None
        proof = None if plan is None else self._proof(plan)
        collect = self._context.measurements.collect
        # Whether the workers hold something for this request that nobody has collected yet.
        uncollected = False
        try:
            stream = self._context.client.generate(
                prompt,
                self._params(text.ending_ids),
                settings,
                self._key,
                keep_from=keep_from,
                looks_at={} if proof is None else proof.positions,
            )
            uncollected = bool(settings) or keep_from is not None
            decoded = await self._decode(stream, text)
            scores = await self._scores(text.ids, decoded.logprobs) if self._row.score else ()
            receipts, doses = empty_receipts(plan), tuple[float, ...]()
            if settings and text.ids and plan is not None and proof is not None:
                uncollected = False
                measurement = await asyncio.shield(collect(self._key, settings, begun=True))
                ids = (*prompt, *text.ids)
                receipts = await prove_receipts(
                    self._context, plan, proof, measurement, ids=ids, prompt_tokens=len(prompt)
                )
                if self._row.report is not None and self._row.report.doses:
                    doses = generated_doses(plan, measurement, prompt_tokens=len(prompt), fed=len(ids) - 1)
            shown = "" if decoded.stop_string else text.flush()
            return RowFinished(self._index, decoded.reason, shown, decoded.stop_string, receipts, scores, doses)
        finally:
            if uncollected:
                # Nobody waits for the measurement; taking it makes the workers forget the request.
                collect(self._key, settings, begun=bool(text.ids))

    async def _load_operators(self, plan: SteeringPlan) -> bool:
        """Whether the operators were in the workers before the time limit."""
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._context.operator_cache.load(
                    use.artifact for use in plan.applications if use.setting.strength
                )
        except TimeoutError:
            return False
        return True

    def _params(self, ending_ids: Collection[int]) -> dict[str, Any]:
        sampling = self._row.sampling
        max_tokens = min(sampling.max_tokens, self._context.model.context_length - len(self._job.prompt_ids))
        # A plain row is its own plain model: the log-probabilities of its tokens are its score.
        own_logprobs = sampling.logprobs is None and self._row.score and self._row.plan is None
        logprobs = 0 if own_logprobs else sampling.logprobs
        lengths = {"max_tokens": max_tokens, "min_tokens": min(sampling.min_tokens, max_tokens)}
        return {**vllm_sampling(sampling, ending_ids), **lengths, "logprobs": logprobs}

    async def _decode(self, stream: Any, text: RowText) -> _DecodedText:
        """Reads vLLM's outputs and posts their tokens, until one of them ends the text."""
        own_logprobs: list[float] = []
        num_top = self._row.sampling.logprobs
        begun = False
        try:
            async with asyncio.timeout_at(self._deadline):
                async for output in stream:
                    if not begun:
                        begun = True
                        self._on_first_output(output.metrics)
                    choice = output.outputs[0]
                    for place, token in enumerate(choice.token_ids):
                        logprobs = choice.logprobs[place] if choice.logprobs else None
                        if logprobs is not None:
                            own_logprobs.append(logprobs[token].logprob)
                        piece, reason = text.push(token)
                        shown = None if num_top is None else self._token_logprob(token, logprobs, num_top)
                        self._emit(TokenEvent(self._index, token, piece.text, shown))
                        if reason is not None:
                            return _DecodedText(reason, piece.stop_string, tuple(own_logprobs))
                    if output.finished:
                        raise EngineFailedError(f"vLLM ended a text without a reason of ours: {choice.finish_reason}")
        except TimeoutError:
            return _DecodedText(FinishReason.TIME_LIMIT, "", tuple(own_logprobs))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._is_stopping() or task is None:
                raise
            task.uncancel()
            return _DecodedText(FinishReason.CANCELLED, "", tuple(own_logprobs))
        finally:
            await stream.aclose()
        raise EngineFailedError("vLLM ended a text without a last token")

    def _token_logprob(self, token: int, logprobs: Any, num_top: int) -> TokenLogprob:
        ranked = sorted(logprobs.items(), key=lambda item: -item[1].logprob)[:num_top]
        top = tuple(TopLogprob(other, self._token_text(other), entry.logprob) for other, entry in ranked)
        return TokenLogprob(token, self._token_text(token), logprobs[token].logprob, top)

    def _token_text(self, token: int) -> str:
        return str(self._context.tokenizer.decode([token]))

    async def _scores(self, ids: Sequence[int], own_logprobs: Sequence[float]) -> tuple[Score, ...]:
        """Each token of a finished text under the plain model, for which one more request reads the text unsteered.

        Empty where the time limit runs out: that changes neither the text nor the reason for which it ended.
        """
        if self._is_stopping():
            return ()
        if self._row.is_plain_score or not ids:
            return plain_scores(own_logprobs)
        if self._deadline is not None and self._deadline <= asyncio.get_running_loop().time():
            return ()
        client, prompt, plain_key = self._context.client, self._job.prompt_ids, uuid.uuid4().hex
        # Without the last token: no token of the text is chosen after it.
        read = (*prompt, *ids[:-1])
        stream = client.generate(read, READING, (), plain_key, keep_from=len(prompt) - 1, private_cache=True)
        try:
            async with asyncio.timeout_at(self._deadline):
                async for _ in stream:
                    pass
                key = plain_key if self._row.plan is None else self._key
                return await client.score(key, plain_key, ids, self._row.report or NO_REPORT)
        except TimeoutError:
            return ()
        finally:
            await stream.aclose()
            self._context.measurements.collect(plain_key, ())

    def _proof(self, plan: SteeringPlan) -> Proof:
        prompt, max_tokens = self._job.prompt_ids, self._row.sampling.max_tokens
        return Proof(plan, self._context.embed, prompt_ids=prompt, max_tokens=max_tokens)
