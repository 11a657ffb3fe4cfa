"""The detached map of each block, of its attention and of its MLP, for one prompt.

With the frozen factors of one forward pass, block s takes the stream h^(s-1) to

    h^(s) = h^(s-1) + a^(s) + m^(s)

with a the attention's and m the MLP's contribution, each affine in h^(s-1). A JVP applies their linear parts.

Positions that are zero need not be computed: attention's weights are constants, so that a tangent that is zero outside
some positions, read at some of these, depends on no other. The tape is cut to these positions.

Cost: one forward pass of the model to record. A JVP of l tangents at m positions takes ceil(l m / POSITIONS_PER_PASS)
passes of one block, over m positions, and one for the offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from operators.analyse.results import TARGETS, Target
from operators.core.errors import AnalysisError
from operators.core.header import Profile
from operators.maps.detach import FamilyRules, Tape, family_of, recording, replaying
from operators.maps.jacobian import relative_error
from operators.maps.replay import target_hidden_state
from operators.model.experts import eager_experts
from operators.model.loading import block_input, decoder_layers, embed, embedding_scale

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS_PER_PASS = 3072
"""Upper bound of tangents times positions in one pass: one block's temporaries are small, and each pass has a cost."""
_NORMS_AFTER = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
"""Norms between each part and the stream: in Gemma 2 and 3, OLMo 2 and 3 and EXAONE 4, and in GLM 4."""
_SUM_TOLERANCE = 0.05
"""Bound of |h + a + m - h'| / |h'|: rounding is far below it, a block that is wired differently far above."""


@dataclass(frozen=True, eq=False)
class BlockOutputs:
    """The outputs of one block for l inputs at m positions: h^(s) (l, m, d); a^(s) and m^(s) at the last one (l, d)."""

    block: torch.Tensor
    attention: torch.Tensor
    mlp: torch.Tensor

    def last(self, target: Target) -> torch.Tensor:
        """One of the three at the last position, (l, d)."""
        return {"block": self.block[:, -1], "attention": self.attention, "mlp": self.mlp}[target]


class FrozenBlocks:
    """The blocks of a model, frozen at one prompt.

    ``x``: (n, d), what the first block receives. ``states[s-1]``: the outputs of block s for the prompt, with l = 1.

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
            outputs = [stack.enter_context(_capturing(block, self._family)) for block in decoder_layers(model)]
            model.get_decoder()(inputs_embeds=embeddings[None], use_cache=False)
            self.states = [captured() for captured in outputs]
        self._check_sums()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, n, d)."""
        return len(self.states), int(self.x.shape[0]), int(self.x.shape[1])

    def stream(self, layer: int) -> torch.Tensor:
        """h^(layer), shape (n, d); layer 0 is x."""
        return self.states[layer - 1].block[0] if layer else self.x

    def jvp(
        self, layer: int, tangents: torch.Tensor, positions: Sequence[int], *, last_only: bool = False
    ) -> BlockOutputs:
        """The linear parts of block ``layer`` (1 to L) applied to tangents (l, m, d) at m ``positions``, ascending.

        At all other positions the tangents are zero; these are not computed. With ``last_only``, neither are the
        outputs at any position but the last of these: what ``block`` says of the others is meaningless.
        """
        tape = _CutTape(self._tape, tuple(positions))
        block = decoder_layers(self._model)[layer - 1]
        per_pass = max(1, POSITIONS_PER_PASS // len(positions))
        with torch.no_grad(), replaying(self._model, tape, final=block if last_only else None, within=block):
            offset = self._forward(block, torch.zeros_like(tangents[:1]))
            passes = [self._forward(block, group) for group in torch.split(tangents, per_pass)]
        return BlockOutputs(
            *(torch.cat([getattr(each, name) for each in passes]) - getattr(offset, name) for name in TARGETS)
        )

    def _forward(self, block: nn.Module, inputs: torch.Tensor) -> BlockOutputs:
        with _capturing(block, self._family) as captured:
            block(inputs)
        return captured()

    def _check_sums(self) -> None:
        for layer, state in enumerate(self.states, start=1):
            total = self.stream(layer - 1)[-1] + state.attention[0] + state.mlp[0]
            if relative_error(total, state.block[0, -1]) > _SUM_TOLERANCE:
                raise AnalysisError(
                    f"{type(self._model).__name__}: block {layer} is not its input plus its attention plus its MLP; "
                    "its parts cannot be told apart"
                )


def ordinary_product(model: PreTrainedModel, ids: tuple[int, ...], *, layer: int, profile: Profile) -> torch.Tensor:
    """sum_i J_i x_i, shape (d,), with the ordinary Jacobian of the model as it is: one JVP in forward mode.

    The same as :func:`operators.maps.jacobian.ordinary_jacobian` summed, without its d backward passes.
    """
    embeddings = embed(model, torch.tensor(ids, device=model.get_input_embeddings().weight.device))
    # What moves the first block's input by that input itself.
    tangent = block_input(model, embeddings) / embedding_scale(model)
    # The other kernels of scaled dot product attention have no forward-mode derivative.
    with sdpa_kernel(SDPBackend.MATH), eager_experts(model):
        pair = torch.func.jvp(
            lambda z: target_hidden_state(model, z[None], layer=layer, profile=profile)[0], (embeddings,), (tangent,)
        )
    product: torch.Tensor = pair[1]
    return product


class _CutTape(Tape):
    """Replays the factors of a recorded tape at some positions only."""

    def __init__(self, tape: Tape, positions: tuple[int, ...]) -> None:
        super().__init__("replay", {})
        self._whole, self._positions = tape.replayed(), list(positions)

    def factor(
        self, module: nn.Module, compute: Callable[[], torch.Tensor], *, multiplies: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The factor of ``module``: rows (1, n, .) of norms and gates, weights (1, H, n, n) of attention."""
        whole = self._whole.factor(module, compute)
        if whole.ndim == 4:
            return whole[:, :, self._positions][..., self._positions]
        # Of the positions that the tape is cut to, the input has all, or only the last ones.
        count = len(self._positions) if multiplies is None else multiplies.shape[-2]
        return whole[:, self._positions[-count:]]

    def replayed(self) -> Tape:
        """The tape itself: it replays already."""
        return self


@contextmanager
def _capturing(block: nn.Module, family: FamilyRules) -> Iterator[Callable[[], BlockOutputs]]:
    """Captures the last outputs of ``block`` and of its two parts; yields a function that returns them."""
    captured: dict[Target, torch.Tensor] = {}
    # Granite multiplies what is added to the stream.
    scale = float(getattr(block, "residual_multiplier", 1.0))

    def keep(target: Target) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            whole = output[0] if isinstance(output, tuple) else output
            captured[target] = whole if target == "block" else whole[:, -1] * scale

        return hook

    attention, mlp = _contributors(block, family)
    with ExitStack() as undo:
        modules: dict[Target, nn.Module] = {"block": block, "attention": attention, "mlp": mlp}
        for target, module in modules.items():
            undo.callback(module.register_forward_hook(keep(target)).remove)
        yield lambda: BlockOutputs(**captured)


def _contributors(block: Any, family: FamilyRules) -> tuple[nn.Module, nn.Module]:
    """The modules whose outputs are added to the stream: attention and MLP, or the norms after them."""
    for after_attention, after_mlp in _NORMS_AFTER:
        if hasattr(block, after_mlp):
            return getattr(block, after_attention), getattr(block, after_mlp)
    attention = next(module for module in block.children() if type(module) in family.attentions)
    mlp = next(module for module in block.children() if type(module) in family.mlps)
    return attention, mlp
