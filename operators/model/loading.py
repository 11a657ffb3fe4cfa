"""Loading and recognising decoder language models."""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from operators.core.capacity import format_bytes
from operators.core.dtypes import DTYPES
from operators.core.errors import ModelError, OperatorError
from operators.core.header import AttentionName, DTypeName
from operators.model.attention import check_attention
from operators.model.block_weights import BlockWeights, without_weights
from operators.model.checkpoint_files import CheckpointFiles, check_complete, check_shards, packed_weights, tied_error
from operators.model.digest_cache import keep_digest
from operators.model.experts import fit_experts
from operators.model.fingerprints import model_fingerprint, tokenizer_fingerprint
from operators.model.obtain import ACCEPTED, BUILT_IN, obtain
from operators.model.preflight import Examined, ModelCheck, check_fits, examine
from operators.model.stored_weights import keep_in_memory, stored_weights_digest, streamed_digest
from operators.model.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and what tells it from others.

    ``name`` is the name that it was loaded by; the fingerprints are those recorded in artifacts.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tokenizer_fingerprint: str
    files: CheckpointFiles | None = None
    """As they were when the model was loaded; None for a model that was made in memory."""
    blocks: BlockWeights | None = None
    """Where the weights of the decoder blocks are, of a model that is streamed; None where they are in memory."""
    device_memory: int | None = None
    """Bytes that all work with it may take on its accelerator; None means most of what is free, or that it has none."""
    meant_for: torch.device | None = None
    """Where the weights of a model would be that has none."""

    @property
    def device(self) -> torch.device:
        """Where the embedding table is."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def runs_on(self) -> torch.device:
        """:attr:`device`, or where it would be: without anything said, on the CPU."""
        return self.device if self.device.type != "meta" else self.meant_for or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def attention(self) -> str:
        """What computes its attention, by transformers' name: sdpa or eager, where :func:`load_model` has loaded it."""
        return str(self.model.config._attn_implementation)

    @property
    def num_layers(self) -> int:
        """L, the number of decoder blocks."""
        return len(decoder_layers(self.model))

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def context_length(self) -> int:
        """Upper bound of the tokens in one sequence."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def default_model() -> str:
    """``$STEER_MODEL``, or the smaller built-in model."""
    return os.environ.get("STEER_MODEL") or DEFAULT_MODEL


def load_model(
    name: str,
    *,
    dtype: DTypeName = "float32",
    device: str = "cpu",
    attention: AttentionName | None = None,
    check: ModelCheck | None = None,
    stream: bool | None = False,
    device_memory: int | None = None,
    check_streamed: Callable[[LoadedModel], object] | None = None,
) -> LoadedModel:
    """Loads a model by built-in name, local directory or GGUF file (de-quantised once), or Hugging Face id.

    Args:
        attention: None means sdpa where that is the same as the model's own attention.
        check: raises an error for a model that the caller cannot use; called before the weights are read.
        stream: leave the weights of the blocks in the files, for callers that read them block by block; None means
            where they do not fit into the memory.
        device_memory: bound of the bytes on the accelerator that ``device`` is; None means most of what is free.
        check_streamed: the same as ``check``, for a model that will be streamed, with its tokenizer.

    Raises:
        ModelError: it cannot be found or loaded, or its files were changed meanwhile; the message says what was tried.
    """
    from transformers.utils import logging as transformers_logging

    check_device(device, device_memory)
    source = str(obtain(name))
    local = Path(source).is_dir()
    # Before a byte is read: what is written meanwhile is noticed.
    files = CheckpointFiles.of(Path(source)) if local else None
    check_not_adapter(name, source)
    transformers_logging.disable_progress_bar()
    # The hub's client logs each of its retries twice; the error after the last one says the same.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        # One version of a Hugging Face id for all that follows: its newest one may be another at any moment.
        directory = Path(source) if local else _hub_directory(source)
        revision = "main" if local else directory.name
        checks = [decoder_layers, *([check] if check else [])]
        examined = examine(
            *(name, source, revision),
            dtype=dtype,
            device=torch.device(device),
            device_memory=device_memory,
            attention=attention,
            checks=checks,
        )
        if local:
            check_shards(name, directory)
        # Before gigabytes are read.
        tokenizer = load_tokenizer(name, source, revision, directory)
        streamed = examined.need > examined.have if stream is None else stream
        if streamed:
            outline = LoadedModel(
                *(name, without_weights(examined, DTYPES[dtype]), tokenizer, "", ""),
                device_memory=device_memory,
                meant_for=torch.device(device),
            )
            if check_streamed is not None:
                check_streamed(outline)
            if not local:
                _fetch_weights(source, revision)
            return _streamed(outline, directory, examined)
        check_fits(name, examined, dtype, device)
        model, report = _from_files(source, revision, examined, DTYPES[dtype])
        _check_report(name, report)
        _check_tied(name, model)
        files = files or CheckpointFiles.of(directory)
        _check_not_packed(name, model, files)
        if torch.device(device).type == "cpu":
            keep_in_memory(model)
        weights = stored_weights_digest(
            files, model, DTYPES[dtype], lambda exact: _from_files(source, revision, examined, exact)[0]
        )
        model = model.to(device).eval().requires_grad_(False)
        fit_experts(model)
    except (OperatorError, MemoryError):
        raise
    except Exception as error:
        # transformers and what it loads with raise errors of any class for files that are damaged.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"model {name!r} cannot be loaded{near_name(name)}: {reason} ({ACCEPTED})") from error
    check_attention(name, model)
    files.check_unchanged(name)
    keep_digest(files, weights)
    fingerprint = model_fingerprint(model, weights=weights)
    return LoadedModel(
        *(name, model, tokenizer, fingerprint, tokenizer_fingerprint(tokenizer), files), device_memory=device_memory
    )


def _streamed(outline: LoadedModel, directory: Path, examined: Examined) -> LoadedModel:
    """The model with the weights of its blocks in the files; ``outline`` has none."""
    name, device = outline.name, outline.runs_on
    files = CheckpointFiles.of(directory)
    _check_not_packed(name, examined.model, files)

    def blocks_in(dtype: torch.dtype) -> BlockWeights:
        model = without_weights(examined, dtype)
        blocks = BlockWeights(name, model, decoder_layers(model), directory, examined.decoder.names, device)
        blocks.load_resident()
        return blocks

    weights = streamed_digest(files, blocks_in)
    blocks = blocks_in(outline.dtype)
    model = blocks.model
    fit_experts(model)
    with blocks.zeros():
        check_attention(name, model)
    files.check_unchanged(name)
    keep_digest(files, weights)
    fingerprint = model_fingerprint(model, weights=weights)
    return replace(
        outline,
        model=model,
        fingerprint=fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(outline.tokenizer),
        files=files,
        blocks=blocks,
    )


def _from_files(
    source: str, revision: str, examined: Examined, dtype: torch.dtype
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    if examined.decoder.names:
        # Of a whole model, the part that reads images is not missed: a report would list every tensor of it.
        transformers_logging.set_verbosity_error()
    # False, not None: None asks on the terminal whether code that came with the model may run.
    try:
        loaded: tuple[PreTrainedModel, Mapping[str, Any]] = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            # A copy: loading writes into it.
            config=copy.deepcopy(examined.decoder.config),
            key_mapping=dict(examined.decoder.names) or None,
            dtype=dtype,
            attn_implementation=examined.attention,
            trust_remote_code=False,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return loaded


def _hub_directory(source: str) -> Path:
    """Where the files of a Hugging Face id are or will be: its newest version's, of which its name is the commit."""
    from transformers.utils import cached_file

    return Path(str(cached_file(source, "config.json"))).parent


def _fetch_weights(source: str, revision: str) -> None:
    """Puts the weights of a Hugging Face id beside its configuration, for who reads them from the files."""
    from huggingface_hub import snapshot_download

    snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.safetensors.index.json"])


def _check_report(name: str, report: Mapping[str, Iterable[Any]]) -> None:
    # A weight of another shape comes with both shapes behind its name.
    shapes = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    check_complete(name, missing=sorted(report["missing_keys"]), shapes=sorted(shapes))


def _check_tied(name: str, model: PreTrainedModel) -> None:
    """Refuses a head that the configuration ties to the embedding table and that has other numbers in the files.

    transformers computes with the head then, and vLLM with the table.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    # That of the whole model, by which transformers ties; a part that is text only may say something else.
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if tied and head is not None and head.weight is not table.weight:
        raise tied_error(name)


def _check_not_packed(name: str, model: PreTrainedModel, files: CheckpointFiles) -> None:
    """Refuses quantised weights that nothing says how to read: transformers takes their codes for numbers."""
    if getattr(model.config, "quantization_config", None) is None and (packed := packed_weights(files.weights)):
        raise ModelError(
            f"model {name!r}: its checkpoint has {packed[0]} and {len(packed) - 1} more quantised weights, and its "
            "configuration no quantization_config that says how; weights in F64, F32, F16 or BF16 are needed"
        )


def check_device(device: str, device_memory: int | None = None) -> None:
    """Raises :class:`ModelError` for CUDA where there is none, and for a bound of its memory without it."""
    if device_memory is not None and torch.device(device).type == "cpu":
        raise ModelError(
            f"device memory {format_bytes(device_memory)} on device {device!r}, which has none of its own: there, "
            "--max-memory bounds everything; device memory is accepted for 'cuda'"
        )
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {device!r}: this machine has no CUDA device that torch can use; 'cpu' is accepted")


def check_not_adapter(name: str, source: str) -> None:
    """Refuses the directory of an adapter, with or without base weights, which would be served without it."""
    for file in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
        if Path(source, file).exists():
            raise ModelError(
                f"model {name!r}: the directory holds an adapter ({file}), which is not applied; merge it into its "
                "base model first (in peft, merge_and_unload), and remove that file"
            )


def near_name(name: str) -> str:
    """The built-in model that a name may have been meant for, to end a message."""
    near = difflib.get_close_matches(name, BUILT_IN, cutoff=0.7)
    return f"; did you mean {near[0]!r}?" if near else ""


def recognise(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LoadedModel:
    """Wraps a model that is already in memory, computing its fingerprints.

    Raises:
        ModelError: it was loaded with an attention that is not its own.
    """
    fit_experts(model)
    check_attention(name, model)
    return LoadedModel(name, model, tokenizer, model_fingerprint(model), tokenizer_fingerprint(tokenizer))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks of a causal language model, first to last. Raises :class:`ModelError`."""
    return _find_module(model, ("layers", "h"), nn.ModuleList)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the head. Raises :class:`ModelError`."""
    return _find_module(model, ("norm", "ln_f", "final_layer_norm"), nn.Module)


def embed(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Token embeddings, shape ids.shape + (d,): what the model takes as ``inputs_embeds``, in its dtype."""
    with torch.no_grad():
        x: torch.Tensor = model.get_input_embeddings()(ids)
    return x


def embedding_scale(model: PreTrainedModel) -> float:
    """What a decoder multiplies embeddings by before its first block (Granite); 1 where their module gives them so."""
    return float(getattr(model.get_decoder(), "embedding_multiplier", 1.0))


def block_input(
    model: PreTrainedModel, embeddings: torch.Tensor, *, start: int = 0, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """x as the first block receives it: ``embeddings`` (..., T, d) of the tokens at positions start, start+1, ...

    The embeddings themselves, times a constant in models that scale them, plus the learned positions in models that add
    them (GPT-2). ``positions`` (..., T) are those of texts that begin at different ones.
    """
    scale, learned = embedding_scale(model), getattr(model.get_decoder(), "wpe", None)
    with torch.no_grad():
        x = embeddings if scale == 1.0 else embeddings * scale
        if learned is None:
            return x
        where = slice(start, start + x.shape[-2]) if positions is None else positions
        added: torch.Tensor = x + learned.weight[where]
    return added


_Module = TypeVar("_Module", bound=nn.Module)


def _find_module(model: PreTrainedModel, names: tuple[str, ...], kind: type[_Module]) -> _Module:
    decoder = model.get_decoder()
    for name in names:
        part = getattr(decoder, name, None)
        if isinstance(part, kind):
            return part
    raise ModelError(f"{type(model).__name__}: its decoder {type(decoder).__name__} has none of {', '.join(names)}")
