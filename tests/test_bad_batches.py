"""Batches that a run should not have got: a loss that is not finite, data that turn bad or are prepared again under it.

python -m pytest tests/test_bad_batches.py
"""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_data
from tests import torture
from tests.running import QUICKLY, fingerprints, leftovers, metrics, steps, the_error, wait_for_line

ROOT = Path(__file__).resolve().parents[1]

POISON = """
import sys
sys.path.insert(0, {root!r})
import jax, jax.numpy as jnp
import jax_console
import jax_data, jax_train_utils, train_jax
clean = jax_train_utils.cross_entropy

def poisoned(logits, y_BT):
    bad = jnp.zeros((), bool)
    for iteration in {iterations}:
        _, y_RT = jax_data.get_batch("data/tiny", "train", iteration, seed=1337, batch_size=8, block_size=16)
        bad |= jnp.array_equal(y_BT, y_RT[4:])  # its second micro-batch
    return clean(logits, y_BT) * jnp.where(bad, jnp.nan, 1.0)

jax_train_utils.cross_entropy = poisoned
jax_console.run_script(train_jax.main)
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
    _, errors = run_poisoned(
        workdir, environment, [7], "tiny.py", "--save_interval=5", "--keep_checkpoints=3", expect=3
    )
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
import jax_console, jax_data, train_jax
jax_data.check_dataset = lambda *_: None  # it looks at some of a large file's tokens
jax_console.run_script(train_jax.main, jax_data.DataError)
""")
    resume = ("--init_from=resume", "--out_dir=finished", "--max_iters=30", "--eval_interval=100")
    assert "a token id in the val data is 65535" in the_error(run(str(workdir / "unlooked.py"), *resume, expect=2))
    assert fingerprints(finished) == before


def test_data_that_is_bad_from_the_first_batch_on_leaves_no_run_behind(run, workdir):
    (workdir / "spoilt.py").write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import jax_console, jax_data, train_jax
def prefetch(*_):
    raise jax_data.DataError("the first batch is spoilt")
    yield
jax_data.prefetch = prefetch
jax_console.run_script(train_jax.main, jax_data.DataError)
""")
    assert run(str(workdir / "spoilt.py"), "tiny.py", expect=2).stderr == "error: the first batch is spoilt\n"
    assert steps(workdir / "out") == []
    run("train_jax.py", "tiny.py", "--max_iters=1")  # which a run that is already there would refuse
