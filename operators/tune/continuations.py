"""Continuations: what a model writes under a push, and how far that is from what it would write itself.

Decoding of many texts in one batch with one KV cache, prompts padded on the left. Every steered row has a plain
reference row: it is fed the same tokens and chooses none. So the batch itself gives, for each token of a steered text,
KL(plain || steered) and the token's log-probability under the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from operators.core.apply import PreparedOperator, Setting
from operators.core.errors import SteeringError, TrialError
from operators.core.hooks import PushHooks, layer_push
from operators.core.measured import Sampling
from operators.core.positions import ALL_POSITIONS
from operators.core.pushes import SequencePushes
from operators.model.kept_logits import last_positions
from operators.model.loading import LoadedModel, block_input, decoder_layers, embed
from operators.model.rope import check_one_rope
from operators.tune.token_choice import GREEDY, TokenChoice

TEXTS_PER_BATCH = 64
"""A steered text brings a reference row, so that the model sees up to twice as many rows."""


@dataclass(frozen=True, eq=False)
class Injection:
    """An operator that pushes the input of block ``layer``."""

    operator: PreparedOperator
    layer: int
    setting: Setting

    def describe(self) -> str:
        """The setting and the layer, for messages."""
        setting = self.setting
        where = "" if setting.positions == ALL_POSITIONS else f", positions {setting.positions}"
        return (
            f"strength {setting.strength:g}, {setting.rule}, blend {setting.blend:g}{where} at the input of block "
            f"{self.layer}"
        )


@dataclass(frozen=True, eq=False)
class ContinuationRequest:
    """One prompt, as token ids, and what steers its continuation (None: the plain model)."""

    ids: tuple[int, ...]
    injection: Injection | None = None


@dataclass(frozen=True)
class Continuation:
    """The generated tokens, without the prompt, and one number for each. A token that ended the text is one of them.

    ``kl``: KL(plain || steered) in nats over the whole vocabulary; 0 for a plain text. ``logprobs``: log-probability of
    the token under the plain model, in nats.
    """

    ids: tuple[int, ...]
    kl: tuple[float, ...]
    logprobs: tuple[float, ...]


def decode_continuations(
    requests: Sequence[ContinuationRequest],
    loaded: LoadedModel,
    *,
    tokens: int,
    sampling: Sampling = GREEDY,
    texts_per_batch: int = TEXTS_PER_BATCH,
    on_batch: Callable[[int], None] | None = None,
) -> list[Continuation]:
    """The continuation of every request, up to ``tokens`` tokens or one that ends a text.

    The positions of the setting are pushed, each from the token ids up to it; the last token is never fed, so never
    pushed.
    ``on_batch`` is called after each batch with its number of texts.

    Raises:
        SteeringError: a push cannot be formed, changes nothing, or makes the logits not finite.
        ModelError: texts would cross a length at which the model's rotary factors change.
        TrialError: a prompt is empty or too long, or the plain model's own logits are not finite.
    """
    longest = loaded.context_length - tokens
    for request in requests:
        if not 1 <= len(request.ids) <= longest:
            raise TrialError(
                f"prompt has {len(request.ids)} tokens; {loaded.name} takes 1 to {longest} with {tokens} more"
            )
    if requests:
        lengths = [len(request.ids) for request in requests]
        # Texts of a batch share a forward pass, and the longest one's factors.
        check_one_rope(loaded.model.config.get_text_config(), min(lengths), max(lengths) + tokens - 1)
    continuations: list[Continuation] = []
    with torch.inference_mode():
        for first in range(0, len(requests), texts_per_batch):
            batch = requests[first : first + texts_per_batch]
            continuations += _decode_batch(batch, loaded, tokens, sampling)
            if on_batch is not None:
                on_batch(len(batch))
    return continuations


def _decode_batch(
    requests: Sequence[ContinuationRequest], loaded: LoadedModel, tokens: int, sampling: Sampling
) -> list[Continuation]:
    model, device = loaded.model, loaded.device
    # In the batch: the S steered rows, a reference of each, the plain rows.
    order = sorted(range(len(requests)), key=lambda index: requests[index].injection is None)
    ordered = [requests[index] for index in order]
    injections = [request.injection for request in ordered if request.injection is not None]
    s = len(injections)
    # Equal plain prompts are one row of the prefill; ``source``: the prefill's row of each row of the batch.
    plain_prompts = list(dict.fromkeys(request.ids for request in ordered))
    plain_rows = [s + plain_prompts.index(request.ids) for request in ordered]
    source = torch.tensor([*range(s), *plain_rows], device=device)
    ids, mask = _left_padded([*(request.ids for request in ordered[:s]), *plain_prompts], device)
    cache = DynamicCache(config=model.config)
    choice = TokenChoice(sampling, [request.ids for request in ordered], device)
    generated = _GeneratedTokens(injections, _end_ids(loaded), len(requests), choice)
    layers = {injection.layer for injection in injections}
    with PushHooks(decoder_layers(model), layers) as hooks:
        steering = _BatchPushes(loaded, injections, hooks, prompt_tokens=[len(request.ids) for request in ordered[:s]])
        for step in range(tokens):
            num_fed = ids.shape[1]
            steering.load(ids[:s], mask[:s, -num_fed:])
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -num_fed:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last_positions(ids),
            )
            steering.check()
            logits = output.logits[:, -1]
            if step == 0:
                logits, mask = logits[source], mask[source]
                cache.batch_select_indices(source)
            chosen = generated.choose(torch.cat([logits[:s], logits[2 * s :]]), logits[s:])
            if bool(generated.ended.all()):
                break
            ids = torch.cat([chosen[:s], chosen])[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    by_request = dict(zip(order, generated.continuations(), strict=True))
    return [by_request[index] for index in range(len(requests))]


def _left_padded(prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T), T of the longest prompt; token 0 under mask 0 in front of shorter ones."""
    width = max(len(prompt) for prompt in prompts)
    ids = [(0,) * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [(0,) * (width - len(prompt)) + (1,) * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    ids = loaded.model.generation_config.eos_token_id
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


class _GeneratedTokens:
    """The tokens chosen so far, of R texts, and their measures. ``ended`` (R,): which texts have ended."""

    def __init__(
        self, injections: Sequence[Injection], end_ids: tuple[int, ...], num_texts: int, choice: TokenChoice
    ) -> None:
        """``injections``: of the first texts; the others are plain."""
        self._choice = choice
        self._injections = injections
        self._end_ids = end_ids
        self._steps: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """Per step token ids, KL and log-probabilities, each (R,)."""
        self._lengths = [0] * num_texts
        self.ended = torch.zeros(num_texts, dtype=torch.bool)

    def choose(self, logits: torch.Tensor, plain_logits: torch.Tensor) -> torch.Tensor:
        """The next token of each text, (R,), from its logits and those of the plain model on the same text, (R, V)."""
        self._check_finite(logits, plain_logits)
        q, p = (values.to(torch.promote_types(values.dtype, torch.float32)) for values in (logits, plain_logits))
        # Before the softmax: a repetition penalty depends on the logits' signs.
        chosen = self._choice.choose(q)
        q, p = q.log_softmax(-1), p.log_softmax(-1)
        # Rounding can leave a tiny negative sum where the two are the same.
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
        self._steps.append((chosen, kl, p.gather(-1, chosen[:, None])[:, 0]))
        for row, token in enumerate(chosen.tolist()):
            if not self.ended[row]:
                self._lengths[row] += 1
                self.ended[row] = token in self._end_ids
        return chosen

    def continuations(self) -> list[Continuation]:
        """One per text, without the tokens after its end."""
        ids, kl, logprobs = (torch.stack(values, 1).tolist() for values in zip(*self._steps, strict=True))
        return [
            Continuation(tuple(ids[row][:length]), tuple(kl[row][:length]), tuple(logprobs[row][:length]))
            for row, length in enumerate(self._lengths)
        ]

    def _check_finite(self, logits: torch.Tensor, plain_logits: torch.Tensor) -> None:
        finite = [torch.isfinite(values).all(-1).tolist() for values in (logits, plain_logits)]
        for row, (is_finite, plain_is_finite) in enumerate(zip(*finite, strict=True)):
            if not plain_is_finite:
                raise TrialError("the plain model's logits are not finite")
            if not is_finite:
                raise SteeringError(
                    f"{self._injections[row].describe()} makes the logits not finite; a smaller strength is needed"
                )


class _BatchPushes:
    """The pushes of the first S rows of a batch. Padding is in front of a row's tokens, and is not pushed."""

    def __init__(
        self,
        loaded: LoadedModel,
        injections: Sequence[Injection],
        hooks: PushHooks,
        *,
        prompt_tokens: Sequence[int],
    ) -> None:
        self._loaded, self._injections, self._hooks = loaded, injections, hooks
        self._pushes = [
            SequencePushes(injection.operator, injection.setting, prompt_tokens=count)
            for injection, count in zip(injections, prompt_tokens, strict=True)
        ]
        self._starts = [0] * len(injections)
        """Tokens fed so far, by row."""
        self._loaded_pieces: dict[int, dict[int, list[tuple[slice, torch.Tensor]]]] = {}
        """Of the pass under way: by layer and row, which tokens are pushed, and their pushes (P, d)."""

    def load(self, ids: torch.Tensor, fed: torch.Tensor) -> None:
        """Loads the pushes of the next forward pass: over ``ids`` (S, T), where ``fed`` (S, T) is 0 on padding."""
        self._loaded_pieces, width = {}, ids.shape[1]
        for row, (injection, count) in enumerate(zip(self._injections, fed.sum(-1).tolist(), strict=True)):
            start, self._starts[row] = self._starts[row], self._starts[row] + count
            if self._pushes[row].over:
                continue
            # Without the padding, which must not enter the running sum.
            x = block_input(self._loaded.model, embed(self._loaded.model, ids[row, -count:]), start=start)
            try:
                at, push = self._pushes[row].advance(x)
            except SteeringError as error:
                raise SteeringError(f"{injection.describe()}: {error}") from error
            if len(push):
                padding = width - count
                piece = (slice(padding + at.start, padding + at.stop), push)
                self._loaded_pieces.setdefault(injection.layer, {})[row] = [piece]
        self._hooks.load({layer: layer_push(pieces, width) for layer, pieces in self._loaded_pieces.items()})

    def check(self) -> None:
        """Raises :class:`SteeringError` where the last forward pass did not push a row at a token."""
        for layer, doses in self._hooks.take_doses().items():
            for place, (row, [(at, _)]) in enumerate(self._loaded_pieces[layer].items()):
                pushed = doses[place, at]
                if not bool(((pushed > 0) & torch.isfinite(pushed)).all()):
                    raise SteeringError(
                        f"{self._injections[row].describe()} moved a hidden state by {float(pushed.min())} of its "
                        "norm; a positive, finite change is needed"
                    )
