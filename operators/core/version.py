"""The version of this project, as artifacts record it."""

__version__ = "0.1.0"
