"""Options that several commands share, and their values where they are not given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from operators.commands._output import wrong_usage
from operators.core.built_at import built_at
from operators.core.header import AttentionName, DTypeName
from operators.core.store import Store, check_name

if TYPE_CHECKING:
    from operators.model.loading import LoadedModel

DeviceName = Literal["cpu", "cuda"]

NameArgument = Annotated[str, typer.Argument(help="Name of the operator.", show_default=False)]
StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Directory of operators (default: $STEER_STORE, or one in the user's data directory).",
        show_default=False,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Built-in name, local directory, GGUF file or Hugging Face id (default: $STEER_MODEL, or smollm2-135m).",
        show_default=False,
    ),
]
DTypeOption = Annotated[DTypeName, typer.Option(help="Precision of the model.")]
DeviceOption = Annotated[DeviceName | None, typer.Option(help="(default: cuda where there is one)", show_default=False)]
AttentionOption = Annotated[
    AttentionName | None,
    typer.Option(help="(default: sdpa, or eager where the model's own attention does more)", show_default=False),
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(
        help="Bound of the memory that the work takes beside the loaded model, such as 8GiB (default: most of what is "
        "free, within the container's limit).",
        show_default=False,
    ),
]
ReplaceOption = Annotated[bool, typer.Option("--replace", help="Replace an operator of that name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@dataclass(frozen=True)
class BuildOptions:
    """The options of ``build`` that do not describe an operator. Filled by :func:`operators.commands.build.build`."""

    model: str | None
    dtype: DTypeName
    device: DeviceName | None
    attention: AttentionName | None
    store_path: Path | None
    max_memory: str | None
    replace: bool
    calibrate: bool
    quick: bool
    """Of the calibration."""
    as_json: bool
    jobs: int = 1
    """Processes that build the operators of a file."""
    stream: bool | None = None
    """Whether the weights of the blocks stay in the files; None means where they do not fit into the memory."""
    device_memory: str | None = None
    plan: bool = False
    """Whether only to say what it would take."""

    @property
    def may_stream(self) -> bool | None:
        """``stream``, of a run that may: calibrations write texts, and several processes share one model in memory."""
        return False if self.calibrate or self.jobs > 1 else self.stream


def open_store(path: Path | None) -> Store:
    """The store at ``path``, or the default one."""
    return Store.default() if path is None else Store(path)


def check_new(store: Store, name: str, *, replace: bool) -> None:
    """Refuses, before any work, what would be refused where the operator is stored.

    Raises:
        OperatorError: the store does not take the name, or has it, or the environment says a time that is none.
    """
    with wrong_usage():
        check_name(name)
        built_at()
    store.check_free(name, replace=replace)


def default_device() -> DeviceName:
    """CUDA where this machine has it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_memory(size: str | None) -> int | None:
    """Bytes beside the model; None leaves it to the build. What is no size is wrong usage."""
    from operators.core.capacity import parse_bytes

    with wrong_usage():
        return None if size is None else parse_bytes(size)


def streaming_warnings(loaded: LoadedModel, options: BuildOptions) -> list[str]:
    """What is to be known of a build that was not asked to stream the model, and does."""
    if loaded.blocks is None or options.stream:
        return []
    return [
        f"{loaded.name} does not fit into the memory: its blocks are read from the files in every pass (--plan says "
        "how many, --no-stream refuses)"
    ]
