"""What tests share: a small data set, the scripts started as a user starts them, and what some need around them."""

import functools
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_data

pytest.register_assert_rewrite("tests.parsing", "tests.preparing", "tests.running", "tests.weight_files")
from tests.running import QUICKLY  # noqa: E402
from tests.warm_start import run_warm  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

# GPT-2's tokenizer from the test inputs, where they are; else from tiktoken's own cache or the network
TIKTOKEN_CACHE = ROOT.parent / "shared" / "data" / "tiktoken_cache"
if TIKTOKEN_CACHE.is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TIKTOKEN_CACHE))

# A model that compiles in a second, with everything switched on that could break exact resume.
TINY = """
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
batch_size = 4
gradient_accumulation_steps = 2
dropout = 0.1
learning_rate = 1e-2
warmup_iters = 2
lr_decay_iters = 20
max_iters = 20
eval_interval = 10
eval_iters = 2
device = 'cpu'
dataset = 'tiny'
out_dir = 'out'
"""

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "my", "house"]
Run = Callable[..., subprocess.CompletedProcess[str]]


def pytest_configure(config: pytest.Config) -> None:
    """One compilation cache for the session (this saves minutes): of all workers, and of the scripts they start.

    What is compiled in the workers themselves is so with QUICKLY's XLA_FLAGS; scripts that `run` starts have none.
    """
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist inherits it
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder.name}/jax"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY['XLA_FLAGS']}".strip()


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One CPU device, nobody logged in anywhere, and compiled code kept where all of the session finds it."""
    ours = ("JAX_", "XLA_", "WANDB_", "SLURM_", "RANK", "WORLD_SIZE", "PYTHONUNBUFFERED")
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours) or k.startswith(kept)}
    env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=0"  # large pages are a second start of each script
    env["HOME"] = str(tmp_path_factory.mktemp("home"))
    env["XDG_CACHE_HOME"] = str(Path(env["JAX_COMPILATION_CACHE_DIR"]).parent)
    return env


def write_tiny_dataset(folder: Path) -> None:
    """Words of a small vocabulary in random order: something to learn, in 24,000 characters."""
    words = random.Random(0).choices(WORDS, k=6000)
    text = " ".join(words)[:24_000]
    itos = sorted(set(text))
    ids = np.array([itos.index(c) for c in text], np.uint16)
    jax_data.write_dataset(folder, "char", len(itos), ids[:20_000], ids[20_000:], itos=itos)


def run_script(
    folder: Path, environment: dict[str, str], script: str, *args: str, expect: int = 0, fresh: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """A script to its end. fresh: in a new Python, as also where `env` has what Python or JAX reads when it begins, and
    on macOS, whose libraries a process must not be forked with."""
    command = (str(ROOT / script), *args)
    quickly = "JAX_DISABLE_MOST_OPTIMIZATIONS" in env
    if (
        fresh
        or sys.platform != "linux"
        or any(name.startswith(("PYTHON", "JAX_")) and name not in QUICKLY for name in env)
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder, env=environment | env, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=300,
        )  # fmt: skip
    else:
        done = run_warm(folder, environment | env, *command, optimised=not quickly)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder to run in: data/tiny and tiny.py, the config of the tests."""
    write_tiny_dataset(tmp_path / "data" / "tiny")
    (tmp_path / "tiny.py").write_text(TINY)
    return tmp_path


@pytest.fixture
def run(workdir: Path, environment: dict[str, str]) -> Run:
    """run('train_jax.py', 'tiny.py', '--max_iters=3', JAX_X=...) in `workdir`, to its end."""
    return functools.partial(run_script, workdir, environment)


@pytest.fixture
def quick(run: Run) -> Run:
    """As `run`, with QUICKLY: a model that is compiled nowhere else takes a third of the time.

    For what does not depend on it; tiny.py as it is has all optimisations, and is compiled once for all tests.
    """

    def run_quickly(*args: str, XLA_FLAGS: str = "", **env: Any) -> subprocess.CompletedProcess[str]:
        return run(*args, **env, **QUICKLY | {"XLA_FLAGS": f"{XLA_FLAGS} {QUICKLY['XLA_FLAGS']}"})

    return run_quickly


@pytest.fixture(scope="session")
def one_finished_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finished")
    write_tiny_dataset(folder / "data" / "tiny")
    (folder / "tiny.py").write_text(TINY)
    done = run_script(folder, environment, "train_jax.py", "tiny.py", "--out_dir=finished", fresh=True)
    return folder / "finished", done.stdout


@pytest.fixture
def finished(workdir: Path, one_finished_run: tuple[Path, str]) -> Path:
    """A copy in `workdir` of the run of tiny.py as it is: 20 iterations, checkpoints 10 and 20."""
    return Path(shutil.copytree(one_finished_run[0], workdir / "finished"))


@pytest.fixture
def exact_and_quick() -> Iterator[None]:
    """Without XLA's optimisations everything compiles in half to two thirds of the time, and what is asked there does
    not depend on them; the self check, runs of tiny.py as it is and the comparison with nanoGPT have them on.

    On a GPU float32 products are rounded to tf32 unless told otherwise, which no comparison there would survive.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A copy of what preparing needs, in a folder whose name has a space."""
    copy = tmp_path / "my repo"
    ignored = shutil.ignore_patterns("*.bin", "*.pkl", "*.json", "input.txt*", "parts", "__pycache__", "*.tmp")
    shutil.copytree(ROOT / "data", copy / "data", ignore=ignored)
    for name in ("jax_data.py", "jax_codec.py"):
        shutil.copy(ROOT / name, copy)
    (tmp_path / "no_jax").mkdir()
    (tmp_path / "no_jax" / "jax.py").write_text("raise SystemExit('preparing data imported jax')")
    return copy


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., str]:
    """write_config('batch_size = 3'): a config file, and its path."""

    def write_file(text: str, name: str = "c.py") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


@pytest.fixture(scope="session")
def transformers() -> Any:
    """Hugging Face's, where it is installed."""
    return pytest.importorskip("transformers")


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
