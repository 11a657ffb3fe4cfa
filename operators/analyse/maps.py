"""The detached map of each block, of its attention and of its MLP, for one prompt.

With the frozen factors of one forward pass, block s takes the stream h^(s-1) to

    h^(s) = h^(s-1) + a^(s) + m^(s)

a the attention's and m the MLP's contribution, each affine in h^(s-1). Only linear parts are returned. Because
attention is causal and the factors are constants, columns that are zero everywhere but at some positions, read at some
of those positions, need only those positions: the tape is cut to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from operators.core.errors import AnalysisError
from operators.core.header import Profile
from operators.maps.detach import Family, Tape, family_of, recording, replaying
from operators.maps.jacobian import relative_error
from operators.maps.replay import hidden_state
from operators.model.loading import block_input, decoder_layers, embed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Target = Literal["block", "attention", "mlp"]
TARGETS: tuple[Target, ...] = ("block", "attention", "mlp")
_COLUMNS_PER_PASS = 64
# |h + a + m - h'| / |h'|: rounding is far below, a block that is built otherwise far above.
_SUM_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Images:
    """What one block makes of l columns at m positions: h^(s) (l, m, d); a^(s) and m^(s) at the last one (l, d)."""

    block: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor

    def last(self, target: Target) -> torch.Tensor:
        """The images under one target at the last position, (l, d)."""
        return {"block": self.block[:, -1], "attention": self.attention, "mlp": self.mlp}[target]


class FrozenBlocks:
    """The blocks of a model, frozen at one prompt.

    ``x``: (n, d), what the first block receives. ``states[s-1]`` are the images of block s, for one column.

    Raises:
        UnsupportedModelError: the architecture has no detach table.
        AnalysisError: a block does not add its attention and its MLP to the stream.
    """

    def __init__(self, model: PreTrainedModel, ids: tuple[int, ...]) -> None:
        self._model, self._family = model, family_of(model)
        device = model.get_input_embeddings().weight.device
        embeddings = embed(model, torch.tensor(ids, device=device))
        self.x = block_input(model, embeddings)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            self._tape = stack.enter_context(recording(model))
            seen = [stack.enter_context(_watched(block, self._family)) for block in decoder_layers(model)]
            model.get_decoder()(inputs_embeds=embeddings[None], use_cache=False)
            self.states = [images() for images in seen]
        self._check_sums()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, n, d)."""
        return len(self.states), int(self.x.shape[0]), int(self.x.shape[1])

    def stream(self, layer: int) -> torch.Tensor:
        """h^(layer), shape (n, d); layer 0 is x."""
        return self.states[layer - 1].block[0] if layer else self.x

    def push(self, layer: int, columns: torch.Tensor, positions: Sequence[int]) -> Images:
        """The linear part of block ``layer`` (1 to L) on columns (l, m, d) that live at m ``positions``, ascending.

        All other positions are taken to be zero, and are not computed.
        """
        tape = _CutTape(self._tape, tuple(positions))
        with torch.no_grad(), replaying(self._model, tape):
            offset = self._run(layer, torch.zeros_like(columns[:1]))
            passes = [self._run(layer, part) for part in torch.split(columns, _COLUMNS_PER_PASS)]
        return Images(
            *(torch.cat([getattr(part, name) for part in passes]) - getattr(offset, name) for name in TARGETS)
        )

    def _run(self, layer: int, columns: torch.Tensor) -> Images:
        block = decoder_layers(self._model)[layer - 1]
        with _watched(block, self._family) as images:
            block(columns)
        return images()

    def _check_sums(self) -> None:
        for layer, state in enumerate(self.states, start=1):
            total = self.stream(layer - 1)[-1] + state.attention[0] + state.mlp[0]
            if relative_error(total, state.block[0, -1]) > _SUM_TOLERANCE:
                raise AnalysisError(
                    f"{type(self._model).__name__}: block {layer} is not its input plus its attention plus its MLP; "
                    "its parts cannot be told apart"
                )


def ordinary_product(model: PreTrainedModel, ids: tuple[int, ...], *, layer: int, profile: Profile) -> torch.Tensor:
    """sum_i J_i x_i with the ordinary Jacobian of the model as it is, (d,): one Jacobian-vector product.

    The same as summing ``linear_map.jacobian``, without its d backward passes.
    """
    embeddings = embed(model, torch.tensor(ids, device=model.get_input_embeddings().weight.device))
    x = block_input(model, embeddings)
    # The other kernels of scaled dot product attention have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH):
        pair = torch.func.jvp(
            lambda z: hidden_state(model, z[None], layer=layer, profile=profile)[0], (embeddings,), (x,)
        )
    product: torch.Tensor = pair[1]
    return product


class _CutTape(Tape):
    """The factors of a recorded tape at some positions only. Always replays."""

    def __init__(self, tape: Tape, positions: tuple[int, ...]) -> None:
        super().__init__("replay", {})
        self._whole, self._positions = tape.replayed(), list(positions)

    def factor(
        self, module: nn.Module, compute: Callable[[], torch.Tensor], *, of: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The factor of ``module``: rows (1, n, .) of norms and gates, weights (1, H, n, n) of attention."""
        del of  # its positions are those that the tape was cut to
        whole = self._whole.factor(module, compute)
        if whole.ndim == 4:
            return whole[:, :, self._positions][..., self._positions]
        return whole[:, self._positions]

    def replayed(self) -> Tape:
        """Itself."""
        return self


@contextmanager
def _watched(block: nn.Module, family: Family) -> Iterator[Callable[[], Images]]:
    """Keeps what ``block`` and its two contributions last gave; call what it yields to have them."""
    seen: dict[Target, torch.Tensor] = {}

    def keep(target: Target) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            whole = output[0] if isinstance(output, tuple) else output
            seen[target] = whole if target == "block" else whole[:, -1]

        return hook

    attention, mlp = _contributors(block, family)
    with ExitStack() as undo:
        watched: dict[Target, nn.Module] = {"block": block, "attention": attention, "mlp": mlp}
        for target, module in watched.items():
            undo.callback(module.register_forward_hook(keep(target)).remove)
        yield lambda: Images(**seen)


def _contributors(block: Any, family: Family) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs are added to the stream."""
    if hasattr(block, "post_feedforward_layernorm"):
        # Gemma 3 and OLMo 2 put a norm between each part and the stream.
        return block.post_attention_layernorm, block.post_feedforward_layernorm
    attention = next(part for part in block.children() if type(part) in family.attentions)
    mlp = next(part for part in block.children() if type(part) in family.mlps)
    return attention, mlp
