"""What a build's process does first: it bounds itself, ties its life to the server's, and becomes the builder.

Run as ``python -m steer_server.admin.build_child PARENT MEMORY ARGUMENT...``: the process id of the server, the bytes
that the process may take, and the arguments of Python. It imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

_NICE = 10
_PR_SET_PDEATHSIG = 1
_FIRST_TO_BE_KILLED = "1000"


def main() -> None:
    """Never returns: the process goes on as another program."""
    parent, memory = int(sys.argv[1]), int(sys.argv[2])
    # Elsewhere than on Linux a build outlives a server that was killed, and its work directory goes at the next start.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the server is gone")
    os.nice(_NICE)
    # Private memory that can be written to: what torch maps beside it, libraries and weights, is shared or not its own.
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Where memory runs out all the same, the kernel ends the build and not the server.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_BE_KILLED)
    os.execv(sys.executable, [sys.executable, *sys.argv[3:]])  # noqa: S606 - no shell


if __name__ == "__main__":
    main()
