"""What goes wrong around a run: a full disk, a signal at a bad moment, a broken wandb.

python -m pytest tests/test_faults.py
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_run_dir
from tests import torture
from tests.running import QUICKLY, leftovers, metrics, steps, wait_for_line

ROOT = Path(__file__).resolve().parents[1]
LOST_SAVE = "error: the last save failed. Put that right; --init_from=resume goes on from the newest checkpoint"
OFTEN = ("tiny.py", "--save_interval=5", "--keep_checkpoints=3")


def wait_until(condition) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.001)


# ----------------------------------------------------------------------------------------------------------------------
# the disk


def limit_files(process: subprocess.Popen[str], size: int) -> None:
    """No file of the process may grow beyond `size`: EFBIG, in whatever thread writes, as ENOSPC on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no prlimit: not Linux")
def test_full_disk_costs_no_iteration_and_no_line_once_it_is_freed_and_ends_with_1_if_not(run, start, workdir):
    long = ("tiny.py", "--max_iters=1500", "--eval_interval=100")
    run("train_jax.py", *long, "--out_dir=straight")
    process = start(*long)
    wait_for_line(process, "step 100:")
    wait_until(lambda: steps(workdir / "out") == [100])
    limit_files(process, 2000)  # neither the log nor an array fits
    wait_for_line(process, "step 400:")
    limit_files(process, resource.RLIM_INFINITY)
    wait_until(lambda: steps(workdir / "out")[-1] > 100)
    limit_files(process, 2000)  # full again, until the end
    out, errors = process.communicate()
    assert process.returncode == 1
    assert "step 1500: " in out  # training went on to its end
    assert "metrics.jsonl can be written again, and has all its lines" in out

    *complaints, lost_save, lost_lines = errors.splitlines()
    failed = [line for line in complaints if line.startswith("error: saving checkpoint ")]
    assert all(re.search(r"out/checkpoints/\d+ failed: .*File too large", line) for line in failed)
    assert re.search("checkpoints/[2-4]00 failed:", failed[0]) and "checkpoints/1500 failed:" in failed[-1]
    assert failed[0].endswith(". The newest checkpoint is that of step 100")
    full = (
        "error: metrics.jsonl cannot be written ([Errno 27] File too large); its lines wait in memory, the run goes on"
    )
    assert [line for line in complaints if line not in failed] == [full, full]
    assert (
        lost_save
        == "error: the last save failed. Put that right; --init_from=resume goes on from the newest checkpoint"
    )
    assert re.fullmatch(r"error: the last \d+ lines of metrics.jsonl could not be written", lost_lines)
    assert steps(workdir / "out")[0] == 100 and leftovers(workdir / "out") == []

    run("train_jax.py", "--init_from=resume", "--out_dir=out")
    assert torture.differences(workdir / "straight", workdir / "out", 1500) == []


@pytest.fixture
def small_disk(workdir: Path) -> Iterator[Path]:
    """A disk of one megabyte, mounted on `workdir`/disk."""
    disk = workdir / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_that_fills_in_the_middle_of_a_save_keeps_the_step_before(run, workdir, small_disk):
    full = ("tiny.py", "--out_dir=disk/out", "--eval_interval=4", "--keep_checkpoints=50", "--max_iters=40")
    done = run("train_jax.py", *full, expect=1)
    errors = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and "No space left on device" in done.stderr
    assert (
        "error: the last save failed. Put that right; --init_from=resume goes on from the newest checkpoint" in errors
    )
    kept = steps(small_disk / "out")
    assert kept == list(range(4, kept[-1] + 4, 4)) and 1 <= len(kept) < 10
    assert leftovers(small_disk / "out") == []
    assert jax_run_dir.find_checkpoint(small_disk / "out") == (Path(small_disk / "out/checkpoints" / str(kept[-1])), [])
    for step in kept[:-1]:
        subprocess.run(["rm", "-r", str(small_disk / "out/checkpoints" / str(step))], check=True)  # make room
    run("train_jax.py", "--init_from=resume", "--out_dir=disk/out", "--keep_checkpoints=1")
    run("train_jax.py", "tiny.py", "--out_dir=straight", "--eval_interval=4", "--max_iters=40")
    assert torture.differences(workdir / "straight", small_disk / "out", 40) == []


def test_disk_that_cannot_be_written_is_one_line_and_exit_1(run, workdir, finished, small_disk):
    finished.rename(workdir / "moved")
    subprocess.run(["cp", "-r", "moved", "disk/out"], cwd=workdir, check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for args in (["--init_from=resume", "--out_dir=disk/out", "--max_iters=25"], ["tiny.py", "--out_dir=disk/new"]):
        (error,) = run("train_jax.py", *args, expect=1).stderr.splitlines()
        assert re.fullmatch(r"error: \[Errno 30\] Read-only file system: 'disk/(out/lock|new)'", error)
    run("train_jax.py", "--init_from=resume", "--eval_only=True", "--out_dir=disk/out")  # reading needs no more


def test_directory_without_the_right_to_write_is_one_line_and_exit_1(run, workdir):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (workdir / "out").mkdir(mode=0o500)
    (error,) = run("train_jax.py", "tiny.py", expect=1).stderr.splitlines()
    assert error == "error: [Errno 13] Permission denied: 'out/lock'"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_console_on_a_full_disk_does_not_stop_a_run(workdir, environment):
    with open("/dev/full", "w") as full:  # as `python train_jax.py tiny.py > log.txt` on a full disk
        done = subprocess.run(
            [sys.executable, str(ROOT / "train_jax.py"), "tiny.py"],
            cwd=workdir, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.stderr.splitlines() == [
        "warning: nothing more is printed (OSError: [Errno 28] No space left on device); the run goes on"
    ]
    assert done.returncode == 0
    assert steps(workdir / "out") == [10, 20] and len(metrics(workdir / "out")) == 23


def test_failed_save_is_told_at_the_iteration_it_fails_and_best_is_what_is_on_disk(run, workdir, environment):
    # a wrapper in whose Saver the save of step 10, an improvement, fails while it is sealed
    (workdir / "broken.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import jax_checkpoint, jax_console, train_jax
seal = jax_checkpoint.write_manifest
def write_manifest(step_dir):
    if step_dir.name == "10":
        raise OSError(28, "No space left on device")
    seal(step_dir)
jax_checkpoint.write_manifest = write_manifest
jax_console.run_script(train_jax.main)
""")
    args = ("--max_iters=2000", "--eval_interval=10", "--learning_rate=0", "--min_lr=0", "--eval_iters=1")
    process = subprocess.Popen(
        [sys.executable, "broken.py", "tiny.py", *args], cwd=workdir, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("error: "):
            break
    process.send_signal(signal.SIGTERM)
    lines += process.communicate()[0].splitlines()
    assert process.returncode == 75
    (failed,) = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert re.search(r"saving checkpoint .*/out/checkpoints/10 failed: OSError: .*No space left", lines[failed])
    assert lines[failed].endswith(". There is no checkpoint yet")
    # nothing is learned here: 10 was no improvement, and what is told comes before the save after it
    saves = [i for i, line in enumerate(lines) if line.startswith("saving checkpoint to ")]
    assert saves[0] < failed <= saves[1]
    assert steps(workdir / "out")[0] > 10 and leftovers(workdir / "out") == []


def test_a_best_that_cannot_be_written_costs_no_checkpoint(quick, workdir, environment):
    (workdir / "broken.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import jax_checkpoint, jax_console, train_jax
def no_room(*args, **options):
    raise OSError(28, "No space left on device")
jax_checkpoint.shutil.copytree = no_room
jax_console.run_script(train_jax.main)
""")
    done = subprocess.run(
        [sys.executable, "broken.py", "tiny.py"], cwd=workdir, env=environment | QUICKLY, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    errors = done.stderr.splitlines()
    for step in (10, 20):
        assert any(f"out/best/{step} failed: OSError: [Errno 28]" in line for line in errors)
    assert errors[-2].endswith("The newest checkpoint is that of step 20") and errors[-1] == LOST_SAVE
    assert steps(workdir / "out") == [10, 20] and leftovers(workdir / "out") == []

    def best_after(*args: str) -> str:
        done = quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--learning_rate=0", "--min_lr=0", *args)
        lost = f"{Path('out/best')} has lost the checkpoint of step 20: what it holds now is the one to beat"
        assert (lost in done.stdout) == ("--max_iters=40" in args)
        return jax_run_dir.find_checkpoint(workdir / "out", "best")[0].name

    assert best_after() == "20"  # which is made up for where the checkpoint is the one, also of a run that is finished
    assert best_after("--max_iters=30") == "20"  # nothing is learned
    shutil.rmtree(workdir / "out" / "best" / "20")
    assert best_after("--max_iters=40") == "40"


# the seal of the step that is saved; its copy's last move, when the step is sealed
@pytest.mark.parametrize(("killed_in", "how_to_go_on"), [("write_manifest", "scratch"), ("_make_best", "resume")])
def test_kill_in_the_first_save_leaves_a_run_or_none(quick, workdir, environment, killed_in, how_to_go_on):
    (workdir / "killed.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import jax_checkpoint, jax_console, train_jax
seal = jax_checkpoint.write_manifest
def write_manifest(step_dir):
    if step_dir.parent.name == "checkpoints" and {killed_in!r} == "write_manifest":
        os._exit(9)
    seal(step_dir)
jax_checkpoint.write_manifest = write_manifest
if {killed_in!r} == "_make_best":
    jax_checkpoint.Saver._make_best = lambda saver, copy: os._exit(9)
jax_console.run_script(train_jax.main)
""")
    done = subprocess.run(
        [sys.executable, "killed.py", "tiny.py"], cwd=workdir, env=environment | QUICKLY, capture_output=True
    )
    assert done.returncode == 9
    args = ("tiny.py",) if how_to_go_on == "scratch" else ("--init_from=resume", "--out_dir=out", "--max_iters=10")
    quick("train_jax.py", *args)
    assert steps(workdir / "out")[-1] == (20 if how_to_go_on == "scratch" else 10)
    assert jax_run_dir.newest_good(workdir / "out" / "best")[0] is not None and leftovers(workdir / "out") == []


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints apart from evaluations, and which are kept


def test_save_interval_saves_between_evaluations_and_changes_nothing_else(run, workdir, finished):
    run("train_jax.py", *OFTEN, "--keep_checkpoints=9")
    assert steps(workdir / "out") == [5, 10, 15, 20]
    ours, theirs = (torture.numbers(folder / "metrics.jsonl") for folder in (workdir / "out", finished))
    assert ours == theirs
    assert [p.name for p in (workdir / "out/best").iterdir()] == [p.name for p in (finished / "best").iterdir()]


def test_save_interval_counts_where_an_evaluation_brings_no_improvement(run, workdir):
    nothing_learned = ("--learning_rate=0", "--min_lr=0", "--always_save_checkpoint=False")
    run("train_jax.py", "tiny.py", *nothing_learned, "--save_interval=10", "--max_iters=25")
    assert steps(workdir / "out") == [20, 25]


# ----------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.slow
def test_signal_before_the_first_step_saves_step_0_from_which_resume_goes_the_same_way(run, start, workdir, finished):
    process = start("tiny.py")
    wait_until((workdir / "out/lock").exists)  # from here on a signal saves
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate()
    assert process.returncode == 75, errors
    assert re.search(r"^stopped by SIGTERM at step 0 and saved; --init_from=resume goes on from there$", out, re.M)
    run("train_jax.py", "--init_from=resume", "--out_dir=out")
    assert torture.differences(finished, workdir / "out", 20) == []


def test_signal_while_a_resumed_run_starts_is_75_too_and_loses_nothing(run, start, workdir, finished):
    process = start("--init_from=resume", "--out_dir=finished", "--max_iters=22")
    wait_for_line(process, "tokens per iteration")  # jax is not even imported
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    assert 20 in steps(finished)  # on a busy machine the signal may come a few updates later


def test_signal_during_an_evaluation_saves_when_that_is_through(start, finished):
    args = ("--init_from=resume", "--out_dir=finished", "--max_iters=1000", "--eval_interval=22", "--eval_iters=30000")
    process = start(*args)
    wait_for_line(process, "iter 21:")  # the next thing is an evaluation of seconds
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate()
    assert process.returncode == 75
    assert "step 22: train loss" in out and "iter 22:" not in out
    assert "stopped by SIGTERM at step 22 and saved" in out
    assert steps(finished) == [20, 22]
    assert errors == "SIGTERM: stopping after this step; Ctrl-C twice stops at once\n"


# ----------------------------------------------------------------------------------------------------------------------
# wandb

BROKEN_WANDB = {
    "init": "def init(**kwargs): raise ConnectionError('no route to host')",
    "log": "fail_after = 3",  # tests/test_wandb.py has the import and the end
}
FAKE_WANDB = """
import types
fail_after = 10**9

class Run:
    id, starting_step, dir, logged = 'abc', 0, 'wandb/run/files', 0
    def log(self, values, step):
        self.logged += 1
        if self.logged > fail_after:
            raise BrokenPipeError('the wandb process is gone')

def setup():
    return types.SimpleNamespace(settings=types.SimpleNamespace(mode='online'))
def login(**kwargs):
    return True
def Settings(**kwargs):
    return None
def init(**kwargs):
    return Run()
"""


@pytest.mark.parametrize("broken", BROKEN_WANDB)
def test_wandb_that_breaks_anywhere_is_one_line_and_the_run_is_the_same(run, workdir, finished, broken):
    (workdir / "fake").mkdir()
    (workdir / "fake/wandb.py").write_text(FAKE_WANDB + BROKEN_WANDB[broken])
    done = run("train_jax.py", "tiny.py", "--wandb_log=True", PYTHONPATH=str(workdir / "fake"))
    (line,) = [line for line in done.stdout.splitlines() if "wandb" in line and not line.startswith("Overriding")]
    reason = {"init": "no route", "log": "process is gone"}
    assert line.startswith("wandb: ") and reason[broken] in line
    assert done.stderr == ""
    assert torture.numbers(workdir / "out/metrics.jsonl") == torture.numbers(finished / "metrics.jsonl")
    assert steps(workdir / "out") == [10, 20]
