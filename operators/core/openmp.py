"""How long OpenMP's threads wait for each other at work before they sleep, in the commands of this project."""

from __future__ import annotations

import os

_SPINS = "GOMP_SPINCOUNT"
_ACCEPTED = "2000"


def wait_briefly() -> None:
    """Has threads that wait look for work for a tenth of a millisecond, and sleep then. Before torch is imported.

    Between the operations of a pass through a small model less than that goes by: who sleeps at once is a fifth slower.
    By default, though, libgomp's threads look for milliseconds, which on a machine that does other things too is the
    time of those that they wait for: a text took two to three times as long, and a build five times the CPU seconds.
    ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` in the environment says otherwise.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(_SPINS, _ACCEPTED)


def wait_as_usual() -> None:
    """Takes that back, for processes that are started from here and have threads of their own ways."""
    if os.environ.get(_SPINS) == _ACCEPTED:
        del os.environ[_SPINS]
