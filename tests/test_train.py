"""The trainer as its users meet it: the script is started, killed, resumed, and its files are read.

python -m pytest tests/test_train.py
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_manifest import write_manifest
from jax_run_dir import META_FILE
from tests.running import fingerprints, metrics, the_error, wait_for_line

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"time_ms", "tokens_per_s", "mfu"}  # the only fields that may differ between two equal runs


def without_times(records: list[dict]) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def arrays(out_dir: Path, step: int) -> list[np.ndarray]:
    """Everything that was saved at a step, read by another process than the one that wrote it."""
    import orbax.checkpoint as ocp

    loaded = []
    for item in ("params", "opt_state"):
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            tree = checkpointer.restore((out_dir / "checkpoints" / str(step) / item).resolve())
        import jax

        loaded += [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return loaded


def start(workdir: Path, environment: dict[str, str], *args: str) -> subprocess.Popen[str]:
    """The trainer, left running."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_jax.py"), *args],
        cwd=workdir, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# a run, from start to end


def test_run_prints_nanogpts_lines(finished, one_finished_run):
    printed = one_finished_run[1]
    assert "tokens per iteration will be: 128\n" in printed
    assert re.search(r"^number of parameters: 0\.01M$", printed, re.M)
    assert re.search(r"^found vocab_size = 15 \(inside data/tiny\)$", printed, re.M)
    for step in (0, 10, 20):
        assert re.search(rf"^step {step}: train loss \d\.\d{{4}}, val loss \d\.\d{{4}}$", printed, re.M)
    scraped = re.findall(r"^iter (\d+): loss (\d\.\d{4}), time \d+\.\d\dms, mfu -100\.00%, ", printed, re.M)
    recorded = [(str(r["iter"]), f"{r['loss']:.4f}") for r in metrics(finished) if "loss" in r]
    assert scraped == recorded and len(scraped) == 20


def test_run_directory_holds_what_the_design_promises(finished):
    records = metrics(finished)
    iterations = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val/loss" in r]
    assert [r["iter"] for r in iterations] == list(range(20))
    assert [r["iter"] for r in evaluations] == [0, 10, 20]
    keys = {"iter", "loss", "lr", "grad_norm", "time_ms", "tokens_per_s", "mfu"}
    assert all(set(r) == keys for r in iterations)
    assert all(set(r) == {"iter", "train/loss", "val/loss", "lr", "mfu"} for r in evaluations)
    assert evaluations[0]["val/loss"] == pytest.approx(np.log(15), abs=0.1)  # a fresh model knows nothing
    assert evaluations[2]["val/loss"] < evaluations[0]["val/loss"] - 0.2
    assert [r["lr"] for r in iterations][:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])

    config = json.loads((finished / "config.json").read_text())
    assert config["n_embd"] == 16 and config["max_iters"] == 20
    (best,) = (finished / "best").iterdir()
    assert best.name == str(min(evaluations[1:], key=lambda r: r["val/loss"])["iter"])
    items = {"params", "opt_state", "meta"}
    for folder, there in (("checkpoints/10", items), ("checkpoints/20", items), (best, items - {"opt_state"})):
        folder = finished / folder
        assert {p.name for p in folder.iterdir() if p.is_dir()} == there
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        on_disk = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        del on_disk["MANIFEST.json"]
        assert manifest["files"] == {
            name: {"size": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
            for name, p in on_disk.items()
        }
    assert {p.name for p in finished.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "best"}


def test_ten_and_ten_more_iterations_equal_twenty_bit_for_bit(run, workdir, finished):
    run("train_jax.py", "tiny.py", "--max_iters=10")
    resumed = run("train_jax.py", "--init_from=resume", "--out_dir=out", "--max_iters=20")
    assert "resuming with max_iters = 20, which was 10 (--max_iters=20)" in resumed.stdout
    assert "resuming on" not in resumed.stdout  # the same device
    assert without_times(metrics(workdir / "out")) == without_times(metrics(finished))
    ours, theirs = arrays(workdir / "out", 20), arrays(finished, 20)
    assert sum(array.size for array in ours) > 3 * 6000  # the parameters and two averages of each
    assert len(ours) == len(theirs)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_resume_in_the_middle_of_an_epoch_goes_on_with_its_order(run, workdir, finished):
    epoch = ("tiny.py", "--sampling=epoch", "--eval_interval=7")
    run("train_jax.py", *epoch, "--out_dir=straight")
    run("train_jax.py", *epoch, "--max_iters=7")
    run("train_jax.py", "--init_from=resume", "--out_dir=out", "--max_iters=20")
    assert without_times(metrics(workdir / "out")) == without_times(metrics(workdir / "straight"))
    crops, blocks = ([r["loss"] for r in metrics(folder) if "loss" in r] for folder in (finished, workdir / "out"))
    assert crops != blocks


def test_a_run_goes_on_beyond_two_to_the_31_iterations(run, finished):
    checkpoints, far = finished / "checkpoints", 2**31 - 2
    step_dir = max(checkpoints.iterdir(), key=lambda step_dir: int(step_dir.name)).rename(checkpoints / str(far))
    meta = json.loads((step_dir / META_FILE).read_text())
    (step_dir / META_FILE).write_text(json.dumps(meta | {"step": far, "evaluated_at": None}))
    write_manifest(step_dir)
    run("train_jax.py", "--init_from=resume", f"--out_dir={finished}", f"--max_iters={far + 4}")
    assert [record["iter"] for record in metrics(finished) if "loss" in record][-4:] == [*range(far, far + 4)]


def test_sigterm_saves_and_exits_75_and_the_resumed_run_is_the_one_never_stopped(run, workdir, environment):
    run("train_jax.py", "tiny.py", "--out_dir=straight", "--max_iters=400", "--eval_interval=1000")
    process = start(workdir, environment, "tiny.py", "--max_iters=400", "--eval_interval=1000")
    wait_for_line(process, "iter 5:")
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    stopped = re.search(
        r"^stopped by SIGTERM at step (\d+) and saved; --init_from=resume goes on from there$", rest, re.M
    )
    assert stopped and 6 <= int(stopped[1]) < 400
    assert (workdir / "out" / "checkpoints" / stopped[1] / "MANIFEST.json").exists()
    run("train_jax.py", "--init_from=resume", "--out_dir=out")
    assert without_times(metrics(workdir / "out")) == without_times(metrics(workdir / "straight"))


@pytest.mark.parametrize("under_nohup", [False, True])
def test_a_terminal_that_is_closed_stops_the_run_unless_it_is_under_nohup(workdir, environment, under_nohup):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup themselves
    command = [sys.executable, str(ROOT / "train_jax.py"), "tiny.py", "--max_iters=1000000"]
    process = subprocess.Popen(
        ["nohup", *command] if under_nohup else command,
        cwd=workdir, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_line(process, "iter 5:")
    process.send_signal(signal.SIGHUP)
    if under_nohup:
        wait_for_line(process, "iter 30:")
        process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert re.search(f"^stopped by {'SIGTERM' if under_nohup else 'SIGHUP'} at step", rest, re.M)


@pytest.mark.parametrize(
    ("option", "last_line"),
    [
        ("--gradient_accumulation_steps=100000", "number of parameters"),  # a training step of many seconds
        pytest.param("--eval_iters=400000", "iter 21:", marks=pytest.mark.slow),  # an evaluation of many seconds
    ],
)
def test_second_ctrl_c_stops_at_once_with_130(workdir, environment, finished, option, last_line):
    before = fingerprints(finished / "checkpoints")
    process = start(workdir, environment, "--init_from=resume", "--out_dir=finished", "--max_iters=22", option)
    wait_for_line(process, last_line)
    time.sleep(3)  # so that it is under way, mostly; it takes several times as long
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    # Told while the computation goes on, which it waits for.
    assert process.stderr.readline() == "SIGINT: stopping after this step; Ctrl-C again stops at once\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped at once; nothing was saved since the last checkpoint\n"
    assert fingerprints(finished / "checkpoints") == before


def test_ctrl_c_ends_a_script_wherever_it_is_and_nothing_swallows_it(environment):
    """Also in a callback of JAX's, out of which an exception does not come."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, as do its children
    computes = """
import gc, os, signal, sys, time
import jax_console
def main():
    import jax
    gc.callbacks.append(lambda phase, info: phase == "start" and os.kill(os.getpid(), signal.SIGINT))
    gc.collect()
    time.sleep(60)
jax_console.run_script(main)
"""
    done = subprocess.run(
        [sys.executable, "-c", computes], cwd=ROOT, env=environment, capture_output=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize("first", [("TERM", "INT"), ("INT", "TERM")])
def test_of_sigterm_and_ctrl_c_in_any_order_only_a_second_ctrl_c_stops_at_once(environment, first):
    waits = "import time, jax_processes; jax_processes.StopRequest().listen(); print(flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", waits], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    how = {("TERM", "INT"): ["twice", "again"], ("INT", "TERM"): ["again", "again"]}
    for name, word in zip(first, how[first], strict=True):
        process.send_signal(signal.Signals[f"SIG{name}"])
        assert process.stderr.readline() == f"SIG{name}: stopping after this step; Ctrl-C {word} stops at once\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_ctrl_c_ends_an_evaluation_at_once_and_says_nothing(workdir, environment, finished):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, as do its children
    options = ("--init_from=resume", "--out_dir=finished", "--eval_only=True", "--eval_iters=400000")
    process = start(workdir, environment, *options)
    wait_for_line(process, "number of parameters")
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "") and "train loss" not in out


def test_divergence_stops_with_3_and_saves_nothing_bad(quick, workdir):
    done = quick(
        "train_jax.py",
        "tiny.py",
        "--learning_rate=3e38",
        "--weight_decay=100",
        "--warmup_iters=0",
        "--grad_clip=0",
        "--batch_size=12",
        expect=3,
    )
    assert re.search(
        r"tokens (\d+, ){15}\d+ and 8 more \(jax_data.batch_starts\) of data/tiny/train.bin; ", done.stderr
    )
    assert re.match(r"error: training diverged at iteration 1: loss (nan|inf), gradient norm ", the_error(done))
    assert not list((workdir / "out" / "checkpoints").iterdir())


def test_weights_that_the_last_update_made_infinite_are_not_saved_though_no_evaluation_saw_them(quick, workdir):
    steep = ("--learning_rate=1e36", "--weight_decay=1e5", "--warmup_iters=0", "--grad_clip=0", "--decay_lr=False")
    done = quick("train_jax.py", "tiny.py", *steep, "--save_interval=1", "--eval_interval=100", expect=3)
    assert the_error(done).startswith("error: training diverged before step 1: its weights are not finite; nothing bad")
    assert not list((workdir / "out" / "checkpoints").iterdir())


def test_a_loss_that_is_not_finite_before_a_slow_save_is_through_is_one_line_too(quick, workdir):
    (workdir / "slow.py").write_text(f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import jax_checkpoint, jax_console, train_jax
save = jax_checkpoint.Saver._save
def slowly(*args):
    time.sleep(1)
    save(*args)
jax_checkpoint.Saver._save = slowly
jax_console.run_script(train_jax.main)
""")
    steep = ("--learning_rate=1e38", "--warmup_iters=0", "--grad_clip=0", "--decay_lr=False", "--save_interval=1")
    done = quick(str(workdir / "slow.py"), "tiny.py", *steep, "--weight_decay=1e5", "--eval_interval=100", expect=3)
    assert the_error(done).startswith("error: training diverged")
    assert not list((workdir / "out" / "checkpoints").iterdir())


def test_state_whose_evaluation_is_not_finite_is_never_saved(quick, workdir):
    # loss and gradient of iteration 0 are finite, 3e38 x (1 + 100 x weight) is not; the next thing is an evaluation
    wreck = (
        "--learning_rate=3e38",
        "--weight_decay=100",
        "--warmup_iters=0",
        "--grad_clip=0",
        "--batch_size=12",
        "--eval_interval=1",
        "--max_iters=1",
    )
    done = quick("train_jax.py", "tiny.py", *wreck, expect=3)
    assert "training diverged before step 1: the evaluation is not finite" in the_error(done)
    assert not list((workdir / "out" / "checkpoints").iterdir())


@pytest.mark.slow  # tests/test_kill.py kills at more moments, and compares more
def test_killed_run_resumes_to_the_same_losses(run, workdir, environment):
    run("train_jax.py", "tiny.py", "--out_dir=straight", "--max_iters=200", "--eval_interval=50")
    process = start(workdir, environment, "tiny.py", "--max_iters=200", "--eval_interval=50")
    wait_for_line(process, "iter 130:")
    process.kill()
    process.wait()
    resumed = run("train_jax.py", "--init_from=resume", "--out_dir=out")
    assert re.search(r"Resuming training from out/checkpoints/(50|100)$", resumed.stdout, re.M)
    assert without_times(metrics(workdir / "out")) == without_times(metrics(workdir / "straight"))


@pytest.mark.slow
def test_divergence_is_found_after_a_resume_that_left_float16(quick, workdir):
    quick("train_jax.py", "tiny.py", "--dtype=float16", "--max_iters=2")
    wreck = (
        "--learning_rate=3e38",
        "--weight_decay=100",
        "--decay_lr=False",
        "--grad_clip=0",
        "--max_iters=12",
        "--eval_interval=100",
    )
    done = quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--dtype=float32", *wreck, expect=3)
    assert "training diverged at iteration 3" in the_error(done)


@pytest.mark.slow
def test_bfloat16_learns_as_float32_does(quick, workdir, finished):
    done = quick("train_jax.py", "tiny.py", "--dtype=bfloat16")
    assert "computing in bfloat16 on 1 x cpu" in done.stdout
    ours, theirs = ([r["loss"] for r in metrics(folder) if "loss" in r] for folder in (workdir / "out", finished))
    assert ours == pytest.approx(theirs, abs=0.3) and ours != theirs


def test_float16_resumes_exactly_with_its_loss_scale(quick, workdir, finished):
    # 2^16 times the loss overflows at first: the scale must have come down, and must come back from the checkpoint
    quick("train_jax.py", "tiny.py", "--dtype=float16", "--out_dir=straight")
    quick("train_jax.py", "tiny.py", "--dtype=float16", "--max_iters=10")
    quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--max_iters=20")
    records = metrics(workdir / "out")
    assert without_times(records) == without_times(metrics(workdir / "straight"))
    assert records[-1]["val/loss"] < records[0]["val/loss"] - 0.2


def test_losses_and_tokens_do_not_depend_on_the_number_of_devices(quick, workdir):
    # 12 rows an iteration: of 8 devices 6 take 2 each, 4 take 3 each
    heads_of_16 = "--n_embd=32"  # whose attention is our own code on a CPU
    rows = (
        "tiny.py", "--gradient_accumulation_steps=3", "--dropout=0", "--max_iters=10", "--eval_iters=5", heads_of_16
    )  # fmt: skip
    losses = {}
    for devices, line in ((1, "3 x 4 rows"), (8, "1 x 2 rows")):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        done = quick("train_jax.py", *rows, f"--out_dir=out{devices}", **flags)
        assert "tokens per iteration will be: 192\n" in done.stdout
        assert f"{line} on each per iteration" in done.stdout
        assert ("using 6 of 8 devices" in done.stdout) == (devices == 8)
        losses[devices] = [
            value for r in metrics(workdir / f"out{devices}") for key, value in r.items() if key.endswith("loss")
        ]
    assert len(losses[1]) == 10 + 2 * 2
    assert losses[8] == pytest.approx(losses[1], abs=1e-5)

    # and the run of one device goes on with 4, the one of 6 with 1
    for out_dir, before, devices in (("out1", 1, 4), ("out8", 6, 1)):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        resumed = quick("train_jax.py", "--init_from=resume", f"--out_dir={out_dir}", "--max_iters=18", **flags)
        on, was = (rf"{n} x cpu \(\d+ cores?\)" for n in (devices, before))
        assert re.search(rf"^resuming on {on}, which was {was}: losses .*$", resumed.stdout, re.M)
    tail = [[r["loss"] for r in metrics(workdir / f"out{n}") if "loss" in r] for n in (1, 8)]
    assert len(tail[0]) == 18 and tail[1] == pytest.approx(tail[0], abs=1e-5)


@pytest.mark.slow  # tests/test_forms.py compares the two forms of the model
def test_scanned_layers_train_as_unrolled_ones(quick, workdir):
    losses, loops = {}, {}
    for scan in (False, True):
        ir = workdir / f"ir{scan}"
        options = ("--gradient_accumulation_steps=1", f"--scan_layers={scan}", f"--out_dir=out{scan}")
        quick("train_jax.py", "tiny.py", *options, JAX_DUMP_IR_TO=str(ir))
        (step,) = (path.read_text() for path in ir.glob("*jit_train_step*"))
        loops[scan] = step.count("stablehlo.while")
        losses[scan] = [value for r in metrics(workdir / f"out{scan}") for key, value in r.items() if "loss" in key]
    assert loops[True] > loops[False]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation only


def test_eval_only_prints_the_run_s_own_losses_and_leaves_every_byte(run, workdir, finished):
    before = fingerprints(workdir)
    done = run("train_jax.py", "--init_from=resume", "--eval_only=True", "--out_dir=finished")
    lines = {
        r["iter"]: f"step {r['iter']}: train loss {r['train/loss']:.4f}, val loss {r['val/loss']:.4f}"
        for r in metrics(finished)
        if "val/loss" in r
    }
    assert done.stdout.splitlines()[-1] == lines[20]
    older = run("train_jax.py", "--init_from=resume", "--eval_only=True", "--out_dir=finished", "--checkpoint=10")
    assert older.stdout.splitlines()[-1] == lines[10]
    best_step = int(next((finished / "best").iterdir()).name)
    best = run("train_jax.py", "--init_from=resume", "--eval_only=True", "--out_dir=finished", "--checkpoint=best")
    assert best.stdout.splitlines()[-1] == lines[best_step]
    assert fingerprints(workdir) == before


def test_eval_only_of_the_newest_step_does_not_ask_for_the_best_one(run, finished):
    best_dir = next((finished / "best").iterdir())
    (best_dir / META_FILE).write_text("{}")  # of which the trainer would say that it is not a checkpoint's
    write_manifest(best_dir)
    resume = ("--init_from=resume", "--out_dir=finished", "--max_iters=21")
    assert "is not a checkpoint's" in the_error(run("train_jax.py", *resume, expect=2))
    run("train_jax.py", *resume, "--eval_only=True")


def test_eval_only_from_scratch_creates_nothing(run, workdir):
    before = fingerprints(workdir)
    done = run("train_jax.py", "tiny.py", "--eval_only=True", "--wandb_log=True")
    assert done.stdout.splitlines()[-1].startswith("step 0: train loss 2.7")
    assert fingerprints(workdir) == before


# ----------------------------------------------------------------------------------------------------------------------
# wandb


def test_wandb_runs_offline_without_a_login_and_keeps_its_id_across_a_resume(run, workdir):
    done = run("train_jax.py", "tiny.py", "--wandb_log=True", "--max_iters=10")
    assert len([line for line in done.stdout.splitlines() if line.startswith("wandb: ")]) == 1
    run("train_jax.py", "--init_from=resume", "--out_dir=out", "--max_iters=12")
    ids = {
        json.loads((p / "meta" / "metadata").read_text())["wandb_run_id"]
        for p in (workdir / "out/checkpoints").iterdir()
    }
    assert len(ids) == 1 and ids != {None}
    folders = [p.name for p in (workdir / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name.endswith(next(iter(ids))) for name in folders)
