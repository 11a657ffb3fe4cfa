"""What a model does with one prompt, read off its detached maps: reconstruction, spectra, tokens, layers, models.

``maps`` gives the map of each block, ``spectra`` singular values and vectors, ``tokens`` their words. ``layers`` and
``positions`` put these together, ``compare`` does so over many phrases and models. ``results`` holds what is found;
``plots`` and ``report`` show it, and ``command`` is the door. Nothing is imported here, so that ``--help`` is quick.
"""
