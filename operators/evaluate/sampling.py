"""How the next token is chosen: greedily, with a repetition penalty, or by nucleus sampling with common random numbers.

One uniform number per prompt and step, drawn beforehand from a fixed seed, picks the token by the inverse of the
cumulative distribution. So the text of a prompt depends neither on its batch nor on the device's generator, and two
forms differ by what they do and not by their luck.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOP_K = 256
"""Tokens that nucleus sampling looks at: beyond them is less than 1 - top_p in all but the flattest distributions."""


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0: the likeliest token. ``penalty`` divides positive and multiplies negative logits of tokens
    that the text has already, prompt included."""

    name: str
    temperature: float = 0.0
    top_p: float = 1.0
    penalty: float = 1.0

    def __str__(self) -> str:
        penalty = "" if self.penalty == 1.0 else f"repetition penalty {self.penalty:g}"
        if self.temperature:
            chosen = f"temperature {self.temperature:g}, top-p {self.top_p:g}, top-k {TOP_K}"
            return f"{self.name} ({', '.join(filter(None, (chosen, penalty)))})"
        return f"{self.name} (greedy, {penalty})" if penalty else self.name


GREEDY = Sampling("greedy")
PENALISED = Sampling("penalised", penalty=1.2)
SAMPLED = Sampling("sampled", temperature=0.8, top_p=0.95)
SAMPLED_PENALISED = Sampling("sampled-penalised", temperature=0.8, top_p=0.95, penalty=1.2)
SAMPLINGS = (GREEDY, PENALISED, SAMPLED, SAMPLED_PENALISED)


def uniforms(prompts: int, steps: int, seed: int) -> torch.Tensor:
    """Numbers in [0, 1), (prompts, steps) float64 on the CPU."""
    return torch.rand(prompts, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choose(logits: torch.Tensor, sampling: Sampling, text: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The next token (R,) of each text, from ``logits`` (R, V), its tokens ``text`` (R, T) and ``uniform`` (R,)."""
    if sampling.penalty != 1.0:
        seen = logits.gather(1, text)
        logits = logits.scatter(1, text, torch.where(seen > 0, seen / sampling.penalty, seen * sampling.penalty))
    if not sampling.temperature:
        return logits.argmax(-1)
    wide = logits.float() / sampling.temperature
    best, ids = wide.topk(min(TOP_K, wide.shape[-1]), dim=-1)
    shares = (best - wide.logsumexp(-1, keepdim=True)).exp()
    # The smallest set of tokens whose share reaches top_p; the first always.
    kept = shares * (shares.cumsum(-1) - shares < sampling.top_p)
    cumulative = kept.cumsum(-1)
    place = (cumulative <= uniform.to(cumulative)[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, place.clamp_max(ids.shape[-1] - 1))[:, 0]
