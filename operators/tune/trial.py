"""Trials: what a model writes when it is pushed, and how far that is from what it would have said itself.

Greedy decoding of many texts in one batch with one KV cache, prompts padded on the left. Every steered row has a plain
follower: it is fed the same tokens and never chooses one. So the batch itself gives, for each token of a steered text,
KL(plain || steered) and the token's log-probability under the plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from operators.core.apply import Direction, PreparedOperator, Setting, steer
from operators.core.errors import SteeringError, TrialError
from operators.model.loading import LoadedModel, block_input, decoder_layers, embed

ROWS = 64
"""Texts per batch. A steered one brings a follower, so that the model sees up to twice as many rows."""


@dataclass(frozen=True, eq=False)
class Push:
    """An operator on its way into the model: added to the input of block ``layer``."""

    operator: PreparedOperator
    layer: int
    setting: Setting


@dataclass(frozen=True, eq=False)
class Row:
    """One text to be written: the prompt's token ids, and what pushes it (None: the plain model)."""

    ids: tuple[int, ...]
    push: Push | None = None


@dataclass(frozen=True)
class Text:
    """What a row became. One number per token; a token that ended the text is one of them.

    ``kl``: KL(plain || steered) in nats over the whole vocabulary; 0 for a plain row. ``logprobs``: of the token under
    the plain model, in nats.
    """

    ids: tuple[int, ...]
    kl: tuple[float, ...]
    logprobs: tuple[float, ...]


def write(
    rows: Sequence[Row],
    loaded: LoadedModel,
    *,
    tokens: int,
    rows_per_batch: int = ROWS,
    tick: Callable[[int], None] | None = None,
) -> list[Text]:
    """The greedy continuation of every row, up to ``tokens`` tokens or one that ends a text.

    Each position of prompt and text is pushed from its token ids; the last token is never fed, so never pushed.
    ``tick`` is told how many rows each batch had.

    Raises:
        SteeringError: a push cannot be formed, changes nothing, or makes the logits not finite.
        TrialError: a prompt is empty or too long, or the plain model's own logits are not finite.
    """
    longest = loaded.context_length - tokens
    for row in rows:
        if not 1 <= len(row.ids) <= longest:
            raise TrialError(f"prompt has {len(row.ids)} tokens; {loaded.name} takes 1 to {longest} with {tokens} more")
    texts: list[Text] = []
    with torch.inference_mode():
        for first in range(0, len(rows), rows_per_batch):
            batch = rows[first : first + rows_per_batch]
            texts += _write(batch, loaded, tokens)
            if tick is not None:
                tick(len(batch))
    return texts


def _write(rows: Sequence[Row], loaded: LoadedModel, tokens: int) -> list[Text]:
    model, device = loaded.model, loaded.device
    # In the batch: the steered rows, a follower of each, the plain rows.
    order = sorted(range(len(rows)), key=lambda index: rows[index].push is None)
    ordered = [rows[index] for index in order]
    pushes = [row.push for row in ordered if row.push is not None]
    s = len(pushes)
    # A plain prompt is read once, however many rows go on from it.
    plain_prompts = list(dict.fromkeys(row.ids for row in ordered))
    source = torch.tensor([*range(s), *(s + plain_prompts.index(row.ids) for row in ordered)], device=device)
    ids, mask = _left_padded([*(row.ids for row in ordered[:s]), *plain_prompts], device)
    cache = DynamicCache(config=model.config)
    texts = _Texts(_end_ids(loaded), len(rows))
    with _Pushes(loaded, pushes).hooked() as steering:
        for step in range(tokens):
            fed = mask[:, -ids.shape[1] :]
            steering.load(ids[:s], fed[:s])
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            steering.check()
            logits = output.logits[:, -1]
            if step == 0:
                logits, mask = logits[source], mask[source]
                cache.batch_select_indices(source)
            chosen = texts.add(torch.cat([logits[:s], logits[2 * s :]]), logits[s:], pushes)
            if bool(texts.ended.all()):
                break
            ids = torch.cat([chosen[:s], chosen])[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    found = dict(zip(order, texts.finished(), strict=True))
    return [found[index] for index in range(len(rows))]


def _left_padded(prompts: Sequence[tuple[int, ...]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T), T of the longest prompt; token 0 under mask 0 in front of shorter ones."""
    width = max(len(prompt) for prompt in prompts)
    ids = [(0,) * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [(0,) * (width - len(prompt)) + (1,) * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    found = loaded.model.generation_config.eos_token_id
    return tuple(found) if isinstance(found, list | tuple) else () if found is None else (int(found),)


class _Texts:
    """What has been written so far, by all rows."""

    def __init__(self, ends: tuple[int, ...], rows: int) -> None:
        self._ends = ends
        self._columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._lengths = [0] * rows
        self.ended = torch.zeros(rows, dtype=torch.bool)

    def add(self, steered: torch.Tensor, plain: torch.Tensor, pushes: Sequence[Push]) -> torch.Tensor:
        """The next token of each row, (R,), from its logits and those of the plain model on the same text, (R, V)."""
        for row, (own, reference) in enumerate(zip(_finite(steered), _finite(plain), strict=True)):
            if not reference:
                raise TrialError("the plain model's logits are not finite")
            if not own:
                raise SteeringError(f"{_named(pushes[row])} makes the logits not finite; a smaller strength is needed")
        q, p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in (steered, plain))
        q, p = q.log_softmax(-1), p.log_softmax(-1)
        chosen = q.argmax(-1)
        # Rounding can leave a tiny negative sum where the two are the same.
        kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
        self._columns.append((chosen, kl, p.gather(-1, chosen[:, None])[:, 0]))
        for row, token in enumerate(chosen.tolist()):
            if not self.ended[row]:
                self._lengths[row] += 1
                self.ended[row] = token in self._ends
        return chosen

    def finished(self) -> list[Text]:
        ids, kl, logprobs = (torch.stack(column, 1).tolist() for column in zip(*self._columns, strict=True))
        return [
            Text(tuple(ids[row][:length]), tuple(kl[row][:length]), tuple(logprobs[row][:length]))
            for row, length in enumerate(self._lengths)
        ]


def _named(push: Push) -> str:
    setting = push.setting
    return f"strength {setting.strength:g}, {setting.rule}, blend {setting.blend:g} at the input of block {push.layer}"


def _finite(logits: torch.Tensor) -> list[bool]:
    found: list[bool] = torch.isfinite(logits).all(-1).tolist()
    return found


@dataclass(eq=False)
class _Site:
    """What one layer's hook is to do in one forward pass, and what it did."""

    rows: torch.Tensor
    push: torch.Tensor
    fed: torch.Tensor
    doses: torch.Tensor | None = None


class _Pushes:
    """The pushes of the first rows of a batch, and the hooks that add them."""

    def __init__(self, loaded: LoadedModel, pushes: Sequence[Push]) -> None:
        self._loaded = loaded
        self._pushes = pushes
        self._directions = [Direction(push.operator, push.setting) for push in pushes]
        self._starts = [0] * len(pushes)
        self._sites: dict[int, _Site] = {}

    @contextmanager
    def hooked(self) -> Iterator[_Pushes]:
        """The model with its hooks; without them again on every way out."""
        blocks = decoder_layers(self._loaded.model)
        with ExitStack() as undo:
            for layer in {push.layer for push in self._pushes}:
                handle = blocks[layer].register_forward_pre_hook(self._hook(layer), with_kwargs=True)
                undo.callback(handle.remove)
            yield self

    def load(self, ids: torch.Tensor, fed: torch.Tensor) -> None:
        """Works out the pushes of the next tokens: ``ids`` (S, T), of which those are fed that ``fed`` marks."""
        model = self._loaded.model
        push = torch.zeros(*ids.shape, self._loaded.hidden_size, device=ids.device)
        counts = fed.sum(-1).tolist()
        for row, (direction, count) in enumerate(zip(self._directions, counts, strict=True)):
            # Padding is in front: it neither is pushed nor moves the running sum.
            new = embed(model, ids[row, -count:])
            try:
                unit = direction.advance(block_input(model, new, start=self._starts[row]))
            except SteeringError as error:
                raise SteeringError(f"{_named(self._pushes[row])}: {error}") from error
            push[row, -count:] = self._pushes[row].setting.strength / 2.0 * unit
            self._starts[row] += count
        layers = torch.tensor([one.layer for one in self._pushes], device=ids.device)
        for layer in set(layers.tolist()):
            rows = (layers == layer).nonzero()[:, 0]
            self._sites[layer] = _Site(rows, push[rows], fed[rows].bool())

    def check(self) -> None:
        """Raises :class:`SteeringError` where the pass that has just been made did not push a row."""
        for layer, site in self._sites.items():
            if site.doses is None:
                raise SteeringError(f"layer {layer} was not reached: the model did not call its hook")
            wrong = site.fed & ~((site.doses > 0) & torch.isfinite(site.doses))
            if bool(wrong.any()):
                row, position = wrong.nonzero()[0].tolist()
                raise SteeringError(
                    f"{_named(self._pushes[int(site.rows[row])])} moved a hidden state by "
                    f"{float(site.doses[row, position])} of its norm; a positive, finite change is needed"
                )

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            site = self._sites[layer]
            hidden = args[0] if args else kwargs["hidden_states"]
            moved, site.doses = steer(hidden[site.rows], site.push)
            # Plain rows keep their bits: only the steered ones are written.
            hidden = hidden.index_copy(0, site.rows, moved)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook
