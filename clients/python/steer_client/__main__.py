"""The `steer` command."""

from steer_client._cli.app import app


def main() -> None:
    """Runs the command; the exit status is 0, 1 for a failed request, 2 for wrong usage, 130 for Ctrl-C."""
    app(prog_name="steer")


if __name__ == "__main__":
    main()
