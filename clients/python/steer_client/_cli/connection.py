"""A client for one command; its failure is one line on stderr and an exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

import steer_client
from steer_client._cli.connection_options import ConnectionOptions
from steer_client._cli.json_output import Json, print_json, print_json_line


@contextlib.contextmanager
def connect(
    connection: ConnectionOptions, *, as_json: bool, as_lines: bool = False
) -> Iterator[steer_client.SteerClient]:
    """Turns a failed request into a line on stderr and exit status 1, options that do not go together into 2.

    Ctrl-C is 130. `as_json` also prints the error as an object on stdout, `as_lines` on one line.
    """
    status = 2
    try:
        with connection.client() as client:
            status = 1
            yield client
    except steer_client.SteerError as error:
        if as_json or as_lines:
            (print_json_line if as_lines else print_json)({"error": _error_fields(error)})
        print(f"steer: {' '.join(error.message.split())}", file=sys.stderr)
        raise typer.Exit(status) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _error_fields(error: steer_client.SteerError) -> Json:
    values: Json = {
        "code": error.code.name if error.code else None,
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
    }
    if isinstance(error, steer_client.InvalidRequestError):
        values["field"] = error.field
    if isinstance(error, steer_client.ServerBusyError):
        values["retry_after"] = error.retry_after
    return values
