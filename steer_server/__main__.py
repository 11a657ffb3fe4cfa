"""``steer-server``, also as ``python -m steer_server``."""

from __future__ import annotations

import sys

from steer_server.allocator import share_arenas


def main() -> None:
    """Entry point of the command."""
    share_arenas()
    try:
        from steer_server.command import app
    except ModuleNotFoundError as error:
        sys.exit(f"steer-server: {error.name} is not installed; the server needs its extra: pip install '.[server]'")
    app()


if __name__ == "__main__":
    main()
