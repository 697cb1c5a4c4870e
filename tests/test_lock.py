"""One writer for each run directory: who is refused, what is taken over, and that looking changes nothing.

python -m pytest tests/test_lock.py
"""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_lock
from jax_lock import LockError

ROOT = Path(__file__).resolve().parents[1]
HERE = socket.gethostname()


@pytest.fixture
def lost_pid() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def sleeper():
    """Another process, alive."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.communicate()


def leave_lock(out_dir: Path, **holder: object) -> Path:
    path = out_dir / "lock"
    path.write_text(json.dumps({"host": HERE, "since": "yesterday"} | holder))
    return path


def test_lock_names_its_holder_and_is_gone_after_release(tmp_path):
    lock = jax_lock.acquire(tmp_path)
    holder = json.loads((tmp_path / "lock").read_text())
    assert (holder["host"], holder["pid"]) == (HERE, os.getpid())
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", holder["since"])
    lock.release()
    assert list(tmp_path.iterdir()) == []
    jax_lock.acquire(tmp_path).release()


def test_second_lock_is_refused_by_the_kernel_whatever_the_text_says(tmp_path):
    lock = jax_lock.acquire(tmp_path)
    for text in (None, "", "{", json.dumps({"host": "elsewhere", "pid": 1})):
        if text is not None:
            (tmp_path / "lock").write_text(text)
        with pytest.raises(LockError, match=f"out_dir={tmp_path} is being written by process"):
            jax_lock.acquire(tmp_path)
    lock.release()


def test_lock_of_a_dead_process_is_taken_over_and_told(tmp_path, lost_pid, capsys):
    path = leave_lock(tmp_path, pid=lost_pid, started="then")
    jax_lock.check(tmp_path)
    lock = jax_lock.acquire(tmp_path)
    assert capsys.readouterr().out == f"taking over {path}: process {lost_pid} left it and does not run any more\n"
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.release()


def test_process_that_only_has_the_number_of_the_dead_one_is_not_taken_for_it(tmp_path, sleeper):
    leave_lock(tmp_path, pid=sleeper.pid, started=jax_lock.process_started(sleeper.pid))
    with pytest.raises(LockError, match=f"process {sleeper.pid} on host {HERE}, since yesterday"):
        jax_lock.check(tmp_path)
    leave_lock(tmp_path, pid=sleeper.pid, started="another start")
    jax_lock.check(tmp_path)
    jax_lock.acquire(tmp_path).release()


def test_start_of_a_process_tells_processes_apart(sleeper, lost_pid):
    started = jax_lock.process_started(sleeper.pid)
    assert started and started == jax_lock.process_started(sleeper.pid) != jax_lock.process_started(os.getpid())
    assert jax_lock.process_started(lost_pid) is None


def test_lock_of_another_host_is_refused_with_the_way_to_remove_it(tmp_path):
    path = leave_lock(tmp_path, host="node17", pid=4711, started="then")
    for attempt in (jax_lock.check, jax_lock.acquire):
        with pytest.raises(LockError, match="process 4711 on host node17, since yesterday") as e:
            attempt(tmp_path)
        assert str(e.value).endswith(f"If it does not run any more: rm {path}")
    path.unlink()
    jax_lock.acquire(tmp_path).release()


def no_flock(descriptor: int, flags: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.mark.skipif(not jax_lock.BOOT_ID.exists(), reason="only Linux tells which kernel a process ran on")
def test_lock_of_a_container_on_this_machine_is_taken_over_once_the_kernel_has_freed_it(tmp_path, monkeypatch):
    leave_lock(tmp_path, host="container-7f3a", pid=1, started=jax_lock.process_started(os.getpid()))
    jax_lock.check(tmp_path)
    held = jax_lock.acquire(tmp_path)
    leave_lock(tmp_path, host="container-7f3a", pid=1, started=jax_lock.process_started(os.getpid()))
    with pytest.raises(LockError, match="process 1 on host container-7f3a"):
        jax_lock.acquire(tmp_path)
    held.release()
    leave_lock(tmp_path, host="container-7f3a", pid=1, started=jax_lock.process_started(os.getpid()))
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with pytest.raises(LockError, match="If it does not run any more: rm"):
        jax_lock.acquire(tmp_path)


def test_without_flock_the_text_decides(tmp_path, monkeypatch, sleeper, lost_pid):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    leave_lock(tmp_path, pid=sleeper.pid, started=jax_lock.process_started(sleeper.pid))
    with pytest.raises(LockError, match=f"process {sleeper.pid}"):
        jax_lock.acquire(tmp_path)
    leave_lock(tmp_path, pid=lost_pid, started="then")
    lock = jax_lock.acquire(tmp_path)
    with pytest.raises(LockError, match=f"process {os.getpid()}"):
        jax_lock.acquire(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_another_fault_of_the_disk_is_not_taken_for_a_missing_flock(tmp_path, monkeypatch):
    def broken(descriptor: int, flags: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        jax_lock.acquire(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["host", "pid", "started"]), inner),
        max_leaves=4,
    ).map(lambda value: json.dumps(value).encode())
    | st.just(b"[" * 100_000)
)
def test_any_content_of_the_file_is_a_refusal_or_a_take_over(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    try:
        jax_lock.check(tmp_path)
        jax_lock.acquire(tmp_path).release()
    except LockError:
        (tmp_path / "lock").unlink()


def test_of_many_who_come_at_once_one_has_it_at_a_time(tmp_path):
    # each holder creates `inside` exclusively: two at once would fail
    script = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import jax_lock
from pathlib import Path
held = 0
while held < 40:
    try:
        lock = jax_lock.acquire(Path("."))
    except jax_lock.LockError:
        continue
    os.close(os.open("inside", os.O_CREAT | os.O_EXCL))
    os.unlink("inside")
    lock.release()
    held += 1
"""
    processes = [subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------------------------
# the trainer


def test_second_trainer_is_refused_readers_are_not_and_a_killed_one_is_taken_over(run, workdir, environment, finished):
    trainer = subprocess.Popen(
        [sys.executable, str(ROOT / "train_jax.py"), "--init_from=resume", "--out_dir=finished", "--max_iters=1e7"],
        cwd=workdir, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert trainer.stdout is not None
    assert any(line.startswith("iter 20:") for line in trainer.stdout)
    trainer.send_signal(signal.SIGSTOP)  # alive, and the machine is ours
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    for second in (["--init_from=resume"], ["tiny.py", "--overwrite=True"], ["tiny.py"]):
        refused = run("train_jax.py", *second, "--out_dir=finished", expect=2)
        (error,) = refused.stderr.splitlines()
        assert error.startswith(f"error: out_dir=finished is being written by process {trainer.pid} on host {HERE}, ")
    run("train_jax.py", "--init_from=resume", "--eval_only=True", "--out_dir=finished")
    run("sample_jax.py", "--out_dir=finished", "--device=cpu", "--num_samples=1", "--max_new_tokens=1", "--start=the")
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    done = run("train_jax.py", "--init_from=resume", "--out_dir=finished", "--max_iters=22")
    assert f"taking over finished/lock: process {trainer.pid} left it and does not run any more\n" in done.stdout
    assert not (finished / "lock").exists()


def test_lock_that_turns_up_while_the_trainer_starts_is_refused_before_anything_is_removed(run, workdir, finished):
    # what `check` saw as free at first is taken when it counts: here by a stand-in that makes every flock fail
    (workdir / "sitecustomize.py").write_text(
        "import fcntl\ndef flock(*_):\n    raise BlockingIOError(11, 'taken')\nfcntl.flock = flock\n"
    )
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    args = ("tiny.py", "--out_dir=finished", "--overwrite=True")
    refused = run("train_jax.py", *args, expect=2, PYTHONPATH=str(workdir))
    assert "is being written by process ?" in refused.stderr
    after = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file() and p.name != "lock"}
    assert after == before
