"""Options that several commands share, and what they stand for when they are not given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from operators.core.store import Store

# The same choices as in operators.core.header, which is not imported here because it imports torch.
ProfileChoice = Literal["golden", "residual"]
RuleChoice = Literal["cumulative", "substitute"]
DTypeChoice = Literal["float32", "float64", "bfloat16"]
DeviceChoice = Literal["cpu", "cuda"]

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
DTypeOption = Annotated[DTypeChoice, typer.Option(help="Precision of the model.")]
DeviceOption = Annotated[
    DeviceChoice | None, typer.Option(help="(default: cuda where there is one)", show_default=False)
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option(help="Memory beside the model, such as 8GiB (default: most of what is free).", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def open_store(path: Path | None) -> Store:
    """The store at ``path``, or the default one."""
    from operators.core.store import Store

    return Store.default() if path is None else Store(path)


def device_or_default(given: DeviceChoice | None) -> DeviceChoice:
    """The device that is meant."""
    import torch

    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def memory_or_default(given: str | None) -> int | None:
    """Bytes beside the model; None leaves it to the build. Raises :class:`BuildError`."""
    from operators.core.capacity import parse_bytes

    return None if given is None else parse_bytes(given)
