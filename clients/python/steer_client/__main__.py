"""The `steer` command."""

import io
import os
import sys

from steer_client._cli.app import app


def main() -> None:
    """Runs the command; the exit status is 0, 1 for a failed request, 2 for wrong usage, 130 for Ctrl-C."""
    # gRPC would write of a connection that fails on stderr too, in lines of its own.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show a character is no reason to lose the text.
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="steer")


if __name__ == "__main__":
    main()
