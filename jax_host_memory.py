"""How glibc hands out the memory that XLA computes in on a CPU: two settings, each worth up to a third of a step."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path


def use_huge_pages() -> None:
    """Have glibc ask Linux for memory in large pages. Starts the script again: only a new process can be told so.

    A step of a large model on a CPU takes memory by the gigabyte, and in pages of 4 kB the kernel needs up to a third
    of the time to hand it out. A choice in GLIBC_TUNABLES is left as it is; ours is there after the second start.
    """
    glibc = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if glibc and "glibc.malloc.hugetlb" not in tunables and _can_start_again():
        asked = os.environ | {"GLIBC_TUNABLES": f"{tunables}:glibc.malloc.hugetlb=1".lstrip(":")}
        if sys.stdout is not None:
            sys.stdout.flush()
        with contextlib.suppress(OSError):  # a Python that this user cannot start by its path: without large pages then
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], asked)


def no_huge_pages() -> None:
    """Have Linux make no large pages for this process, for a small model, which is as fast without. Elsewhere, nothing.

    Where they are asked for, it makes one, in the background, of any 2 MB in which a single small page is in use, so it
    fills what a process has freed and keeps: 60 MB in two minutes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE


def _can_start_again() -> bool:
    """Whether the same command would run the same script: not from a pipe, in a notebook, under a debugger."""
    script = Path(sys.argv[0])
    started_here = {sys.argv[0], script.stem} & set(sys.orig_argv[1:])  # by its path, or by python -m
    return bool(sys.executable and script.is_file() and started_here) and sys.gettrace() is None


def keep_freed_memory() -> None:
    """Have glibc keep what it is given back. Before the first thread, if only once; elsewhere than on Linux, nothing.

    XLA on a CPU allocates its temporary memory anew for every step. glibc asks the kernel for a block of that size and
    returns it at once, so each step begins with the kernel filling it with zeros: a third of a small model's step.
    Above 2 GB that is left as it is: a heap in which such a block just does not fit would grow by another of its size.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        # M_MMAP_THRESHOLD: blocks below 2 GB come from the heap. glibc before 2.35 takes no more than 32 MB.
        if not libc.mallopt(-3, 2**31 - 1):
            libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and the heap is not given back
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap for all threads; those of other threads are small.
        # A thread that is there already has one of its own, which a later one would compute in.


def give_back_freed_memory() -> None:
    """Give the kernel, this once, what `keep_freed_memory` keeps. Elsewhere than with glibc, nothing."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
