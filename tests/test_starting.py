"""How a script is started: streams that are closed or full, in which way, what JAX reads in the environment.

python -m pytest tests/test_starting.py
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import jax_host_memory
from tests.running import QUICKLY, metrics

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = (str(ROOT / "sample_jax.py"), "--out_dir=finished", "--num_samples=1", "--max_new_tokens=3", "--start=a")
MISTAKE = (*SAMPLE, "--start=???")
PLOT = (str(ROOT / "plot_jax.py"), "finished")


def shell(line: str, workdir: Path, environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """A command by a shell, which opens or closes its streams: `"$@" >&-`."""
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, *command],
        cwd=workdir, env=environment, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("line", ['"$@" 2>&-', '"$@" >&-'])
def test_a_closed_stream_does_not_stop_a_run(workdir, environment, line):
    done = shell(line, workdir, environment | QUICKLY, str(ROOT / "train_jax.py"), "tiny.py", "--max_iters=2")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert [r["iter"] for r in metrics(workdir / "out") if "loss" in r] == [0, 1]


FULL = "error: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("command", "code", "line"),
    [(SAMPLE, 1, FULL), (PLOT, 1, FULL), (MISTAKE, 2, "error: --start=???: characters that are")],
)
def test_a_full_console_is_one_line_and_changes_no_other_exit_code(workdir, environment, finished, command, code, line):
    done = shell('"$@" >/dev/full', workdir, environment, *command)
    assert done.returncode == code and done.stderr.splitlines()[-1].startswith(line)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_a_console_without_a_characters_code_shows_it_by_number(run, workdir):
    shutil.copytree(workdir / "data" / "tiny", workdir / "dätä")
    done = run("train_jax.py", "tiny.py", "--out_dir=日", "--dataset=dätä", "--max_iters=2", PYTHONIOENCODING="ascii")
    assert "saving checkpoint to \\u65e5\n" in done.stdout and "(inside d\\xe4t\\xe4)" in done.stdout
    assert [r["iter"] for r in metrics(workdir / "日") if "loss" in r] == [0, 1]
    assert run("plot_jax.py", "日", PYTHONIOENCODING="ascii").stdout.endswith("\\u65e5/curves.png\n")


def test_a_mistake_is_exit_2_where_nobody_can_be_told(workdir, environment):
    done = shell('"$@" 2>/dev/full', workdir, environment, str(ROOT / "train_jax.py"), "tiny.py", "--n_head=3")
    assert done.returncode == 2


def test_a_picture_that_cannot_be_written_is_the_machines_fault(workdir, environment, finished):
    done = shell('"$@"', workdir, environment, *PLOT, "--out=/dev/full")
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_an_export_that_does_not_fit_is_one_line_and_leaves_nothing(workdir, environment, finished):
    export = (str(ROOT / "export_jax.py"), "--out_dir=finished", "--hf_dir=exported")
    done = shell('ulimit -f 8; "$@"', workdir, environment, *export)
    assert done.returncode == 1 and done.stderr.startswith("error: exported: ") and done.stderr.count("\n") == 1
    assert list((workdir / "exported").iterdir()) == []


def test_what_jax_reads_in_the_environment_does_not_change_the_type_of_the_weights(run, finished):
    few = ("--out_dir=finished", "--init_from=resume", "--max_iters=21")
    assert "iter 20: " in run("train_jax.py", *few, JAX_ENABLE_X64="1").stdout


@pytest.mark.parametrize(
    ("argv", "orig_argv", "again"),
    [
        (["{script}", "--a=1"], ["python", "{script}", "--a=1"], True),
        (["{script}"], ["python", "-u", "-m", "script"], True),
        (["-"], ["python", "-"], False),
        (["-c"], ["python", "-c", "exec(...)"], False),
        (["{script}"], ["python", "-m", "ipykernel_launcher", "-f", "kernel.json"], False),
    ],
)
def test_only_a_script_that_python_was_started_with_is_started_again(tmp_path, monkeypatch, argv, orig_argv, again):
    script = tmp_path / "script.py"
    script.touch()
    for name, arguments in (("argv", argv), ("orig_argv", orig_argv)):
        monkeypatch.setattr(sys, name, [text.format(script=script) for text in arguments])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    assert jax_host_memory._can_start_again() == again
    monkeypatch.setattr(sys, "gettrace", lambda: print)  # a debugger
    assert not jax_host_memory._can_start_again()
