"""One table per architecture. Everything in a model must be in its table; nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers.models.gemma3 import modeling_gemma3 as gemma3
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from operators.detach.rules import NormForward, offset_rms_norm, rms_norm
from operators.errors import UnsupportedModelError

# Linear in their input, or looked up before the map begins.
_LINEAR: frozenset[type[nn.Module]] = frozenset({nn.Linear, nn.Embedding, nn.ModuleList})


@dataclass(frozen=True)
class Family:
    """How one architecture is made linear.

    ``norms`` maps each norm class to its detached forward; ``gated_mlps`` names, per MLP class, the attribute
    that holds the gate's activation; ``attentions`` take their weights from the attention interface;
    ``containers`` only pass tensors on.
    """

    name: str
    causal_lm: type[nn.Module]
    norms: Mapping[type[nn.Module], NormForward]
    gated_mlps: Mapping[type[nn.Module], str]
    attentions: frozenset[type[nn.Module]]
    containers: frozenset[type[nn.Module]] = field(default_factory=frozenset)


def _llama() -> Family:
    return Family(
        name="llama",
        causal_lm=llama.LlamaForCausalLM,
        norms={llama.LlamaRMSNorm: rms_norm(eps="variance_epsilon")},
        gated_mlps={llama.LlamaMLP: "act_fn"},
        attentions=frozenset({llama.LlamaAttention}),
        containers=frozenset({llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaRotaryEmbedding}),
    )


def _qwen3() -> Family:
    return Family(
        name="qwen3",
        causal_lm=qwen3.Qwen3ForCausalLM,
        norms={qwen3.Qwen3RMSNorm: rms_norm(eps="variance_epsilon")},
        gated_mlps={qwen3.Qwen3MLP: "act_fn"},
        attentions=frozenset({qwen3.Qwen3Attention}),
        containers=frozenset({qwen3.Qwen3Model, qwen3.Qwen3DecoderLayer, qwen3.Qwen3RotaryEmbedding}),
    )


def _gemma3() -> Family:
    return Family(
        name="gemma3",
        causal_lm=gemma3.Gemma3ForCausalLM,
        norms={gemma3.Gemma3RMSNorm: offset_rms_norm(eps="eps")},
        gated_mlps={gemma3.Gemma3MLP: "act_fn"},
        attentions=frozenset({gemma3.Gemma3Attention}),
        containers=frozenset(
            {
                gemma3.Gemma3TextModel,
                gemma3.Gemma3DecoderLayer,
                gemma3.Gemma3RotaryEmbedding,
                gemma3.Gemma3TextScaledWordEmbedding,
            }
        ),
    )


_TABLES: tuple[Callable[[], Family], ...] = (_llama, _qwen3, _gemma3)


def family_of(model: nn.Module) -> Family:
    """The table of this model, after checking that every module is in it.

    Raises:
        UnsupportedModelError: names the first module, and its class, that no rule covers.
    """
    families = [make() for make in _TABLES]
    family = next((family for family in families if family.causal_lm is type(model)), None)
    if family is None:
        known = ", ".join(sorted(family.causal_lm.__name__ for family in families))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no detach table; there are tables for {known}. "
            "operators/detach says how to add one"
        )
    known_classes = {
        family.causal_lm,
        *family.norms,
        *family.gated_mlps,
        *family.attentions,
        *family.containers,
    }
    known_classes |= _LINEAR
    activations = {
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for kind, attribute in family.gated_mlps.items()
        if type(module) is kind
    }
    for name, module in model.named_modules():
        inside_activation = any(name == path or name.startswith(f"{path}.") for path in activations)
        if type(module) not in known_classes and not inside_activation:
            raise UnsupportedModelError(
                f"{type(model).__name__}: module {name!r} of class {type(module).__name__} is in no rule of "
                f"the {family.name!r} table; operators/detach says how to add it"
            )
        if isinstance(module, nn.Linear) and module.bias is not None and not name.endswith(("q_proj", "k_proj")):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name!r} has a bias; the {family.name!r} table covers maps without one"
            )
    return family
