"""``steer-operators``: build operators, and look after the directory that holds them."""

from __future__ import annotations

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
from operators.core.version import __version__

app = typer.Typer(
    name=COMMAND,
    help="Build steering operators from concepts, and look after the store that holds them.",
    no_args_is_help=True,
    add_completion=False,
    # A programming error is shown as Python shows it; what a user can cause is one line.
    pretty_exceptions_enable=False,
)
app.command()(build)
app.command("list")(list_operators)
app.command()(show)
app.command()(verify)
app.command()(renew)
app.command()(delete)
app.command()(calibrate)
app.command()(combine)
app.command("import")(import_vectors)
app.command()(export)
app.command()(contrast)
app.command()(lens)
app.command()(analyse)
app.command("eval")(evaluate)


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
    try:
        app()
    except ModuleNotFoundError as error:
        sys.exit(f"{COMMAND}: {error.name} is not installed; building needs its extra: pip install '.[build]'")


if __name__ == "__main__":
    main()
