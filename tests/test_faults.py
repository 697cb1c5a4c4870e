"""What goes wrong around a run: a full disk, a signal at a bad moment, a bad batch, a broken wandb.

python -m pytest tests/test_faults.py
"""

import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import jax_data
import jax_run_dir
from tests import torture
from tests.running import QUICKLY, fingerprints, metrics, the_error, wait_for_line

ROOT = Path(__file__).resolve().parents[1]
OFTEN = ("tiny.py", "--save_interval=5", "--keep_checkpoints=3")


def steps(out_dir: Path) -> list[int]:
    return sorted(jax_run_dir.sealed_steps(out_dir))


def leftovers(out_dir: Path) -> list[str]:
    """What a run that has ended should not leave."""
    unsealed = [p for p in out_dir.glob("*/*") if not (p / "MANIFEST.json").exists()]
    return [str(p) for p in [*unsealed, *out_dir.rglob("*tmp*"), *out_dir.glob("lock")]]


@pytest.fixture
def start(workdir: Path, environment: dict[str, str]) -> Iterator:
    """start('tiny.py', ...): the trainer, left running."""
    started = []

    def start_trainer(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_jax.py"), *args],
            cwd=workdir, env=environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield start_trainer
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


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
    assert lost_save == "error: the last save failed. Make room; --init_from=resume goes on from the newest checkpoint"
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
    assert "error: the last save failed. Make room; --init_from=resume goes on from the newest checkpoint" in errors
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
import configurator, jax_checkpoint, train_jax
seal = jax_checkpoint.write_manifest
def write_manifest(step_dir):
    if step_dir.name == "10":
        raise OSError(28, "No space left on device")
    seal(step_dir)
jax_checkpoint.write_manifest = write_manifest
configurator.run_script(train_jax.main)
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


# the seal of the step that is saved; its copy's last move, when the step is sealed
@pytest.mark.parametrize(("killed_in", "how_to_go_on"), [("write_manifest", "scratch"), ("_make_best", "resume")])
def test_kill_in_the_first_save_leaves_a_run_or_none(quick, workdir, environment, killed_in, how_to_go_on):
    (workdir / "killed.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import configurator, jax_checkpoint, train_jax
seal = jax_checkpoint.write_manifest
def write_manifest(step_dir):
    if step_dir.parent.name == "checkpoints" and {killed_in!r} == "write_manifest":
        os._exit(9)
    seal(step_dir)
jax_checkpoint.write_manifest = write_manifest
if {killed_in!r} == "_make_best":
    jax_checkpoint.Saver._make_best = lambda saver, copy: os._exit(9)
configurator.run_script(train_jax.main)
""")
    done = subprocess.run(
        [sys.executable, "killed.py", "tiny.py"], cwd=workdir, env=environment | QUICKLY, capture_output=True
    )
    assert done.returncode == 9
    args = ("tiny.py",) if how_to_go_on == "scratch" else ("--init_from=resume", "--out_dir=out", "--max_iters=10")
    quick("train_jax.py", *args)
    assert steps(workdir / "out")[-1] == (20 if how_to_go_on == "scratch" else 10)
    assert jax_run_dir.best_val_loss(workdir / "out") is not None and leftovers(workdir / "out") == []


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
# bad batches

POISON = """
import sys
sys.path.insert(0, {root!r})
import configurator, jax, jax.numpy as jnp
import jax_data, jax_train_utils, train_jax
clean = jax_train_utils.cross_entropy

def poisoned(logits, y_BT):
    bad = jnp.zeros((), bool)
    for iteration in {iterations}:
        _, y_RT = jax_data.get_batch("data/tiny", "train", iteration, seed=1337, batch_size=8, block_size=16)
        bad |= jnp.array_equal(y_BT, y_RT[4:])  # its second micro-batch
    return clean(logits, y_BT) * jnp.where(bad, jnp.nan, 1.0)

jax_train_utils.cross_entropy = poisoned
configurator.run_script(train_jax.main)
"""


def run_poisoned(workdir, environment, iterations: list[int], *args: str, expect: int) -> tuple[str, str]:
    """The trainer with a loss that is NaN on the batches of these iterations, as one bad text would make it."""
    (workdir / "poison.py").write_text(POISON.format(root=str(ROOT), iterations=iterations))
    done = subprocess.run(
        [sys.executable, "poison.py", *args],
        cwd=workdir, env=environment | QUICKLY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_bad_batch_stops_the_run_and_is_named_by_its_offsets(workdir, environment):
    _, errors = run_poisoned(workdir, environment, [7], *OFTEN, expect=3)
    said = re.fullmatch(
        r"error: training diverged at iteration 7: loss nan, gradient norm nan; its rows begin at the tokens ([\d, ]+) "
        r"of data/tiny/train.bin; nothing bad was saved. .*\n", errors
    )  # fmt: skip
    assert said, errors
    starts_B = [int(start) for start in said[1].split(", ")]
    ids = np.fromfile(workdir / "data/tiny/train.bin", np.uint16)
    x_BT, _ = jax_data.get_batch(
        workdir / "data/tiny", "train", 7, seed=1337, batch_size=8, block_size=16, sampling="random"
    )
    assert np.array_equal(np.stack([ids[start : start + 16] for start in starts_B]), x_BT)
    assert steps(workdir / "out") == [5]


@pytest.mark.slow
def test_skipped_updates_change_nothing_are_counted_across_a_resume_and_end_with_one_too_many(workdir, environment):
    bad = [5, 12, 14]
    often = ("tiny.py", "--save_interval=1", "--keep_checkpoints=30", "--eval_interval=50", "--skip_bad_steps=2")
    out, _ = run_poisoned(workdir, environment, bad, *often, "--max_iters=8", expect=0)
    (line,) = [line for line in out.splitlines() if line.startswith("skipped")]
    assert line.startswith(
        "skipped the update of iteration 5: loss nan, gradient norm nan; its rows begin at the tokens "
    )
    assert line.endswith("; 1 of 2 allowed")
    checkpoints = workdir / "out/checkpoints"
    for a, b, same in ((5, 6, True), (6, 7, False)):
        hashes = [torture.fingerprint(checkpoints / str(step)) for step in (a, b)]
        arrays = [{k: v for k, v in found.items() if not k.endswith("meta")} for found in hashes]
        assert len(arrays[0]) == 3 and (arrays[0] == arrays[1]) == same
    out, errors = run_poisoned(
        workdir, environment, bad, "--init_from=resume", "--out_dir=out", "--max_iters=20", expect=3
    )
    assert "skipped the update of iteration 12: " in out and "; 2 of 2 allowed" in out
    assert errors.startswith("error: training diverged at iteration 14: loss nan")
    assert steps(workdir / "out")[-1] == 14  # the state before the bad one
    log = {r["iter"]: r["loss"] for r in metrics(workdir / "out") if "loss" in r}
    assert [k for k, loss in log.items() if loss is None] == [5, 12]
    assert all(math.isfinite(loss) for k, loss in log.items() if k not in (5, 12))


def test_data_that_turns_bad_ends_the_run_with_2_and_what_was_computed_is_saved(run, start, workdir):
    process = start("tiny.py", "--max_iters=1000000", "--lr_decay_iters=20")
    wait_for_line(process, "iter 3:")
    good = (workdir / "data" / "tiny" / "train.bin").read_bytes()
    with (workdir / "data" / "tiny" / "train.bin").open("r+b") as file:
        file.write(b"\xff" * len(good))
    errors = process.communicate()[1]
    assert process.returncode == 2 and leftovers(workdir / "out") == []
    noticed = r"/train.bin was written anew while .*|: a token id in the train data is 65535, not below \d+"
    assert re.fullmatch(rf"error: data/tiny({noticed})\n", errors)

    (workdir / "data" / "tiny" / "train.bin").write_bytes(good)
    saved = steps(workdir / "out")[-1]
    iterations = [record["iter"] for record in metrics(workdir / "out") if "loss" in record]
    assert iterations == list(range(saved)) and saved > 3
    done = run("train_jax.py", "--init_from=resume", "--out_dir=out", f"--max_iters={saved + 1}")
    assert f"iter {saved}: " in done.stdout


def test_data_that_is_prepared_again_under_a_run_ends_it_with_2_and_touching_it_does_not(start, workdir):
    process = start("tiny.py", "--max_iters=1000000", "--lr_decay_iters=20", "--log_interval=1")
    path = workdir / "data" / "tiny" / "train.bin"
    wait_for_line(process, "iter 3:")
    path.touch()
    for line in process.stdout:
        if line.startswith("iter 20:"):
            break
    other = path.with_name("other.bin")
    other.write_bytes(path.read_bytes()[::-1][1:-1] + b"\x00\x00")  # good ids, in another order
    other.replace(path)
    errors = process.communicate()[1]
    assert process.returncode == 2 and steps(workdir / "out")
    goes_on = "was written anew while the run reads it; with the tokens it began with, resume goes on"
    assert errors == f"error: data/tiny/train.bin {goes_on}\n"


def test_evaluation_data_that_turned_bad_is_told_before_a_resumed_run_computes_anything(run, workdir, finished):
    before = fingerprints(finished)
    with (workdir / "data" / "tiny" / "val.bin").open("r+b") as file:
        file.write(b"\xff" * (workdir / "data" / "tiny" / "val.bin").stat().st_size)
    (workdir / "unlooked.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import configurator, jax_data, train_jax
jax_data.check_dataset = lambda *_: None  # it looks at some of a large file's tokens
configurator.run_script(train_jax.main, jax_data.DataError)
""")
    resume = ("--init_from=resume", "--out_dir=finished", "--max_iters=30", "--eval_interval=100")
    assert "a token id in the val data is 65535" in the_error(run(str(workdir / "unlooked.py"), *resume, expect=2))
    assert fingerprints(finished) == before


def test_data_that_is_bad_from_the_first_batch_on_leaves_no_run_behind(run, workdir):
    (workdir / "spoilt.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import configurator, jax_data, train_jax
def prefetch(*_):
    raise jax_data.DataError("the first batch is spoilt")
    yield
jax_data.prefetch = prefetch
configurator.run_script(train_jax.main, jax_data.DataError)
""")
    assert run(str(workdir / "spoilt.py"), "tiny.py", expect=2).stderr == "error: the first batch is spoilt\n"
    assert steps(workdir / "out") == []
    run("train_jax.py", "tiny.py", "--max_iters=1")  # which a run that is already there would refuse


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
