"""Engines turn decode jobs into tokens. ``base`` is the door; one file (or few) per backend behind it."""
