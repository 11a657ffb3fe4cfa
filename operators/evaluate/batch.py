"""Many texts in one batch: the layout of their tokens.

Column 0 holds every text's first token, the next ones padding where a text is short, the last the rest of it. So the
first token, where pushes by constant directions matter, is fed in a pass of its own, and its cache can be edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from operators.core.errors import TrialError
from operators.evaluate.directions import Push
from operators.model.loading import LoadedModel
from operators.model.rope import check_one_rope


@dataclass(frozen=True, eq=False)
class TextJob:
    """One text to write: its prompt, and what steers it (None: the plain model).

    ``scored``: what the plain model is given in the prompt's place when it scores the text; None means the prompt.
    ``number``: that of the prompt, which its random numbers belong to.
    """

    prompt: tuple[int, ...]
    number: int
    push: Push | None = None
    strength: float = 0.0
    scored: tuple[int, ...] | None = None


class TextBatch:
    """The tokens of R texts of two or more tokens: ``first`` (R, 1), ``rest`` (R, W-1), ``mask`` (R, W)."""

    def __init__(self, prompts: Sequence[tuple[int, ...]], loaded: LoadedModel, *, tokens: int) -> None:
        """``tokens``: how many may follow. Raises :class:`TrialError` for a prompt that is too short or too long."""
        self.lengths = np.array([len(prompt) for prompt in prompts])
        width = int(self.lengths.max())
        short = next((prompt for prompt in prompts if len(prompt) < 2), None)
        if short is not None:
            text = loaded.tokenizer.decode(short)
            raise TrialError(
                f"prompt {text!r} has {len(short)} tokens; two or more are needed, or pushes of all but the first "
                "leave nothing to steer"
            )
        if width + tokens > _longest(loaded):
            raise TrialError(
                f"prompt of {width} tokens; {loaded.name} takes at most {_longest(loaded)} with {tokens} more"
            )
        # The first token is fed alone.
        check_one_rope(loaded.model.config.get_text_config(), 1, width + tokens - 1)
        device = loaded.device
        # Padding repeats the first token: a repetition penalty must not see one that is not in the text.
        rest = [prompt[:1] * (width - len(prompt)) + prompt[1:] for prompt in prompts]
        self.first = torch.tensor([prompt[:1] for prompt in prompts], device=device)
        self.rest = torch.tensor(rest, device=device)
        padding = torch.tensor(width - self.lengths, device=device)[:, None]
        columns = torch.arange(1, width, device=device)[None]
        real = columns > padding
        self.mask = torch.cat([torch.ones_like(real[:, :1]), real], 1)
        self.positions = (columns - padding).clamp_min(0)
        """Of ``rest``, (R, W-1)."""


def _longest(loaded: LoadedModel) -> int:
    """Tokens of a text, its padding included: a window shorter than a batch is wide would count the padding."""
    config = loaded.model.config.get_text_config()
    windows = [loaded.context_length]
    window = getattr(config, "sliding_window", None)
    if window and any("sliding" in kind for kind in getattr(config, "layer_types", None) or ("sliding",)):
        windows.append(int(window))
    return min(windows)
