"""A mistake in the options, config files or data of train_jax.py: one clear line, an exit code, nothing written.

python -m pytest tests/test_train_mistakes.py
"""

from pathlib import Path

import numpy as np
import pytest

from tests.running import fingerprints, the_error


def poison(path: Path, offset: int, token: int) -> None:
    ids = np.fromfile(path, np.uint16)
    ids[offset] = token
    ids.tofile(path)


MISTAKES = {
    "unknown option": (["--btch_size=3"], lambda data: None, ["btch_size", "batch_size"]),
    "wrong type": (["--max_iters=many"], lambda data: None, ["--max_iters=many", "int"]),
    "out of range": (["--dropout=1.5"], lambda data: None, ["dropout", "below 1"]),
    "not a choice": (["--dtype=float8"], lambda data: None, ["dtype", "bfloat16"]),
    "missing config file": (["tiny_.py"], lambda data: None, ["tiny_.py", "tiny.py"]),
    "heads do not divide the width": (
        ["--n_head=3"],
        lambda data: None,
        ["n_embd=16 (tiny.py)", "n_head=3 (--n_head=3)"],
    ),
    "an evaluation of everything": (
        ["--eval_iters=2000000000"],
        lambda data: None,
        ["eval_iters=2000000000 (--eval_iters=2000000000)", "at once"],
    ),
    "unknown start": (
        ["--init_from=nothing"],
        lambda data: None,
        ["init_from=nothing (--init_from=nothing)", "scratch", "resume"],
    ),
    "checkpoint without eval_only": (["--checkpoint=best"], lambda data: None, ["checkpoint=best", "eval_only"]),
    "no data set": (["--dataset=nowhere"], lambda data: None, ["nowhere", "prepare", "tiny"]),
    "no val.bin": ([], lambda data: (data / "val.bin").unlink(), ["val.bin is missing"]),
    "too short": (
        [],
        lambda data: (data / "val.bin").write_bytes(bytes(2 * 16)),
        ["val.bin", "16 tokens", "block_size"],
    ),
    "id beyond the vocabulary": ([], lambda data: poison(data / "train.bin", 777, 15), ["train.bin", "15", "777"]),
    "odd file size": ([], lambda data: (data / "train.bin").write_bytes(b"x" * 999), ["train.bin", "999 bytes"]),
    "meta that is no JSON": ([], lambda data: (data / "meta.json").write_text("{"), ["meta.json"]),
    "no checkpoint": (["--init_from=resume"], lambda data: None, ["no checkpoint that verifies in out/checkpoints"]),
    "no TPU": (["--device=tpu"], lambda data: None, ["device=tpu"]),
    "no GPU": (["--device=cuda"], lambda data: None, ["device=cuda: JAX finds no such device"]),
    "no second GPU": (["--device=cuda:1"], lambda data: None, ["device=cuda:1: JAX finds no such device"]),
    "cut short": (
        [],
        lambda data: (data / "train.bin").write_bytes((data / "train.bin").read_bytes()[:30_000]),
        ["train.bin holds 15,000 tokens, but meta.json says 20,000", "--tokenizer=char"],
    ),
    "no out_dir": (["--out_dir="], lambda data: None, ["out_dir is empty (--out_dir=)"]),
    "out_dir in a bucket": (
        ["--out_dir=gs://b/r"],
        lambda data: None,
        ["out_dir=gs://b/r", "no folder of this machine"],
    ),
    "out_dir with a colon": (["--out_dir=gs:/r"], lambda data: None, ["out_dir=gs:/r", "ends with gs:"]),
    "out_dir of no text": (
        ["nul.py"],
        lambda data: (data.parents[1] / "nul.py").write_text("out_dir = 'a\\0b'"),
        ["out_dir=a\\x00b (nul.py)", "no name of a folder"],
    ),
    "out_dir of half a character": (
        ["half.py"],
        lambda data: (data.parents[1] / "half.py").write_text("out_dir = 'a\\ud800'"),
        ["out_dir=a\\ud800 (half.py)", "no name of a folder"],
    ),
    "out_dir with a backslash": (["--out_dir=a\\b"], lambda data: None, ["out_dir=a\\b", "backslash"]),
    "out_dir is a file": (["--out_dir=tiny.py"], lambda data: None, ["out_dir=tiny.py", "is a file"]),
    "overwrite what is to be resumed": (
        ["--init_from=scratch", "--eval_only=True", "--overwrite=True"],
        lambda data: None,
        ["overwrite=True (--overwrite=True)", "eval_only"],
    ),
    "not a device": (["--device=abacus"], lambda data: None, ["device='abacus'", "cpu"]),
    "no such device number": (["--device=cpu:5"], lambda data: None, ["cpu:5"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_and_exit_2_and_writes_nothing(run, workdir, mistake):
    args, damage, expected = MISTAKES[mistake]
    damage(workdir / "data" / "tiny")
    before = fingerprints(workdir)
    error = the_error(run("train_jax.py", "tiny.py", *args, expect=2))
    assert all(text in error for text in expected), error
    assert fingerprints(workdir) == before


def test_out_of_memory_is_one_line_that_says_what_to_halve(run):
    error = the_error(run("train_jax.py", "tiny.py", "--n_embd=2000000", expect=1))
    assert "out of memory; halve --batch_size" in error


def test_mistake_in_a_config_file_names_the_file(run, workdir):
    (workdir / "typo.py").write_text("n_layers = 3\n")
    error = the_error(run("train_jax.py", "tiny.py", "typo.py", expect=2, fresh=True))
    assert "typo.py" in error and "n_layers" in error and "n_layer'" in error
