"""A decoder language model: getting it, loading it, telling it from others."""
