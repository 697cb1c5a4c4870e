"""The two streams of a script when nobody can read them: a closed pipe, a full disk behind `> log.txt`."""

import contextlib
import os
import sys


def complain(line: str) -> None:
    """A line on stderr, where that can still be written."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def silence(number: int) -> None:
    """Have what is written to file descriptor 1 or 2 from now on, and is in its buffer, go nowhere.

    Python would try to write the buffer at the end, complain, and end with a code of its own.
    """
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)
