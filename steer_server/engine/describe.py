"""The description of a loaded model that clients get, and that operators are checked against."""

from __future__ import annotations

import torch

from operators.core.errors import OperatorError
from operators.model.loading import LoadedModel, decoder_layers
from steer_server.errors import StartupError
from steer_server.types import ModelInfo


def describe_model(loaded: LoadedModel, *, engine: str) -> ModelInfo:
    """The description of ``loaded`` as served by ``engine``.

    Raises:
        StartupError: the model cannot be decoded or steered.
    """
    if getattr(loaded.tokenizer, "backend_tokenizer", None) is None:
        raise StartupError(
            f"{loaded.name}: its tokenizer {type(loaded.tokenizer).__name__} has no fast form, which streaming needs"
        )
    try:
        layers = len(decoder_layers(loaded.model))
        vocab_size = int(loaded.model.config.get_text_config().vocab_size)
        context_length = loaded.context_length
    except (OperatorError, AttributeError) as error:
        raise StartupError(f"{loaded.name} ({type(loaded.model).__name__}) cannot be served: {error}") from error
    return ModelInfo(
        model=loaded.name,
        architecture=type(loaded.model).__name__,
        model_fingerprint=loaded.fingerprint,
        tokenizer_fingerprint=loaded.tokenizer_fingerprint,
        num_layers=layers,
        hidden_size=loaded.hidden_size,
        vocab_size=vocab_size,
        context_length=context_length,
        eos_token_ids=_eos_ids(loaded),
        has_chat_template=bool(getattr(loaded.tokenizer, "chat_template", None)),
        engine=engine,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(loaded.device) if loaded.device.type == "cuda" else str(loaded.device),
        attention=loaded.attention,
    )


def _eos_ids(loaded: LoadedModel) -> tuple[int, ...]:
    ids = loaded.model.generation_config.eos_token_id
    if ids is None:
        ids = loaded.tokenizer.eos_token_id
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)
