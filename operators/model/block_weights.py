"""A model's weights in a checkpoint of safetensors files, of which a part at a time is in memory.

The model is made without weights (on the device "meta"). What every text needs (embedding table, final norm) is read
and stays; each decoder block has its weights only inside of :meth:`BlockWeights.present`. Names, fused tensors and
dtypes are resolved by transformers' own loader, to which a part of the checkpoint is given at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from operators.core.errors import ModelError
from operators.model.checkpoint_files import check_complete, loaded_weights, tied_error
from operators.model.stored_tensors import StoredTensor, stored_tensors
from operators.model.weights_digest import TensorDigest, combined_digest, tensor_digests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from operators.model.preflight import Examined

_HEAD = "head"
_RESIDENT = "resident"
Part = int | str
"""A decoder block by its number, what stays, or the head, which is read for nothing but its digest."""


class BlockWeights:
    """The weights of ``model``, part by part.

    ``model`` is without weights, in the dtype that they are to have; ``blocks`` are its decoder blocks. ``names`` are
    patterns of names in the checkpoint, and what stands for them in the model.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        directory: Path,
        names: Mapping[str, str],
        device: torch.device,
    ) -> None:
        """Reads the headers of the files, and no weight.

        Raises:
            ModelError: the checkpoint is of other files than safetensors, or it is quantised.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping

        self._name, self.model, self._blocks, self._device = name, model, blocks, device
        self._conversions = get_model_conversion_mapping(model, dict(names) or None)
        self._prefix = next(path for path, module in model.named_modules() if module is blocks)
        self._head = self._head_name()
        if getattr(model.config, "quantization_config", None) is not None:
            raise ModelError(f"model {name!r}: its weights are quantised; blocks are streamed from plain ones only")
        self._sources = self._find(loaded_weights(directory))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._ahead: tuple[Part, Future[dict[str, torch.Tensor]]] | None = None

    def _head_name(self) -> str:
        head = self.model.get_output_embeddings()
        return next((f"{path}." for path, module in self.model.named_modules() if module is head), "")

    def part_of(self, parameter: str) -> Part:
        """Where a parameter of this name belongs."""
        if parameter.startswith(f"{self._prefix}."):
            return int(parameter[len(self._prefix) + 1 :].partition(".")[0])
        return _HEAD if self._head and parameter.startswith(self._head) else _RESIDENT

    def _find(self, files: frozenset[Path]) -> dict[Part, list[StoredTensor]]:
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [entry for entry in self._conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._conversions if isinstance(entry, WeightConverter)]
        expected, base = self.model.state_dict(), self.model.base_model_prefix
        found: dict[Part, list[StoredTensor]] = {}
        for file in sorted(files):
            if file.suffix.lower() != ".safetensors":
                raise ModelError(
                    f"model {self._name!r}: {file.name} is no safetensors file; blocks are streamed from those only"
                )
            for tensor in stored_tensors(self._name, file):
                renamed, _ = rename_source_key(tensor.key, renamings, converters, base, expected)
                if renamed not in expected and tensor.key in expected:
                    renamed = tensor.key
                if renamed in expected:
                    found.setdefault(self.part_of(renamed), []).append(tensor)
        return found

    def load_resident(self) -> None:
        """Reads what stays. Raises :class:`ModelError` where the checkpoint lacks a part of it."""
        self._load(_RESIDENT)
        with torch.no_grad():
            self._make_buffers()
        self.model.tie_weights()
        self.model.requires_grad_(False)

    def _make_buffers(self) -> None:
        """Those that a model works out from its configuration (rotary factors), as transformers makes them."""
        for name, buffer in self.model.named_non_persistent_buffers():
            module, _, own = name.rpartition(".")
            empty = torch.empty_like(buffer, device=self._device)
            self.model.get_submodule(module).register_buffer(own, empty, persistent=False)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            tensor._is_hf_initialized = True
        for _, buffer in self.model.named_non_persistent_buffers():
            buffer._is_hf_initialized = False
        self.model.initialize_weights()

    @contextmanager
    def present(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """Inside the ``with`` block, decoder block ``index`` has its weights, on the device; and may be cast.

        ``following``: the block that will be asked for next, whose weights are read meanwhile.
        """
        with self._hollow_afterwards(index):
            self._load(index)
            if following is not None:
                self._read_ahead(following)
            yield self._blocks[index].requires_grad_(False)

    @contextmanager
    def zeros(self) -> Iterator[None]:
        """Inside the ``with`` block, the model runs with zeros for the weights of its blocks, of which none is read."""
        with ExitStack() as undo:
            for index, block in enumerate(self._blocks):
                held = ExitStack()

                def fill(module: nn.Module, _args: Any, index: int = index, held: ExitStack = held) -> None:
                    held.enter_context(self._hollow_afterwards(index))
                    _fill(module, lambda tensor: torch.zeros_like(tensor, device=self._device))

                def empty(_module: nn.Module, _args: Any, _output: Any, held: ExitStack = held) -> None:
                    held.close()

                undo.callback(held.close)
                undo.callback(block.register_forward_pre_hook(fill).remove)
                undo.callback(block.register_forward_hook(empty).remove)
            yield

    @contextmanager
    def _hollow_afterwards(self, index: int) -> Iterator[None]:
        """What a block's tensors are outside of the ``with`` block, they are again at its end."""
        block = self._blocks[index]
        before = [
            (module, name, tensor)
            for module in block.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and tensor.is_meta
        ]
        try:
            yield
        finally:
            for module, name, tensor in before:
                setattr(module, name, tensor)

    def digest(self) -> str:
        """The digest of all weights, as :func:`~operators.model.weights_digest.weights_digest` has it.

        Of a model in a dtype that holds every number of the files. Everything is read once.

        Raises:
            ModelError: the checkpoint lacks a tensor; or it has a head of its own where its configuration ties it.
        """
        digests: dict[str, TensorDigest] = {}
        last = len(self._blocks) - 1
        for index in range(last + 1):
            with self.present(index, index + 1 if index < last else None) as block:
                path = f"{self._prefix}.{index}"
                digests |= tensor_digests({f"{path}.{name}": tensor for name, tensor in block.state_dict().items()})
        outside = {name: tensor for name, tensor in self.model.state_dict().items() if self.part_of(name) == _RESIDENT}
        digests |= tensor_digests(outside)
        head, table = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        tied = head is not None and head.weight is table.weight
        if head is None:
            return combined_digest(digests)
        if not tied or _HEAD in self._sources:
            self._load(_HEAD)
        of_head = tensor_digests({f"{self._head}{name}": tensor for name, tensor in head.state_dict().items()})
        if tied:
            head.weight = table.weight
            own, shared = of_head[f"{self._head}weight"], tensor_digests({"": table.weight})[""]
            if own != shared:
                raise tied_error(self._name)
        else:
            head.to("meta")
        return combined_digest(digests | of_head)

    def _load(self, part: Part) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        dtype = self.model.get_input_embeddings().weight.dtype
        info, _ = convert_and_load_state_dict_in_model(
            model=self.model,
            state_dict=self._read(part),
            load_config=LoadStateDictConfig(
                dtype=dtype,
                dtype_plan=self.model._get_dtype_plan(dtype),
                device_map={"": str(self._device)},
                weight_mapping=self._conversions,
            ),
        )
        self._check(part, info)

    def _read(self, part: Part) -> dict[str, torch.Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == part:
            return ahead[1].result()
        return self._from_files(part)

    def _from_files(self, part: Part) -> dict[str, torch.Tensor]:
        return {tensor.key: tensor.read() for tensor in self._sources.get(part, [])}

    def _read_ahead(self, part: Part) -> None:
        self._ahead = (part, self._reader.submit(self._from_files, part))

    def _tensors(self, part: Part) -> list[tuple[str, torch.Tensor]]:
        every = self.model.state_dict(keep_vars=True).items()
        return [(name, tensor) for name, tensor in every if self.part_of(name) == part]

    def _check(self, part: Part, info: Any) -> None:
        shapes = sorted(key if isinstance(key, str) else key[0] for key in info.mismatched_keys)
        missing = sorted(name for name, tensor in self._tensors(part) if tensor.is_meta and name not in shapes)
        check_complete(self._name, missing=missing, shapes=shapes)


def _fill(block: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(make(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = make(buffer)


def without_weights(examined: Examined, dtype: torch.dtype) -> PreTrainedModel:
    """The model that was examined, in ``dtype``, on the device "meta"."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(examined.decoder.config),
            dtype=dtype,
            attn_implementation=examined.attention,
            trust_remote_code=False,
        )
    return model.eval().requires_grad_(False)
