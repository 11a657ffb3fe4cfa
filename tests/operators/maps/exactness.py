"""How exact the map of every architecture is, in float64 on a small random model, and the table of it in the docs.

    python -m tests.operators.maps.exactness

writes the table of docs/ARCHITECTURES.md anew; ``test_exactness.py`` measures the same, and holds the page to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from operators.maps.detach import detached, families
from operators.maps.jacobian import relative_error
from operators.maps.replay import Replay, input_and_target
from operators.model.attention import choose_attention
from operators.model.loading import embed
from tests.odd_models import LAYERS, ODD, odd_config, odd_model

PAGE = Path(__file__).parents[3] / "docs" / "ARCHITECTURES.md"
BOUND = 1e-12
IDS = (77, 12, 90, 65, 78, 69, 17)
_COLUMNS = (
    *("table", "model class", "attention", "Σ J x + c = h", "adjoint", "replay", "head tied"),
    *("what is particular", "vLLM"),
)
_VECTORS = 3


@dataclass(frozen=True)
class Exactness:
    """The largest relative errors over the first, a middle and the last layer, in both profiles, with the attention
    that a model is loaded with; and with its own (eager) at the last layer.

    ``reconstruction`` of sum_i J_i x_i + c; ``adjoint`` of <J^T u, v> = <u, J v>; ``replay`` of its products J^T u,
    held against autograd's through the detached model.
    """

    reconstruction: float
    adjoint: float
    replay: float

    @property
    def worst(self) -> float:
        """The largest of the three; NaN where one is."""
        return float(torch.tensor([self.reconstruction, self.adjoint, self.replay]).max())


def attentions_of(name: str) -> tuple[str, ...]:
    """What can compute this architecture: sdpa where it is the same as its own, and eager."""
    with torch.device("meta"):
        model = odd_model(name)
    return tuple(dict.fromkeys((choose_attention(model, None), "eager")))


def measure(model: PreTrainedModel, attentions: tuple[str, ...]) -> Exactness:
    """The errors of one model."""
    found = []
    for place, attention in enumerate(attentions):
        model.set_attn_implementation(attention)
        layers = (LAYERS,) if place else (1, LAYERS // 2, LAYERS)
        found += [_errors(model, layer, profile) for profile in ("residual", "golden") for layer in layers]
    return Exactness(*torch.tensor(found, dtype=torch.float64).amax(0).tolist())


def _errors(model: PreTrainedModel, layer: int, profile: str) -> tuple[float, float, float]:
    replay = Replay(model, IDS, layer=layer, profile=profile)
    generator = torch.Generator().manual_seed(layer)
    v = torch.randn(_VECTORS, *replay.shape, dtype=torch.float64, generator=generator)
    u = torch.randn(_VECTORS, replay.shape[1], dtype=torch.float64, generator=generator)
    pulled, pushed = replay.vjp(u), replay.jvp(v)
    embeddings = embed(model, torch.tensor([IDS])).requires_grad_()
    with detached(model), torch.enable_grad():
        x, y = input_and_target(model, embeddings, layer=layer, profile=profile)
    by_autograd = [torch.autograd.grad(y[0], x, each, retain_graph=True)[0][0] for each in u]
    return (
        relative_error(replay.reconstruction(), replay.y),
        relative_error((pulled * v).sum((1, 2)), (u * pushed).sum(1)),
        relative_error(pulled, torch.stack(by_autograd)),
    )


def rows_of(page: str) -> dict[str, list[str]]:
    """The cells of the page's table of architectures, by the name of the table."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in _lines(page)]
    return {row[0].strip("`"): row for row in rows}


def cells(name: str, exactness: Exactness) -> list[str]:
    """What is measured or known of an architecture, as the page has it: all columns but the last two."""
    (model_class,) = (family.model_class for family in families() if family.name == name)
    errors = [f"{e:.0e}" if e else "0" for e in (exactness.reconstruction, exactness.adjoint, exactness.replay)]
    tied = "yes" if type(odd_config(name))().tie_word_embeddings else "no"
    return [f"`{name}`", f"`{model_class}`", ", ".join(attentions_of(name)), *errors, tied]


def _lines(page: str) -> list[str]:
    return re.findall(r"^\| `\w+` \| `\w+` \|.*$", page, flags=re.MULTILINE)


def write() -> None:
    """Writes the page's table, keeping what is said by hand of each row."""
    page = PAGE.read_text(encoding="utf-8")
    said = {name: row[-2:] for name, row in rows_of(page).items()}
    lines = []
    for name in ODD:
        measured = measure(odd_model(name), attentions_of(name))
        lines.append(f"| {' | '.join([*cells(name, measured), *said.get(name, ['', ''])])} |")
    table = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}", *lines]
    pattern = r"^\| table \| model class.*\n(\|.*\n)+"
    PAGE.write_text(re.sub(pattern, lambda _: "\n".join(table) + "\n", page, flags=re.MULTILINE), encoding="utf-8")


if __name__ == "__main__":
    write()
