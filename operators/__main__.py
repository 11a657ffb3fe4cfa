"""``steer-operators``: build operators, and look after the directory that holds them."""

from __future__ import annotations

import gc
import sys
from typing import Annotated

import typer

from operators.commands._output import COMMAND
from operators.commands.analyse import analyse
from operators.commands.build import build
from operators.commands.calibrate import calibrate
from operators.commands.combine import combine
from operators.commands.contrast import contrast
from operators.commands.eval import evaluate
from operators.commands.lens import lens
from operators.commands.store import delete, list_operators, show
from operators.commands.vectors import export, import_vectors
from operators.commands.verify import renew, verify
from operators.core.number_options import decimal_numbers
from operators.core.openmp import wait_briefly
from operators.core.version import __version__

_OBJECTS_PER_COLLECTION = 50_000

app = typer.Typer(
    name=COMMAND,
    help="Build steering operators from concepts, and look after the store that holds them.",
    no_args_is_help=True,
    add_completion=False,
    # A programming error is shown as Python shows it; what a user can cause is one line.
    pretty_exceptions_enable=False,
)
app.command()(decimal_numbers(build))
app.command("list")(decimal_numbers(list_operators))
app.command()(decimal_numbers(show))
app.command()(decimal_numbers(verify))
app.command()(decimal_numbers(renew))
app.command()(decimal_numbers(delete))
app.command()(decimal_numbers(calibrate))
app.command()(decimal_numbers(combine))
app.command("import")(decimal_numbers(import_vectors))
app.command()(decimal_numbers(export))
app.command()(decimal_numbers(contrast))
app.command()(decimal_numbers(lens))
app.command()(decimal_numbers(analyse))
app.command("eval")(decimal_numbers(evaluate))


def _print_version(requested: bool) -> None:
    if requested:
        print(f"{COMMAND} {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options that belong to no command."""


def main() -> None:
    """Entry point of the command; Ctrl-C exits with 130."""
    wait_briefly()
    # To import torch and transformers makes half a million objects and no garbage; Python looks after every 700.
    gc.set_threshold(_OBJECTS_PER_COLLECTION)
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(f"{COMMAND}: {error.name} is not installed; building needs its extra: pip install '.[build]'")


if __name__ == "__main__":
    main()
