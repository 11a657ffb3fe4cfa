"""What a model does with one prompt, read off its detached maps: reconstruction, spectra, tokens, layers.

``frozen_blocks`` applies the map of each block, ``spectra`` gives singular values and vectors, ``tokens`` reads vectors
as tokens. ``positions`` and ``layers`` put these together and ``analysis`` makes one :class:`~results.Analysis` of
them; ``model_summary`` does so over many phrases. ``results`` holds what is found. ``plots`` and ``summary_plots`` draw
it on ``canvas``, ``report`` and ``summary_page`` write HTML from ``page``'s elements, and ``answers`` what the command
prints. ``write_report`` is what the command calls. Nothing is imported here, so that ``--help`` is quick.
"""
