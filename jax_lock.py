"""One writer for each run directory: out_dir/lock, held by the trainer from before its first write to its end.

The kernel's own lock (flock) is what counts, since it dies with its process. The text in the file names the holder, and
decides where the kernel cannot: on a file system without flock, and where the holder was another machine's, since some
file systems (NFS) keep flock to each machine.
Looking at it needs neither jax nor orbax, so that a second trainer is refused before they are imported.
"""

import errno
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

NAME = "lock"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # on Linux; all containers of a machine see the same
# What a file system without flock answers
NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)


class LockError(Exception):
    """Another process writes this run. One line: who, where, since when, and what to do."""


class Lock(NamedTuple):
    """A lock that is held. The kernel frees it when the process ends, however it ends."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Remove the file, if it is still ours, and let go of it."""
        if _same_file(self.path, self.descriptor):
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)


def check(out_dir: Path) -> None:
    """Raise LockError if another process is known to write this run. Touches nothing."""
    path = Path(out_dir) / NAME
    _refuse_if_alive(path, read_holder(path), has_flock=True)  # which `acquire` asks


def acquire(out_dir: Path) -> Lock:
    """Take the lock, also over from a process of this host that has died. Raises LockError, and OSError of the disk."""
    import fcntl  # not on Windows, where everything but training works without

    path = Path(out_dir) / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by the processes that we start
        has_flock = True
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if isinstance(error, BlockingIOError):  # alive for certain, whatever the text says
                    raise LockError(_in_use(path, read_holder(path))) from None
                if error.errno not in NO_FLOCK:
                    raise
                has_flock = False
            if _same_file(path, descriptor):  # else its holder removed it between our open and our flock
                left = read_holder(path)
                _refuse_if_alive(path, left, has_flock)
                if left:
                    print(f"taking over {path}: process {left.get('pid')} left it and does not run any more")
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_ourselves()).encode(), 0)
                return Lock(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def read_holder(path: Path) -> dict[str, Any] | None:
    """What the lock file says of its holder; None without a file, {} where it is empty or torn."""
    try:
        holder = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _ourselves() -> dict[str, Any]:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "pid": pid, "started": process_started(pid), "since": since}


def process_started(pid: int) -> str | None:
    """When a process of this host started, as a text only good for comparing; None if there is no such process.

    A process id is given out again, after a reboot soon: with its start it is unique.
    """
    if BOOT_ID.exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
        return None if state in "ZX" else f"{BOOT_ID.read_text().strip()} {fields[18]}"  # field 22, in ticks since boot
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None


def _refuse_if_alive(path: Path, holder: dict[str, Any] | None, has_flock: bool) -> None:
    """Raise LockError unless the holder is known not to run any more."""
    if not holder:
        return
    pid, host = holder.get("pid"), holder.get("host")
    if host != socket.gethostname():
        if has_flock and _of_this_kernel(holder):  # of another container here, or of this one before it was restarted
            return
        raise LockError(f"{_in_use(path, holder)}. If it does not run any more: rm {path}")
    if type(pid) is int and pid > 0 and holder.get("started") == process_started(pid) is not None:
        raise LockError(_in_use(path, holder))


def _of_this_kernel(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine since it was started, whatever its name for the machine."""
    return BOOT_ID.exists() and str(holder.get("started")).partition(" ")[0] == BOOT_ID.read_text().strip()


def _in_use(path: Path, holder: dict[str, Any] | None) -> str:
    holder = holder or {}
    who = f"process {holder.get('pid', '?')} on host {holder.get('host', '?')}, since {holder.get('since', '?')}"
    return f"out_dir={path.parent} is being written by {who}: let it end, or give another --out_dir"


def _same_file(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to the file that was opened."""
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
