"""Decoding one job on a transformers model: prefill, then one token per row and step, with a KV cache.

The rows of a job share every forward pass. Plain rows share one prefill. A row that is to be scored brings a
follower: a plain row that is fed the same tokens and never chooses one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from operators.model.loading import LoadedModel, block_input, decoder_layers, embed
from steer_server.engine.hf.sampling import Sampler
from steer_server.engine.hf.steering import PreparedOperators, RowSteering, SteeringHooks
from steer_server.engine.row_text import RowText
from steer_server.engine.text import Detokenizer
from steer_server.errors import EngineFailedError, SteeringNotAppliedError
from steer_server.types import (
    DecodeJob,
    EngineEvent,
    FinishReason,
    RowFinished,
    Score,
    TokenEvent,
    TokenLogprob,
    TopLogprob,
)

Interrupted = Callable[[], FinishReason | None]
"""Asked between steps: TIME_LIMIT or CANCELLED when the job must end, else None."""


_PREFILL_CHUNK = 1024
"""Prompt tokens between two looks at whether the job is still wanted."""


@dataclass(eq=False)
class _Leader:
    """A row that chooses tokens."""

    index: int
    steering: RowSteering | None
    scored: bool
    sampler: Sampler
    text: RowText
    sequence: torch.Tensor

    @property
    def generated(self) -> int:
        return len(self.text.ids)


@dataclass(frozen=True, eq=False)
class _Slot:
    """One row of the batch: a leader, or the plain follower of one."""

    leader: _Leader
    follower: bool = False

    @property
    def steering(self) -> RowSteering | None:
        return None if self.follower else self.leader.steering


@dataclass(eq=False)
class Decoder:
    """Everything one job needs of the engine."""

    loaded: LoadedModel
    job: DecodeJob
    prepared: PreparedOperators
    interrupted: Interrupted
    eos_ids: frozenset[int]
    _cache: DynamicCache = field(init=False)
    _hooks: SteeringHooks = field(init=False)

    @torch.inference_mode()
    def run(self) -> Iterator[EngineEvent]:
        """Tokens and ends of rows, step by step.

        Raises:
            SteeringNotAppliedError: a plan could not be applied at some step.
            EngineFailedError: the plain model itself gives logits that are not finite.
        """
        leaders = [self._leader(index) for index in range(len(self.job.rows))]
        slots = [_Slot(leader) for leader in leaders]
        # A plain row is its own plain model.
        slots += [_Slot(leader, follower=True) for leader in leaders if leader.scored and leader.steering]
        layers = {layer for leader in leaders if leader.steering for layer in leader.steering.layers}
        self._cache = DynamicCache(config=self.loaded.model.config)
        with SteeringHooks(decoder_layers(self.loaded.model), layers) as self._hooks:
            logits, interruption = self._prefill(slots)
            while True:
                ended: set[_Leader] = set()
                for event, leader in self._choose(slots, logits, interruption):
                    yield event
                    if isinstance(event, RowFinished):
                        ended.add(leader)
                live = [place for place, slot in enumerate(slots) if slot.leader not in ended]
                if not live:
                    return
                if len(live) < len(slots):
                    slots = [slots[place] for place in live]
                    self._cache.batch_select_indices(torch.tensor(live, device=self.loaded.device))
                interruption = self.interrupted()
                if interruption is None:
                    # A token is fed back only to choose another: the last one of a text never is, however it ends.
                    last = torch.stack([slot.leader.sequence[-1:] for slot in slots])
                    logits = self._forward(slots, last, prompt=False)

    def _leader(self, index: int) -> _Leader:
        row, sampling, device = self.job.rows[index], self.job.sampling, self.loaded.device
        return _Leader(
            index=index,
            steering=RowSteering(row.plan, self.prepared, self.loaded.dtype) if row.plan else None,
            scored=row.score,
            sampler=Sampler(sampling, device),
            text=RowText(
                Detokenizer(self.loaded.tokenizer, self.job.prompt_ids),
                sampling,
                prompt_tokens=len(self.job.prompt_ids),
                context_length=self.loaded.context_length,
                eos_ids=self.eos_ids,
            ),
            sequence=torch.tensor(self.job.prompt_ids, device=device),
        )

    def _prefill(self, slots: list[_Slot]) -> tuple[torch.Tensor, FinishReason | None]:
        """Logits (B, V) after the prompt, read in chunks; and what interrupted the reading, if anything did.

        Plain rows are one row here and are copied afterwards.
        """
        unique: list[_Slot] = []
        source: list[int] = []
        for slot in slots:
            plain = next((i for i, other in enumerate(unique) if not (slot.steering or other.steering)), None)
            source.append(len(unique) if plain is None else plain)
            if plain is None:
                unique.append(slot)
        rows = torch.tensor(source, device=self.loaded.device)
        logits = torch.empty(len(unique), 0, device=self.loaded.device)
        for chunk in torch.split(slots[0].leader.sequence, _PREFILL_CHUNK):
            if interruption := self.interrupted():
                return logits[rows], interruption
            logits = self._forward(unique, chunk.expand(len(unique), -1), prompt=True)
        if len(unique) < len(slots):
            self._cache.batch_select_indices(rows)
        return logits[rows], self.interrupted()

    def _forward(self, slots: list[_Slot], ids: torch.Tensor, *, prompt: bool) -> torch.Tensor:
        """One forward pass over ``ids`` (B, T); float32 logits (B, V) of the last position."""
        steered = [(row, slot.steering) for row, slot in enumerate(slots) if slot.steering is not None]
        model, start = self.loaded.model, self._cache.get_seq_length()
        self._hooks.load(steered, {row: block_input(model, embed(model, ids[row]), start=start) for row, _ in steered})
        output = model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[:, -1].float()
        finite = torch.isfinite(logits).all(-1).tolist()
        for slot, whole in zip(slots, finite, strict=True):
            if not whole and slot.steering is not None:
                raise SteeringNotAppliedError(
                    f"{slot.steering.describe()} makes the logits of token {slot.leader.generated} not finite; "
                    "a smaller strength is needed"
                )
            if not whole:
                raise EngineFailedError(f"the model's logits of token {slot.leader.generated} are not finite")
        self._hooks.collect(steered, prompt=prompt)
        return logits

    def _choose(
        self, slots: list[_Slot], logits: torch.Tensor, interruption: FinishReason | None
    ) -> Iterator[tuple[EngineEvent, _Leader]]:
        followers = {slot.leader: logits[row] for row, slot in enumerate(slots) if slot.follower}
        for row, slot in enumerate(slots):
            if slot.follower:
                continue
            leader = slot.leader
            if interruption is not None:
                yield self._end(leader, interruption, ""), leader
                continue
            token = leader.sampler.choose(leader.sequence, logits[row])
            leader.sequence = torch.cat([leader.sequence, leader.sequence.new_tensor([token])])
            piece, reason = leader.text.push(token)
            yield (
                TokenEvent(
                    row=leader.index,
                    token_id=token,
                    text=piece.text,
                    logprob=self._logprob(token, logits[row]),
                    score=_score(token, logits[row], followers.get(leader, logits[row])) if leader.scored else None,
                ),
                leader,
            )
            if reason is not None:
                yield self._end(leader, reason, piece.stop_string), leader

    def _end(self, leader: _Leader, reason: FinishReason, stop_string: str) -> RowFinished:
        text = "" if stop_string else leader.text.flush()
        receipts = leader.steering.receipts() if leader.steering else ()
        return RowFinished(leader.index, reason, text, stop_string, receipts)

    def _logprob(self, token: int, logits: torch.Tensor) -> TokenLogprob | None:
        count = self.job.sampling.logprobs
        if count is None:
            return None
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(count)
        top = tuple(
            TopLogprob(other, self._text(other), value)
            for value, other in zip(values.tolist(), ids.tolist(), strict=True)
        )
        return TokenLogprob(token, self._text(token), float(logprobs[token]), top)

    def _text(self, token: int) -> str:
        return str(self.loaded.tokenizer.decode([token]))


def _score(token: int, logits: torch.Tensor, plain: torch.Tensor) -> Score:
    """KL(plain || this row) in nats, and the token's log-probability under the plain model."""
    p, q = plain.log_softmax(-1), logits.log_softmax(-1)
    # Rounding can leave a tiny negative sum where the two are the same.
    kl = float((p.exp() * (p - q)).sum().clamp_min(0.0))
    return Score(kl, float(p[token]))
