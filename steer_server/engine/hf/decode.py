"""Decoding one job on a transformers model: prefill, then one token per row and step, with a KV cache.

The rows of a job share every forward pass. Plain rows share one prefill. A steered row that is to be scored has a
plain reference in the batch: it is fed the same tokens, chooses none, and gives the plain model's logits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from operators.core.errors import SteeringError
from operators.core.hooks import PushHooks
from operators.model.kept_logits import last_positions
from operators.model.loading import LoadedModel, block_input, decoder_layers, embed
from operators.model.rope import RopeOfLength
from steer_server.engine.distributions import NO_REPORT
from steer_server.engine.hf.forced_text import read_text
from steer_server.engine.hf.memory import prefill_positions, scored_positions
from steer_server.engine.hf.operator_cache import PreparedOperatorCache
from steer_server.engine.hf.rows import BatchSlot, RowState, check_finite, end_all, end_row, score_token, token_logprob
from steer_server.engine.hf.sampling import Sampler
from steer_server.engine.hf.steering import RowSteering, load_pushes, record_doses
from steer_server.engine.hf.witness import Witness, WitnessedPass
from steer_server.engine.proof import Proof
from steer_server.engine.reference import EmbeddingRows
from steer_server.engine.row_text import RowText
from steer_server.engine.special_stops import special_stops
from steer_server.engine.text import Detokenizer
from steer_server.errors import SteeringNotAppliedError
from steer_server.types import (
    DecodeJob,
    EngineEvent,
    FinishReason,
    RowFinished,
    SteeringPlan,
    TokenEvent,
    TokenLogprob,
)

InterruptionCheck = Callable[[], FinishReason | None]
"""Called between steps: TIME_LIMIT or CANCELLED when the job must end, else None."""


@dataclass(eq=False)
class Decoder:
    """Decodes one job. Filled by the engine."""

    loaded: LoadedModel
    job: DecodeJob
    operators: PreparedOperatorCache
    check_interruption: InterruptionCheck
    eos_ids: frozenset[int]
    prove_every_position: bool = False
    """Hold all that is added against the reference, in place of some of it."""
    num_prompt_tokens_read: int = field(default=0, init=False)
    _cache: DynamicCache = field(init=False)
    _hooks: PushHooks = field(init=False)
    _rope: RopeOfLength = field(init=False)
    _witness: Witness = field(init=False)

    def __post_init__(self) -> None:
        self._rope = RopeOfLength(self.loaded.model)

    def run(self) -> Iterator[EngineEvent]:
        """The events of :meth:`turns` one by one: the job alone, without a break."""
        for events in self.turns():
            yield from events

    @torch.inference_mode()
    def turns(self) -> Generator[list[EngineEvent], None, None]:
        """Decodes in turns of one forward pass: a part of the prompt, then a token of each row.

        Between two turns the model may serve other jobs: this one keeps its KV cache and its ids, and nothing else.

        Returns:
            What each turn brought: nothing within the prompt, then tokens and ends of rows.

        Raises:
            SteeringNotAppliedError: a plan could not be applied at some step.
            EngineFailedError: the plain model itself gives logits that are not finite.
        """
        states = [self._row_state(index) for index in range(len(self.job.rows))]
        slots = [BatchSlot(state) for state in states]
        if not self.job.forced_ids:
            # A plain row is its own reference. That of a text that is given is the first row, which reads the same.
            slots += [BatchSlot(state, reference=True) for state in states if state.scored and state.steering]
        layers = {layer for state in states if state.steering for layer in state.steering.layers}
        self._cache = DynamicCache(config=self.loaded.model.config)
        self._hooks = PushHooks(decoder_layers(self.loaded.model), layers)
        self._witness = Witness(self.loaded.model, layers)
        after_prompt = yield from self._prefill(slots)
        if isinstance(after_prompt, FinishReason):
            yield list(end_all(slots, after_prompt))
            return
        if self.job.forced_ids:
            yield from self._read_text(slots, after_prompt)
            return
        logits: torch.Tensor | None = after_prompt
        del after_prompt
        while slots:
            if interruption := self.check_interruption():
                yield list(end_all(slots, interruption))
                return
            if logits is None:
                # A token is fed back only to choose another: the last one of a text never is, however it ends.
                last = torch.tensor([slot.state.sequence[-1:] for slot in slots], device=self.loaded.device)
                logits = self._forward(slots, last, prompt=False)
            events = list(self._choose_tokens(slots, logits))
            logits = None
            slots = self._drop_ended(slots, {event.row for event in events if isinstance(event, RowFinished)})
            yield events

    def _read_text(self, slots: list[BatchSlot], logits: torch.Tensor) -> Iterator[list[EngineEvent]]:
        """Reads the job's text, whose first token has the logits (B, V)."""
        rows, vocabulary = logits.shape

        def forward(ids: torch.Tensor) -> torch.Tensor:
            self.num_prompt_tokens_read += len(ids)
            return self._forward(slots, ids.expand(rows, -1), prompt=False, logits_of=len(ids))

        yield from read_text(
            slots,
            self.job.forced_ids,
            logits,
            chunk=min(prefill_positions(self.loaded.device) // rows or 1, scored_positions(rows, vocabulary)),
            forward=forward,
            check_interruption=self.check_interruption,
        )

    def _row_state(self, index: int) -> RowState:
        row, device = self.job.rows[index], self.loaded.device
        report = row.report or NO_REPORT
        sampling, prompt, tokenizer = row.sampling, self.job.prompt_ids, self.loaded.tokenizer
        text = RowText(
            Detokenizer(tokenizer, prompt, skip_special_tokens=sampling.skip_special_tokens),
            sampling,
            prompt_tokens=len(prompt),
            context_length=self.loaded.context_length,
            eos_ids=self.eos_ids,
            special_stops=special_stops(sampling, tokenizer),
        )
        return RowState(
            index=index,
            steering=self._steering(row.plan, traces=report.doses) if row.plan else None,
            proof=self._proof(row.plan, sampling.max_tokens) if row.plan else None,
            scored=row.score,
            report=report,
            sampler=Sampler(sampling, device, prompt_tokens=len(prompt), ending_ids=text.ending_ids),
            text=text,
            sequence=list(prompt),
        )

    def _steering(self, plan: SteeringPlan, *, traces: bool) -> RowSteering:
        prompt_tokens = len(self.job.prompt_ids)
        return RowSteering(plan, self.operators, self.loaded.dtype, prompt_tokens=prompt_tokens, traces_doses=traces)

    def _proof(self, plan: SteeringPlan, max_tokens: int) -> Proof:
        return Proof(
            plan,
            EmbeddingRows(self.loaded.model),
            prompt_ids=self.job.prompt_ids,
            max_tokens=max_tokens,
            every_position=self.prove_every_position,
        )

    def _prefill(self, slots: list[BatchSlot]) -> Generator[list[EngineEvent], None, torch.Tensor | FinishReason]:
        """Reads the prompt in turns of at most :func:`prefill_positions` rows x tokens.

        Plain rows are one row here and are copied afterwards.

        Returns:
            Logits (B, V) after the prompt, or what interrupted the prefill.
        """
        unique: list[BatchSlot] = []
        source: list[int] = []
        for slot in slots:
            plain = next((i for i, other in enumerate(unique) if not (slot.steering or other.steering)), None)
            source.append(len(unique) if plain is None else plain)
            if plain is None:
                unique.append(slot)
        rows = torch.tensor(source, device=self.loaded.device)
        tokens = max(1, prefill_positions(self.loaded.device) // len(unique))
        *chunks, last = torch.split(torch.tensor(self.job.prompt_ids, device=self.loaded.device), tokens)
        for chunk in chunks:
            if interruption := self.check_interruption():
                return interruption
            self._forward(unique, chunk.expand(len(unique), -1), prompt=True)
            self.num_prompt_tokens_read += len(chunk)
            yield []
        if interruption := self.check_interruption():
            return interruption
        logits = self._forward(unique, last.expand(len(unique), -1), prompt=True)
        self.num_prompt_tokens_read += len(last)
        if len(unique) < len(slots):
            self._cache.batch_select_indices(rows)
        return logits[rows]

    def _forward(
        self, slots: list[BatchSlot], ids: torch.Tensor, *, prompt: bool, logits_of: int | None = None
    ) -> torch.Tensor:
        """One forward pass over ``ids`` (B, T); float32 logits (B, V) of the last position, or (B, N, V) of N."""
        model, start = self.loaded.model, self._cache.get_seq_length()
        steered = {row: slot.steering for row, slot in enumerate(slots) if slot.steering is not None}
        # No embedding, direction or hook for what is over: pushing the first token alone costs nothing after it.
        pushed = [row for row, steering in steered.items() if not steering.over]
        x = block_input(model, embed(model, ids[pushed]), start=start) if pushed else ()
        load_pushes(self._hooks, steered, dict(zip(pushed, x, strict=True)))
        proofs = {row: proof for row, slot in enumerate(slots) if slot.steering and (proof := slot.state.proof)}
        witnessed = WitnessedPass(self._witness, proofs, ids, start=start)
        try:
            # Hooked for this pass alone: the next one may be another job's.
            with self._hooks, self._witness, self._rope.fixed(len(self.job.prompt_ids)):
                kept = last_positions(ids, logits_of or 1)
                output = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=kept)
        except SteeringError as error:
            # A hook that met another shape than its pushes have, or was called twice.
            raise SteeringNotAppliedError(str(error)) from error
        logits: torch.Tensor = (output.logits[:, -1] if logits_of is None else output.logits).float()
        check_finite(slots, logits)
        record_doses(self._hooks, steered, ids.shape[1], prompt=prompt)
        witnessed.check({row: slots[row].state.sequence for row in steered})
        return logits

    def _drop_ended(self, slots: list[BatchSlot], ended: set[int]) -> list[BatchSlot]:
        """The slots whose rows go on; the KV cache keeps only theirs."""
        live = [place for place, slot in enumerate(slots) if slot.state.index not in ended]
        if 0 < len(live) < len(slots):
            self._cache.batch_select_indices(torch.tensor(live, device=self.loaded.device))
        return [slots[place] for place in live]

    def _choose_tokens(self, slots: list[BatchSlot], logits: torch.Tensor) -> Iterator[EngineEvent]:
        """The next token of every row of the job, from its logits in (B, V); and the end of those that it ends."""
        # Of all rows at once: one operation, and one wait for the device.
        likeliest = logits.argmax(-1).tolist()
        plain = {slot.state.index: logits[row] for row, slot in enumerate(slots) if slot.reference}
        for row, slot in enumerate(slots):
            if slot.reference:
                continue
            state = slot.state
            token = likeliest[row]
            if not state.sampler.takes_likeliest:
                token = state.sampler.choose(torch.tensor(state.sequence, device=logits.device), logits[row])
            state.sequence.append(token)
            piece, reason = state.text.push(token)
            yield TokenEvent(
                row=state.index,
                token_id=token,
                text=piece.text,
                logprob=self._logprob(token, logits[row], state.text.sampling.logprobs),
                score=score_token(token, logits[row], plain.get(state.index, logits[row]), state.report)
                if state.scored
                else None,
            )
            if reason is not None:
                yield end_row(state, reason, piece.stop_string)

    def _logprob(self, token: int, logits: torch.Tensor, count: int | None) -> TokenLogprob | None:
        return None if count is None else token_logprob(token, logits, count, self.loaded.tokenizer)
