"""What the tests of data share: a data set made of nothing, the scripts that prepare one, started on a copy of the
checkout (the fixture `repo`), and their inputs."""

import functools
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_data import write_dataset

INPUTS = Path(__file__).resolve().parents[2] / "shared" / "data"


def environment(repo: Path, **more: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(repo.parent / "no_jax"), **more}
    if (INPUTS / "tiktoken_cache").is_dir():
        env.setdefault("TIKTOKEN_CACHE_DIR", str(INPUTS / "tiktoken_cache"))
    return env


def prepare(
    repo: Path, script: str, *options: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    command = [sys.executable, str(repo / "data" / script), *map(str, options)]
    return subprocess.run(
        command, cwd=cwd or repo, env=environment(repo, **(env or {})), capture_output=True, text=True, timeout=120
    )


def prepare_well(
    repo: Path, script: str, *options: object, cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    done = prepare(repo, script, *options, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_one_line(done: subprocess.CompletedProcess, *words: str, code: int = 2) -> None:
    lines = [
        line for line in done.stderr.splitlines() if line and "shards:" not in line
    ]  # the progress bar is no message
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if path.suffix in (".bin", ".json", ".pkl")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


@functools.cache
def gpt2_tokenizer_is_here(cache_dir: str) -> bool:
    code = "import tiktoken; tiktoken.get_encoding('gpt2')"
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": cache_dir} if cache_dir else None
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True).returncode == 0


def need_gpt2_tokenizer(repo: Path) -> None:
    if not gpt2_tokenizer_is_here(environment(repo).get("TIKTOKEN_CACHE_DIR", "")):
        pytest.skip("no GPT-2 tokenizer here and no network")


def make_data(folder: Path, n_train: int = 1000, n_val: int = 300, dtype: str = "uint16") -> Path:
    """A data set whose token at offset i is i in train.bin and 20,000 + i in val.bin."""
    write_dataset(folder, "gpt2", 50257, np.arange(n_train), 20_000 + np.arange(n_val), dtype=dtype)
    return folder
