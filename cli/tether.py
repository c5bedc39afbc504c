"""Run a command that dies with its parent, even on `kill -9`; knows nothing of Freight.

As a program: `python -I -S tether.py PARENT_PID COMMAND...`. A parent-death signal can only be
asked for by the process that is to die. Doing so between fork and exec (`preexec_fn`) may deadlock
a parent that has threads, so this file is started first: it asks, then becomes the command under
the same process id. The kernel keeps the request over exec.

The signal is SIGKILL: a parent that vanished cannot wait for an orderly stop, and everything
Freight runs may be killed at any time. It is bound to the parent's *thread*, so children are
started by a thread that lives as long as they should.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def tethered(command: Sequence[str]) -> list[str]:
    """The command to start in its place. Its process id is the command's own."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def _main(parent_pid: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(1)  # the parent died before the request was made
    try:
        os.execvp(command[0], command)  # noqa: S606
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
