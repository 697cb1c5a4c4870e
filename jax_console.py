"""How a script speaks to a person and ends: what goes wrong as one line, and an exit code that says whose fault it is.

Also where nobody can read it: a closed pipe, a full disk behind `> log.txt`.
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn


def run_script(
    main: Callable[[], int | None], *bad_input: type[Exception], machine_failed: type[Exception] | tuple = OSError
) -> NoReturn:
    """Run a script's main and exit: as it returns, 2 for bad input, 1 where the machine failed, 130 on Ctrl-C."""
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a notebook it is none
            stream.reconfigure(errors="backslashreplace")  # a console may lack a character of a name, or of a sample
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in a background job
        signal.signal(signal.SIGINT, _leave)
    exit_code: Any = 1
    try:
        with one_line_errors(*bad_input):
            done = main()
            sys.stdout.flush()  # what cannot be written is told here, and not as Python ends
            exit_code = done
    except SystemExit as stop:
        exit_code = stop.code
    except machine_failed as error:
        complain(f"error: {one_line(str(error))}")
    except (RuntimeError, MemoryError) as error:
        # how XLA says it on a GPU, and on a CPU
        ran_out = any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory"))
        if not ran_out and not isinstance(error, MemoryError):
            raise
        complain(
            "error: out of memory; halve --batch_size (in training, double --gradient_accumulation_steps with it: the "
            f"update stays the same), or take a smaller model. ({one_line(str(error))[:200]})"
        )
    except KeyboardInterrupt:  # where several processes train, to which it is an exception
        _leave(signal.SIGINT, None)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            silence(number)
    sys.exit(exit_code)


def _leave(signum: int, _frame: object) -> None:
    """Ctrl-C ends a script at once: a thread that computes is not waited for.

    Python's own handler raises, wherever the program is: out of JAX's callbacks nothing comes, and the script went on.
    """
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a console that is gone; a print that was under way
        sys.stdout.flush()
    os._exit(128 + signum)


def _open_closed_streams() -> None:
    """Give a script that was started with >&- or 2>&- a stream to write to, which nobody reads."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.fstat(number)
            except OSError:
                os.dup2(nowhere, number)  # else the next file that is opened gets it, and what libraries print
            setattr(sys, name, open(nowhere, "w", encoding="utf-8"))  # noqa: SIM115  to the end


@contextlib.contextmanager
def one_line_errors(*exception_types: type[Exception]) -> Iterator[None]:
    """Bad input ends a script with one line and exit code 2. A bug in the program keeps its traceback."""
    try:
        yield
    except exception_types as error:
        complain(f"error: {one_line(str(error))}")
        raise SystemExit(2) from None


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


def one_line(text: str) -> str:
    """The text with its line ends, and what would colour or clear a terminal, written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
