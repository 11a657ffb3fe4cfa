"""``steer-server``, also as ``python -m steer_server``."""

from __future__ import annotations

import os
import signal
import sys

from operators.core.openmp import wait_briefly
from steer_server.allocator import share_arenas


def main() -> None:
    """Entry point of the command."""
    _end_when_asked()
    share_arenas()
    wait_briefly()
    try:
        from steer_server.command import app
    except ModuleNotFoundError as error:
        sys.exit(f"steer-server: {error.name} is not installed; the server needs its extra: pip install '.[server]'")
    app()


def _end_when_asked() -> None:
    """Lets SIGTERM end a container's server while it loads, as it ends any other; when it serves, it drains.

    The kernel keeps from process 1, which is the server there, every signal that it has no handler for.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))


if __name__ == "__main__":
    main()
