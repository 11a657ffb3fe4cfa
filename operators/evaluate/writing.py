"""Writing texts under pushes, and scoring them: KL(plain || steered) and log-probability of every token.

The texts are written by the steered model alone. Then both models are fed whole texts, one pass each for many tokens,
which costs less than a plain row beside every steered one, step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from operators.core import capacity
from operators.core.errors import TrialError
from operators.core.hooks import PushHooks
from operators.evaluate.batch import TextBatch, TextJob
from operators.evaluate.batch_pushes import BatchPushes, first_token
from operators.evaluate.sampling import Sampling, choose
from operators.model.kept_logits import last_positions
from operators.model.loading import LoadedModel, decoder_layers

_STEPS_BETWEEN_CHECKS = 8
"""Whether all texts have ended is looked at this often: each look waits for the device."""
_LOGITS_COPIES = 7
"""Float32 tensors of the logits' size that scoring holds at a time."""


@dataclass(frozen=True, eq=False)
class Written:
    """R texts, on the CPU. ``ids`` (R, T); ``lengths`` (R,), up to and with the token that ended a text; ``kl`` and
    ``logprobs`` (R, T) float32 in nats, with what is behind a text's end without meaning."""

    ids: np.ndarray
    lengths: np.ndarray
    kl: np.ndarray
    logprobs: np.ndarray


def write_texts(
    jobs: Sequence[TextJob],
    loaded: LoadedModel,
    layer: int,
    sampling: Sampling,
    uniforms: torch.Tensor,
    *,
    tokens: int,
) -> Written:
    """Writes every job's text, up to ``tokens`` tokens, and scores it; all of them in one batch.

    ``uniforms`` (prompts, tokens or more): the random numbers of each prompt.

    Raises:
        SteeringError: a push moved nothing, or cannot be formed.
        TrialError: a prompt is too short or too long, or logits are not finite.
    """
    with (
        _tensor_cores(loaded.device),
        torch.inference_mode(),
        PushHooks(decoder_layers(loaded.model), [layer]) as hooks,
    ):
        ids, lengths = _decode(jobs, loaded, layer, sampling, uniforms, tokens, hooks)
        rows = _rows_per_pass(loaded, tokens)
        # Texts of like length together: less padding.
        order = sorted(range(len(jobs)), key=lambda row: len(jobs[row].prompt))
        kl = np.zeros((len(jobs), tokens), dtype=np.float32)
        logprobs = np.zeros_like(kl)
        for first in range(0, len(jobs), rows):
            part = order[first : first + rows]
            scored = _score([jobs[row] for row in part], ids[part], loaded, layer, hooks)
            kl[part, : ids.shape[1]], logprobs[part, : ids.shape[1]] = scored
    real = np.arange(tokens)[None] < lengths[:, None]
    if not np.isfinite(kl[real]).all() or not np.isfinite(logprobs[real]).all():
        raise TrialError("logits are not finite; a smaller strength, or a wider dtype, is needed")
    # Where all texts ended early, the rest is padding.
    padded = np.zeros((len(jobs), tokens), dtype=np.int64)
    padded[:, : ids.shape[1]] = ids.cpu().numpy()
    return Written(padded, lengths, kl, logprobs)


def _decode(
    jobs: Sequence[TextJob],
    loaded: LoadedModel,
    layer: int,
    sampling: Sampling,
    uniforms: torch.Tensor,
    tokens: int,
    hooks: PushHooks,
) -> tuple[torch.Tensor, np.ndarray]:
    batch = TextBatch([job.prompt for job in jobs], loaded, tokens=tokens)
    pushes = BatchPushes(jobs, loaded, hooks, layer)
    cache = first_token(jobs, batch, loaded, pushes)
    noise = uniforms[[job.number for job in jobs], :tokens].to(loaded.device, torch.float32)
    ends = torch.tensor(end_ids(loaded), device=loaded.device)
    ended = torch.zeros(len(jobs), dtype=torch.bool, device=loaded.device)
    text = torch.cat([batch.first, batch.rest], 1)
    fed, positions, mask, start = batch.rest, batch.positions, batch.mask, np.ones(len(jobs), dtype=int)
    real = mask[:, 1:]
    for step in range(tokens):
        pushes.load(fed, positions, real, start)
        output = loaded.model(
            input_ids=fed,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last_positions(fed),
        )
        pushes.collect()
        chosen = choose(output.logits[:, -1], sampling, text, noise[:, step])
        if len(ends):
            chosen = torch.where(ended, ends[0], chosen)
            ended = ended | torch.isin(chosen, ends)
        text = torch.cat([text, chosen[:, None]], 1)
        if step % _STEPS_BETWEEN_CHECKS == _STEPS_BETWEEN_CHECKS - 1 and bool(ended.all()):
            break
        fed, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        real, start = torch.ones_like(fed, dtype=torch.bool), batch.lengths + step
    pushes.check()
    written = text[:, batch.mask.shape[1] :]
    is_end = torch.isin(written, ends) if len(ends) else torch.zeros_like(written, dtype=torch.bool)
    # Up to and with the first end.
    lengths = ((is_end.cumsum(1) == 0).sum(1) + 1).clamp_max(written.shape[1]).cpu().numpy()
    return written, lengths


def _score(
    jobs: Sequence[TextJob], written: torch.Tensor, loaded: LoadedModel, layer: int, hooks: PushHooks
) -> tuple[np.ndarray, np.ndarray]:
    """KL(plain || steered) and the log-probability under the plain model, (R, T) each, of the written tokens (R, T)."""
    plain = [TextJob(job.prompt if job.scored is None else job.scored, job.number) for job in jobs]
    p = _logprobs(plain, written, loaded, layer, hooks)
    logprobs = p.gather(-1, written[..., None])[..., 0]
    if all(job.push is None and job.scored is None for job in jobs):
        return np.zeros(written.shape, dtype=np.float32), logprobs.cpu().numpy()
    q = _logprobs(jobs, written, loaded, layer, hooks)
    # Rounding can leave a tiny negative sum where the two are the same.
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0.0)
    return kl.cpu().numpy(), logprobs.cpu().numpy()


def _logprobs(
    jobs: Sequence[TextJob], written: torch.Tensor, loaded: LoadedModel, layer: int, hooks: PushHooks
) -> torch.Tensor:
    """The model's log-probabilities (R, T, V) float32 where it writes the tokens (R, T)."""
    count = written.shape[1]
    batch = TextBatch([job.prompt for job in jobs], loaded, tokens=count)
    pushes = BatchPushes(jobs, loaded, hooks, layer)
    cache = first_token(jobs, batch, loaded, pushes)
    fed = torch.cat([batch.rest, written[:, :-1]], 1)
    following = torch.from_numpy(batch.lengths).to(fed.device)[:, None] + torch.arange(count - 1, device=fed.device)
    positions = torch.cat([batch.positions, following], 1)
    real = torch.cat([batch.mask[:, 1:], torch.ones_like(following, dtype=torch.bool)], 1)
    pushes.load(fed, positions, real, np.ones(len(jobs), dtype=int))
    output = loaded.model(
        input_ids=fed,
        attention_mask=torch.cat([batch.mask[:, :1], real], 1).long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last_positions(fed, count),
    )
    pushes.collect()
    pushes.check()
    logprobs: torch.Tensor = output.logits.float().log_softmax(-1)
    return logprobs


def end_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """The tokens that end a text."""
    ids = loaded.model.generation_config.eos_token_id
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


@contextmanager
def _tensor_cores(device: torch.device) -> Iterator[None]:
    """On a GPU, products of float32 in TF32, four times as fast; of plain and steered model alike."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rows_per_pass(loaded: LoadedModel, tokens: int) -> int:
    vocabulary = loaded.model.get_output_embeddings().weight.shape[0]
    per_row = tokens * vocabulary * 4 * _LOGITS_COPIES
    if loaded.device.type == "cuda":
        # Of all its memory: what torch has cached for reuse counts as taken.
        return int(max(1, min(512, torch.cuda.mem_get_info(loaded.device)[1] // 4 // per_row)))
    return int(max(1, min(32, capacity.free_memory(loaded.device) // 2 // per_row)))
