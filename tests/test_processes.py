"""Several processes train one model: two on this machine, as two nodes of a cluster would.

python -m pytest tests/test_processes.py
"""

import dataclasses
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import jax_data
import jax_processes
import jax_run_dir
import jax_weights
from jax_processes import Processes, ProcessesError
from tests import torture
from tests.running import QUICKLY
from tests.weight_files import FIXTURES

ROOT = Path(__file__).resolve().parents[1]
# Losses that do not depend on the number of devices; at a lower rate rounding errors stay small for longer.
EXACT = ("tiny.py", "--dropout=0")


def losses(out_dir: Path) -> dict[tuple[str, int], float]:
    """What metrics.jsonl says, which has to say each thing once."""
    records = torture.numbers(out_dir / "metrics.jsonl")
    found = [((key, r["iter"]), r[key]) for r in records for key in ("loss", "train/loss", "val/loss") if key in r]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.fixture
def start(workdir: Path, environment: dict[str, str]) -> Iterator:
    """start('tiny.py', ...): the trainer in two processes, left running. second: what only the second one is given."""
    started: list[subprocess.Popen[str]] = []

    def start_two(
        *args: str, second: tuple[str, ...] = (), code: str = "", counts: tuple[int, int] = (2, 2), port: int = 0
    ) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{port or free.getsockname()[1]}"
        for index, count in enumerate(counts):
            place = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
            script = [str(ROOT / "train_jax.py")]
            if code:  # run before the script
                run = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); {code}; sys.argv[0] = {script[0]!r}; "
                script = ["-c", run + "runpy.run_path(sys.argv[0], run_name='__main__')"]
            process = subprocess.Popen(
                [sys.executable, *script, *args, *(second if index else ())],
                cwd=workdir, env=environment | QUICKLY | place, text=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            started.append(process)
        return started[-2:]

    yield start_two
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def finish(processes: list[subprocess.Popen[str]], expect: int) -> tuple[list[str], list[str]]:
    """What each printed, and what each said on stderr, when all have ended as expected."""
    told = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [expect] * len(processes), told
    return [out for out, _ in told], [err for _, err in told]


def test_two_processes_are_one_run_with_the_losses_of_one_and_a_signal_to_either_stops_both(start, quick, workdir):
    long = (*EXACT, "--max_iters=300", "--learning_rate=1e-4", "--min_lr=1e-4", "--eval_interval=1000")
    quick("train_jax.py", *long, "--out_dir=straight")
    first, second = start(*long)
    assert first.stdout is not None
    assert any(line.startswith("iter 5:") for line in first.stdout), first.communicate()
    second.send_signal(signal.SIGTERM)
    printed, errors = finish([first, second], expect=75)
    stopped = re.search(r"^stopped by SIGTERM at step (\d+) and saved; ", printed[0], re.M)
    assert stopped and 6 <= int(stopped[1]) < 300
    assert printed[1] == ""
    assert errors == ["", "SIGTERM: stopping after this step; Ctrl-C twice stops at once\n"]
    assert jax_run_dir.sealed_steps(workdir / "out") == [int(stopped[1])]
    assert sorted(p.name for p in (workdir / "out").iterdir()) == [
        "best",
        "checkpoints",
        "config.json",
        "metrics.jsonl",
    ]

    resumed = quick("train_jax.py", "--init_from=resume", "--out_dir=out")
    cores = r" \(\d+ cores?\)"
    assert re.search(rf"resuming on 1 x cpu{cores}, which was 2 x cpu{cores}: losses will agree up to", resumed.stdout)
    assert losses(workdir / "out") == pytest.approx(losses(workdir / "straight"), abs=1e-5)


MISTAKES = {
    "rows that do not spread": (
        ("--batch_size=3", "--gradient_accumulation_steps=1"),
        (),
        "3 rows .* over the 2 devices",
    ),
    "another command line": ((), ("--seed=3",), "process 1 has seed=3, and process 0 has 1337; "),
    "an option that none knows": (("--btch_size=3",), (), "--btch_size=3: unknown key 'btch_size'"),
    "a device that only one asks for": ((), ("--device=cpu:7",), "process 1 has device=cpu:7, and process 0 has cpu;"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_both_with_2_and_one_line(start, workdir, mistake):
    args, second, said = MISTAKES[mistake]
    _, errors = finish(start("tiny.py", *args, second=second), expect=2)
    assert re.search(said, errors[0]) and len(errors[0].splitlines()) == 1
    assert errors[1] == "" and not (workdir / "out").exists()


def test_mistake_of_one_process_is_told_by_that_one_and_ends_both(start, workdir):
    first, second = start("tiny.py", second=("--dataset=nowhere",))
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    (line,) = errors.splitlines()
    assert re.match(r"process 1 on \S+: error: no data set 'nowhere'", line)
    assert first.communicate(timeout=60)[1] == "error: process 1 has stopped; its own line says why\n"
    assert first.returncode == 2 and not (workdir / "out").exists()


def test_processes_that_are_not_as_many_as_they_were_told_end_with_one_line(start):
    first, second = start("tiny.py", counts=(2, 3))
    assert "error: this process was told that it is one of 3, and process 0 of 2\n" in second.communicate(timeout=60)[1]
    assert first.communicate(timeout=60)[1] == "error: process 1 has stopped; its own line says why\n"
    assert (first.returncode, second.returncode) == (2, 2)


def test_a_process_that_stays_away_is_one_line_for_those_that_wait(start, workdir):
    impatient = "import jax_processes; jax_processes.START_SECONDS = 3"
    (first,) = start("tiny.py", code=impatient, counts=(2,))
    said = r"error: not all of 2 processes met at 127\.0\.0\.1:\d+ within 3 s; start them all, .*\n"
    assert re.fullmatch(said, first.communicate(timeout=60)[1]) and first.returncode == 2


def test_a_port_that_is_taken_is_one_line_not_a_crash(start):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (first,) = start("tiny.py", counts=(2,), port=port)
        said = rf"error: the first process cannot listen on port {port} \(.*\); JAX_COORDINATOR_PORT, .*\n"
        assert re.fullmatch(said, first.communicate(timeout=60)[1]) and first.returncode == 2


def test_a_process_that_is_only_to_print_does_not_leave_the_other_waiting(start):
    _, errors = finish(start("tiny.py", second=("--help",)), expect=2)
    only = "some processes are only to print (--help, --print_config); all need the same command line"
    assert errors == [f"error: {only}\n", ""]
    printed, _ = finish(start("tiny.py", "--print_config"), expect=0)
    assert "n_layer" in printed[0] and printed[1] == ""


def test_other_contents_under_the_same_name_are_told(start, workdir):
    """Each process in a folder of its own, as on machines without a common disk."""
    data = "import os; os.environ['JAX_PROCESS_ID'] == '1' and os.chdir('elsewhere')"
    shutil.copytree(workdir / "data", workdir / "elsewhere/data")
    shutil.copy(workdir / "tiny.py", workdir / "elsewhere")
    ids = np.fromfile(workdir / "elsewhere/data/tiny/train.bin", np.uint16)
    ids[::-1].tofile(workdir / "elsewhere/data/tiny/train.bin")
    _, errors = finish(start("tiny.py", code=data), expect=2)
    assert re.match(
        r"error: process 1 has train\.bin=[\d,]+ bytes, crc \w{8}, and process 0 has [\d,]+ bytes", errors[0]
    )


def test_outlines_of_data_and_weights_show_what_differs(tmp_path):
    data = np.arange(3_000_000, dtype=np.uint16)
    outlines = set()
    for at in (None, 0, 1_499_999, 2_999_999):  # as it is; another first, middle and last id
        changed = data.copy()
        changed[: 0 if at is None else at + 1][-1:] += 1
        changed.tofile(tmp_path / "train.bin")
        outlines.add(jax_data.outline(tmp_path / "train.bin"))
    assert len(outlines) >= 3  # the middle one lies between two samples
    data[:10].tofile(tmp_path / "train.bin")
    assert jax_data.outline(tmp_path / "train.bin").startswith("20 bytes, crc ")

    weights = jax_weights.open_weights(FIXTURES / "single")
    name, tensor, transposed = weights.tensors["h.0.attn.c_proj.kernel"]
    other = tensor._replace(read=lambda: tensor.read() + 1e-3)
    tensors = weights.tensors | {"h.0.attn.c_proj.kernel": (name, other, transposed)}
    assert weights.outline() == jax_weights.open_weights(FIXTURES / "single").outline()
    assert weights.outline() != dataclasses.replace(weights, tensors=tensors).outline()


def test_bad_data_that_any_process_meets_stops_all_at_the_same_step_and_what_was_computed_is_saved(start, workdir):
    (workdir / "named.py").write_text("import time\nwandb_run_name = f'run-{time.time()}'\n")  # as nanoGPT's have it
    long = (*EXACT, "named.py", "--max_iters=100000", "--eval_interval=100000", "--learning_rate=1e-4", "--min_lr=1e-4")
    first, second = start(*long)
    assert first.stdout is not None
    assert any(line.startswith("iter 5:") for line in first.stdout), first.communicate()
    ids = np.memmap(workdir / "data/tiny/train.bin", np.uint16, "r+")
    ids[len(ids) // 2 :: 400] = 60_000  # seldom enough that mostly one of the processes has it in its rows
    ids.flush()
    _, errors = finish([first, second], expect=2)
    assert re.match(r"error: .*: a token id in the train data is 60000, not below ", errors[0])
    (step,) = jax_run_dir.sealed_steps(workdir / "out")
    assert step >= 6 and max(i for _, i in losses(workdir / "out")) == step - 1


def test_process_that_dies_ends_the_other_and_the_run_can_be_resumed_by_two(start, quick, workdir):
    slowly = ("--learning_rate=1e-4", "--min_lr=1e-4")
    long = (*EXACT, *slowly, "--max_iters=2000", "--eval_interval=20", "--keep_checkpoints=50")
    first, second = start(*long)
    assert first.stdout is not None
    assert any(line.startswith("iter 45:") for line in first.stdout), first.communicate()
    second.kill()
    _, errors = first.communicate(timeout=200)
    assert first.returncode != 0
    assert re.match("error: the exchange with the other processes failed: .*", errors)
    assert not (workdir / "out/lock").exists()
    step = jax_run_dir.sealed_steps(workdir / "out")[0]
    assert step >= 20

    goal = f"--max_iters={step + 12}"
    finish(start("--init_from=resume", "--out_dir=out", goal), expect=0)
    quick("train_jax.py", *long, goal, "--out_dir=straight")
    assert losses(workdir / "out") == pytest.approx(losses(workdir / "straight"), abs=1e-5)


@pytest.mark.slow
def test_two_processes_start_from_weights_and_only_evaluate_as_one_does(start, quick, workdir, finished):
    quick("export_jax.py", "--out_dir=finished", "--hf_dir=weights")
    args = (*EXACT, "--init_from=weights", "--max_iters=3", "--sampling=epoch", "--eval_iters=3")
    finish(start(*args), expect=0)
    quick("train_jax.py", *args, "--out_dir=straight")
    assert losses(workdir / "out") == pytest.approx(losses(workdir / "straight"), abs=1e-5)
    eval_only = ("--init_from=resume", "--out_dir=finished", "--eval_only=True")
    printed, _ = finish(start(*eval_only), expect=0)
    assert printed[0].splitlines()[-1] == quick("train_jax.py", *eval_only).stdout.splitlines()[-1]
    assert printed[1] == ""


# ----------------------------------------------------------------------------------------------------------------------
# what the environment says

SLURM = {"SLURM_JOB_ID": "12345", "SLURM_PROCID": "9", "SLURM_STEP_NODELIST": "node[03-04,7],other"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
PLAIN = {"JAX_COORDINATOR_ADDRESS": "a:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize(
    "env, expected",
    [
        ({}, Processes()),
        ({"SLURM_JOB_ID": "12345", "SLURM_PROCID": "0"}, Processes()),  # in the batch script itself, without srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, Processes()),
        (PLAIN, Processes(0, 2, "a:99")),
        (PLAIN | TORCHRUN, Processes(0, 2, "a:99")),  # set by hand: that counts
        (TORCHRUN, Processes(1, 4, "10.0.0.1:29500")),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, Processes()),
        (TORCHRUN | {"WORLD_SIZE": "", "RANK": ""}, Processes()),
        (
            TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
            Processes(1, 4, "10.0.0.1:29501", 1),
        ),
        (TORCHRUN | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Processes(1, 4, "10.0.0.1:29500")),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"},
            Processes(9, 16, "node03:61497", 3),
        ),
        (  # --gpus-per-task=1
            SLURM
            | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}
            | {"CUDA_VISIBLE_DEVICES": "3"},
            Processes(9, 16, "node03:61497"),
        ),
        (  # a process a node has all its GPUs
            SLURM | {"SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_TASKS_PER_NODE": "1(x10)", "SLURM_LOCALID": "0"},
            Processes(9, 10, "node03:61497"),
        ),
        (
            SLURM | {"SLURM_STEP_NUM_TASKS": "10", "SLURM_STEP_NODELIST": "gpu1,gpu2", "JAX_COORDINATOR_PORT": "7"},
            Processes(9, 10, "gpu1:7"),
        ),
    ],
)
def test_processes_are_found_in_the_environment(env, expected):
    assert jax_processes.find(env) == expected


@pytest.mark.parametrize(
    "env, said",
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID must be a whole number in each process's environment, not None"),
        (PLAIN | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
        (PLAIN | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES must be a whole number .*, not 'two'"),
        (PLAIN | {"JAX_LOCAL_DEVICE_IDS": "0,x"}, "JAX_LOCAL_DEVICE_IDS=0,x must be the numbers of devices, as in 0,1"),
        (PLAIN | {"JAX_COORDINATOR_ADDRESS": "a"}, "JAX_COORDINATOR_ADDRESS=host:port does not say where"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE=2, but MASTER_ADDR:MASTER_PORT does not say where"),
    ],
)
def test_environment_that_makes_no_sense_is_one_line(env, said):
    with pytest.raises(ProcessesError, match=said):
        jax_processes.find(env)
