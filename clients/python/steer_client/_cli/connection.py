"""A client for one command; its failure is one line on stderr and an exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import typer

import steer_client
from steer_client._cli.json_output import Json, print_json, print_json_line
from steer_client._cli.options import ConnectionOptions


@contextlib.contextmanager
def connect(
    connection: ConnectionOptions, *, as_json: bool, as_lines: bool = False
) -> Iterator[steer_client.SteerClient]:
    """Turns a failed request into a line on stderr and exit status 1, and Ctrl-C into 130.

    `as_json` also prints the error as an object on stdout, `as_lines` on one line.
    """
    try:
        with steer_client.SteerClient(
            connection.target, timeout=connection.timeout, retry=not connection.no_retry
        ) as client:
            yield client
    except steer_client.SteerError as error:
        if as_json or as_lines:
            (print_json_line if as_lines else print_json)({"error": _error_fields(error)})
        print(f"steer: {' '.join(error.message.split())}", file=sys.stderr)
        raise typer.Exit(1) from None
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
