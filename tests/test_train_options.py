"""Options of the trainer, across runs, too: what a resumed run keeps and refuses, what --overwrite removes, which
checkpoints are kept, and nanoGPT's command line as it is.

python -m pytest tests/test_train_options.py
"""

import json
import re
import shutil

import numpy as np
import pytest

from jax_run_dir import find_checkpoint
from tests.running import fingerprints, metrics, the_error


def test_directory_with_a_run_is_refused_and_overwrite_removes_only_the_run(run, workdir, finished):
    again = ("tiny.py", "--out_dir=finished")
    (finished / "notes.txt").write_text("mine")
    before = fingerprints(workdir)
    error = the_error(run("train_jax.py", *again, expect=2))
    assert (
        "out_dir=finished (--out_dir=finished) holds a run" in error
        and "--init_from=resume" in error
        and "--overwrite=True" in error
    )
    # bad options or data are found before anything is removed
    run("train_jax.py", *again, "--overwrite=True", "--n_head=3", expect=2)
    run("train_jax.py", *again, "--overwrite=True", "--dataset=nowhere", expect=2)
    run("train_jax.py", *again, "--overwrite=True", "--device=tpu", expect=2)
    run("train_jax.py", *again, "--overwrite=True", "--init_from=resume", expect=2)
    assert fingerprints(workdir) == before
    run("train_jax.py", *again, "--overwrite=True", "--max_iters=3")
    assert [r["iter"] for r in metrics(finished) if "loss" in r] == [0, 1, 2]
    assert [p.name for p in (finished / "checkpoints").iterdir()] == ["3"]
    assert (finished / "notes.txt").read_text() == "mine"


def test_overwrite_removes_a_run_whose_configuration_is_damaged(quick, finished):
    (finished / "config.json").write_text("{")
    quick("train_jax.py", "tiny.py", "--out_dir=finished", "--overwrite=True", "--max_iters=1")
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["1"]


def test_overwrite_goes_through_a_link_to_another_disk(quick, workdir, finished):
    (finished / "checkpoints").rename(workdir / "large_disk")
    (finished / "checkpoints").symlink_to(workdir / "large_disk")
    quick("train_jax.py", "tiny.py", "--out_dir=finished", "--overwrite=True", "--max_iters=3")
    assert (finished / "checkpoints").is_symlink()
    assert [p.name for p in (workdir / "large_disk").iterdir()] == ["3"]


def test_what_print_config_shows_is_a_config_file(quick, workdir):
    (workdir / "shown.py").write_text(quick("train_jax.py", "tiny.py", "--n_head=1", "--print_config=True").stdout)
    quick("train_jax.py", "shown.py", "--max_iters=1")
    config = json.loads((workdir / "out" / "config.json").read_text())
    assert (config["n_head"], config["dataset"], config["max_iters"]) == (1, "tiny", 1)


def test_print_config_that_is_false_silences_nothing(quick, workdir):
    done = quick("train_jax.py", "tiny.py", "--max_iters=0", "--print_config=True", "--print_config=False")
    assert "Overriding config with tiny.py" in done.stdout and "number of parameters" in done.stdout


def test_resume_says_that_a_device_it_lacks_is_the_checkpoints(quick, workdir):
    two = "--xla_force_host_platform_device_count=2"
    quick("train_jax.py", "tiny.py", "--max_iters=1", "--device=cpu:1", XLA_FLAGS=two)
    error = the_error(quick("train_jax.py", "--init_from=resume", "--out_dir=out", expect=2))
    assert "device=cpu:1: JAX sees 1 such devices" in error and "from the checkpoint; --device=auto" in error


def test_resume_keeps_options_and_names_each_one_changed(quick, workdir):
    quick("train_jax.py", "tiny.py", "--max_iters=2", "--weight_decay=0.3", "--seed=7")
    (workdir / "more.py").write_text("max_iters = 4\nlearning_rate = 1e-2\n")
    done = quick("train_jax.py", "more.py", "--init_from=resume", "--out_dir=out", "--min_lr=1e-3")
    changes = [line for line in done.stdout.splitlines() if line.startswith("resuming with ")]
    assert sorted(changes) == [
        "resuming with max_iters = 4, which was 2 (more.py)",
        "resuming with min_lr = 0.001, which was 6e-05 (--min_lr=1e-3)",
    ]
    config = json.loads((workdir / "out" / "config.json").read_text())
    assert (config["weight_decay"], config["seed"], config["min_lr"], config["max_iters"]) == (0.3, 7, 1e-3, 4)
    shown = quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--print_config=True", "--max_iters=9").stdout
    assert re.search(r"^eval_only *= False +# default$", shown, re.M)
    assert re.search(r"^seed *= 7 +# the checkpoint$", shown, re.M)
    assert re.search(r"^max_iters *= 9 +# --max_iters=9$", shown, re.M)
    shutil.rmtree(workdir / "out" / "checkpoints" / "4" / "params")  # which is told, as a comment
    shown = quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--print_config=True", "--max_iters=9").stdout
    assert "# checkpoint out/checkpoints/4 skipped: " in shown
    namespace: dict[str, object] = {}
    exec(shown, namespace)
    assert (namespace["seed"], namespace["max_iters"]) == (7, 9)


@pytest.mark.parametrize("option", ["n_layer=3", "n_embd=32", "block_size=8", "bias=True", "gelu=tanh"])
def test_resume_refuses_another_model(run, workdir, finished, option):
    before = fingerprints(workdir)
    error = the_error(run("train_jax.py", "--init_from=resume", "--out_dir=finished", f"--{option}", expect=2))
    key, value = option.split("=")
    assert f"{key}={value} (--{option}) contradicts the checkpoint finished/checkpoints/20, which has {key}=" in error
    assert fingerprints(workdir) == before


def test_resume_refuses_data_of_another_vocabulary(run, workdir, finished):
    meta = workdir / "data" / "tiny" / "meta.json"
    content = json.loads(meta.read_text())
    meta.write_text(json.dumps(content | {"itos": content["itos"][::-1]}))
    error = the_error(run("train_jax.py", "--init_from=resume", "--out_dir=finished", "--max_iters=22", expect=2))
    assert "dataset=tiny has another vocabulary than the run in finished" in error


def test_resume_says_that_the_data_are_not_what_they_were(quick, workdir):
    quick("train_jax.py", "tiny.py", "--max_iters=2")
    resume = ("train_jax.py", "--init_from=resume", "--out_dir=out")
    assert "is not what it was" not in quick(*resume, "--max_iters=4").stdout
    path = workdir / "data" / "tiny" / "val.bin"
    path.write_bytes(path.read_bytes()[::-1][1:-1] + b"\x00\x00")
    assert (
        "note: data/tiny is not what it was, so the run will not go on as if" in quick(*resume, "--max_iters=6").stdout
    )


def test_best_begins_anew_where_resume_has_other_validation_data(quick, workdir):
    """Which are harder here, so that no loss comes below those of the first ones."""
    quick("train_jax.py", "tiny.py", "--max_iters=4", "--eval_interval=2")
    shutil.copytree(workdir / "data" / "tiny", workdir / "data" / "harder")
    path = workdir / "data" / "harder" / "val.bin"
    tokens = np.fromfile(path, np.uint16)
    np.full_like(tokens, np.bincount(tokens).argmin()).tofile(path)  # the rarest letter alone
    resume = ["train_jax.py", "--init_from=resume", "--out_dir=out", "--dataset=harder", "--eval_interval=2"]
    done = quick(*resume, "--max_iters=6", "--always_save_checkpoint=False")
    assert "note: the validation data are others now, so best/ begins anew" in done.stdout
    best_dir, _ = find_checkpoint(workdir / "out", "best")
    assert best_dir.name == "6"


def test_resume_refuses_a_damaged_log_and_keeps_it(run, workdir, finished):
    path = finished / "metrics.jsonl"
    path.write_text("not JSON\n" + path.read_text())
    before = fingerprints(finished)
    error = the_error(run("train_jax.py", "--init_from=resume", "--out_dir=finished", "--max_iters=22", expect=2))
    assert "finished/metrics.jsonl, line 1:" in error
    run("train_jax.py", "--init_from=resume", "--out_dir=finished", "--eval_only=True")  # which needs no log
    assert fingerprints(finished) == before


def test_resume_of_a_finished_run_does_nothing(run, finished):
    before = fingerprints(finished / "checkpoints")
    log = metrics(finished)
    done = run("train_jax.py", "--init_from=resume", "--out_dir=finished")
    assert "the run is at step 20 of max_iters=20 already" in done.stdout
    assert metrics(finished) == log
    assert fingerprints(finished / "checkpoints") == before


def test_best_is_the_lowest_validation_loss_and_latest_is_kept_beside_it(quick, workdir):
    # a rate that first learns, then wrecks: the best is not the last
    schedule = ("--learning_rate=2e-2", "--warmup_iters=0", "--decay_lr=False", "--dropout=0")
    quick("train_jax.py", "tiny.py", *schedule, "--max_iters=20", "--eval_interval=5")
    quick("train_jax.py", "--init_from=resume", "--out_dir=out", "--learning_rate=5", "--max_iters=30")
    losses = {r["iter"]: r["val/loss"] for r in metrics(workdir / "out") if "val/loss" in r}
    best = min(losses, key=lambda step: losses[step])
    assert best <= 20 and losses[30] > losses[best] + 1
    assert [p.name for p in (workdir / "out" / "best").iterdir()] == [str(best)]
    assert sorted(p.name for p in (workdir / "out" / "checkpoints").iterdir()) == ["25", "30"]


@pytest.mark.slow
def test_log_interval_keep_checkpoints_and_no_updates_at_all(run, workdir):
    run("train_jax.py", "tiny.py", "--max_iters=0")
    assert [list(r) for r in metrics(workdir / "out")] == [["iter", "train/loss", "val/loss", "lr", "mfu"]]
    assert [p.name for p in (workdir / "out/checkpoints").iterdir()] == ["0"]
    more = ("--init_from=resume", "--out_dir=out")
    run("train_jax.py", *more, "--max_iters=9", "--log_interval=4", "--eval_interval=2", "--keep_checkpoints=3")
    assert [r["iter"] for r in metrics(workdir / "out") if "loss" in r] == [0, 4, 8]
    assert sorted(p.name for p in (workdir / "out/checkpoints").iterdir()) == ["6", "8", "9"]
    run("train_jax.py", *more, "--max_iters=5")  # fewer than are done already: nothing to do, nothing lost
    assert sorted(p.name for p in (workdir / "out/checkpoints").iterdir()) == ["6", "8", "9"]


def test_without_always_save_only_improvements_and_the_end_are_saved(run, workdir):
    run("train_jax.py", "tiny.py", "--learning_rate=0", "--min_lr=0", "--always_save_checkpoint=False")
    # nothing is learned, so nothing improves: the last state is saved all the same, and nothing is best
    assert [p.name for p in (workdir / "out" / "checkpoints").iterdir()] == ["20"]
    assert not list((workdir / "out" / "best").iterdir())
    error = the_error(
        run("train_jax.py", "--init_from=resume", "--eval_only=True", "--out_dir=out", "--checkpoint=best", expect=2)
    )
    assert "no checkpoint that verifies in out/best" in error


def test_nanogpt_data_folder_and_command_line_work_as_they_are(run, workdir):
    (workdir / "data" / "tiny" / "meta.json").unlink()  # what nanoGPT writes: train.bin, val.bin, meta.pkl
    done = run("train_jax.py", "tiny.py", "--max_iters=2", "--compile=False", "--backend=gloo", "--device=cpu")
    assert "found vocab_size = 15 (inside data/tiny)" in done.stdout
    assert "note: compile has no meaning here" in done.stdout and "note: backend has no meaning here" in done.stdout
    assert "Overriding config with tiny.py:" in done.stdout and "Overriding: max_iters = 2" in done.stdout
