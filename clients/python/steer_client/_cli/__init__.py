"""The `steer` command: a thin face over the public SDK."""
